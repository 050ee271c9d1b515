"""Routing of tokens to experts: scores, the choice, its weights, and what keeps the experts evenly loaded.

All of it is in float32 and by tables: a router is a set of values in `model.moe`. What is summed over tokens is summed, and
what is not linear in the batch is defined per sequence, so neither the mesh nor the microbatches change it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from maxtrain.config import schema

Scores = Callable[[jax.Array], jax.Array]
SCORES: Mapping[str, Scores] = {"softmax": partial(jax.nn.softmax, axis=-1), "sigmoid": jax.nn.sigmoid}
GROUP_SCORES: Mapping[str, Scores] = {
    "max": lambda scores: scores.max(axis=-1),  # DeepSeek-V2, section 2.2.2
    "top2": lambda scores: jax.lax.top_k(scores, 2)[0].sum(axis=-1),  # DeepSeek-V3, section 2.1.2
}


class Routing(NamedTuple):
    """Where tokens go: logits and scores [batch, length, experts]; weights and experts (int32) [batch, length, experts_per_token]."""

    logits: jax.Array
    scores: jax.Array
    weights: jax.Array
    experts: jax.Array


def route(cfg: schema.Moe, logits: jax.Array, balance_bias: jax.Array | None = None) -> Routing:
    """Experts and their weights from the router's logits [batch, length, experts].

    The balancing bias [experts] (Wang et al., 2024) takes part in the choice, of groups and of experts, and never in the weights.
    """
    scores = SCORES[cfg.routing](logits)
    if balance_bias is None and cfg.groups_per_token == cfg.num_groups:
        weights, experts = jax.lax.top_k(scores, cfg.experts_per_token)
    else:
        choice = jax.lax.stop_gradient(scores if balance_bias is None else scores + balance_bias)
        experts = jax.lax.top_k(within_groups(cfg, choice), cfg.experts_per_token)[1]
        weights = jnp.take_along_axis(scores, experts, axis=-1)
    if cfg.norm_topk:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)  # all sigmoids can be 0; a softmax never is
    return Routing(logits, scores, weights * cfg.routed_scale, experts)


def within_groups(cfg: schema.Moe, choice: jax.Array) -> jax.Array:
    """The scores of choice [batch, length, experts], -inf outside the `groups_per_token` best groups."""
    if cfg.groups_per_token == cfg.num_groups:
        return choice
    groups = choice.reshape(*choice.shape[:-1], cfg.num_groups, -1)
    best = jax.lax.top_k(GROUP_SCORES[cfg.group_score](groups), cfg.groups_per_token)[1]
    open_groups = jnp.any(best[..., None] == jnp.arange(cfg.num_groups), axis=-2)
    return jnp.where(open_groups[..., None], groups, -jnp.inf).reshape(choice.shape)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Balance:
    """Sums over tokens, scalars that add up over layers, devices and microbatches.

    loss: what is added to the objective, its weights applied.
    aux: the load-balancing loss without its weight, 1 a token and layer when balanced; z: the routers' z-loss without its weight.
    """

    loss: jax.Array
    aux: jax.Array
    z: jax.Array

    @classmethod
    def zero(cls) -> Balance:
        """Of a layer without experts."""
        zero = jnp.zeros((), jnp.float32)
        return cls(zero, zero, zero)

    def __add__(self, other: Balance) -> Balance:
        return jax.tree.map(jnp.add, self, other)


def balance(cfg: schema.Moe, routing: Routing, real: jax.Array, balance_bias: jax.Array | None = None) -> Balance:
    """The balancing terms of one layer over the tokens that `real` [batch, length] marks.

    The gradient of `loss` with respect to the balancing bias is, by construction, the number of tokens sent to each expert;
    its value has no part of the bias in it. So counts are summed over layers, microbatches and devices as gradients are.
    """
    tokens = jnp.sum(real, axis=1)[:, None].astype(jnp.float32)
    chosen = jax.nn.one_hot(routing.experts, cfg.num_experts, dtype=jnp.float32).sum(axis=2) * real[:, :, None]
    aux = _auxiliary(cfg, routing.scores, chosen, real, tokens)
    z = jnp.sum(jnp.square(jax.nn.logsumexp(routing.logits, axis=-1)) * real)
    loss = cfg.aux_loss * aux
    if cfg.router_z_loss:
        loss += cfg.router_z_loss * z
    if balance_bias is not None:
        loss += jnp.sum(jax.lax.stop_gradient(chosen.sum(axis=(0, 1))) * (balance_bias - jax.lax.stop_gradient(balance_bias)))
    return Balance(loss, jax.lax.stop_gradient(aux), jax.lax.stop_gradient(z))


def _auxiliary(cfg: schema.Moe, scores: jax.Array, chosen: jax.Array, real: jax.Array, tokens: jax.Array) -> jax.Array:
    """Sum over tokens of E * sum_e f_e * P_e (Fedus et al., 2021, equation 4) of the token's sequence; 1 a token when balanced.

    Sigmoid scores are divided by their sum first (DeepSeek-V3, equation 19).
    """
    share = chosen.sum(axis=1) / jnp.maximum(tokens * cfg.experts_per_token, 1)
    probabilities = scores if cfg.routing == "softmax" else scores / (scores.sum(axis=-1, keepdims=True) + 1e-20)
    mean_probability = jnp.sum(probabilities * real[:, :, None], axis=1) / jnp.maximum(tokens, 1)
    return jnp.sum(cfg.num_experts * jnp.sum(share * mean_probability, axis=-1, keepdims=True) * tokens)


def balance_step(counts: jax.Array, rate: float) -> jax.Array:
    """What is added to a balancing bias [..., experts] after a step with these counts: `rate` up below the mean load, down above it."""
    return rate * jnp.sign(jnp.sum(counts, axis=-1, keepdims=True) - counts.shape[-1] * counts)  # in whole numbers: a tie is a tie
