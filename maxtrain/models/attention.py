"""Grouped-query attention (Ainslie et al., 2023) with rotary positions."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maxtrain.config import schema
from maxtrain.models.layers import Norm, matmul
from maxtrain.ops import rope
from maxtrain.ops.attention import Context, Options, attend
from maxtrain.ops.pages import cache_spec
from maxtrain.parallel.sharding import param


class Attention(nnx.Module):
    """Self-attention of one layer. Shapes: x [batch, length, embed].

    The weights are matrices, the heads of `q` and the rows of `out` side by side: an axis of its own for a head of 64
    would be padded to twice its size on TPU.
    """

    def __init__(self, cfg: schema.Model, slot: schema.Slot, dtype: str):
        self.options = Options(slot.window, cfg.attention_scale, cfg.attention_softcap)
        self.rope, self.rotary, self.qk_norm = slot.rope or cfg.rope, slot.rotary, cfg.qk_norm
        self.width, self.num_kv_heads = cfg.head_width, cfg.num_kv_heads
        std, heads, kv_heads = cfg.init_scale * cfg.embed**-0.5, cfg.num_heads * self.width, cfg.num_kv_heads * self.width
        self.q = param((cfg.embed, heads), ("embed", "heads"), std=std, dtype=dtype)
        self.k = param((cfg.embed, kv_heads), ("embed", "kv_heads"), std=std, dtype=dtype)
        self.v = param((cfg.embed, kv_heads), ("embed", "kv_heads"), std=std, dtype=dtype)
        out_std = cfg.init_scale * (heads * 2 * cfg.num_layers) ** -0.5  # residual branches shrink with depth (GPT-2)
        self.out = param((heads, cfg.embed), ("heads", "embed"), std=out_std, dtype=dtype)

        def bias(width: int, axis: str, there: bool, std: float = 0.0) -> nnx.Param | None:
            return param((width,), (axis,), std=std, dtype=dtype) if there else None

        self.q_bias = bias(heads, "heads", cfg.qkv_bias)
        self.k_bias, self.v_bias = (bias(kv_heads, "kv_heads", cfg.qkv_bias) for _ in "kv")
        self.out_bias = bias(cfg.embed, "embed", cfg.out_bias)
        self.sinks = bias(cfg.num_heads, "heads", cfg.attention_sinks, std=0.02 * cfg.init_scale)

        def norm(heads: int) -> Norm | None:
            """A norm of queries or keys, of which there are so many heads."""
            if cfg.qk_norm == "projection":
                return Norm(cfg, heads * self.width, dtype)
            own = heads if cfg.qk_norm == "each_head" else None
            return None if cfg.qk_norm == "none" else Norm(cfg, self.width, dtype, heads=own)

        self.q_norm, self.k_norm = norm(cfg.num_heads), norm(cfg.num_kv_heads)

    def __call__(self, x: jax.Array, context: Context, cache: Any) -> tuple[jax.Array, Any]:
        q, k = (
            self._prepared(*parts)
            for parts in ((matmul(x, self.q, self.q_bias), self.q_norm), (matmul(x, self.k, self.k_bias), self.k_norm))
        )
        v = self._heads(matmul(x, self.v, self.v_bias))
        if self.rotary:
            cos, sin = rope.angles(context.positions, self.rope, self.width, None if context.pages else context.segments)
            q, k = (rope.rotate(part, cos, sin, self.rope.interleaved) for part in (q, k))
        sinks = None if self.sinks is None else self.sinks.get_value()
        y, cache = attend(q, k, v, cache, context, self.options, sinks)
        return matmul(y.reshape(*x.shape[:2], -1), self.out, self.out_bias), cache

    def _heads(self, x: jax.Array) -> jax.Array:
        """[batch, length, heads * width] -> [batch, length, heads, width]."""
        return x.reshape(*x.shape[:2], -1, self.width)

    def _prepared(self, x: jax.Array, norm: Norm | None) -> jax.Array:
        """Queries or keys by head, normalised."""
        if norm is None:
            return self._heads(x)
        return self._heads(norm(x)) if self.qk_norm == "projection" else norm(self._heads(x))

    def cache_spec(self, num_pages: int, page_size: int, dtype: jnp.dtype) -> Any:
        """Shape and format of this layer's pool of pages."""
        return cache_spec(num_pages, page_size, self.num_kv_heads, (self.width, self.width), dtype, self.sinks is not None)
