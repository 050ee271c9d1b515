"""Rows against a plain oracle, and packing against its definition."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from maxtrain.data.packing import frame, pack


def oracle(begins: np.ndarray) -> dict[str, list[int]]:
    """Walks over one window, token by token."""
    rows: dict[str, list[int]] = {"positions": [], "segments": [], "weights": []}
    position, segment = -1, 0
    for i in range(len(begins) - 1):
        new = i == 0 or begins[i]
        position, segment = (0, segment + 1) if new else (position + 1, segment)
        rows["positions"].append(position)
        rows["segments"].append(segment)
        rows["weights"].append(0 if begins[i + 1] else 1)
    return rows


@given(st.integers(1, 12), st.integers(1, 4), st.randoms(use_true_random=False))
def test_frame_is_the_oracle(length, rows, draw):
    begins = np.array([[draw.random() < 0.3 for _ in range(length + 1)] for _ in range(rows)])
    tokens = np.arange(rows * (length + 1), dtype=np.int32).reshape(rows, length + 1)
    batch = frame(tokens, begins)
    for row in range(rows):
        for name, values in oracle(begins[row]).items():
            assert batch[name][row].tolist() == values
    assert np.array_equal(batch["targets"], batch["tokens"] + 1)
    assert {name: value.dtype for name, value in batch.items()} == {
        **dict.fromkeys(("tokens", "targets", "positions", "segments"), np.int32),
        "weights": np.float32,
    }


@given(st.lists(st.integers(1, 20)))
def test_pack_keeps_all_within_capacity_and_leaves_little_room(sizes):
    bins = pack(sizes, 20)
    assert sorted(item for items in bins for item in items) == list(range(len(sizes)))
    loads = [sum(sizes[item] for item in items) for items in bins]
    assert max(loads, default=0) <= 20
    assert sum(load <= 10 for load in loads) <= 1  # two half-empty bins would have been one
