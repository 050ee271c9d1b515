"""Prepared text: a source is tokenised once into one flat file of tokens with an index, which training then only maps.

The cache key is made of the content, the settings and the tokenizer, so nothing stale is ever read.
"""

from __future__ import annotations

import json
import sys
import time
from array import array
from collections.abc import Iterable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from maxtrain.config.schema import Source
from maxtrain.data import sources
from maxtrain.data.cache import build_once, key
from maxtrain.data.tokenizer import Tokenizer

FORMAT = 1
CHUNK = 2**20  # characters tokenised together
SHOW_AFTER = 2.0  # seconds of preparation before progress is shown


class Shard:
    """A prepared source: `tokens` holds every document between its beginning and end tokens, in an order shuffled once and for all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
        self.fingerprint = folder.name
        self.num_tokens: int = self.meta["num_tokens"]
        self.num_documents: int = self.meta["num_documents"]
        self.num_bytes: int = self.meta["num_bytes"]

    def __reduce__(self) -> tuple:
        return Shard, (self.folder,)  # another process maps the files again; a pickled map would carry the tokens

    @classmethod
    def find(cls, folder: Path) -> Shard | None:
        """The shard in `folder`; None if there is none or its files are not the size they were written with."""
        try:
            shard = cls(folder)
            sizes = [(folder / name).stat().st_size for name in ("tokens", "offsets")]
        except (OSError, ValueError, KeyError):
            return None
        dtype = np.dtype(shard.meta["dtype"])
        return shard if sizes == [shard.num_tokens * dtype.itemsize, (shard.num_documents + 1) * 8] else None

    @cached_property
    def tokens(self) -> np.ndarray:
        """Token ids [num_tokens], uint16 or uint32, mapped."""
        return np.asarray(np.memmap(self.folder / "tokens", self.meta["dtype"], "r"))

    @cached_property
    def offsets(self) -> np.ndarray:
        """Where each document begins in `tokens`, and their end [num_documents + 1] int64, mapped."""
        return np.asarray(np.memmap(self.folder / "offsets", np.int64, "r"))

    def window(self, start: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """`size` tokens [size] int32 from `start` on, taking the shard as a ring, and which of them begin a document [size] bool."""
        index = np.arange(start, start + size) % self.num_tokens
        begins = self.offsets[np.searchsorted(self.offsets, index)] == index
        return self.tokens[index].astype(np.int32), begins


def prepare(name: str, source: Source, tokenizer: Tokenizer, cache_dir: str) -> Shard:
    """The shard of `source`, made if `cache_dir` does not hold it; `name` is for the progress line. Bad data is `Refused`."""
    made_of = key(FORMAT, sources.fingerprint(source, cache_dir), tokenizer.fingerprint)
    return build_once(Path(cache_dir).expanduser() / "shards" / made_of, Shard.find, partial(_write, name, source, tokenizer))


def _write(name: str, source: Source, tokenizer: Tokenizer, folder: Path) -> None:
    """Tokenise in the source's order, then copy the documents in a shuffled one; only the index is ever in memory."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    begin, end = tokenizer.boundaries.document_begin, tokenizer.boundaries.document_end
    lengths, num_bytes = array("q"), 0
    with open(folder / "unshuffled", "wb") as file:
        for texts in _chunks(_shown(sources.documents(source), name)):
            num_bytes += sum(len(text.encode()) for text in texts)
            for ids in tokenizer.encode_batch(texts):
                np.concatenate([begin, ids, end]).astype(dtype).tofile(file)
                lengths.append(len(begin) + len(ids) + len(end))
    ends = np.cumsum(lengths)
    order = np.random.default_rng(0).permutation(len(ends))
    unshuffled = np.asarray(np.memmap(folder / "unshuffled", dtype, "r"))
    with open(folder / "tokens", "wb") as file:
        for i in order:
            unshuffled[ends[i] - lengths[i] : ends[i]].tofile(file)
    (folder / "unshuffled").unlink()
    np.concatenate([[0], np.cumsum(np.array(lengths)[order])]).astype(np.int64).tofile(folder / "offsets")
    meta = {"dtype": dtype.name, "num_tokens": int(ends[-1]), "num_documents": len(ends), "num_bytes": num_bytes}
    (folder / "meta.json").write_text(json.dumps(meta))


def _chunks(documents: Iterable[sources.Document]) -> Iterator[list[str]]:
    texts: list[str] = []
    size = 0
    for document in documents:
        texts.append(document.text)
        size += len(document.text)
        if size > CHUNK:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def _shown(documents: Iterable[sources.Document], name: str) -> Iterator[sources.Document]:
    """`documents`, with a progress line on a terminal when they take long."""
    columns = (SpinnerColumn(), TextColumn(f"preparing {name}"), DownloadColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    task = progress.add_task(name, total=None)
    begin = time.monotonic()
    try:
        for document in documents:
            if time.monotonic() - begin > SHOW_AFTER:
                progress.start()
            yield document
            progress.advance(task, len(document.text))
    finally:
        progress.stop()
