"""What the kernel of TPUs is given, against the gathered pages of plain XLA; its own reference stands for the kernel.

Neither of pallas' interpreters can run it (reshaped references, copies of a computed number of pages); it is compiled for TPU in
tests/serving/test_tpu.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import ragged_paged_attention as library

from maxtrain.ops.paged_attention import paged_attention
from maxtrain.ops.pages import DROPPED, Cache, Combined, Pages, cache_spec

PAGE, NUM_PAGES = 16, 24


def step(counts, block, starts):
    """Pages of a step: a row for each count of 1, a block for the others; request i goes on from starts[i]."""
    rows, blocks = [n for n in counts if n == 1], [n for n in counts if n > 1]
    free = iter(np.random.default_rng(1).permutation(np.arange(1, NUM_PAGES)))
    tables, slots, positions = [], [], []
    for count, start, places in zip([*rows, *blocks], starts, [1] * len(rows) + [block] * len(blocks), strict=True):
        held = [next(free) for _ in range(-(-(start + count) // PAGE))]
        tables.append([*held, *[0] * (6 - len(held))])
        at = [*range(start, start + count), *[-1] * (places - count)]
        positions += at
        slots += [DROPPED if p < 0 else held[p // PAGE] * PAGE + p % PAGE for p in at]
    tables = np.asarray(tables, np.int32)
    return np.asarray(positions, np.int32), Pages(*(np.asarray(x, np.int32) for x in (slots, tables[: len(rows)], tables[len(rows) :])))


def reference(*arrays, num_kv_pages_per_block, num_queries_per_block, **options):
    return library.ref_ragged_paged_attention(*arrays, **options)


@pytest.mark.parametrize(("width", "kv_heads", "window", "softcap"), [(128, 2, None, None), (64, 4, None, 5.0), (128, 1, 20, None)])
def test_kernel_is_given_what_makes_the_gathered_attention(width, kv_heads, window, softcap, monkeypatch):
    monkeypatch.setattr(library, "ragged_paged_attention", reference)
    positions, pages = step([1, 1, 1, 8, 5], 8, [40, 0, 17, 30, 3])
    draws = np.random.default_rng(0)
    q = draws.normal(size=(len(positions), 4, width)).astype(np.float32) * width**-0.5
    k, v = (draws.normal(size=(len(positions), kv_heads, width)).astype(np.float32) for _ in "kv")
    keys, values = (draws.normal(size=(kv_heads, NUM_PAGES, PAGE, width)).astype(np.float32) for _ in "kv")
    want, cache = paged_attention(q, k, v, Cache(jnp.asarray(keys), jnp.asarray(values)), positions, pages, window, softcap, None)
    padded = np.zeros((NUM_PAGES, PAGE, 2 * kv_heads, 128), np.float32)
    for index, pool in enumerate((keys, values)):
        padded[:, :, index::2, :width] = pool.transpose(1, 2, 0, 3)
    got, combined = paged_attention(q, k, v, Combined(jnp.asarray(padded)), positions, pages, window, softcap, None)
    real = positions >= 0
    np.testing.assert_allclose(np.asarray(got)[real], np.asarray(want)[real], rtol=2e-5, atol=2e-5)
    for index, pool in enumerate(cache):
        np.testing.assert_array_equal(np.asarray(combined.pages)[:, :, index::2, :width], np.asarray(pool).transpose(1, 2, 0, 3))


def test_other_platforms_keep_a_pool_for_each_head():
    assert isinstance(cache_spec(4, 8, 2, (16, 16), jnp.dtype("float32")), Cache)
    assert jax.tree.map(lambda s: s.shape, cache_spec(4, 8, 1, (20, None), jnp.dtype("float32"))) == Cache((1, 4, 8, 20), None)
