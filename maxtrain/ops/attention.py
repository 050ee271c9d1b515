"""Attention over keys and values, and the seam through which a cache enters it.

Training passes no cache: keys and values are the sequence itself, queries go in blocks, and a block reads only the keys
that its causal mask and window leave. Serving passes a cache in pages (`ops.paged_attention`). A query sees a key of its own
segment that is not later than itself and not further back than the window.

Keys may be wider than values (multi-head latent attention). A sink is a learned logit per head that takes part in the
softmax and has no value (GPT-OSS): weights then sum to less than one.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from maxtrain.ops.linear import settle
from maxtrain.ops.paged_attention import MASKED, paged_attention
from maxtrain.ops.pages import Cache, Combined, Pages
from maxtrain.parallel.sharding import parts, per_shard

MIN_BLOCK, MAX_BLOCKS = 64, 16  # blocks of queries: small enough to skip masked keys, few enough to compile fast


class Context(NamedTuple):
    """Where the tokens of a call stand.

    positions: int32 [batch, length], counted from 0 in each document.
    segments: int32 [batch, length], the document each token belongs to; 0 is padding. A document's tokens are neighbours.
    pages: in a serving step, whose tokens are rows [tokens, 1], where their keys and values lie; None in training.
    """

    positions: jax.Array
    segments: jax.Array
    pages: Pages | None = None


class Options(NamedTuple):
    """What is fixed about the attention of a layer.

    window: a query sees so many tokens, itself included; None sees everything before it.
    scale: factor on the products of queries and keys; None is 1 / sqrt(key width).
    softcap: scores become softcap * tanh(scores / softcap) (Gemma 2).
    """

    window: int | None = None
    scale: float | None = None
    softcap: float | None = None


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    cache: Cache | Combined | None,
    context: Context,
    options: Options,
    sinks: jax.Array | None = None,
) -> tuple[jax.Array, Cache | Combined | None]:
    """Attention of q [batch, length, heads, width] over k, v [batch, length, kv_heads, width], or over the cache they are written to.

    v: None, with a cache only, if the keys are the values too. sinks: float [heads] or None.
    Returns: output [batch, length, heads, width of v] and the updated cache.
    """
    q = q * (q.shape[-1] ** -0.5 if options.scale is None else options.scale)
    if cache is None:
        assert v is not None
        return _split_attention(q, k, v, context.segments, sinks, options), None
    assert context.pages is not None, "a cache is read by tokens that say where their pages are"
    q, k, v = jax.tree.map(lambda x: x[:, 0], (q, k, v))  # a token is a row of its own
    y, cache = paged_attention(q, k, v, cache, context.positions[:, 0], context.pages, options.window, options.softcap, sinks)
    return y[:, None], cache


def _split_attention(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, sinks: jax.Array | None, options: Options) -> jax.Array:
    """`causal_attention` with each device at its sequences and heads; too few kv heads are repeated for the devices that share one."""
    repeats = max(1, parts("heads") // k.shape[2])
    if repeats > 1:
        k, v = jnp.repeat(k, repeats, axis=2), jnp.repeat(v, repeats, axis=2)
    axes, arrays = ("batch", None, "heads", None), (q, k, v, segments)
    inputs = (axes, axes, axes, ("batch", None))
    if sinks is None:
        return per_shard(lambda *local: causal_attention(*local, None, options), inputs, axes)(*arrays)
    return per_shard(lambda *local: causal_attention(*local, options), (*inputs, ("heads",)), axes)(*arrays, sinks)


def _product(form: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Batched product with float32 sums."""
    return jnp.einsum(form, a, b, preferred_element_type=jnp.float32)


def _fold(x: jax.Array, kv_heads: int) -> jax.Array:
    """[batch, length, heads, width] -> [batch * kv_heads, length * group, width]: the query heads of a group become rows."""
    batch, length, heads, width = x.shape
    return x.reshape(batch, length, kv_heads, -1).swapaxes(1, 2).reshape(batch * kv_heads, length * (heads // kv_heads), width)


def _unfold(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_fold`, to [batch, length, heads, width]; `shape` begins with the first three."""
    batch, length, heads = shape[:3]
    return x.reshape(batch, x.shape[0] // batch, length, -1).swapaxes(1, 2).reshape((batch, length, heads, x.shape[-1]))


def _sink_rows(sinks: jax.Array, kv_heads: int, batch: int, length: int) -> jax.Array:
    """sinks [heads] -> [batch * kv_heads, length * group, 1], the sink of each folded row."""
    return jnp.tile(sinks.astype(jnp.float32).reshape(kv_heads, -1, 1), (batch, length, 1))


def softcapped(scores: jax.Array, softcap: float | None) -> jax.Array:
    """softcap * tanh(scores / softcap) (Gemma 2); the scores themselves for None."""
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _masked(scores: jax.Array, visible: jax.Array) -> jax.Array:
    """Scores [batch * kv_heads, length * group, keys] with the keys that visible [batch, length, keys] rules out at -1e30."""
    batch, length, keys = visible.shape
    by_head = scores.reshape(batch, -1, length, scores.shape[1] // length, keys)
    return jnp.where(visible[:, None, :, None, :], by_head, MASKED).reshape(scores.shape)


def _blocks(length: int, window: int | None) -> list[tuple[slice, slice]]:
    """Blocks of queries with the keys each may see."""
    size = max(MIN_BLOCK, -(-length // MAX_BLOCKS))
    starts = range(0, length, size)
    return [(slice(at, min(at + size, length)), slice(max(0, at + 1 - window) if window else 0, min(at + size, length))) for at in starts]


def _block_scores(q: jax.Array, k: jax.Array, segments: jax.Array, rows: slice, columns: slice, options: Options) -> jax.Array:
    """Masked scores of one block of folded queries q against the keys of `columns`."""
    distance = jnp.arange(rows.start, rows.stop)[:, None] - jnp.arange(columns.start, columns.stop)
    near = (distance >= 0) & (distance < (options.window or k.shape[1]))
    visible = near & (segments[:, rows, None] == segments[:, None, columns])
    return settle(_masked(softcapped(_product("nqd,nkd->nqk", q, k[:, columns]), options.softcap), visible))


def _of_group(x: jax.Array, rows: slice, group: int) -> jax.Array:
    """The folded rows of the query positions `rows`."""
    return x[:, rows.start * group : rows.stop * group]


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, sinks: jax.Array | None, options: Options) -> jax.Array:
    """Softmax attention of a sequence over itself; weights are computed again in the backward pass instead of kept.

    Shapes: q [batch, length, heads, width], already scaled; k, v [batch, length, kv_heads, width]; segments int32
    [batch, length], a document's tokens being neighbours; sinks [heads]; result as q, with the width of v.
    """
    return _forward(q, k, v, segments, sinks, options)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, sinks: jax.Array | None, options: Options):
    shape, kv_heads = q.shape, k.shape[2]
    group = shape[2] // kv_heads
    q, k, v = settle(tuple(_fold(x, kv_heads) for x in (q, k, v)))
    outputs, log_sums = [], []
    for rows, columns in _blocks(shape[1], options.window):
        scores = _block_scores(_of_group(q, rows, group), k, segments, rows, columns, options)
        top = scores.max(axis=-1, keepdims=True)
        sink = None if sinks is None else _sink_rows(sinks, kv_heads, shape[0], rows.stop - rows.start)
        top = top if sink is None else jnp.maximum(top, sink)
        weights = settle(jnp.exp(scores - top))
        total = weights.sum(axis=-1, keepdims=True)
        total = total if sink is None else total + jnp.exp(sink - top)
        outputs.append((_product("nqk,nkd->nqd", weights.astype(q.dtype), v[:, columns]) / total).astype(q.dtype))
        log_sums.append(top + jnp.log(total))
    out = jnp.concatenate(outputs, axis=1)
    return settle(_unfold(out, shape)), (q, k, v, segments, sinks, out, tuple(log_sums))


def _backward(options: Options, saved: tuple, d_out: jax.Array):
    q, k, v, segments, sinks, out, log_sums = saved
    shape, kv_heads = d_out.shape, k.shape[0] // d_out.shape[0]
    group = shape[2] // kv_heads
    d_out = settle(_fold(d_out, kv_heads))
    delta = settle(jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True))
    blocks_q, d_k, d_v = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for (rows, columns), log_sum in zip(_blocks(shape[1], options.window), log_sums, strict=True):
        q_rows, d_rows, delta_rows = settle(tuple(_of_group(x, rows, group) for x in (q, d_out, delta)))
        scores = _block_scores(q_rows, k, segments, rows, columns, options)
        weights = settle(jnp.exp(scores - log_sum))
        d_scores = weights * (_product("nqd,nkd->nqk", d_rows, v[:, columns]) - delta_rows)
        if options.softcap is not None:  # the slope of the cap; a masked score has no weight, whatever its slope
            d_scores *= 1 - jnp.square(jnp.maximum(scores, -options.softcap) / options.softcap)
        d_scores = settle(d_scores.astype(q.dtype))
        pad = ((0, 0), (columns.start, shape[1] - columns.stop), (0, 0))
        d_v += jnp.pad(_product("nqk,nqd->nkd", weights.astype(q.dtype), d_rows), pad)
        d_k += jnp.pad(_product("nqk,nqd->nkd", d_scores, q_rows), pad)
        blocks_q.append(_product("nqk,nkd->nqd", d_scores, k[:, columns]).astype(q.dtype))
    d_sinks = None
    if sinks is not None:
        shares = jnp.exp(_sink_rows(sinks, kv_heads, shape[0], shape[1]) - jnp.concatenate(log_sums, axis=1))
        d_sinks = -(shares * delta).reshape(shape[0], kv_heads, shape[1], group).sum(axis=(0, 2)).reshape(-1).astype(sinks.dtype)
    kv_shape = (*shape[:2], kv_heads)
    d_q, d_k, d_v = jnp.concatenate(blocks_q, axis=1), d_k.astype(k.dtype), d_v.astype(v.dtype)
    return *settle((_unfold(d_q, shape), _unfold(d_k, kv_shape), _unfold(d_v, kv_shape))), None, d_sinks


causal_attention.defvjp(_forward, _backward)
