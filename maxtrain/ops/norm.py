"""Root-mean-square norm (Zhang and Sennrich, 2019) and layer norm (Ba et al., 2016)."""

from functools import partial

import jax
import jax.numpy as jnp

from maxtrain.ops.linear import settle


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis: float32 inside, the format of x outside. scale: the last axes of x."""
    return _forward(x, scale, eps)[0]


def _forward(x: jax.Array, scale: jax.Array, eps: float) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return settle((x32 * inverse).astype(x.dtype) * scale.astype(x.dtype)), (x, inverse, scale)


def _backward(eps: float, saved: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, inverse, scale = saved
    normed, dy = x.astype(jnp.float32) * inverse, settle(dy).astype(jnp.float32)
    d_normed = dy * scale.astype(jnp.float32)
    dx = inverse * (d_normed - normed * jnp.mean(d_normed * normed, axis=-1, keepdims=True))
    d_scale = jnp.sum(dy * normed, axis=tuple(range(x.ndim - scale.ndim)))
    return settle(dx.astype(x.dtype)), d_scale.astype(scale.dtype)


rms_norm.defvjp(_forward, _backward)


def float32_rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """The norm with its scale multiplied in float32, before the one rounding to the format of x (OLMo 2, GPT-OSS)."""
    return rms_norm(x.astype(jnp.float32), scale.astype(jnp.float32), eps).astype(x.dtype)


def one_plus_rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """The norm with 1 + scale in place of the scale, all of it in float32 (Gemma)."""
    return float32_rms_norm(x, 1.0 + scale.astype(jnp.float32), eps)


def layer_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """(x - mean) / sqrt(variance + eps) * scale over the last axis: float32 inside, the format of x outside."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    return settle((centred * inverse * scale.astype(jnp.float32)).astype(x.dtype))
