"""Softmax attention of a sequence over itself, block by block; weights are computed again in the backward pass.

Blocks and the loops over them (`ops.attention_tiles`) are those of `ops.ring_attention`, whose keys come from other devices too.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from maxtrain.ops.attention_block import Rows, delta_rows, fold, sink_gradient, unfold
from maxtrain.ops.attention_tiles import Keys, Passes, Tokens, tied
from maxtrain.ops.linear import settle


class Options(NamedTuple):
    """What is fixed about the attention of a layer.

    window: a query sees so many tokens, itself included; None sees everything before it.
    scale: factor on the products of queries and keys; None is 1 / sqrt(key width).
    softcap: scores become softcap * tanh(scores / softcap) (Gemma 2).
    """

    window: int | None = None
    scale: float | None = None
    softcap: float | None = None


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, sinks: jax.Array | None, options: Options) -> jax.Array:
    """Softmax attention of a sequence over itself; weights are computed again in the backward pass instead of kept.

    Shapes: q [batch, length, heads, width], already scaled; k, v [batch, length, kv_heads, width]; segments int32
    [batch, length], a document's tokens being neighbours; sinks [heads]; result as q, with the width of v.
    """
    return _forward(q, k, v, segments, sinks, options)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, sinks: jax.Array | None, options: Options):
    shape, kv_heads = q.shape, k.shape[2]
    segments, indices = tied((segments, jnp.arange(shape[1], dtype=jnp.int32)), q)
    q, k, v = settle(tuple(fold(x, kv_heads) for x in (q, k, v)))
    keys = Keys(k, v, Tokens(indices[None], segments))
    block = Passes(options.window, options.softcap).forward(q, keys, sinks)
    out = (block.product / block.total).astype(q.dtype)
    return settle(unfold(out, shape)), (q, keys, sinks, out, block.log_sum)


def _backward(options: Options, saved: tuple, d_out: jax.Array):
    q, keys, sinks, out, log_sum = saved
    shape, kv_heads = d_out.shape, q.shape[0] // d_out.shape[0]
    d_out = settle(fold(d_out, kv_heads))
    delta = delta_rows(d_out, out)
    d_q, (d_k, d_v) = Passes(options.window, options.softcap).backward(Rows(q, d_out, delta, log_sum), keys)
    d_sinks = None if sinks is None else sink_gradient(sinks, delta, log_sum, shape)
    kv_shape = (*shape[:2], kv_heads)
    d_q, d_k, d_v = d_q.astype(q.dtype), d_k.astype(q.dtype), d_v.astype(q.dtype)
    return *settle((unfold(d_q, shape), unfold(d_k, kv_shape), unfold(d_v, kv_shape))), None, d_sinks


causal_attention.defvjp(_forward, _backward)
