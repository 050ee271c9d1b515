"""Ring attention (Liu et al., 2023): each device keeps its queries, keys and values of all devices come past.

Keys and values travel with their segments and indices from neighbour to neighbour, and the softmax of each row is put
together from what it saw, in float32. In the backward pass they travel again, and their gradients with them until they are
home. They meet in the tiles of `ops.attention_tiles`: what no query of one may see (later tokens, beyond the window, other documents)
is not computed.

In natural order, the device with the last tokens has all the work while that with the first has next to none. In the
balanced order (`balanced_order`), device i of n holds chunks i and 2n - 1 - i of 2n, and all have the same.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxtrain.ops.attention_block import Rows, delta_rows, fold, sink_gradient, unfold
from maxtrain.ops.attention_tiles import Keys, Passes, Tile, Tokens, met, tied
from maxtrain.ops.causal_attention import Options
from maxtrain.ops.linear import settle
from maxtrain.parallel.sharding import index, is_balanced, parts, permute


def balanced_order(length: int) -> jax.Array | None:
    """Which token stands where, int32 [length], if the layout in use has the balanced order; None for the natural one."""
    if not is_balanced():
        return None
    devices = parts("length")
    chunks = np.arange(length, dtype=np.int32).reshape(2 * devices, -1)
    return jnp.asarray(np.concatenate([chunks[part] for i in range(devices) for part in (i, 2 * devices - 1 - i)]))


def ring_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, indices: jax.Array | None, sinks: jax.Array | None, options: Options
) -> jax.Array:
    """Within `per_shard`: `causal_attention` of sequences that are split over the devices of `length`.

    Shapes are those of this device's part. indices: int32 [length], where in the sequence each token stands, in the balanced
    order; None in natural order.
    """
    if indices is None:
        indices = index("length") * q.shape[1] + jnp.arange(q.shape[1], dtype=jnp.int32)
    return _ring(q, k, v, Tokens(indices[None], segments), sinks, options)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _ring(q: jax.Array, k: jax.Array, v: jax.Array, tokens: Tokens, sinks: jax.Array | None, options: Options) -> jax.Array:
    return _forward(q, k, v, tokens, sinks, options)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, tokens: Tokens, sinks: jax.Array | None, options: Options):
    shape, kv_heads, tokens = q.shape, k.shape[2], tied(tokens, q)
    q, k, v = settle(tuple(fold(x, kv_heads) for x in (q, k, v)))
    keys, passes = Keys(k, v, tokens), Passes(options.window, options.softcap)
    block, _ = _around(q, keys, passes.forward(q, keys, sinks), (), passes.tile_forward, options.window)
    out = (block.product / block.total).astype(q.dtype)
    return settle(unfold(out, shape)), (q, keys, sinks, out, block.log_sum)


def _backward(options: Options, saved: tuple, d_out: jax.Array):
    q, keys, sinks, out, log_sum = saved
    shape, kv_heads = d_out.shape, q.shape[0] // d_out.shape[0]
    d_out = settle(fold(d_out, kv_heads))
    delta = delta_rows(d_out, out)
    rows, passes = Rows(q, d_out, delta, log_sum), Passes(options.window, options.softcap)
    d_q, (d_k, d_v) = _around(rows, keys, *passes.backward(rows, keys), passes.tile_backward, options.window)
    d_sinks = None if sinks is None else sink_gradient(sinks, delta, log_sum, shape)
    kv_shape = (*shape[:2], kv_heads)
    d_q, d_k, d_v = d_q.astype(q.dtype), d_k.astype(q.dtype), d_v.astype(q.dtype)
    return *settle((unfold(d_q, shape), unfold(d_k, kv_shape), unfold(d_v, kv_shape))), None, d_sinks


_ring.defvjp(_forward, _backward)


def _around(rows: Any, keys: Keys, at_rows: Any, at_keys: Any, tile: Tile, window: int | None) -> tuple[Any, Any]:
    """Let the keys of all other devices come past the rows of this one.

    Args:
        rows: what a tile needs of this device's queries; a pytree of folded arrays.
        keys: those of this device.
        at_rows: what is summed up for the rows; stays.
        at_keys: what is summed up for the keys; travels with them, and home in the end.
    """
    tokens = keys.tokens

    def step(carry: tuple[Keys, Any, Any], _: None) -> tuple[tuple[Keys, Any, Any], None]:
        keys, at_rows, at_keys = carry
        following = permute(keys, "length")  # under way while the ones that are here are used
        at_rows, at_keys = met(rows, tokens, keys, at_rows, at_keys, tile, window)
        return (following, at_rows, permute(at_keys, "length")), None

    carry = permute(keys, "length"), at_rows, permute(at_keys, "length")
    (keys, at_rows, at_keys), _ = jax.lax.scan(step, carry, None, parts("length") - 2)
    at_rows, at_keys = met(rows, tokens, keys, at_rows, at_keys, tile, window)
    return at_rows, permute(at_keys, "length")
