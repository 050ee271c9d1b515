"""Held-out text as batches in which every token is scored exactly once, so that loss is a code length of the documents.

Each document starts from an empty context, alone as a compressor would see it; its end is scored too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from maxtrain.config.schema import Source
from maxtrain.data import sources
from maxtrain.data.packing import Batch, pack
from maxtrain.data.shards import prepare
from maxtrain.data.tokenizer import Tokenizer


class Piece(NamedTuple):
    """A stretch of a document within a window: its inputs in the shard's tokens; those before `scored` are context only."""

    start: int
    size: int
    scored: int


class EvalSet:
    """A held-out set; `num_bytes` and `num_documents` describe the text, `batches` yields it for scoring."""

    def __init__(self, name: str, source: Source, tokenizer: Tokenizer, length: int, stride: int, batch_size: int, cache_dir: str) -> None:
        """Windows of `length` tokens; in a longer document each window after the first scores `stride` new ones. `Refused` for bad data."""
        assert 0 < stride <= length
        self.name, self._source, self._length, self._batch_size = name, source, length, batch_size
        self._shard = prepare(name, source, tokenizer, cache_dir)
        self.num_bytes, self.num_documents, self.fingerprint = self._shard.num_bytes, self._shard.num_documents, self._shard.fingerprint
        pieces = [piece for begin, end in pairwise(self._shard.offsets[:].tolist()) for piece in _pieces(begin, end, length, stride)]
        self._windows = [[pieces[i] for i in window] for window in pack([piece.size for piece in pieces], length)]
        self.num_batches = -(-len(self._windows) // batch_size)

    def documents(self) -> Iterator[tuple[str, bytes]]:
        """Name and bytes of every document, for a compressor to be measured on the same text."""
        return ((document.name, document.text.encode()) for document in sources.documents(self._source))

    def batches(self, rows: Sequence[int] | slice) -> Iterator[Batch]:
        """This reader's rows of every batch, keys as in `packing`; windows that fill up the last batch are padding."""
        rows = range(self._batch_size)[rows] if isinstance(rows, slice) else rows
        for first in range(0, len(self._windows), self._batch_size):
            yield self._batch([self._windows[first + row] if first + row < len(self._windows) else [] for row in rows])

    def _batch(self, windows: list[list[Piece]]) -> Batch:
        shape = len(windows), self._length
        batch: Batch = {key: np.zeros(shape, np.int32) for key in ("tokens", "targets", "positions", "segments")}
        batch |= {"weights": np.zeros(shape, np.float32), "source": np.zeros(len(windows), np.int32)}
        for row, window in enumerate(windows):
            column = 0
            for segment, (start, size, scored) in enumerate(window, 1):
                here = row, slice(column, column + size)
                batch["tokens"][here] = self._shard.tokens[start : start + size]
                batch["targets"][here] = self._shard.tokens[start + 1 : start + size + 1]
                batch["positions"][here] = np.arange(size)
                batch["segments"][here] = segment
                batch["weights"][row, column + scored : column + size] = 1
                column += size
        return batch


def _pieces(begin: int, end: int, length: int, stride: int) -> Iterator[Piece]:
    """The document in tokens [begin, end): one piece if it fits, else windows that overlap, the last with as much context as possible."""
    size = end - begin - 1  # the last token is only a target
    yield Piece(begin, min(size, length), 0)
    for done in range(length, size, stride):
        until = min(done + stride, size)
        yield Piece(begin + until - length, length, length - (until - done))
