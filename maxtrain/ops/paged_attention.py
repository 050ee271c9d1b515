"""Attention of a serving step over keys and values that lie in pages (PagedAttention, Kwon et al., 2023).

The tokens of a step come as single rows, then as blocks of equally many neighbours, each block of one request: two dense
batched products over gathered pages, on any backend. Pages are gathered a chunk of positions at a time with a running
softmax, as far as the longest request of the step goes: one program serves every length, and chunks that a row does not see
leave its result bitwise as it is.
"""

import jax
import jax.numpy as jnp

from maxtrain.ops.pages import DROPPED, Cache, Combined, Pages
from maxtrain.ops.ragged_attention import ragged_attention
from maxtrain.parallel.sharding import constrain

CHUNK = 128  # positions gathered at a time
MASKED = -1e30


def write(pool: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
    """The pool with new [tokens, kv_heads, width] at their places."""
    flat = pool.reshape(pool.shape[0], -1, pool.shape[-1])
    return flat.at[:, slots].set(new.swapaxes(0, 1).astype(pool.dtype), mode="drop").reshape(pool.shape)


def read(
    q: jax.Array, cache: Cache, tables: jax.Array, positions: jax.Array, window: int | None, softcap: float | None, sinks: jax.Array | None
) -> jax.Array:
    """Softmax attention of n blocks of queries, each over the pages of its table.

    Args:
        q: [n, length, heads, width], already scaled.
        tables: int32 [n, pages]; page i holds the positions from i * page_size on.
        positions: int32 [n, length]; -1 sees nothing, and its result means nothing.
        window: a query sees so many tokens, itself included; None for all before it.
        softcap: scores become softcap * tanh(scores / softcap).
        sinks: float [heads] or None.

    Returns: [n, length, heads, width of the values].
    """
    n, length, heads, _ = q.shape
    kv_heads, _, page_size, _ = cache.keys.shape
    pages = max(1, min(CHUNK // page_size, tables.shape[1]))
    tables = jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % pages)))
    chunk, group, width = pages * page_size, heads // kv_heads, (cache.keys if cache.values is None else cache.values).shape[-1]
    # [kv_heads, n, length * group, width]: the query heads of a group are rows of one product
    q = q.reshape(n, length, kv_heads, group, -1).transpose(2, 0, 1, 3, 4).reshape(kv_heads, n, length * group, -1)
    at = jnp.repeat(positions, group, axis=1)[:, :, None]

    def gathered(pool: jax.Array, ids: jax.Array) -> jax.Array:
        return pool[:, ids].reshape(kv_heads, n, chunk, pool.shape[-1]).astype(q.dtype)

    def step(index: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        top, total, out = carry
        ids = jax.lax.dynamic_slice_in_dim(tables, index * pages, pages, axis=1)
        keys = gathered(cache.keys, ids)
        scores = jnp.einsum("hnqd,hnkd->hnqk", q, keys, preferred_element_type=jnp.float32)
        scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
        distance = at - (index * chunk + jnp.arange(chunk))
        scores = jnp.where((distance >= 0) & (distance < (window or DROPPED)), scores, MASKED)
        higher = jnp.maximum(top, scores.max(axis=-1, keepdims=True))
        weights, decay = jnp.exp(scores - higher), jnp.exp(top - higher)
        values = keys if cache.values is None else gathered(cache.values, ids)
        product = jnp.einsum("hnqk,hnkd->hnqd", weights.astype(q.dtype), values, preferred_element_type=jnp.float32)
        return higher, total * decay + weights.sum(axis=-1, keepdims=True), out * decay + product

    shape = (kv_heads, n, length * group, 1)
    if sinks is None:
        top, total = jnp.full(shape, MASKED), jnp.zeros(shape)
    else:
        by_row = jnp.tile(sinks.astype(jnp.float32).reshape(kv_heads, 1, group), (1, length, 1)).reshape(kv_heads, 1, -1, 1)
        top, total = jnp.broadcast_to(by_row, shape), jnp.ones(shape)
    first = jnp.where(positions < 0, DROPPED, positions).min()
    start = jnp.maximum(first + 1 - window, 0) // chunk if window else jnp.int32(0)
    _, total, out = jax.lax.fori_loop(start, positions.max() // chunk + 1, step, (top, total, jnp.zeros((*shape[:3], width))))
    out = (out / jnp.maximum(total, 1e-30)).astype(q.dtype)
    return out.reshape(kv_heads, n, length, group, width).transpose(1, 2, 0, 3, 4).reshape(n, length, heads, width)


def paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    cache: Cache | Combined,
    positions: jax.Array,
    pages: Pages,
    window: int | None,
    softcap: float | None,
    sinks: jax.Array | None,
) -> tuple[jax.Array, Cache | Combined]:
    """Write k, v [tokens, kv_heads, width] into the pool, then attention of q [tokens, heads, width], already scaled, over it.

    Without v, k is the value too.

    Returns: output [tokens, heads, width of v] and the updated pool.
    """
    if isinstance(cache, Combined):
        assert v is not None
        assert sinks is None
        return ragged_attention(q, k, v, cache, positions, pages, window, softcap)
    axes = cache.axes
    updated: Cache = jax.tree.map(lambda pool, new: constrain(write(pool, new, pages.slots), axes), cache, Cache(k, v))
    out, rows = [], len(pages.rows)
    for tokens, tables in ((slice(0, rows), pages.rows), (slice(rows, None), pages.blocks)):
        if len(tables):
            part, at = (x[tokens].reshape(len(tables), -1, *x.shape[1:]) for x in (q, positions))
            out.append(read(part, updated, tables, at, window, softcap, sinks).reshape(-1, q.shape[1], (k if v is None else v).shape[-1]))
    return jnp.concatenate(out), updated
