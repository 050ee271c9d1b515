"""Rows of a batch: positions, segments and weights of the documents that share a window, and how short ones are packed.

Keys of a batch, R rows of L tokens: `tokens`, `targets`, `positions` (from 0 at each document's start in the window),
`segments` (1, 2, ... in the window, 0 is padding) are [R, L] int32; `weights` [R, L] float32 is 1 where the target counts;
`source` [R] int32 is the index of the row's source.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

Batch = dict[str, np.ndarray]


def frame(tokens: np.ndarray, begins: np.ndarray) -> Batch:
    """The rows of windows cut from a stream: `tokens` [R, L + 1] int32, `begins` [R, L + 1] bool says which begin a document.

    The last token of a document has weight 0: its target, the next document's first token, is not a continuation.
    """
    first = begins[:, :-1].copy()
    first[:, 0] = True
    column = np.arange(first.shape[1], dtype=np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": column - np.maximum.accumulate(np.where(first, column, 0), axis=1),
        "segments": np.cumsum(first, axis=1, dtype=np.int32),
        "weights": (~begins[:, 1:]).astype(np.float32),
    }


def pack(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `sizes` (each at most `capacity`) in bins of `capacity`: best fit, largest first, ties in order."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (left, bin), sorted
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        fit = bisect_left(room, (sizes[item],))
        if fit == len(room):
            left, target = capacity, len(bins)
            bins.append([])
        else:
            left, target = room.pop(fit)
        bins[target].append(item)
        insort(room, (left - sizes[item], target))
    return bins
