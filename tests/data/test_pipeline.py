"""Batches are a function of seed and step: no reader, worker or restart changes them, and the mixture is exact."""

import multiprocessing
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxtrain.config.errors import Refused
from maxtrain.config.schema import Data, Source
from maxtrain.data.pipeline import Mixture, TrainData, shuffled
from maxtrain.data.shards import Shard
from maxtrain.data.tokenizer import ByteTokenizer

SOURCES = {
    "sums": Source(kind="synthetic", num_documents=40, document_length=60, weight=0.7),
    "more": Source(kind="synthetic", num_documents=90, document_length=50, weight=0.3),
}


def data(tmp_path, seed: int = 0, **keys) -> TrainData:
    keys = {"batch_size": 4, "length": 16, "sources": SOURCES, **keys}
    return TrainData(Data(cache_dir=str(tmp_path), **keys), seed, ByteTokenizer())


def take(train: TrainData, count: int, start: int = 0, rows=slice(None)) -> list[dict[str, np.ndarray]]:
    batches = train.batches(start, rows)
    try:
        return [next(batches) for _ in range(count)]
    finally:
        batches.close()


def assert_equal(one, two):
    assert len(one) == len(two)
    for left, right in zip(one, two, strict=True):
        assert left.keys() == right.keys()
        for key in left:
            assert left[key].dtype == right[key].dtype
            assert np.array_equal(left[key], right[key]), key


def test_shapes_and_types(tmp_path):
    (batch,) = take(data(tmp_path), 1)
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        **dict.fromkeys(("tokens", "targets", "positions", "segments"), ((4, 16), "int32")),
        "weights": ((4, 16), "float32"),
        "source": ((4,), "int32"),
    }
    assert np.array_equal(batch["weights"] == 0, batch["targets"] == 256)
    assert np.array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    assert batch["segments"].min() == 1


@pytest.mark.parametrize("readers", [1, 2, 4])
def test_any_number_of_readers_gives_the_same_batches(tmp_path, readers):
    train = data(tmp_path)
    expected = [train.batch(step, range(4)) for step in range(6)]
    parts = [take(train, 6, rows=slice(i, None, readers)) for i in range(readers)]
    rows = np.argsort(np.concatenate([np.arange(4)[i::readers] for i in range(readers)]))
    merged = [{key: np.concatenate([part[step][key] for part in parts])[rows] for key in expected[0]} for step in range(6)]
    assert_equal(merged, expected)
    assert_equal(take(train, 2, rows=[3, 1]), [{key: value[[3, 1]] for key, value in batch.items()} for batch in expected[:2]])


def test_any_number_of_workers_and_any_start_gives_the_same_batches(tmp_path):
    expected = take(data(tmp_path), 9)
    assert_equal(take(data(tmp_path, workers=2, prefetch=3), 9), expected)
    assert_equal(take(data(tmp_path), 4, start=5), expected[5:])


@pytest.mark.parametrize("size", [1, 2, 8])
def test_another_batch_size_goes_on_at_the_next_window(tmp_path, size):
    """3 steps of 4 windows, then batches of another size: over two sources and several of their epochs, none twice, none left out."""
    whole = data(tmp_path, batch_size=1)
    windows = [whole.batch(step, [0]) for step in range(12, 12 + 3 * 64)]
    train = data(tmp_path, batch_size=size)
    found = [train.batch(step, range(size), first=12 - 3 * size) for step in range(3, 3 + 3 * 64 // size)]
    assert_equal([{key: value[[row]] for key, value in batch.items()} for batch in found for row in range(size)], windows)
    assert train.fingerprint == whole.fingerprint
    assert_equal([next(train.batches(3, slice(None), 12 - 3 * size))], found[:1])


def test_workers_leave_signals_to_the_trainer(tmp_path):
    batches = data(tmp_path, workers=1).batches(3, slice(None))
    found = [next(batches)]
    for worker in multiprocessing.active_children():
        worker.terminate()  # as a scheduler does that signals every process of a job, when the trainer still wants to save
    found += [next(batches) for _ in range(12)]  # more than was prepared ahead
    batches.close()
    assert_equal(found, take(data(tmp_path), 13, start=3))


def test_seed_changes_order_and_fingerprint(tmp_path):
    one, two = data(tmp_path), data(tmp_path, seed=1)
    assert not np.array_equal(one.batch(0, range(4))["tokens"], two.batch(0, range(4))["tokens"])
    prints = {one.fingerprint, two.fingerprint, data(tmp_path, length=8).fingerprint}
    prints.add(data(tmp_path, sources={"sums": SOURCES["sums"]}).fingerprint)
    assert len(prints) == 4
    assert data(tmp_path, batch_size=2).fingerprint == one.fingerprint  # the same windows, cut otherwise
    assert len({one.fingerprint_of_batches(size) for size in (2, 4)} | {one.fingerprint}) == 3
    assert data(tmp_path, workers=2, sources=dict(reversed(SOURCES.items()))).fingerprint == one.fingerprint


def test_every_epoch_covers_the_text_once_in_another_order(tmp_path, monkeypatch):
    starts = []
    monkeypatch.setattr(Shard, "window", lambda shard, start, size, real=Shard.window: (starts.append(start), real(shard, start, size))[1])
    train = data(tmp_path, batch_size=1, sources={"sums": SOURCES["sums"]})
    total = train.num_tokens["sums"]
    count = total // 16
    for step in range(3 * count):
        train.batch(step, [0])
    orders = []
    for epoch in range(3):
        found = starts[epoch * count : (epoch + 1) * count]
        order = [(start - min(found)) // 16 for start in found]
        assert sorted(order) == list(range(count))  # whole windows side by side: no token comes twice
        assert {(start - found[0]) % 16 for start in found} == {0}
        orders.append((order, min(found) % total))
    assert orders[0][0] != orders[1][0] != orders[2][0]
    assert len({phase for _, phase in orders}) == 3


@given(st.integers(1, 500), st.lists(st.integers(0, 2**64 - 1), min_size=4, max_size=4))
def test_shuffled_is_a_permutation(count, keys):
    assert sorted(shuffled(index, count, keys) for index in range(count)) == list(range(count))


def test_shuffled_sends_every_index_everywhere():
    seen = np.zeros((20, 20))
    for seed in range(2000):
        keys = [int(word) for word in np.random.SeedSequence(seed).generate_state(4, np.uint64)]
        for index in range(20):
            seen[index, shuffled(index, 20, keys)] += 1
    assert ((seen - 100) ** 2 / 100).sum() < 361 + 6 * (2 * 361) ** 0.5  # chi-squared, 19 x 19 degrees of freedom, 6 sigma


@given(st.lists(st.integers(1, 999).map(lambda n: n / 100), min_size=1, max_size=6), st.integers(1, 600))
@settings(max_examples=50, deadline=None)
def test_any_beginning_has_the_exact_shares(weights, count):
    mixture = Mixture(weights)
    places = [mixture.locate(k) for k in range(count)]
    total = sum(Fraction(str(weight)) for weight in weights)
    bound = (1 + sum(1 / j for j in range(1, len(weights) - 1))) / 2
    for source, weight in enumerate(weights):
        indices = [index for chosen, index in places if chosen == source]
        assert indices == list(range(len(indices)))
        assert abs(len(indices) - count * Fraction(str(weight)) / total) <= bound


def test_ten_thousand_windows_have_the_exact_shares(tmp_path):
    weights = {"a": 0.6173, "b": 0.25, "c": 0.1, "d": 0.03, "e": 0.0027}
    source = Source(kind="synthetic", num_documents=5, document_length=40)
    train = data(tmp_path, batch_size=100, length=4, sources={name: source.model_copy(update={"weight": w}) for name, w in weights.items()})
    counts = np.bincount(np.concatenate([train.batch(step, range(100))["source"] for step in range(100)]), minlength=5)
    for name, count in zip(train.source_names, counts, strict=True):
        assert abs(count - 10_000 * weights[name]) <= 1


def test_rows_of_a_source_come_from_its_own_text(tmp_path, jsonl):
    sources = {name: jsonl([letter * 30] * 9, name) for name, letter in {"a": "a", "b": "b"}.items()}
    batch = data(tmp_path, sources=sources).batch(3, range(4))
    for row in range(4):
        letter = ord("ab"[batch["source"][row]])
        assert set(batch["tokens"][row].tolist()) <= {letter, 256, 257}


def test_importing_the_data_loads_no_jax():
    code = "import sys, maxtrain.data.pipeline, maxtrain.data.evalset; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_text_shorter_than_a_window_is_refused(tmp_path, jsonl):
    with pytest.raises(Refused, match=r"data\.sources\.tiny: 7 tokens are fewer than one window of data\.length=16"):
        data(tmp_path, sources={"tiny": jsonl(["small"])})
    assert data(tmp_path, length=6, sources={"tiny": jsonl(["small"])}).batch(0, [0])["tokens"].shape == (1, 6)


ORPHAN = """
import sys, time
from maxtrain.config.schema import Data, Source
from maxtrain.data.pipeline import TrainData
from maxtrain.data.tokenizer import ByteTokenizer

if __name__ == "__main__":
    cfg = Data(cache_dir=sys.argv[1], sources={"s": Source(kind="synthetic")}, workers=1)
    batches = TrainData(cfg, 0, ByteTokenizer()).batches(0, slice(None))
    next(batches)
    print("ready", flush=True)
    time.sleep(600)
"""


def test_workers_do_not_outlive_a_killed_trainer(tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(ORPHAN)
    process = subprocess.Popen(
        [sys.executable, "-c", f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')", str(tmp_path)], stdout=subprocess.PIPE
    )
    try:
        assert process.stdout.readline() == b"ready\n"
    finally:
        process.kill()
    assert process.communicate(timeout=60) == (b"", None)  # the pipe ends when the last process that holds it has gone
