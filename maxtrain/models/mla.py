"""Multi-head latent attention (DeepSeek-V2, section 2.1): keys and values come from one latent vector per token."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maxtrain.config import schema
from maxtrain.models.layers import Norm, matmul
from maxtrain.ops import rope
from maxtrain.ops.attention import Context, Options, attend
from maxtrain.ops.linear import rows_of
from maxtrain.ops.pages import cache_spec
from maxtrain.parallel.sharding import param


class LatentAttention(nnx.Module):
    """Self-attention of one layer. Shapes: x [batch, length, embed].

    Training makes keys and values of all heads from the latent vectors. Serving caches latent vector and rotated key alone and
    multiplies the matrix of keys into the queries, that of values into the result (section 2.1.2): one wide key for all heads.
    """

    def __init__(self, cfg: schema.Model, slot: schema.Slot, dtype: str):
        assert cfg.mla is not None
        self.cfg, self.num_heads, self.width = cfg.mla, cfg.num_heads, cfg.head_width
        self.rope, self.rotary = slot.rope or cfg.rope, slot.rotary
        scaling = self.rope.scaling
        sharper = 1.0 if scaling is None or scaling.mscale_all_dim is None else scaling.magnitude(scaling.mscale_all_dim) ** 2
        self.options = Options(slot.window, cfg.attention_scale or self.width**-0.5 * sharper, cfg.attention_softcap)
        embed, scale, heads = cfg.embed, cfg.init_scale, cfg.num_heads
        queries, q_rank, kv_rank = heads * self.width, self.cfg.q_rank, self.cfg.kv_rank

        def matrix(rows: int, columns: int, axis: str | None) -> nnx.Param:  # FSDP splits the latent width as it does embed
            return param((rows, columns), ("embed", axis), std=scale * rows**-0.5, dtype=dtype)

        def bias(width: int, there: bool) -> nnx.Param | None:
            return param((width,), ("embed",), std=0.0, dtype=dtype) if there else None

        self.q_down = None if q_rank is None else matrix(embed, q_rank, None)
        self.q_norm = None if q_rank is None else Norm(cfg, q_rank, dtype, self.cfg.norm_eps)
        self.q = matrix(q_rank or embed, queries, "heads")
        self.kv_down = matrix(embed, self.cfg.cached, None)
        self.kv_norm = Norm(cfg, kv_rank, dtype, self.cfg.norm_eps)
        self.kv_up = matrix(kv_rank, heads * (self.cfg.nope_dim + self.cfg.value_dim), "heads")
        out_std = scale * (heads * self.cfg.value_dim * 2 * cfg.num_layers) ** -0.5
        self.out = param((heads * self.cfg.value_dim, embed), ("heads", "embed"), std=out_std, dtype=dtype)
        self.q_down_bias = None if q_rank is None else bias(q_rank, cfg.qkv_bias)
        self.kv_down_bias, self.out_bias = bias(self.cfg.cached, cfg.qkv_bias), bias(embed, cfg.out_bias)

    def __call__(self, x: jax.Array, context: Context, cache: Any) -> tuple[jax.Array, Any]:
        q_nope, q_rope = jnp.split(self._heads(self._queries(x)), [self.cfg.nope_dim], axis=-1)
        latent, k_rope = jnp.split(matmul(x, self.kv_down, self.kv_down_bias), [self.cfg.kv_rank], axis=-1)
        latent, k_rope = self.kv_norm(latent), k_rope[:, :, None]
        if self.rotary:
            segments = None if context.pages else context.segments
            cos, sin = rope.angles(context.positions, self.rope, self.cfg.rope_dim, segments)
            q_rope, k_rope = (rope.rotate(part, cos, sin, self.rope.interleaved) for part in (q_rope, k_rope))
        if cache is None:
            k_nope, v = jnp.split(self._heads(matmul(latent, self.kv_up)), [self.cfg.nope_dim], axis=-1)
            k = jnp.concatenate([k_nope, jnp.broadcast_to(k_rope, (*k_nope.shape[:3], k_rope.shape[-1]))], axis=-1)
            y, _ = attend(jnp.concatenate([q_nope, q_rope], axis=-1), k, v, None, context, self.options)
        else:
            up = rows_of(self.kv_up.get_value().astype(x.dtype)).reshape(self.num_heads, -1, self.cfg.kv_rank)
            of_keys, of_values = jnp.split(up, [self.cfg.nope_dim], axis=1)
            q = jnp.concatenate([jnp.einsum("blhn,hnr->blhr", q_nope, of_keys), q_rope], axis=-1)
            k = jnp.concatenate([latent[:, :, None], k_rope], axis=-1)
            y, cache = attend(q, k, None, cache, context, self.options)
            y = jnp.einsum("blhr,hvr->blhv", y[..., : self.cfg.kv_rank], of_values)
        return matmul(y.reshape(*x.shape[:2], -1), self.out, self.out_bias), cache

    def _queries(self, x: jax.Array) -> jax.Array:
        latent = x if self.q_norm is None or self.q_down is None else self.q_norm(matmul(x, self.q_down, self.q_down_bias))
        return matmul(latent, self.q)

    def _heads(self, x: jax.Array) -> jax.Array:
        """[batch, length, heads * width] -> [batch, length, heads, width]."""
        return x.reshape(*x.shape[:2], self.num_heads, -1)

    def cache_spec(self, num_pages: int, page_size: int, dtype: jnp.dtype) -> Any:
        """Shape and format of this layer's pool of pages."""
        return cache_spec(num_pages, page_size, 1, (self.cfg.cached, None), dtype)
