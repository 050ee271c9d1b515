"""The training batches: a pure function of seed and window, so any number of hosts, readers and workers sees the same ones.

Resuming needs no state but how many windows were taken. Grain only computes the function ahead of time, in threads or processes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from maxtrain.config import schema
from maxtrain.config.errors import Refused
from maxtrain.data.cache import key
from maxtrain.data.packing import Batch, frame
from maxtrain.data.shards import prepare
from maxtrain.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    import grain

WORD = 2**64 - 1


class Mixture:
    """An endless interleaving of sources whose every beginning has their exact shares, as near as whole windows allow.

    Source after source, the heaviest first, takes its share of the positions that are left, rounded to the nearest. Of n
    sources each is at most (1 + 1/1 + ... + 1/(n-2)) / 2 windows off, however long the run: less than one window for three
    sources, two for ten. All of it is integer arithmetic. (`grain.MapDataset.mix` cuts weights to two digits and rounds down.)
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(str(weight)) for weight in weights]
        scale = np.lcm.reduce([weight.denominator for weight in exact], dtype=object)
        self._parts = sorted(((int(weight * scale), source) for source, weight in enumerate(exact)), reverse=True)

    def locate(self, position: int) -> tuple[int, int]:
        """(source, how many windows that source gave before) of a position in the interleaving."""
        low, high = position, position + 1
        total = sum(part for part, _ in self._parts)
        for part, source in self._parts:
            rest = total - part
            next_low, next_high = ((2 * count * rest + total) // (2 * total) for count in (low, high))
            if next_low == next_high:
                return source, low - next_low
            low, high, total = next_low, next_high, rest
        raise AssertionError("the last source takes every position that is left")


def shuffled(index: int, count: int, keys: Sequence[int]) -> int:
    """Where `keys` (64 bits each, a round each) send `index` in a permutation of range(count).

    A Feistel network over the next even number of bits, repeated until it lands within the range. (`grain.experimental.
    index_shuffle` has at least 16 bits, so it takes milliseconds for a source of a few windows.)
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    while True:
        left, right = index >> half, index & (1 << half) - 1
        for round_key in keys:
            mixed = (right + round_key) * 0xBF58476D1CE4E5B9 & WORD  # the constants of SplitMix64
            mixed = (mixed ^ mixed >> 31) * 0x94D049BB133111EB & WORD
            left, right = right, left ^ mixed >> 64 - half
        index = left << half | right
        if index < count:
            return index


class TrainData:
    """The training sources as batches of windows of `cfg.length` tokens."""

    def __init__(self, cfg: schema.Data, seed: int, tokenizer: Tokenizer) -> None:
        """Prepare all sources (see `shards`); `Refused` for bad data or a source with less text than one window."""
        self._seed, self._length, self._batch_size = seed, cfg.length, cfg.batch_size
        self._workers, self._prefetch = cfg.workers, cfg.prefetch
        self.source_names = sorted(cfg.sources)
        self._shards = [prepare(name, cfg.sources[name], tokenizer, cfg.cache_dir) for name in self.source_names]
        weights = [cfg.sources[name].weight for name in self.source_names]
        self._mixture = Mixture(weights)
        self.num_tokens = {name: shard.num_tokens for name, shard in zip(self.source_names, self._shards, strict=True)}
        for name, count in self.num_tokens.items():
            if count <= cfg.length:
                remedy = "lower data.length or add text"
                raise Refused(f"data.sources.{name}: {count} tokens are fewer than one window of data.length={cfg.length} + 1; {remedy}")
        self._made_of = [shard.fingerprint for shard in self._shards], weights, cfg.length
        self.fingerprint = key(*self._made_of, seed)  # of the endless stream of windows, however it is cut into batches

    def fingerprint_of_batches(self, batch_size: int) -> str:
        """What a checkpoint that counts no windows holds in place of `fingerprint`."""
        return key(*self._made_of, batch_size, self._seed)

    def batch(self, step: int, rows: Sequence[int], first: int = 0) -> Batch:
        """The given rows of global batch `step`, batch 0 beginning at window `first`: see `packing` for the keys."""
        places = [self._mixture.locate(first + step * self._batch_size + row) for row in rows]
        windows = [self._window(*place) for place in places]
        batch = frame(*(np.stack(part) for part in zip(*windows, strict=True)))
        return {**batch, "source": np.array([source for source, _ in places], np.int32)}

    def _window(self, source: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Window `index` of a source's endless stream: every epoch cuts the ring of tokens elsewhere and shuffles the pieces anew."""
        shard, length = self._shards[source], self._length
        count = shard.num_tokens // length
        epoch, index = divmod(index, count)
        phase, *keys = map(int, np.random.SeedSequence([self._seed, source, epoch]).generate_state(5, np.uint64))
        return shard.window(phase % shard.num_tokens + length * shuffled(index, count, keys), length + 1)

    def batches(self, start: int, rows: Sequence[int] | slice, first: int = 0) -> grain.DatasetIterator[Batch]:
        """This reader's rows of the global batches `start`, `start + 1`, ... without end, prepared ahead; close it after use.

        Batch 0 begins at window `first`, which is negative where the batches of that many steps were smaller.
        """
        import grain  # here, because it imports jax
        from absl import flags

        rows = range(self._batch_size)[rows] if isinstance(rows, slice) else rows
        steps = grain.MapDataset.range(start, 2**62).map(partial(self.batch, rows=rows, first=first))
        if not self._workers:
            ahead = self._prefetch
            return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)))
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain reads absl flags when it starts a process, and fails if nobody parsed them
        # Batches are copied between processes: grain's shared memory leaves segments behind when an iterator is closed early.
        copied = grain.experimental.DatasetOptions(min_shm_size=2**62)
        steps = grain.experimental.WithOptionsIterDataset(steps.to_iter_dataset(grain.ReadOptions(0, 0)), copied)
        options = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=-(-self._prefetch // self._workers))
        return iter(steps.mp_prefetch(options, worker_init_fn=_start_worker))


def _start_worker(index: int, count: int) -> None:
    """A worker lives as long as its trainer: it leaves signals to it, and does not outlive it, even if it is killed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
