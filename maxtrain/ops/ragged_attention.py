"""Attention of a serving step by jax's kernel for TPUs (ragged paged attention), which reads pages in place instead of gathering them."""

import math
from functools import partial

import jax
import jax.numpy as jnp

from maxtrain.ops.pages import Combined, Pages
from maxtrain.parallel.sharding import per_shard

BUFFER, QUERIES = 4 << 20, 32  # bytes of pages, and queries, that the kernel works on at a time; its own table is of measured devices


def ragged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: Combined,
    positions: jax.Array,
    pages: Pages,
    window: int | None,
    softcap: float | None,
) -> tuple[jax.Array, Combined]:
    """As `paged_attention`, each device at its heads: q [tokens, heads, width], already scaled, k and v [tokens, kv_heads, width].

    To the kernel each row is a sequence with one new token, each block one with as many as it has places: those behind its last
    token see pages that are not theirs, and what comes of them is not used.
    """
    num_rows, num_blocks, width = len(pages.rows), len(pages.blocks), q.shape[-1]
    block = (len(q) - num_rows) // max(1, num_blocks)
    first = jnp.concatenate([positions[:num_rows], positions[num_rows::block] if num_blocks else positions[:0]])
    counts = jnp.asarray([1] * num_rows + [block] * num_blocks, jnp.int32)
    lengths = jnp.maximum(first, 0) + counts
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)])
    tables = jnp.concatenate([pages.rows, pages.blocks])
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, cache.pages.shape[-1] - width))) for x in (q, k, v))
    by_head, whole = (None, "heads", None), (None,)
    local = per_shard(
        partial(_local, window, softcap),
        (by_head, (None, "kv_heads", None), (None, "kv_heads", None), cache.axes, whole, whole, (None, None), whole),
        (by_head, cache.axes),
        always=True,
    )
    out, updated = local(q, k, v, cache.pages, pages.slots, lengths, tables, starts)
    return out[..., :width], Combined(updated)


def _local(
    window: int | None,
    softcap: float | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pool: jax.Array,
    slots: jax.Array,
    lengths: jax.Array,
    tables: jax.Array,
    starts: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    pairs = jnp.stack([k, v], axis=2).reshape(len(k), -1, k.shape[-1]).astype(pool.dtype)
    flat = pool.reshape(-1, *pool.shape[2:]).at[slots].set(pairs, mode="drop")
    pool = flat.reshape(pool.shape)
    count = jnp.asarray([len(tables)], jnp.int32)
    page = math.prod(pool.shape[1:]) * pool.dtype.itemsize
    sizes = {"num_kv_pages_per_block": min(tables.shape[1], max(1, BUFFER // page)), "num_queries_per_block": min(len(q), QUERIES)}
    out = ragged_paged_attention(q, pool, lengths, tables, starts, count, sliding_window=window, soft_cap=softcap, **sizes)
    return out, pool
