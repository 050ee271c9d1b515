"""Rotary position embedding (Su et al., 2021): of halves as in Llama's published weights, or of neighbours; of a head or its first part."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxtrain.config import schema


def llama3(frequencies: np.ndarray, cfg: schema.RopeScaling, theta: float) -> np.ndarray:
    """Llama 3.1's scaling: long wavelengths are divided by the factor, short ones kept, those between blended."""
    turns = cfg.original_length * frequencies / (2 * math.pi)
    blend = np.clip((turns - cfg.low_freq_factor) / (cfg.high_freq_factor - cfg.low_freq_factor), 0.0, 1.0)
    return (1 - blend) * frequencies / cfg.factor + blend * frequencies


def yarn(frequencies: np.ndarray, cfg: schema.RopeScaling, theta: float) -> np.ndarray:
    """YaRN's "NTK by parts" (Peng et al., 2023, section 3.2): the ramp between kept and stretched pairs is linear in the pair's number."""
    width = 2 * len(frequencies)
    low, high = (
        width * math.log(cfg.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (cfg.beta_fast, cfg.beta_slow)
    )
    if cfg.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    stretched = np.clip((np.arange(len(frequencies)) - low) / (high - low if high > low else 0.001), 0.0, 1.0)
    return stretched * frequencies / cfg.factor + (1 - stretched) * frequencies


def linear(frequencies: np.ndarray, cfg: schema.RopeScaling, theta: float) -> np.ndarray:
    """Position interpolation (Chen et al., 2023): every angle divided by the factor."""
    return frequencies / cfg.factor


def longrope(frequencies: np.ndarray, cfg: schema.RopeScaling, theta: float) -> np.ndarray:
    """LongRoPE (Ding et al., 2024) within the original length: every pair has its divisor."""
    return frequencies / np.asarray(cfg.short_factors)


def dynamic(frequencies: np.ndarray, cfg: schema.RopeScaling, theta: float) -> np.ndarray:
    """Dynamic NTK within the original length: nothing is stretched."""
    return frequencies


SCALINGS = {"llama3": llama3, "yarn": yarn, "linear": linear, "longrope": longrope, "dynamic": dynamic}


def frequencies(cfg: schema.Rope, width: int) -> np.ndarray:
    """Angular frequency of every pair of `width` rotated elements, of longrope and dynamic in short documents: float32 [width / 2]."""
    base = _unscaled(cfg, width)
    scaled = base if cfg.scaling is None else SCALINGS[cfg.scaling.kind](base, cfg.scaling, cfg.theta)
    return scaled.astype(np.float32)


def _unscaled(cfg: schema.Rope, width: int) -> np.ndarray:
    return 1.0 / cfg.theta ** (np.arange(0, width, 2, dtype=np.float64) / width)


def angles(positions: jax.Array, cfg: schema.Rope, width: int, segments: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, float32 [batch, length, rotated / 2], for positions [batch, length] and heads of `width`.

    Args:
        segments: int32 [batch, length], the document of each token; None where all are within the original length.
    """
    frequency: Any = frequencies(cfg, cfg.width(width))
    if cfg.scaling is not None and cfg.scaling.by_length and segments is not None:
        lengths = _lengths(positions, segments)[..., None]
        frequency = jnp.where(lengths > cfg.scaling.original_length, _long(cfg, cfg.width(width), lengths), frequency)
    phase = positions.astype(jnp.float32)[..., None] * frequency
    cos, sin = jnp.cos(phase), jnp.sin(phase)
    factor = 1.0 if cfg.scaling is None else cfg.scaling.rotation_factor
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def _long(cfg: schema.Rope, width: int, lengths: jax.Array) -> Any:
    """The frequencies in documents of `lengths` [batch, length, 1] beyond the original one: float32 [..., width / 2]."""
    assert cfg.scaling is not None
    if cfg.scaling.kind == "longrope":
        return (_unscaled(cfg, width) / np.asarray(cfg.scaling.long_factors)).astype(np.float32)
    grown = cfg.scaling.factor * lengths.astype(jnp.float32) / cfg.scaling.original_length - (cfg.scaling.factor - 1)
    theta = cfg.theta * grown ** (width / (width - 2))  # as in transformers, in float32
    return 1.0 / theta ** (np.arange(0, width, 2, dtype=np.float32) / width)


def _lengths(positions: jax.Array, segments: jax.Array) -> jax.Array:
    """Number of tokens, int32 [batch, length], of the document each token belongs to."""
    last = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    end = jax.lax.cummin(jnp.where(last, jnp.arange(segments.shape[1]), segments.shape[1]), axis=1, reverse=True)
    return jnp.take_along_axis(positions, end, axis=1) + 1


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool = False) -> jax.Array:
    """Rotate x [batch, length, heads, width] by angles [batch, length, pairs]: the first 2 * pairs elements, the rest is kept.

    A pair is an element of the first half with its like in the second, or, `interleaved`, two neighbours.
    """
    rotated, rest = x[..., : 2 * cos.shape[-1]].astype(jnp.float32), x[..., 2 * cos.shape[-1] :]
    first, second = (rotated[..., 0::2], rotated[..., 1::2]) if interleaved else jnp.split(rotated, 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned = [first * cos - second * sin, second * cos + first * sin]
    joined = jnp.stack(turned, axis=-1).reshape(rotated.shape) if interleaved else jnp.concatenate(turned, axis=-1)
    return jnp.concatenate([joined.astype(x.dtype), rest], axis=-1) if rest.shape[-1] else joined.astype(x.dtype)
