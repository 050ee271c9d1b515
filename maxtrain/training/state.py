"""The state of a run as one pytree, and its layout in a checkpoint.

In a checkpoint the layers of the body are stacked along a leading axis whether they were scanned or unrolled, so a
run saved on CPU goes on on an accelerator and the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from maxtrain.config import schema
from maxtrain.models.decoder import Decoder
from maxtrain.parallel.sharding import Layout, check_placement, path_name, shardings


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


def make_init(config: schema.Config, optimizer: optax.GradientTransformation) -> Callable[[jax.Array], TrainState]:
    """The function from a random key to the state before the first step."""

    def init(key: jax.Array) -> TrainState:
        model = Decoder(config.model, config.precision, config.remat, nnx.Rngs(key))
        zero, window = jnp.zeros((), jnp.int32), jnp.zeros((config.guard.window,), jnp.float32)
        return TrainState(model, optimizer.init(model), zero, zero, Guard(window, window, zero, zero))

    return init


def create(init: Callable[[jax.Array], TrainState], seed: int, layout: Layout) -> TrainState:
    """Run `init` with every array made in its shards; values depend on the seed only, not on the mesh."""
    key = jax.random.key(seed)
    target = shardings(jax.eval_shape(init, key), layout)
    # Runs once, so it is compiled in half the time with less optimisation; only the CPU's compiler knows the option
    on_cpu = layout.mesh.devices.flat[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 1} if on_cpu else None
    state = jax.jit(init, out_shardings=target, compiler_options=options)(key)
    check_placement(state.model, layout)
    return state


def abstract(init: Callable[[jax.Array], TrainState], layout: Layout) -> TrainState:
    """The state as shapes, formats and shardings."""
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, shardings(shapes, layout))


# ------------------------------------------------------------------------------------------- layout in a checkpoint

_UNROLLED = re.compile(r"(.*\bbody)/(\d+)/(layers/.*)")


def _flat(state: Any) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


def _groups(names: Any) -> dict[str, list[str]]:
    """Stacked name -> the names of the layers' own arrays, in order; an array of no unrolled layer stands alone."""
    groups: dict[str, list[str]] = {}
    for name in names:
        match = _UNROLLED.fullmatch(name)
        groups.setdefault(f"{match[1]}/{match[3]}" if match else name, []).append(name)
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


def stack(state: TrainState) -> dict[str, Any]:
    """The arrays (or, for an abstract state, their descriptions) of a checkpoint as nested dicts, layers stacked."""
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


def unstack(arrays: dict[str, Any], like: TrainState) -> TrainState:
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
