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
    """Self-attention of one layer. Shapes: x [batch, length, embed]."""

    def __init__(self, cfg: schema.Model, slot: schema.Slot, rngs: nnx.Rngs, dtype: str):
        self.window, self.rope = slot.window, slot.rope or cfg.rope
        self.width, self.num_kv_heads = cfg.head_width, cfg.num_kv_heads
        std, heads, kv_heads = cfg.init_scale * cfg.embed**-0.5, cfg.num_heads, cfg.num_kv_heads
        self.q = param(rngs, (cfg.embed, heads, self.width), ("embed", "heads", "head"), std=std, dtype=dtype)
        self.k = param(rngs, (cfg.embed, kv_heads, self.width), ("embed", "kv_heads", "head"), std=std, dtype=dtype)
        self.v = param(rngs, (cfg.embed, kv_heads, self.width), ("embed", "kv_heads", "head"), std=std, dtype=dtype)
        out_std = cfg.init_scale * (heads * self.width * 2 * cfg.num_layers) ** -0.5  # residual branches shrink with depth (GPT-2)
        self.out = param(rngs, (heads, self.width, cfg.embed), ("heads", "head", "embed"), std=out_std, dtype=dtype)

    def __call__(self, x: jax.Array, context: Context, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        cos, sin = rope.angles(context.positions, self.rope, self.width)
        q, k, v = rope.rotate(matmul(x, self.q), cos, sin), rope.rotate(matmul(x, self.k), cos, sin), matmul(x, self.v)
        y, cache = attend(q, k, v, cache, context, self.window)
        return matmul(y, self.out, num_contracted=2), cache

    def cache_spec(self, batch: int, capacity: int, dtype: jnp.dtype) -> Any:
        """Shape and format of this layer's cache for `batch` sequences of up to `capacity` tokens."""
        spec: Any = jax.ShapeDtypeStruct((batch, capacity, self.num_kv_heads, self.width), dtype)
        return Cache(spec, spec)
