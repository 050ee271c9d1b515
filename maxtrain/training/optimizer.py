"""Update rules and learning-rate schedules, each a table: a new one is one entry and one test."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from maxtrain.config import schema
from maxtrain.ops.routing import balance_step
from maxtrain.parallel.sharding import is_param, kind


def _adamw(cfg: schema.Optimizer, precision: schema.Precision) -> optax.GradientTransformation:
    return optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps, mu_dtype=precision.moments)


OPTIMIZERS = {"adamw": _adamw}


def make_optimizer(cfg: schema.Optimizer, precision: schema.Precision) -> optax.GradientTransformation:
    """Gradient to step direction, before decay and learning rate."""
    return OPTIMIZERS[cfg.kind](cfg, precision)


def decay(direction: Any, model: Any, cfg: schema.Optimizer) -> Any:
    """Add decoupled weight decay (Loshchilov and Hutter, 2019) for the kinds of parameters that `cfg.decay` names."""

    def one(d: Any, p: Any) -> Any:
        if kind(p.get_metadata("axes")) not in cfg.decay:
            return d
        return jax.tree.map(lambda update, value: update + cfg.weight_decay * value, d, p)

    return jax.tree.map(one, direction, model, is_leaf=is_param)


def _is_balance(p: Any) -> bool:
    return kind(p.get_metadata("axes")) == "balance"


def split(grads: Any) -> tuple[Any, Any]:
    """The gradients with zeros for the balancing biases, and the loads that stood there, None elsewhere.

    What a loss hands back for a balancing bias is a count of tokens, no slope: clipping, norm and optimizer must not see it.
    """
    trained = jax.tree.map(lambda g: jax.tree.map(jnp.zeros_like, g) if _is_balance(g) else g, grads, is_leaf=is_param)
    return trained, jax.tree.map(lambda g: g if _is_balance(g) else None, grads, is_leaf=is_param)


def rebalance(updates: Any, loads: Any, cfg: schema.Model) -> Any:
    """The updates with those of the balancing biases by their own rule; learning rate and schedule have no part in it."""
    if cfg.moe is None or cfg.moe.balance_rate is None:
        return updates
    rule = partial(balance_step, rate=cfg.moe.balance_rate)
    return jax.tree.map(lambda u, load: u if load is None else jax.tree.map(rule, load), updates, loads, is_leaf=is_param)


def _cosine(cfg: schema.Schedule, step: jax.Array, steps: int) -> jax.Array:
    progress = jnp.clip((step - cfg.warmup_steps) / max(1, steps - cfg.warmup_steps), 0, 1)
    return cfg.final_fraction + (1 - cfg.final_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * progress))


def _wsd(cfg: schema.Schedule, step: jax.Array, steps: int) -> jax.Array:
    length = cfg.decay_steps or max(1, min(steps // 5, steps - cfg.warmup_steps))
    progress = jnp.clip((step - (steps - length)) / length, 0, 1)
    return 1 - (1 - cfg.final_fraction) * progress


SCHEDULES = {"cosine": _cosine, "wsd": _wsd, "constant": lambda cfg, step, steps: jnp.ones(())}


def make_schedule(cfg: schema.Schedule, steps: int) -> Callable[[jax.Array], jax.Array]:
    """The learning rate as a function of the number of steps done; the first of `warmup_steps` is already above 0."""

    def schedule(step: jax.Array) -> jax.Array:
        shape = SCHEDULES[cfg.kind](cfg, step, steps)
        warm = jnp.minimum((step + 1) / cfg.warmup_steps, 1.0) if cfg.warmup_steps else 1.0
        return jnp.asarray(cfg.learning_rate * shape * warm, jnp.float32)

    return schedule
