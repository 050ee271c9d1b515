"""Prepared text: a source is tokenised once into one flat file of tokens with an index, which training then only maps.

The cache key is made of the content, the settings and the tokenizer, so nothing stale is ever read.
"""

from __future__ import annotations

import json
import sys
import time
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from maxtrain.config.cli import is_terminal
from maxtrain.config.errors import Refused
from maxtrain.config.paths import expand
from maxtrain.config.schema import Source
from maxtrain.data import sources
from maxtrain.data.cache import build_once, key
from maxtrain.data.documents import CHUNK, AnyDocument, LargeDocument
from maxtrain.data.integrity import Mapped, read_manifest
from maxtrain.data.tokenizer import Tokenizer

FORMAT = 1
COUNTS = ("num_tokens", "num_documents", "num_bytes")
SHOW_AFTER = 2.0  # seconds of preparation before progress is shown


class Shard:
    """A prepared source: `tokens` holds every document between its beginning and end tokens, in an order shuffled once and for all."""

    def __init__(self, folder: Path, write: Callable[[Path], None] | None = None) -> None:
        """`write` makes the same folder anew, which is done when a damaged block is found.

        Raises:
            OSError: a file is missing.
            ValueError: the files are no shard, or not of the size they were written with.
        """
        self.folder, self._remake = folder, write
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
        self.fingerprint = folder.name
        self.num_tokens, self.num_documents, self.num_bytes = (_count(self.meta, name) for name in COUNTS)
        if self.meta["dtype"] not in ("uint16", "uint32"):
            raise ValueError(f"meta.json: dtype is {self.meta['dtype']!r}")
        self.dtype = np.dtype(self.meta["dtype"])
        sizes = {"tokens": self.num_tokens * self.dtype.itemsize, "offsets": (self.num_documents + 1) * 8}
        for name, size in sizes.items():
            if (found := (folder / name).stat().st_size) != size:
                raise ValueError(f"{name} has {found} bytes and not {size}")

    def __reduce__(self) -> tuple:
        return Shard, (self.folder, self._remake)  # another process maps the files again; a pickled map would carry the tokens

    @cached_property
    def tokens(self) -> Mapped:
        """Token ids [num_tokens], uint16 or uint32, mapped."""
        return Mapped(self.folder / "tokens", self.dtype, self._mend)

    @cached_property
    def offsets(self) -> Mapped:
        """Where each document begins in `tokens`, and their end [num_documents + 1] int64, mapped."""
        return Mapped(self.folder / "offsets", np.int64, self._mend)

    def _mend(self, wrong: str) -> None:
        """Make the folder anew, since a block of it is damaged; `Refused` if that does not give the same."""
        remedy = f"remove {self.folder}, and the data is prepared as it is now"
        if self._remake is None:
            raise Refused(f"{self.folder}: damaged: {wrong}: {remedy}")
        before = read_manifest(self.folder)
        build_once(self.folder, Shard, self._remake, whole=True)
        if read_manifest(self.folder) != before:
            raise Refused(f"{self.folder}: damaged: {wrong}; what it was made of has changed since: {remedy}")

    def check(self, vocab_size: int) -> list[str]:
        """What cannot be in a shard of a tokenizer of this size: documents out of order, ids beyond the vocabulary."""
        offsets, tokens = self.offsets, self.tokens
        if (offsets[0], offsets[-1]) != (0, self.num_tokens):
            return [f"offsets go from {offsets[0]} to {offsets[-1]}, not from 0 to {self.num_tokens}"]
        if not all((np.diff(offsets[i : i + CHUNK + 1]) > 0).all() for i in range(0, self.num_documents, CHUNK)):
            return ["offsets do not increase"]
        largest = max(int(part.max()) for part in tokens.parts(CHUNK))
        return [f"a token is {largest}, the vocabulary has {vocab_size}"] if largest >= vocab_size else []

    def window(self, start: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """`size` tokens [size] int32 from `start` on, taking the shard as a ring, and which of them begin a document [size] bool."""
        tokens, begins = np.empty(size, np.int32), np.zeros(size, bool)
        done = 0
        while done < size:  # once round the ring, or more often
            first = (start + done) % self.num_tokens
            part = min(size - done, self.num_tokens - first)
            tokens[done : done + part] = self.tokens[first : first + part]
            begin = bisect_left(self.offsets, first)
            begins[done + self.offsets[begin : bisect_left(self.offsets, first + part, begin)] - first] = True
            done += part
        return tokens, begins


def _count(meta: dict[str, Any], name: str) -> int:
    if type(meta[name]) is not int or meta[name] < 1:
        raise ValueError(f"meta.json: {name} is {meta[name]!r}")
    return meta[name]


def prepare(name: str, source: Source, tokenizer: Tokenizer, cache_dir: str) -> Shard:
    """The shard of `source`, made if `cache_dir` does not hold it; `name` is for the progress line. Bad data is `Refused`."""
    for note in sources.notes(source):
        print(f"note: {name}: {note}", file=sys.stderr)
    made_of = key(FORMAT, sources.fingerprint(source, cache_dir), tokenizer.fingerprint)
    write = partial(_write, name, source, tokenizer)
    folder = Path(expand(cache_dir, "data.cache_dir")) / "shards" / made_of
    return build_once(folder, partial(Shard, write=write), write, lambda shard: shard.check(tokenizer.vocab_size))


def _write(name: str, source: Source, tokenizer: Tokenizer, folder: Path) -> None:
    """Tokenise in the source's order, then copy the documents in a shuffled one; only the index and a few chunks are ever in memory."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    begin, end = tokenizer.boundaries.document_begin, tokenizer.boundaries.document_end
    lengths, num_bytes = array("q"), 0
    with open(folder / "unshuffled", "wb") as file:
        for documents in _batches(_shown(sources.documents(source), name)):
            num_bytes += sum(document.num_bytes for document in documents)
            for ids in _encoded(documents, tokenizer, name):
                lengths.append(0)
                for part in chain([np.array(begin)], ids, [np.array(end)]):
                    file.write(part.astype(dtype).tobytes())
                    lengths[-1] += len(part)
    ends = np.cumsum(lengths)
    order = np.random.default_rng(0).permutation(len(ends))
    with open(folder / "unshuffled", "rb") as unshuffled, open(folder / "tokens", "wb") as file:
        for i in order:
            unshuffled.seek(int(ends[i] - lengths[i]) * dtype.itemsize)
            left = lengths[i] * dtype.itemsize
            while left:
                left -= file.write(unshuffled.read(min(left, CHUNK)))
    (folder / "unshuffled").unlink()
    np.concatenate([[0], np.cumsum(np.array(lengths)[order])]).astype(np.int64).tofile(folder / "offsets")
    meta = {"dtype": dtype.name, "num_tokens": int(ends[-1]), "num_documents": len(ends), "num_bytes": num_bytes}
    (folder / "meta.json").write_text(json.dumps(meta))


def _encoded(documents: list[AnyDocument], tokenizer: Tokenizer, name: str) -> Iterator[Iterable[np.ndarray]]:
    """Token ids of each document in parts: short ones are tokenised together, a long one by itself, in pieces."""
    if len(documents) > 1 or not _is_long(documents[0]):
        yield from ([ids] for ids in tokenizer.encode_batch([document.text for document in documents]))
        return

    def grown(size: int) -> None:
        print(f"note: {name}: {documents[0].name}: no place to cut in {size:,} characters, so more are tokenised at once", file=sys.stderr)

    yield tokenizer.encode_long(documents[0].chunks(), grown)


def _is_long(document: AnyDocument) -> bool:
    return isinstance(document, LargeDocument) or len(document.text) > CHUNK


def _batches(documents: Iterable[AnyDocument]) -> Iterator[list[AnyDocument]]:
    """Short documents that have `CHUNK` characters together, and long ones each by itself, in order."""
    batch: list[AnyDocument] = []
    size = 0
    for document in documents:
        if batch and (size > CHUNK or _is_long(document)):
            yield batch
            batch, size = [], 0
        if _is_long(document):
            yield [document]
        else:
            batch.append(document)
            size += len(document.text)
    if batch:
        yield batch


def _shown(documents: Iterable[AnyDocument], name: str) -> Iterator[AnyDocument]:
    """`documents`, with a progress line on a terminal when they take long."""
    columns = (SpinnerColumn(), TextColumn(f"preparing {name}"), DownloadColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=Console(stderr=True), transient=True, disable=not is_terminal(sys.stderr))
    task = progress.add_task(name, total=None)
    begin = time.monotonic()
    try:
        for document in documents:
            if time.monotonic() - begin > SHOW_AFTER:
                progress.start()
            yield document
            progress.advance(task, document.num_bytes)
    finally:
        progress.stop()
