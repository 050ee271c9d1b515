"""Softmax attention of a sequence over itself, block by block; weights are computed again in the backward pass.

Queries go in blocks, and a block reads only the keys that its causal mask and window leave. The functions of one block are
shared with `ops.ring_attention`, whose keys and values come from other devices.
"""

from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from maxtrain.ops.linear import settle
from maxtrain.ops.paged_attention import MASKED

T = TypeVar("T")
MIN_BLOCK, MAX_BLOCKS = 64, 16  # blocks of queries: small enough to skip masked keys, few enough to compile fast


class Options(NamedTuple):
    """What is fixed about the attention of a layer.

    window: a query sees so many tokens, itself included; None sees everything before it.
    scale: factor on the products of queries and keys; None is 1 / sqrt(key width).
    softcap: scores become softcap * tanh(scores / softcap) (Gemma 2).
    """

    window: int | None = None
    scale: float | None = None
    softcap: float | None = None


def softcapped(scores: jax.Array, softcap: float | None) -> jax.Array:
    """softcap * tanh(scores / softcap) (Gemma 2); the scores themselves for None."""
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


# --------------------------------------------------------------------------------------------------------- folding


def _product(form: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Batched product with float32 sums."""
    return jnp.einsum(form, a, b, preferred_element_type=jnp.float32)


def fold(x: jax.Array, kv_heads: int) -> jax.Array:
    """[batch, length, heads, width] -> [batch * kv_heads, length * group, width]: the query heads of a group become rows."""
    batch, length, heads, width = x.shape
    return x.reshape(batch, length, kv_heads, -1).swapaxes(1, 2).reshape(batch * kv_heads, length * (heads // kv_heads), width)


def unfold(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `fold`, to [batch, length, heads, width]; `shape` begins with the first three."""
    batch, length, heads = shape[:3]
    return x.reshape(batch, x.shape[0] // batch, length, -1).swapaxes(1, 2).reshape((batch, length, heads, x.shape[-1]))


def of_group(x: jax.Array, rows: slice, group: int) -> jax.Array:
    """The folded rows of the query positions `rows`."""
    return x[:, rows.start * group : rows.stop * group]


def sink_rows(sinks: jax.Array, kv_heads: int, batch: int, length: int) -> jax.Array:
    """sinks [heads] -> [batch * kv_heads, length * group, 1], the sink of each folded row."""
    return jnp.tile(sinks.astype(jnp.float32).reshape(kv_heads, -1, 1), (batch, length, 1))


# ------------------------------------------------------------------------------------------------------- one block


class Block(NamedTuple):
    """Attention of folded rows over some of their keys, to be divided by `total`: float32.

    product: the values times exp(scores - top), [batch * kv_heads, rows, value width]; top, total: [batch * kv_heads, rows, 1].
    """

    product: jax.Array
    top: jax.Array
    total: jax.Array

    @property
    def log_sum(self) -> jax.Array:
        """The logarithm of the sum of the scores' exponentials."""
        return self.top + jnp.log(self.total)


def blocks(length: int, window: int | None) -> list[tuple[slice, slice]]:
    """Blocks of queries with the keys each may see."""
    size = max(MIN_BLOCK, -(-length // MAX_BLOCKS))
    starts = range(0, length, size)
    return [(slice(at, min(at + size, length)), slice(max(0, at + 1 - window) if window else 0, min(at + size, length))) for at in starts]


def seen(distance: jax.Array, segments: jax.Array, key_segments: jax.Array, window: int | None) -> jax.Array:
    """Which keys count: bool [batch, queries, keys] of distance [queries, keys] and segments [batch, queries], [batch, keys]."""
    near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return near & (segments[:, :, None] == key_segments[:, None])


def tied(tokens: T, to: jax.Array) -> T:
    """The same arrays, for tracing no earlier known than `to`.

    Masks follow from where tokens stand. Left so, jax computes them once for all layers and keeps them: bytes by the square of the length.
    """
    return jax.lax.optimization_barrier((tokens, to.reshape(-1)[:1]))[0]


def _masked(scores: jax.Array, visible: jax.Array) -> jax.Array:
    """Scores [batch * kv_heads, length * group, keys] with the keys that visible [batch, length, keys] rules out at -1e30."""
    batch, length, keys = visible.shape
    by_head = scores.reshape(batch, -1, length, scores.shape[1] // length, keys)
    return jnp.where(visible[:, None, :, None, :], by_head, MASKED).reshape(scores.shape)


def _scores(q: jax.Array, k: jax.Array, visible: jax.Array, softcap: float | None) -> jax.Array:
    return settle(_masked(softcapped(_product("nqd,nkd->nqk", q, k), softcap), visible))


def block_forward(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array, softcap: float | None, sink: jax.Array | None) -> Block:
    """Attention of folded queries over keys k and values v, of which they see `visible`; sink as `sink_rows` gives it, or None."""
    scores = _scores(q, k, visible, softcap)
    top = scores.max(axis=-1, keepdims=True)
    top = top if sink is None else jnp.maximum(top, sink)
    weights = settle(jnp.exp(scores - top))
    total = weights.sum(axis=-1, keepdims=True)
    total = total if sink is None else total + jnp.exp(sink - top)
    return Block(_product("nqk,nkd->nqd", weights.astype(q.dtype), v), top, total)


class Rows(NamedTuple):
    """What the backward pass knows of folded rows: queries and output gradient [.., rows, width], the rest [.., rows, 1] in float32.

    delta: the sum over the width of output times output gradient.
    """

    q: jax.Array
    d_out: jax.Array
    delta: jax.Array
    log_sum: jax.Array


def block_backward(rows: Rows, k: jax.Array, v: jax.Array, visible: jax.Array, softcap: float | None) -> tuple[jax.Array, ...]:
    """Gradients of q, k and v through one block, in float32."""
    q, d_out, delta, log_sum = rows
    scores = _scores(q, k, visible, softcap)
    weights = settle(jnp.exp(scores - log_sum))
    d_scores = weights * (_product("nqd,nkd->nqk", d_out, v) - delta)
    if softcap is not None:  # the slope of the cap; a masked score has no weight, whatever its slope
        d_scores *= 1 - jnp.square(jnp.maximum(scores, -softcap) / softcap)
    d_scores = settle(d_scores.astype(q.dtype))
    d_k, d_v = _product("nqk,nqd->nkd", d_scores, q), _product("nqk,nqd->nkd", weights.astype(q.dtype), d_out)
    return _product("nqk,nkd->nqd", d_scores, k), d_k, d_v


def delta_rows(d_out: jax.Array, out: jax.Array) -> jax.Array:
    """`Rows.delta` of folded gradients and outputs."""
    return settle(jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True))


def sink_gradient(sinks: jax.Array, delta: jax.Array, log_sum: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The gradient of sinks [heads] from folded rows; `shape` is that of the queries before they were folded."""
    batch, length, heads = shape[:3]
    kv_heads = delta.shape[0] // batch
    shares = jnp.exp(sink_rows(sinks, kv_heads, batch, length) - log_sum)
    return -(shares * delta).reshape(batch, kv_heads, length, heads // kv_heads).sum(axis=(0, 2)).reshape(-1).astype(sinks.dtype)


# ------------------------------------------------------------------------------------------------- a whole sequence


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, sinks: jax.Array | None, options: Options) -> jax.Array:
    """Softmax attention of a sequence over itself; weights are computed again in the backward pass instead of kept.

    Shapes: q [batch, length, heads, width], already scaled; k, v [batch, length, kv_heads, width]; segments int32
    [batch, length], a document's tokens being neighbours; sinks [heads]; result as q, with the width of v.
    """
    return _forward(q, k, v, segments, sinks, options)[0]


def _seen(segments: jax.Array, indices: jax.Array, rows: slice, columns: slice, window: int | None) -> jax.Array:
    distance = indices[rows, None] - indices[columns]
    return seen(distance, segments[:, rows], segments[:, columns], window)


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, sinks: jax.Array | None, options: Options):
    shape, kv_heads = q.shape, k.shape[2]
    (segments, indices), group = tied((segments, jnp.arange(shape[1])), q), shape[2] // kv_heads
    q, k, v = settle(tuple(fold(x, kv_heads) for x in (q, k, v)))
    outputs, log_sums = [], []
    for rows, columns in blocks(shape[1], options.window):
        visible = _seen(segments, indices, rows, columns, options.window)
        sink = None if sinks is None else sink_rows(sinks, kv_heads, shape[0], rows.stop - rows.start)
        block = block_forward(of_group(q, rows, group), k[:, columns], v[:, columns], visible, options.softcap, sink)
        outputs.append((block.product / block.total).astype(q.dtype))
        log_sums.append(block.log_sum)
    out = jnp.concatenate(outputs, axis=1)
    return settle(unfold(out, shape)), (q, k, v, segments, sinks, out, tuple(log_sums))


def _backward(options: Options, saved: tuple, d_out: jax.Array):
    q, k, v, segments, sinks, out, log_sums = saved
    shape, kv_heads = d_out.shape, k.shape[0] // d_out.shape[0]
    group = shape[2] // kv_heads
    d_out = settle(fold(d_out, kv_heads))
    delta, indices = delta_rows(d_out, out), jnp.arange(shape[1])
    blocks_q, d_k, d_v = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for (rows, columns), log_sum in zip(blocks(shape[1], options.window), log_sums, strict=True):
        visible = _seen(segments, indices, rows, columns, options.window)
        q_rows, d_rows, rows_delta = settle(tuple(of_group(x, rows, group) for x in (q, d_out, delta)))
        own = Rows(q_rows, d_rows, rows_delta, log_sum)
        part_q, part_k, part_v = block_backward(own, k[:, columns], v[:, columns], visible, options.softcap)
        pad = ((0, 0), (columns.start, shape[1] - columns.stop), (0, 0))
        d_v += jnp.pad(part_v, pad)
        d_k += jnp.pad(part_k, pad)
        blocks_q.append(part_q.astype(q.dtype))
    d_sinks = None if sinks is None else sink_gradient(sinks, delta, jnp.concatenate(log_sums, axis=1), shape)
    kv_shape = (*shape[:2], kv_heads)
    d_q, d_k, d_v = jnp.concatenate(blocks_q, axis=1), d_k.astype(k.dtype), d_v.astype(v.dtype)
    return *settle((unfold(d_q, shape), unfold(d_k, kv_shape), unfold(d_v, kv_shape))), None, d_sinks


causal_attention.defvjp(_forward, _backward)
