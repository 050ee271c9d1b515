"""What begins and ends a text: one record, made from all files of a model, for shards, prompts, scores, chats, stops and exports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maxtrain.config.errors import Refused
from maxtrain.config.json_file import read_object

BOS, EOS = "<|bos|>", "<|eos|>"
ROLES = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
# Names that special tokens go by, for a tokenizer.json that no other file explains.
KNOWN = {
    "bos": (BOS, "<s>", "<|begin_of_text|>", "<bos>", "<｜begin▁of▁sentence｜>"),  # noqa: RUF001
    "eos": (EOS, "</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "<｜end▁of▁sentence｜>"),  # noqa: RUF001
}


@dataclass(frozen=True)
class Boundaries:
    """Token ids around a text."""

    begin: tuple[int, ...]
    """Before a prompt. Of a model that was trained here they are `document_begin`."""
    document_begin: tuple[int, ...]
    """Before every document of training and evaluation, and before an empty prompt; at least one."""
    document_end: tuple[int, ...]
    """Behind every document."""
    ends: frozenset[int]
    """Each of them ends a text that the model writes: the end token, those that the model's files name beside it, and `turn_ends`."""
    turn_ends: frozenset[int] = frozenset()
    """What the chat template puts behind an answer."""
    added: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    """What the post-processor of tokenizer.json puts before and behind a text, as other programs do that read the file."""
    special: Mapping[str, int] = field(default_factory=dict)
    """Id of each special token by its text."""


@dataclass(frozen=True)
class Named:
    """What the files beside a tokenizer.json say of its special tokens."""

    tokens: Mapping[str, str | None]
    """Text of the token in each of `ROLES` that a file speaks of; None where it says that there is none."""
    ids: Mapping[str, tuple[int, ...]]
    """Ids of `bos` and `eos` by generation_config.json, else config.json, as transformers takes them."""
    config: Mapping[str, Any]
    """tokenizer_config.json."""

    def text(self, role: str, vocab: Mapping[str, int], place: object) -> str | None:
        """The token of a role: by its name, else by its id, else a well-known name of the vocabulary.

        Raises:
            Refused: the token that the files name is not in the vocabulary.
        """
        token = self.tokens.get(role)
        if token is not None and token not in vocab:
            raise Refused(f"{place}: the {role}_token {token!r} of the files beside it is not in its vocabulary")
        if token is None and self.ids.get(role) and (role == "eos" or role not in self.tokens):
            token = next((text for text, index in vocab.items() if index == self.ids[role][0]), None)
        if token is None and role not in self.tokens:
            token = next((name for name in KNOWN[role] if name in vocab), None)
        return token


def read_named(folder: Path) -> Named:
    """What a folder's tokenizer_config.json, special_tokens_map.json, generation_config.json and config.json say, those that are there.

    Raises:
        Refused: a file is no JSON object, or names a token in a way that has no meaning.
    """

    def read(name: str) -> dict[str, Any]:
        path = folder / name
        return read_object(path) if path.exists() or path.is_symlink() else {}

    config, generation, model = read("tokenizer_config.json"), read("generation_config.json"), read("config.json")
    # as transformers: the older file counts where the newer one does not list the tokens itself
    said = config if "added_tokens_decoder" in config else config | read("special_tokens_map.json")
    tokens = {role: _text(said[f"{role}_token"], f"{role}_token", folder) for role in ROLES if f"{role}_token" in said}
    inner = model.get("text_config")
    sources = [(folder / "generation_config.json", generation), (folder / "config.json", model)]
    sources += [(folder / "config.json", inner)] if isinstance(inner, dict) else []
    ids: dict[str, tuple[int, ...]] = {}
    for role in ("bos", "eos"):
        for place, values in sources:
            if role not in ids and values.get(f"{role}_token_id") is not None:
                ids[role] = _ids(values[f"{role}_token_id"], f"{place}: {role}_token_id")
    return Named(tokens, ids, config)


def _text(value: Any, key: str, folder: Path) -> str | None:
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str | None) or (content is None and value is not None):
        where = "tokenizer_config.json or special_tokens_map.json"
        raise Refused(f"{folder}: {key} = {value!r:.100} of its {where} is no token: write the token's text")
    return content


def _ids(value: Any, place: str) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [value]
    if not all(type(index) is int for index in ids):
        raise Refused(f"{place} = {value!r:.100}: a token id or a list of them is expected")
    return tuple(index for index in ids if index >= 0)  # -1 is written for none
