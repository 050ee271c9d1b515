"""Mixture of experts (Shazeer et al., 2017; Mixtral): a router sends each token to a few gated feed-forwards.

`ops.routing` decides who goes where; the dispatch functions here carry rows to their experts and back. Capacity, which is not
linear in the batch, is defined per sequence, so neither the mesh nor the number of microbatches changes what is computed.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maxtrain.config import schema
from maxtrain.models.layers import Mlp, matmul
from maxtrain.ops.expert_parallel import boxes_to_owners, boxes_to_senders, rows_to_owners
from maxtrain.ops.gated import GATED
from maxtrain.ops.grouped_matmul import boxed_matmul, grouped_matmul
from maxtrain.ops.linear import Weight, add_bias
from maxtrain.ops.routing import Balance, balance, route
from maxtrain.parallel.sharding import index, param, parts, per_shard, psum

MATRICES = ("expert", None, "mlp"), ("expert", None, "mlp"), ("expert", "mlp", None)
BIASES = ("expert", "mlp"), ("expert", "mlp"), ("expert", None)
"""Axes, where they are used, of gate, up and down."""


class MoeMlp(nnx.Module):
    """Routed gated feed-forward. Shapes: x [batch, length, embed].

    The balancing bias is no weight: gradients do not train it, see `ops.routing.balance` and `training.step`.
    """

    def __init__(self, cfg: schema.Model, dtype: str):
        assert cfg.moe is not None
        self.cfg, self.activation = cfg.moe, cfg.activation
        experts, embed, mlp, scale = cfg.moe.num_experts, cfg.embed, cfg.moe.mlp, cfg.init_scale
        self.router = param((embed, experts), ("embed", "expert"), std=scale * embed**-0.5, dtype=dtype)
        self.gate = param((experts, embed, mlp), ("expert", "embed", "mlp"), std=scale * embed**-0.5, dtype=dtype)
        self.up = param((experts, embed, mlp), ("expert", "embed", "mlp"), std=scale * embed**-0.5, dtype=dtype)
        down_std = scale * (mlp * 2 * cfg.num_layers) ** -0.5
        self.down = param((experts, mlp, embed), ("expert", "mlp", "embed"), std=down_std, dtype=dtype)
        self.router_bias = param((experts,), ("expert",), std=0.0, dtype=dtype) if cfg.moe.router_bias else None
        self.balance_bias = param((experts,), ("balance",), std=0.0) if cfg.moe.balance_rate is not None else None
        biased = cfg.moe.expert_bias
        self.gate_bias = param((experts, mlp), ("expert", "mlp"), std=0.0, dtype=dtype) if biased else None
        self.up_bias = param((experts, mlp), ("expert", "mlp"), std=0.0, dtype=dtype) if biased else None
        self.down_bias = param((experts, embed), ("expert", "embed"), std=0.0, dtype=dtype) if biased else None
        self.shared = Mlp(cfg, dtype, width=cfg.moe.shared_mlp) if cfg.moe.shared_mlp else None
        self.shared_gate = param((embed, 1), ("embed", None), std=scale * embed**-0.5, dtype=dtype) if cfg.moe.shared_gate else None

    def __call__(self, x: jax.Array, segments: jax.Array) -> tuple[jax.Array, Balance]:
        """Output [batch, length, embed] and the balancing terms; tokens of segment 0 are padding."""
        router = self.router.get_value().astype(jnp.float32)
        logits = jnp.einsum("ble,ex->blx", x.astype(jnp.float32), router, precision=jax.lax.Precision.HIGHEST)
        if self.router_bias is not None:
            logits += self.router_bias.get_value().astype(jnp.float32)
        balance_bias = None if self.balance_bias is None else self.balance_bias.get_value()
        routing, real = route(self.cfg, logits, balance_bias), segments != 0
        matrices = [Weight.of(p.get_value(), x.dtype) for p in (self.gate, self.up, self.down)]
        biases = [p.get_value().astype(jnp.float32) for p in (self.gate_bias, self.up_bias, self.down_bias) if p is not None]
        tokens, inputs = ("batch", None, None), (*MATRICES, *MATRICES, *BIASES[: len(biases)])
        dispatch = DISPATCH[self.cfg.dispatch](self.cfg, self.activation)
        dispatch = per_shard(dispatch, (tokens, tokens, tokens, tokens[:2], *inputs), tokens)
        given = *(w.value for w in matrices), *(w.wide for w in matrices), *biases
        y = dispatch(x, routing.weights.astype(x.dtype), routing.experts, real, *given)
        if self.shared is not None:
            y += self._shared(self.shared, x)
        return y, balance(self.cfg, routing, real, balance_bias)

    def _shared(self, shared: Mlp, x: jax.Array) -> jax.Array:
        """The expert that sees every token, behind its gate if it has one."""
        y = shared(x)
        return y if self.shared_gate is None else y * jax.nn.sigmoid(matmul(x, self.shared_gate))


def _experts(activation: str, rows: jax.Array, given: tuple[jax.Array, ...], product: Any, biased: Any) -> jax.Array:
    """The experts' feed-forward on sorted or boxed rows.

    Args:
        given: gate, up, down [experts, in, out] in the compute format, again in float32 (`Weight`) and, where experts have them, their
            biases [experts, out].
        product: (rows, Weight) -> rows, each by its own expert's matrix.
        biased: (rows, bias [experts, out]) -> rows, each with its own expert's bias added.
    """
    gate, up, down = (Weight(*pair) for pair in zip(given[:3], given[3:6], strict=True))
    biases = given[6:]
    if not biases:
        return product(GATED[activation](product(rows, gate), product(rows, up)), down)
    gate_bias, up_bias, down_bias = biases
    hidden = GATED[activation](biased(product(rows, gate), gate_bias), biased(product(rows, up), up_bias))
    if parts("mlp") > 1:  # each device has a share of the sum over mlp, to which the bias comes once
        down_bias = jnp.where(index("mlp") == 0, down_bias, 0)
    return biased(product(hidden, down), down_bias)


@jax.custom_vjp
def _biased(rows: jax.Array, owner: jax.Array, bias: jax.Array) -> jax.Array:
    """rows [rows, out] plus bias float32 [experts, out] of their experts, which owner [rows, experts] names with ones.

    By a product, since TPUs add up a gather's gradient row by row; whose gradient comes before anything goes on from that of the rows:
    a compiler that puts it off keeps the rows' gradients of all products and layers at hand meanwhile.
    """
    return rows + owner @ bias.astype(rows.dtype)


def _biased_backward(owner: jax.Array, d_rows: jax.Array) -> tuple[jax.Array, None, jax.Array]:
    d_bias = jnp.matmul(owner.T, d_rows, preferred_element_type=jnp.float32)
    d_rows, d_bias = jax.lax.optimization_barrier((d_rows, d_bias))
    return d_rows, None, d_bias


_biased.defvjp(lambda rows, owner, bias: (_biased(rows, owner, bias), owner), _biased_backward)


def dropless(cfg: schema.Moe, activation: str):
    """Every token reaches its experts: rows are sorted by expert and multiplied group by group."""

    def dispatch(x: jax.Array, weights: jax.Array, experts: jax.Array, real: jax.Array, *given: jax.Array):
        batch, length, embed = x.shape
        chosen = experts.reshape(-1)
        order = jnp.argsort(chosen, stable=True)
        sizes = jnp.bincount(chosen, length=cfg.num_experts).astype(jnp.int32)
        rows = x.reshape(-1, embed)[order // cfg.experts_per_token]
        rows, sizes, bring_back = rows_to_owners(rows, sizes)
        place, ends = jnp.arange(rows.shape[0])[:, None], jnp.cumsum(sizes)
        owner = ((place >= ends - sizes) & (place < ends)).astype(x.dtype)
        out = _experts(activation, rows, given, lambda a, b: grouped_matmul(a, b, sizes), lambda y, bias: _biased(y, owner, bias))
        out = bring_back(out)[jnp.argsort(order)]
        return psum(jnp.einsum("blke,blk->ble", out.reshape(batch, length, cfg.experts_per_token, embed), weights), "mlp")

    return dispatch


def capacity(cfg: schema.Moe, activation: str):
    """Each expert takes at most `capacity_factor` times an even share of a sequence's tokens, first choices first."""

    def dispatch(x: jax.Array, weights: jax.Array, experts: jax.Array, real: jax.Array, *given: jax.Array):
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
        out = boxes_to_senders(_experts(activation, boxes_to_owners(boxes), given, boxed_matmul, jax.vmap(add_bias)))
        out = out.reshape(cfg.num_experts, batch, slots, embed).transpose(1, 0, 2, 3).reshape(batch, -1, embed)
        picked = jax.vmap(lambda row, at: row.at[at].get(mode="fill", fill_value=0))(out, target)
        return psum(jnp.einsum("bkle,blk->ble", picked.reshape(batch, cfg.experts_per_token, length, embed), weights), "mlp")

    return dispatch


DISPATCH = {"dropless": dropless, "capacity": capacity}
