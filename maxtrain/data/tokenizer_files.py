"""The files of a tokenizer as Hugging Face has them, so written that other programs begin and end texts as this package does."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from maxtrain.config.json_file import MAX_BYTES, parse_object
from maxtrain.config.regular_file import read_bytes
from maxtrain.data import backend as backends
from maxtrain.data.boundaries import Boundaries
from maxtrain.data.cache import key

CONFIG, GENERATION = "tokenizer_config.json", "generation_config.json"
# Files of a tokenizer besides tokenizer.json
BESIDE = (
    CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION,
)


def read_beside(folder: Path) -> dict[str, bytes]:
    """The files of `BESIDE` that a folder has; `Refused` for one that cannot be read."""
    return {name: read_bytes(folder / name, MAX_BYTES) for name in BESIDE if (folder / name).exists()}


def begun(text: str, boundaries: Boundaries, *, trained: bool) -> str:
    """The tokenizer.json whose post-processor puts before a text what `boundaries` say; unchanged where it does already.

    What it puts behind a text is left to whoever wrote it, unless the model is trained here: then it is nothing.
    """
    behind = () if trained else boundaries.added[1]
    if boundaries.added == (boundaries.begin, behind):
        return text
    backend = Backend.from_str(text)
    backends.surround(backend, boundaries.begin, behind)
    return backend.to_str(pretty=True)


def described(config: Mapping[str, Any], text: str, fingerprint: str, *, bos: str | None, eos: str | None, trained: bool) -> dict[str, Any]:
    """The tokenizer_config.json beside a tokenizer.json that `begun` has changed.

    It says for which tokenizer these files stand, as long as they are unchanged, and leaves no flag that contradicts the post-processor.
    """
    flags = {flag: value for flag, value in (("add_bos_token", True), ("add_eos_token", False)) if trained and flag in config}
    named = {"tokenizer_class": "PreTrainedTokenizerFast"} if trained or "tokenizer_class" not in config else {}
    stands = {"fingerprint": {"files": key(text, bos, eos), "tokenizer": fingerprint}}
    return {"bos_token": bos, "eos_token": eos, **config, **flags, **named, **stands}


def original(config: Mapping[str, Any], plain: str) -> str | None:
    """The fingerprint of the tokenizer that files of the fingerprint `plain` stand for; None where they stand for themselves."""
    record = config.get("fingerprint")
    if not isinstance(record, dict) or record.get("files") != plain or not isinstance(record.get("tokenizer"), str):
        return None
    return record["tokenizer"]


def generation(old: bytes | None, boundaries: Boundaries, place: str) -> bytes:
    """generation_config.json with all tokens that end a text; `old` as it is where it names them already."""
    values = {} if old is None else parse_object(old, place)
    listed = values.get("eos_token_id")
    named = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if old is not None and set(named) == boundaries.ends:
        return old
    ends = [*(index for index in named if index in boundaries.ends), *sorted(boundaries.ends - set(named))]
    begin = {"bos_token_id": boundaries.document_begin[0]} if len(boundaries.document_begin) == 1 else {}
    return as_json({**begin, **values, "eos_token_id": ends if len(ends) > 1 else ends[0]})


def as_json(values: Mapping[str, Any]) -> bytes:
    """JSON text of a file."""
    return json.dumps(values, indent=1, ensure_ascii=False).encode() + b"\n"


def write(folder: str | os.PathLike[str], files: Mapping[str, bytes]) -> None:
    """Make the folder with these files, which appears whole; in one that is there replace those that differ, each at once."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name, content in files.items():
            if not (folder / name).is_file() or (folder / name).read_bytes() != content:
                with open(draft / name, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
        if not folder.exists():
            draft.chmod(0o755)
            draft.rename(folder)
        else:
            for path in draft.iterdir():
                path.replace(folder / path.name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
