"""Mixture of experts (Shazeer et al., 2017; Mixtral): a router sends each token to a few gated feed-forwards.

What is not linear in the batch, the balancing loss and the capacity, is defined per sequence, so neither the mesh nor the
number of microbatches changes what is computed.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from maxtrain.config import schema
from maxtrain.ops.expert_parallel import boxes_to_owners, boxes_to_senders, rows_to_owners
from maxtrain.ops.gated import GATED
from maxtrain.ops.grouped_matmul import grouped_matmul
from maxtrain.parallel.sharding import param, per_shard, psum


class MoeMlp(nnx.Module):
    """Routed gated feed-forward. Shapes: x [batch, length, embed]."""

    def __init__(self, cfg: schema.Model, dtype: str):
        assert cfg.moe is not None
        self.cfg, self.activation = cfg.moe, cfg.activation
        experts, embed, mlp, scale = cfg.moe.num_experts, cfg.embed, cfg.moe.mlp, cfg.init_scale
        self.router = param((embed, experts), ("embed", "expert"), std=scale * embed**-0.5, dtype=dtype)
        self.gate = param((experts, embed, mlp), ("expert", "embed", "mlp"), std=scale * embed**-0.5, dtype=dtype)
        self.up = param((experts, embed, mlp), ("expert", "embed", "mlp"), std=scale * embed**-0.5, dtype=dtype)
        down_std = scale * (mlp * 2 * cfg.num_layers) ** -0.5
        self.down = param((experts, mlp, embed), ("expert", "mlp", "embed"), std=down_std, dtype=dtype)

    def __call__(self, x: jax.Array, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Output [batch, length, embed] and the balancing loss, summed over tokens (a scalar)."""
        probabilities = jax.nn.softmax(jnp.einsum("ble,ex->blx", x.astype(jnp.float32), self.router.get_value().astype(jnp.float32)))
        weights, experts = jax.lax.top_k(probabilities, self.cfg.experts_per_token)
        if self.cfg.norm_topk:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        real = segments != 0
        tokens, matrix = ("batch", None), ("expert", None, "mlp")
        inputs = ((*tokens, None), (*tokens, None), (*tokens, None), tokens, matrix, matrix, ("expert", "mlp", None))
        dispatch = per_shard(DISPATCH[self.cfg.dispatch](self.cfg, self.activation), inputs, (*tokens, None))
        matrices = [p.get_value().astype(x.dtype) for p in (self.gate, self.up, self.down)]
        y = dispatch(x, weights.astype(x.dtype), experts, real, *matrices)
        return y, self._balance(probabilities, experts, real)

    def _balance(self, probabilities: jax.Array, experts: jax.Array, real: jax.Array) -> jax.Array:
        """Sum over tokens of E * sum_e f_e * P_e (Fedus et al., 2021, equation 4) of the token's sequence; 1 a token when balanced."""
        num_experts, tokens = self.cfg.num_experts, jnp.sum(real, axis=1)[:, None].astype(jnp.float32)
        chosen = jax.nn.one_hot(experts, num_experts, dtype=jnp.float32).sum(axis=2) * real[:, :, None]
        share = chosen.sum(axis=1) / jnp.maximum(tokens * self.cfg.experts_per_token, 1)
        mean_probability = jnp.sum(probabilities * real[:, :, None], axis=1) / jnp.maximum(tokens, 1)
        return jnp.sum(num_experts * jnp.sum(share * mean_probability, axis=-1, keepdims=True) * tokens)


def dropless(cfg: schema.Moe, activation: str):
    """Every token reaches its experts: rows are sorted by expert and multiplied group by group."""

    def dispatch(x: jax.Array, weights: jax.Array, experts: jax.Array, real: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array):
        batch, length, embed = x.shape
        chosen = experts.reshape(-1)
        order = jnp.argsort(chosen, stable=True)
        sizes = jnp.bincount(chosen, length=cfg.num_experts).astype(jnp.int32)
        rows = x.reshape(-1, embed)[order // cfg.experts_per_token]
        rows, sizes, bring_back = rows_to_owners(rows, sizes)
        hidden = GATED[activation](grouped_matmul(rows, gate, sizes), grouped_matmul(rows, up, sizes))
        out = bring_back(grouped_matmul(hidden, down, sizes))[jnp.argsort(order)]
        return psum(jnp.einsum("blke,blk->ble", out.reshape(batch, length, cfg.experts_per_token, embed), weights), "mlp")

    return dispatch


def capacity(cfg: schema.Moe, activation: str):
    """Each expert takes at most `capacity_factor` times an even share of a sequence's tokens, first choices first."""

    def dispatch(x: jax.Array, weights: jax.Array, experts: jax.Array, real: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array):
        batch, length, embed = x.shape
        slots = max(1, math.ceil(cfg.capacity_factor * length * cfg.experts_per_token / cfg.num_experts))
        by_rank = experts.transpose(0, 2, 1).reshape(batch, -1)  # all first choices, then all second ones
        chosen = jax.nn.one_hot(by_rank, cfg.num_experts, dtype=jnp.int32) * jnp.tile(real, (1, cfg.experts_per_token))[:, :, None]
        place = jnp.sum((jnp.cumsum(chosen, axis=1) - 1) * chosen, axis=-1)
        kept = (place < slots) & (chosen.sum(axis=-1) > 0)
        target = jnp.where(kept, by_rank * slots + place, cfg.num_experts * slots)  # out of range is dropped
        rows = jnp.tile(x, (1, cfg.experts_per_token, 1))
        boxes = jax.vmap(lambda row, at: jnp.zeros((cfg.num_experts * slots, embed), x.dtype).at[at].set(row, mode="drop"))(rows, target)
        boxes = boxes.reshape(batch, cfg.num_experts, slots, embed).transpose(1, 0, 2, 3).reshape(cfg.num_experts, -1, embed)
        boxes = boxes_to_owners(boxes)
        hidden = GATED[activation](boxes @ gate, boxes @ up)
        out = boxes_to_senders(hidden @ down).reshape(cfg.num_experts, batch, slots, embed).transpose(1, 0, 2, 3).reshape(batch, -1, embed)
        picked = jax.vmap(lambda row, at: row.at[at].get(mode="fill", fill_value=0))(out, target)
        return psum(jnp.einsum("bkle,blk->ble", picked.reshape(batch, cfg.experts_per_token, length, embed), weights), "mlp")

    return dispatch


DISPATCH = {"dropless": dropless, "capacity": capacity}
