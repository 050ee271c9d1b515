"""Rotary position embedding (Su et al., 2021) in the half-split layout of Llama's published weights."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from maxtrain.config import schema


def llama3(frequencies: np.ndarray, cfg: schema.RopeScaling) -> np.ndarray:
    """Llama 3.1's scaling: long wavelengths are divided by the factor, short ones kept, those between blended."""
    turns = cfg.original_length * frequencies / (2 * math.pi)
    blend = np.clip((turns - cfg.low_freq_factor) / (cfg.high_freq_factor - cfg.low_freq_factor), 0.0, 1.0)
    return (1 - blend) * frequencies / cfg.factor + blend * frequencies


SCALINGS = {"llama3": llama3}


def frequencies(cfg: schema.Rope, width: int) -> np.ndarray:
    """Angular frequency of every pair of a head: float32 [width / 2]."""
    base = 1.0 / cfg.theta ** (np.arange(0, width, 2, dtype=np.float64) / width)
    scaled = base if cfg.scaling is None else SCALINGS[cfg.scaling.kind](base, cfg.scaling)
    return scaled.astype(np.float32)


def angles(positions: jax.Array, cfg: schema.Rope, width: int) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, float32 [batch, length, width / 2], for positions [batch, length]."""
    phase = positions.astype(jnp.float32)[..., None] * frequencies(cfg, width)
    return jnp.cos(phase), jnp.sin(phase)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate x [batch, length, heads, width] by angles [batch, length, width / 2]; halves of the head are the pairs."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
