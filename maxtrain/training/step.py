"""The one train step. Pretraining and post-training differ only in the loss function they hand to it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from maxtrain.config import schema
from maxtrain.ops.attention import Context
from maxtrain.ops.loss import cross_entropy
from maxtrain.ops.ring_attention import balanced_order
from maxtrain.ops.routing import Balance
from maxtrain.parallel.sharding import constrain
from maxtrain.training.optimizer import decay, make_optimizer, make_schedule, rebalance, split
from maxtrain.training.state import Guard, TrainState

Batch = dict[str, jax.Array]
Sums = dict[str, jax.Array]
LossFn = Callable[[Any, Batch], tuple[jax.Array, Sums]]
"""(model, batch) -> the loss summed over tokens, and sums for the metrics; `tokens` among them is what gradients are divided by."""


def next_token_loss(config: schema.Config, num_sources: int = 1) -> LossFn:
    """Cross-entropy of the next token, with the z-loss, the routers' balancing terms and the multi-token prediction of the config."""
    losses = partial(cross_entropy, z_loss=config.train.z_loss, chunk=config.train.loss_chunk, softcap=config.model.final_softcap)

    def loss_fn(model: Any, batch: Batch) -> tuple[jax.Array, Sums]:
        further = _further(batch, 0 if config.model.mtp is None else config.model.mtp.num_layers)
        order = balanced_order(batch["tokens"].shape[1])
        batch, *further = (_arranged(arrays, order) for arrays in (batch, *further))  # what comes next, natural order alone tells
        context = Context(batch["positions"], batch["segments"], indices=order)
        output = model(batch["tokens"], context)
        weights = batch["weights"]
        total, rows = losses(output.hidden, model.head_weights, batch["targets"], weights)
        sums = {"tokens": weights.sum(), "loss": rows.sum()}
        if num_sources > 1:
            for name, values in (("loss", rows), ("tokens", weights.sum(axis=1))):
                sums[f"{name}_by_source"] = jax.ops.segment_sum(values, batch["source"], num_sources)
        balance = output.balance
        if config.model.mtp is not None:
            ahead, (sums["mtp_loss"], sums["mtp_tokens"]), more = _further_loss(losses, model, further, context, output.hidden)
            total, balance = total + config.model.mtp.loss_weight / config.model.mtp.num_layers * ahead, balance + more
        if config.model.moe is not None:
            total += balance.loss
            sums |= {"balance": balance.aux, "router_z": balance.z}
        return total, sums

    return loss_fn


def _arranged(batch: Batch, order: jax.Array | None) -> Batch:
    """A batch with its arrays [batch, length] in the given order of tokens, None being that in which they are."""
    if order is None:
        return batch
    return {name: constrain(x[:, order], ("batch", "length")) if x.ndim == 2 else x for name, x in batch.items()}


def _further(batch: Batch, modules: int) -> list[Batch]:
    """What each module of multi-token prediction reads (`read`) and predicts (`targets`, `weights`), in natural order.

    A position counts for a module as long as what the module reads and predicts lies in the position's own document.
    """
    targets, weights, segments, found = batch["targets"], batch["weights"], batch["segments"], []
    for _ in range(modules):
        read, targets, segments = targets, _later(targets), _later(segments)
        weights = _later(weights) * (segments == batch["segments"])
        found.append({"read": read, "targets": targets, "weights": weights})
    return found


def _further_loss(
    losses: Callable[..., tuple[jax.Array, jax.Array]], model: Any, further: list[Batch], context: Context, hidden: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array], Balance]:
    """The losses of multi-token prediction, summed over modules and tokens; cross-entropy and tokens for the metrics; balancing terms."""
    total, entropy, tokens, balance = jnp.zeros(()), jnp.zeros(()), jnp.zeros(()), Balance.zero()
    for depth, part in enumerate(further):
        hidden, _, extra = model.ahead(depth, part["read"], hidden, context)
        loss, rows = losses(hidden, model.head_weights, part["targets"], part["weights"])
        total, entropy, tokens, balance = total + loss, entropy + rows.sum(), tokens + part["weights"].sum(), balance + extra
    return total, (entropy, tokens), balance


def _later(values: jax.Array) -> jax.Array:
    """At each position of [batch, length], what stands at the next; 0, which is no document, at the last."""
    return jnp.pad(values[:, 1:], ((0, 0), (0, 1)))


def make_train_step(config: schema.Config, loss_fn: LossFn) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The function from (state, batch, stop) to (state, metrics). Gradients are of the mean over the batch's tokens.

    `stop`, int32 [devices], says for each device whether its process has been asked to stop. The metric `stop`, whether any has,
    is the same for all of them, so that all stop after the same step.
    """
    optimizer, schedule = make_optimizer(config.optimizer, config.precision), make_schedule(config.schedule, config.train.steps)

    def step(state: TrainState, batch: Batch, stop: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        grads, total, sums = accumulate(loss_fn, state.model, batch, config.train.microbatches)
        grads, loads = split(grads)
        tokens = jnp.maximum(sums["tokens"], 1.0)
        grads = jax.tree.map(lambda g: g / tokens, grads)
        norm = optax.tree.norm(grads)
        ok, guard = watch(state.guard, total / tokens, norm, config.guard)
        clip = 1.0 if config.optimizer.clip_norm is None else jnp.minimum(1.0, config.optimizer.clip_norm / (norm + 1e-12))
        direction, opt_state = optimizer.update(jax.tree.map(lambda g: g * clip, grads), state.opt_state, state.model)
        lr = schedule(state.step)
        updates = jax.tree.map(lambda d: -lr * d, decay(direction, state.model, config.optimizer))
        updates = rebalance(updates, loads, config.model)
        new = jax.tree.map(lambda p, u: (p + u).astype(p.dtype), state.model, updates), opt_state
        model, opt_state = jax.tree.map(lambda after, before: jnp.where(ok, after, before), new, (state.model, state.opt_state))
        metrics = sums | {"objective": total / tokens, "grad_norm": norm, "param_norm": optax.tree.norm(model), "lr": lr, "skipped": ~ok}
        metrics |= {"skipped_in_a_row": guard.skipped_in_a_row, "stop": stop.max()}
        moments = [jnp.abs(leaf).max() for leaf in jax.tree.leaves(opt_state) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        metrics["finite"] = jnp.isfinite(metrics["param_norm"]) & jnp.isfinite(jnp.stack(moments).astype(jnp.float32)).all()
        return TrainState(model, opt_state, state.step + 1, state.data_step + 1, guard), metrics

    return step


def accumulate(loss_fn: LossFn, model: Any, batch: Batch, parts: int) -> tuple[Any, jax.Array, Sums]:
    """Gradients, loss and metric sums, added up over `parts` microbatches; nothing is divided here, so the sum is exact."""
    grad = jax.value_and_grad(loss_fn, has_aux=True)
    if parts == 1:
        (total, sums), grads = grad(model, batch)
        return grads, total, sums
    # Row r goes to microbatch r mod parts: each device keeps its own rows, whatever the number of parts.
    micro = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, parts, *a.shape[1:]), 1, 0), batch)

    def add(carry: Any, part: Batch) -> tuple[Any, None]:
        (total, sums), grads = grad(model, part)
        return jax.tree.map(jnp.add, carry, (grads, total, sums)), None

    (total, sums), grads = jax.eval_shape(grad, model, jax.tree.map(lambda a: a[0], micro))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), (grads, total, sums))
    return jax.lax.scan(add, zero, micro)[0]


def watch(guard: Guard, loss: jax.Array, norm: jax.Array, cfg: schema.Guard) -> tuple[jax.Array, Guard]:
    """Whether this step counts, and the history with it added if it does.

    It does not when loss or gradient norm is not finite or lies `spike_sigmas` deviations above the mean of the last
    `window` steps that counted. A deviation below 1% of the mean is taken as 1%: a flat curve is no reason to skip.
    """
    ok = jnp.isfinite(loss) & jnp.isfinite(norm)
    if cfg.spike_sigmas is not None:
        for value, history in ((loss, guard.losses), (norm, guard.norms)):
            deviation = jnp.maximum(jnp.std(history), 0.01 * jnp.abs(jnp.mean(history)))
            spike = value > jnp.mean(history) + cfg.spike_sigmas * deviation
            ok &= ~(spike & (guard.counted >= cfg.window))
    slot = guard.counted % cfg.window
    losses, norms = (jnp.where(ok, h.at[slot].set(v), h) for h, v in ((guard.losses, loss), (guard.norms, norm)))
    return ok, Guard(losses, norms, guard.counted + ok, jnp.where(ok, 0, guard.skipped_in_a_row + 1))
