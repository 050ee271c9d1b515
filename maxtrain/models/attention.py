"""Grouped-query attention (Ainslie et al., 2023) with rotary positions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maxtrain.config import schema
from maxtrain.models.layers import matmul
from maxtrain.ops import rope
from maxtrain.ops.attention import Cache, Context, attend
from maxtrain.parallel.sharding import param


class Attention(nnx.Module):
    """Self-attention of one layer. Shapes: x [batch, length, embed].

    The weights are matrices, the heads of `q` and the rows of `out` side by side: an axis of its own for a head of 64
    would be padded to twice its size on TPU.
    """

    def __init__(self, cfg: schema.Model, slot: schema.Slot, dtype: str):
        self.window, self.rope = slot.window, slot.rope or cfg.rope
        self.width, self.num_kv_heads = cfg.head_width, cfg.num_kv_heads
        std, heads, kv_heads = cfg.init_scale * cfg.embed**-0.5, cfg.num_heads * self.width, cfg.num_kv_heads * self.width
        self.q = param((cfg.embed, heads), ("embed", "heads"), std=std, dtype=dtype)
        self.k = param((cfg.embed, kv_heads), ("embed", "kv_heads"), std=std, dtype=dtype)
        self.v = param((cfg.embed, kv_heads), ("embed", "kv_heads"), std=std, dtype=dtype)
        out_std = cfg.init_scale * (heads * 2 * cfg.num_layers) ** -0.5  # residual branches shrink with depth (GPT-2)
        self.out = param((heads, cfg.embed), ("heads", "embed"), std=out_std, dtype=dtype)

    def __call__(self, x: jax.Array, context: Context, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        q, k, v = (matmul(x, weight).reshape(*x.shape[:2], -1, self.width) for weight in (self.q, self.k, self.v))
        cos, sin = rope.angles(context.positions, self.rope, self.width)
        y, cache = attend(rope.rotate(q, cos, sin), rope.rotate(k, cos, sin), v, cache, context, self.window)
        return matmul(y.reshape(*x.shape[:2], -1), self.out), cache

    def cache_spec(self, batch: int, capacity: int, dtype: jnp.dtype) -> Any:
        """Shape and format of this layer's cache for `batch` sequences of up to `capacity` tokens."""
        spec: Any = jax.ShapeDtypeStruct((batch, capacity, self.num_kv_heads, self.width), dtype)
        return Cache(spec, spec)
