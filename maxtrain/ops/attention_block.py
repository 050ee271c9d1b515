"""Softmax attention of one block of queries over one block of keys, forward and backward: the arithmetic that all plain XLA shares.

Queries, keys and values are folded: [batch * kv_heads, rows, width], the query heads of a group being rows of one product. Every
product has its left operand as it lies and sums over the rows of its right one, which is how XLA:CPU multiplies fastest. The backward
pass has its scores transposed, keys by queries, so that four of its five products are of that form and have many rows: on one core with
AVX2, in GFLOP/s at 768 rows, 512 keys and width 64, d_k = d_scores @ q gives 60, (q transposed) @ d_scores 45, and 20 once XLA has moved
the transpose that follows into the product.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from maxtrain.ops.linear import settle
from maxtrain.ops.paged_attention import MASKED


def softcapped(scores: jax.Array, softcap: float | None) -> jax.Array:
    """softcap * tanh(scores / softcap) (Gemma 2); the scores themselves for None."""
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


# --------------------------------------------------------------------------------------------------------- folding


def fold(x: jax.Array, kv_heads: int) -> jax.Array:
    """[batch, length, heads, width] -> [batch * kv_heads, length * group, width]: the query heads of a group become rows."""
    batch, length, heads, width = x.shape
    return x.reshape(batch, length, kv_heads, -1).swapaxes(1, 2).reshape(batch * kv_heads, length * (heads // kv_heads), width)


def unfold(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `fold`, to [batch, length, heads, width]; `shape` begins with the first three."""
    batch, length, heads = shape[:3]
    return x.reshape(batch, x.shape[0] // batch, length, -1).swapaxes(1, 2).reshape((batch, length, heads, x.shape[-1]))


def sink_rows(sinks: jax.Array, kv_heads: int, batch: int, length: int) -> jax.Array:
    """sinks [heads] -> [batch * kv_heads, length * group, 1], the sink of each folded row."""
    return jnp.tile(sinks.astype(jnp.float32).reshape(kv_heads, -1, 1), (batch, length, 1))


# --------------------------------------------------------------------------------------------------------- forward


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

    def merged(self, other: "Block") -> "Block":
        """Attention over the keys of both, rescaled to the higher top."""
        top = jnp.maximum(self.top, other.top)
        mine, theirs = jnp.exp(self.top - top), jnp.exp(other.top - top)
        return Block(self.product * mine + other.product * theirs, top, self.total * mine + other.total * theirs)


def seen(distance: jax.Array, segments: jax.Array, key_segments: jax.Array, window: int | None) -> jax.Array:
    """Which keys count: bool [batch, queries, keys] of distance [queries, keys] and segments [batch, queries], [batch, keys]."""
    near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return near & (segments[:, :, None] == key_segments[:, None])


def _product(form: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Batched product with float32 sums."""
    return jnp.einsum(form, a, b, preferred_element_type=jnp.float32)


def _across(x: jax.Array) -> jax.Array:
    """[n, rows, width] -> [n, width, rows], made before it is read."""
    return settle(x.swapaxes(1, 2))


def _masked(scores: jax.Array, visible: jax.Array | None) -> jax.Array:
    """Scores [batch * kv_heads, length * group, keys] with the keys that visible [batch, length, keys] rules out at -1e30.

    visible: None rules out none.
    """
    if visible is None:
        return scores
    batch, length, keys = visible.shape
    by_head = scores.reshape(batch, -1, length, scores.shape[1] // length, keys)
    return jnp.where(visible[:, None, :, None, :], by_head, MASKED).reshape(scores.shape)


def block_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array | None, softcap: float | None, sink: jax.Array | None
) -> Block:
    """Attention of folded queries over keys k and values v; visible as in `_masked`, sink as `sink_rows` gives it or None."""
    scores = settle(_masked(softcapped(_product("nqd,ndk->nqk", q, _across(k)), softcap), visible))
    top = scores.max(axis=-1, keepdims=True)
    top = top if sink is None else jnp.maximum(top, sink)
    weights = settle(jnp.exp(scores - top))
    total = weights.sum(axis=-1, keepdims=True)
    total = total if sink is None else total + jnp.exp(sink - top)
    return Block(_product("nqk,nkd->nqd", weights.astype(q.dtype), v), top, total)


# -------------------------------------------------------------------------------------------------------- backward


class Rows(NamedTuple):
    """What the backward pass knows of folded rows: queries and output gradient [.., rows, width], the rest [.., rows, 1] in float32.

    delta: the sum over the width of output times output gradient.
    """

    q: jax.Array
    d_out: jax.Array
    delta: jax.Array
    log_sum: jax.Array


def block_backward(rows: Rows, k: jax.Array, v: jax.Array, visible: jax.Array | None, softcap: float | None) -> tuple[jax.Array, ...]:
    """Gradients of q, k and v through one block, in float32; all but rows as in `block_forward`."""
    q, d_out, delta, log_sum = rows
    scores = softcapped(_product("nkd,ndq->nkq", k, _across(q)), softcap)
    scores = settle(_masked_across(scores, visible))
    weights = settle(jnp.exp(scores - log_sum.swapaxes(1, 2)))
    d_scores = weights * (_product("nkd,ndq->nkq", v, _across(d_out)) - delta.swapaxes(1, 2))
    if softcap is not None:  # the slope of the cap; a masked score has no weight, whatever its slope
        d_scores *= 1 - jnp.square(jnp.maximum(scores, -softcap) / softcap)
    d_scores = settle(d_scores.astype(q.dtype))
    d_k, d_v = _product("nkq,nqd->nkd", d_scores, q), _product("nkq,nqd->nkd", weights.astype(q.dtype), d_out)
    return _across(settle(_product("ndk,nkq->ndq", _across(k), d_scores))), d_k, d_v


def _masked_across(scores: jax.Array, visible: jax.Array | None) -> jax.Array:
    """`_masked` of transposed scores [batch * kv_heads, keys, length * group]."""
    if visible is None:
        return scores
    batch, length, keys = visible.shape
    by_head = scores.reshape(batch, -1, keys, length, scores.shape[2] // length)
    return jnp.where(visible.swapaxes(1, 2)[:, None, :, :, None], by_head, MASKED).reshape(scores.shape)


def delta_rows(d_out: jax.Array, out: jax.Array) -> jax.Array:
    """`Rows.delta` of folded gradients and outputs."""
    return settle(jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True))


def sink_gradient(sinks: jax.Array, delta: jax.Array, log_sum: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The gradient of sinks [heads] from folded rows; `shape` is that of the queries before they were folded."""
    batch, length, heads = shape[:3]
    kv_heads = delta.shape[0] // batch
    shares = jnp.exp(sink_rows(sinks, kv_heads, batch, length) - log_sum)
    return -(shares * delta).reshape(batch, kv_heads, length, heads // kv_heads).sum(axis=(0, 2)).reshape(-1).astype(sinks.dtype)
