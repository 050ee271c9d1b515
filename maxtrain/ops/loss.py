"""Cross-entropy that never materialises [batch, length, vocab].

The loss is the last thing a forward pass computes, so each chunk of positions makes its logits once and yields loss and
gradients together: three products with the head instead of the four of recomputation, and no logits kept.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from maxtrain.parallel.sharding import per_batch_shard


def cross_entropy(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, *, z_loss: float, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of next-token losses.

    Shapes: hidden [batch, length, embed]; head [vocab, embed]; targets int32 and weights float32 [batch, length].
    Returns: the sum over all tokens of weight * (cross-entropy + z_loss * logsumexp^2), a scalar to differentiate; and
    the weighted cross-entropy in nats of each sequence, float32 [batch], a constant to the gradient.
    """
    length = hidden.shape[1]
    chunk = min(chunk, length)
    pad = -length % chunk
    if pad:
        hidden, targets, weights = (jnp.pad(a, ((0, 0), (0, pad)) + ((0, 0),) * (a.ndim - 2)) for a in (hidden, targets, weights))
    local = per_batch_shard(lambda *arrays: _sums(z_loss, chunk, *arrays), num_batched=3)
    total, rows = local(hidden, targets, weights, head)
    return total.sum(), jax.lax.stop_gradient(rows)


def _chunks(chunk: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """[batch, length, ...] -> [length / chunk, batch, chunk, ...]."""
    return tuple(jnp.moveaxis(a.reshape(a.shape[0], -1, chunk, *a.shape[2:]), 1, 0) for a in arrays)


def _chunk_loss(z_loss: float, x: jax.Array, target: jax.Array, weight: jax.Array, head: jax.Array) -> tuple[jax.Array, ...]:
    """Loss and cross-entropy of each sequence of one chunk, with what the gradient needs: logits and their logsumexp."""
    logits = jnp.einsum("bce,ve->bcv", x, head, preferred_element_type=jnp.float32)
    lse = jax.nn.logsumexp(logits, axis=-1)
    ce = lse - jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    return jnp.sum(weight * (ce + z_loss * lse**2)), jnp.sum(weight * ce, axis=1), logits, lse


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums(z_loss: float, chunk: int, hidden: jax.Array, targets: jax.Array, weights: jax.Array, head: jax.Array):
    """Total loss [1] and cross-entropy of each sequence [batch], over the local rows."""
    parts = jax.lax.map(lambda part: _chunk_loss(z_loss, part[0], part[1], part[2], head)[:2], _chunks(chunk, hidden, targets, weights))
    return parts[0].sum()[None], parts[1].sum(axis=0)


def _forward(z_loss: float, chunk: int, hidden: jax.Array, targets: jax.Array, weights: jax.Array, head: jax.Array):
    def one(d_head: jax.Array, part: tuple[jax.Array, ...]):
        x, target, weight = part
        loss, ce, logits, lse = _chunk_loss(z_loss, x, target, weight, head)
        slope = (weight * (1 + 2 * z_loss * lse))[..., None]
        hit = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == target[..., None]
        d_logits = (jnp.exp(logits - lse[..., None]) * slope - jnp.where(hit, weight[..., None], 0.0)).astype(x.dtype)
        d_x = jnp.einsum("bcv,ve->bce", d_logits, head)
        d_head += jnp.einsum("bcv,bce->ve", d_logits, x, preferred_element_type=jnp.float32)
        return d_head, (loss, ce, d_x)

    d_head, (loss, ce, d_x) = jax.lax.scan(one, jnp.zeros(head.shape, jnp.float32), _chunks(chunk, hidden, targets, weights))
    d_hidden = jnp.moveaxis(d_x, 0, 1).reshape(hidden.shape)
    return (loss.sum()[None], ce.sum(axis=0)), (d_hidden, d_head.astype(head.dtype))


def _backward(z_loss: float, chunk: int, saved: tuple[jax.Array, jax.Array], cotangents: tuple[jax.Array, jax.Array]):
    d_hidden, d_head = saved
    slope = cotangents[0][0]  # of the total; the sum of each sequence is not differentiated
    return (d_hidden * slope).astype(d_hidden.dtype), None, None, (d_head * slope).astype(d_head.dtype)


_sums.defvjp(_forward, _backward)
