"""The state of a run as one pytree, and its layout in a checkpoint.

In a checkpoint the layers of the body are stacked along a leading axis whether they were scanned or unrolled, so a
run saved on CPU goes on on an accelerator and the other way round.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from maxtrain.config import schema
from maxtrain.models.decoder import Decoder
from maxtrain.parallel.mesh import optimizer_layout
from maxtrain.parallel.sharding import Layout, check_placement, initialise, path_name, shardings, stacked_name


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Guard:
    """Recent losses and gradient norms of the steps that counted, float32 [window], and how many steps counted or were skipped."""

    losses: jax.Array
    norms: jax.Array
    counted: jax.Array
    skipped_in_a_row: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything a step reads and writes. `data_step` is the next batch; it runs ahead of `step` after a rollback."""

    model: Any
    opt_state: Any
    step: jax.Array
    data_step: jax.Array
    guard: Guard

    replace = replace


def describe(config: schema.Config, optimizer: optax.GradientTransformation, layout: Layout) -> TrainState:
    """The state of a resolved config as shapes, formats and shardings."""
    model = Decoder(config.model, config.precision, config.remat)
    scalar: Any = jax.ShapeDtypeStruct((), jnp.int32)
    window: Any = jax.ShapeDtypeStruct((config.guard.window,), jnp.float32)
    state = TrainState(model, jax.eval_shape(optimizer.init, model), scalar, scalar, Guard(window, window, scalar, scalar))
    places = shardings(state, layout)
    places = places.replace(opt_state=shardings(state.opt_state, optimizer_layout(config.mesh, layout)))
    return jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), state, places)


def create(like: TrainState, optimizer: optax.GradientTransformation, seed: int, model: Any = None) -> TrainState:
    """The state before the first step, laid out as `like` describes; of a `model` that is given, or a fresh one drawn from the seed."""
    model = initialise(like.model, seed) if model is None else model
    check_placement(model, like.model)
    opt_state = jax.jit(optimizer.init, out_shardings=jax.tree.map(lambda s: s.sharding, like.opt_state))(model)
    step, data_step, guard = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, device=s.sharding), (like.step, like.data_step, like.guard))
    return TrainState(model, opt_state, step, data_step, guard)


# ------------------------------------------------------------------------------------------- layout in a checkpoint


def _flat(state: Any) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


def _groups(names: Any) -> dict[str, list[str]]:
    """Stacked name -> the names of the layers' own arrays, in order; an array of no unrolled layer stands alone."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(stacked_name(name)[0], []).append(name)
    return groups


def _stacked_sharding(sharding: Any) -> Any:
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(None, *sharding.spec))


@partial(jax.jit, static_argnums=1)
def _stack(groups: dict[str, list[jax.Array]], targets: tuple[tuple[str, Any], ...]) -> dict[str, jax.Array]:
    """One array for each group of layers; compiled once for all of a state."""
    return {name: jax.lax.with_sharding_constraint(jnp.stack(groups[name]), target) for name, target in targets}


@partial(jax.jit, static_argnums=1)
def _unstack(stacks: dict[str, jax.Array], targets: tuple[tuple[str, str, int, Any], ...]) -> dict[str, jax.Array]:
    """The layers' own arrays out of the stacks: (name, stack, index, sharding) each."""
    return {name: jax.lax.with_sharding_constraint(stacks[stack][index], target) for name, stack, index, target in targets}


def stack(state: Any) -> dict[str, Any]:
    """The arrays (or, for an abstract state, their descriptions) of a checkpoint as nested dicts, layers stacked.

    `state` is a TrainState, or `{"model": model}` for a checkpoint, or a part of one, without the rest.
    """
    flat = _flat(state)
    groups = {name: [flat[member] for member in members] for name, members in _groups(flat).items() if members != [name]}
    targets = {name: _stacked_sharding(leaves[0].sharding) for name, leaves in groups.items()}
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in flat.values()):
        stacked = {n: jax.ShapeDtypeStruct((len(g), *g[0].shape), g[0].dtype, sharding=targets[n]) for n, g in groups.items()}
    else:
        stacked = _stack(groups, tuple(targets.items()))
    nested: dict[str, Any] = {}
    for name in _groups(flat):
        *folders, last = name.split("/")
        place = nested
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = stacked[name] if name in stacked else flat[name]
    return nested


def unstack(arrays: dict[str, Any], like: Any) -> Any:
    """The inverse of `stack`: a state shaped and laid out like the abstract `like`."""
    target, flat, stacks, parts = _flat(like), dict[str, Any](), dict[str, Any](), []
    for name, members in _groups(target).items():
        value: Any = arrays
        for part in name.split("/"):
            value = value[part]
        if members == [name]:
            flat[name] = value
        else:
            stacks[name] = value
            parts += [(member, name, index, target[member].sharding) for index, member in enumerate(members)]
    flat |= _unstack(stacks, tuple(parts))
    return jax.tree.unflatten(jax.tree.structure(like), [flat[name] for name in target])
