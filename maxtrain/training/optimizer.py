"""Update rules and learning-rate schedules, each a table: a new one is one entry and one test."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from maxtrain.config import schema
from maxtrain.config.errors import Refused
from maxtrain.ops.routing import balance_step
from maxtrain.parallel.sharding import is_param, kind


def _adamw(cfg: schema.Optimizer, precision: schema.Precision) -> optax.GradientTransformation:
    """Adam in float32, its moments kept in the formats of the config (optax keeps the second in that of the parameters)."""
    adam = optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps, mu_dtype=precision.moments)

    def kept(state: optax.ScaleByAdamState) -> optax.ScaleByAdamState:
        return state._replace(nu=optax.tree.cast(state.nu, precision.second_moment))

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        direction, state = adam.update(optax.tree.cast(grads, jnp.float32), state, params)
        return direction, kept(state)

    return optax.GradientTransformation(lambda params: kept(adam.init(params)), update)


LARGEST_DECAY = 1 - 2**-24  # of a moment: what is above becomes 1 in float32
OPTIMIZERS = {"adamw": _adamw}


def make_optimizer(cfg: schema.Optimizer, precision: schema.Precision) -> optax.GradientTransformation:
    """Gradient to step direction, before decay and learning rate."""
    return OPTIMIZERS[cfg.kind](cfg, precision)


def check_trainable(config: schema.Config) -> None:
    """Raise `Refused` for number formats that a model cannot be trained in, and for numbers that are others in them."""
    for name in ("compute", "params", "moments", "second_moment"):
        if getattr(config.precision, name) == "float16":
            remedy = "write bfloat16, which has the range of float32"
            raise Refused(f"precision.{name}=float16: gradients become 0 in it, and there is no scaling of the loss: {remedy}")
    cfg, tiny, largest = config.optimizer, float(jnp.finfo(jnp.float32).tiny), float(jnp.finfo(jnp.float32).max)
    limits = {"optimizer.b1": (cfg.b1, 0.0, LARGEST_DECAY), "optimizer.b2": (cfg.b2, 0.0, LARGEST_DECAY)}
    for key, value in (("eps", cfg.eps), ("clip_norm", cfg.clip_norm)):
        limits |= {} if value is None else {f"optimizer.{key}": (value, tiny, largest)}
    for key, (value, low, high) in (limits | {"schedule.learning_rate": (config.schedule.learning_rate, tiny, largest)}).items():
        if not low <= value <= high:
            same = "0" if value < low else "1" if high < 1 else "infinity"
            raise Refused(f"{key}={value:.10g} cannot be told from {same} in float32: write a number >= {low:.3g} and <= {high:.8g}")


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
