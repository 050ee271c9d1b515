"""Cross-entropy that never materialises [batch, length, vocab].

The loss is the last thing a forward pass computes, so each chunk of positions makes its logits once and yields loss and
gradients together: three products with the head instead of the four of recomputation, and no logits kept.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from maxtrain.ops.linear import Weight, settle
from maxtrain.parallel.sharding import index, parts, per_shard, pmax, psum


def cross_entropy(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, *, z_loss: float, chunk: int, softcap: float | None = None
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of next-token losses.

    Shapes: hidden [batch, length, embed]; head [vocab, embed], the parameter, multiplied in the format of hidden; targets int32
    and weights float32 [batch, length]. With a softcap, logits z become softcap * tanh(z / softcap).
    Returns: the sum over all tokens of weight * (cross-entropy + z_loss * logsumexp^2), a scalar to differentiate; and
    the weighted cross-entropy in nats of each sequence, float32 [batch], a constant to the gradient.
    """
    tokens = ("batch", "length")
    local = per_shard(partial(_local, z_loss, chunk, softcap), ((*tokens, None), tokens, tokens, ("vocab", None)), (tokens, tokens))
    total, rows = local(hidden, targets, weights, Weight.of(head, hidden.dtype))
    return total.sum(), jax.lax.stop_gradient(rows.sum(axis=1))


def _local(z_loss: float, chunk: int, softcap: float | None, hidden: jax.Array, targets: jax.Array, weights: jax.Array, head: Weight):
    """Total loss [1, 1] and cross-entropy of each sequence [batch, 1] of the tokens of one device."""
    length = hidden.shape[1]
    chunk = min(chunk, length)
    pad = -length % chunk
    if pad:
        hidden, targets, weights = (jnp.pad(a, ((0, 0), (0, pad)) + ((0, 0),) * (a.ndim - 2)) for a in (hidden, targets, weights))
    total, rows = _sums(z_loss, chunk, softcap, hidden, targets, weights, head)
    return total[:, None], rows[:, None]


def _chunks(chunk: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """[batch, length, ...] -> [length / chunk, batch * chunk, ...]."""
    batch = arrays[0].shape[0]
    return tuple(jnp.moveaxis(a.reshape(batch, -1, chunk, *a.shape[2:]), 1, 0).reshape(-1, batch * chunk, *a.shape[2:]) for a in arrays)


class _Chunk(NamedTuple):
    """Softmax of one chunk of rows: exp(logits - top) [rows, vocab], its sum, the rows' losses [rows, 1]; the slope of a softcap."""

    exponentials: jax.Array
    total: jax.Array
    log_sum: jax.Array
    cross_entropy: jax.Array
    slope: jax.Array | None


def _softmax(x: jax.Array, target: jax.Array, head: jax.Array, softcap: float | None) -> _Chunk:
    logits, slope = settle(jnp.einsum("re,ve->rv", x, head, preferred_element_type=jnp.float32)), None
    if softcap is not None:
        share = settle(jnp.tanh(logits / softcap))
        logits, slope = softcap * share, 1 - jnp.square(share)
    top = pmax(jnp.max(logits, axis=-1, keepdims=True), "vocab")
    exponentials = settle(jnp.exp(logits - top))
    total = psum(jnp.sum(exponentials, axis=-1, keepdims=True), "vocab")
    log_sum = top + jnp.log(total)
    return _Chunk(exponentials, total, log_sum, log_sum - _at_target(logits, target), slope)


def _at_target(logits: jax.Array, target: jax.Array) -> jax.Array:
    """The logits [rows, 1] of the targets, wherever their part of the vocabulary lies."""
    if parts("vocab") == 1:
        return jnp.take_along_axis(logits, target[:, None], axis=-1)
    hit = jnp.arange(logits.shape[1]) == target[:, None]
    return psum(jnp.sum(jnp.where(hit, logits, 0.0), axis=-1, keepdims=True), "vocab")


def _sequences(batch: int, losses: jax.Array) -> jax.Array:
    """Sum over each sequence, [batch], of losses [chunks, batch * chunk]."""
    return losses.reshape(losses.shape[0], batch, -1).sum(axis=(0, 2))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _sums(z_loss: float, chunk: int, softcap: float | None, hidden: jax.Array, targets: jax.Array, weights: jax.Array, head: Weight):
    """Total loss [1] and cross-entropy of each sequence [batch], over the local rows and all of the vocabulary."""
    targets = targets - index("vocab") * head.value.shape[0]

    def one(part: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        x, target, weight = part
        found = _softmax(x, target, head.value, softcap)
        ce = weight * found.cross_entropy[:, 0]
        return ce.sum() + z_loss * jnp.sum(weight * found.log_sum[:, 0] ** 2), ce

    total, ce = jax.lax.map(one, _chunks(chunk, hidden, targets, weights))
    return total.sum()[None], _sequences(hidden.shape[0], ce)


def _forward(z_loss: float, chunk: int, softcap: float | None, hidden: jax.Array, targets: jax.Array, weights: jax.Array, head: Weight):
    vocab, embed = head.value.shape
    targets = targets - index("vocab") * vocab

    def one(d_head: jax.Array, part: tuple[jax.Array, ...]):
        x, target, weight = part[0], part[1], part[2][:, None]
        found = _softmax(x, target, head.value, softcap)
        loss = jnp.sum(weight * (found.cross_entropy + z_loss * found.log_sum**2))
        slope = weight * (1 + 2 * z_loss * found.log_sum) / found.total
        hit = jnp.arange(vocab) == target[:, None]
        d_logits = found.exponentials * slope - jnp.where(hit, weight, 0.0)
        d_logits = settle((d_logits if found.slope is None else d_logits * found.slope).astype(x.dtype))
        # [embed, vocab]: the narrow operand on the left, see ops/linear.py
        d_head += settle(jnp.einsum("re,rv->ev", x, d_logits, preferred_element_type=jnp.float32))
        return d_head, (loss, (weight * found.cross_entropy)[:, 0], d_logits @ head.value)

    d_head, (loss, ce, d_x) = jax.lax.scan(one, jnp.zeros((embed, vocab), jnp.float32), _chunks(chunk, hidden, targets, weights))
    d_hidden = jnp.moveaxis(d_x.reshape(-1, hidden.shape[0], chunk, embed), 0, 1).reshape(hidden.shape)
    return (loss.sum()[None], _sequences(hidden.shape[0], ce)), (d_hidden, d_head.T)


def _backward(
    z_loss: float, chunk: int, softcap: float | None, saved: tuple[jax.Array, jax.Array], cotangents: tuple[jax.Array, jax.Array]
):
    d_hidden, d_head = saved
    # Of the total; the sum of each sequence is not differentiated. Devices with parts of the vocabulary have shares of it.
    slope = psum(cotangents[0][0], "vocab")
    return (d_hidden * slope).astype(d_hidden.dtype), None, None, Weight.gradient(d_head * slope)


_sums.defvjp(_forward, _backward)
