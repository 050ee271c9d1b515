"""A pipeline over microbatches: each stage holds a part of the layers, and all of them work at the same time on unlike microbatches.

One program for all devices: what a stage does is mapped over the stages, whose dim is laid out over the mesh; after each step
what they made moves on to the next stage, and from the last back to the first. With one repeat that is GPipe (Huang et al.,
2019). With several, a stage holds as many groups of layers and a microbatch goes round so often (Narayanan et al., 2021,
section 2.2, the interleaved schedule): stages then wait `repeats` times less for the first and the last microbatch.

    step          0  1  2  3  4  5  6  7  8      2 stages, 4 microbatches, 2 repeats; a1 is microbatch a in its second round
    stage 0       a0 b0 a1 b1 c0 d0 c1 d1 -
    stage 1       -  a0 b0 a1 b1 c0 d0 c1 d1
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from maxtrain.parallel import sharding
from maxtrain.parallel.sharding import Axes, Layout, constrain, is_param, param_axes, per_shard

Pin = Callable[[Any], Any]
MOST_PER_STAGE = 4  # microbatches for each stage unless told otherwise: a fifth of the time is waited at most
INPUT = "block_input"  # what remat calls the input of a block
MOVES = ("dynamic_slice", "convert_element_type", "reshape", "squeeze", "broadcast_in_dim", "transpose")


@dataclass(frozen=True)
class Timetable:
    """Which stage works on what at each step; microbatches are a multiple of stages."""

    stages: int
    microbatches: int
    repeats: int = 1

    @property
    def steps(self) -> int:
        """Steps until the last stage has finished the last microbatch."""
        return self.microbatches * self.repeats + self.stages - 1

    @property
    def bubble(self) -> float:
        """The share of its time that a stage waits."""
        return (self.stages - 1) / self.steps

    def at(self, step: Any, stage: Any) -> tuple[Any, Any, Any]:
        """The microbatch and the repeat that a stage works on, and whether it works at all.

        As many microbatches as there are stages go all their rounds before the next ones start.
        """
        since = step - stage
        places, group = since % self.stages, since // self.stages
        busy = (since >= 0) & (since < self.microbatches * self.repeats)
        return group // self.repeats * self.stages + places, group % self.repeats, busy


def pipeline(
    stage_fn: Callable[..., tuple[Any, Any]],
    params: Any,
    x: Any,
    table: Timetable,
    names: tuple[str, ...] = (),
    pin: Pin = lambda state: state,
) -> tuple[Any, Any]:
    """All stages, and in each round all of them in their order, on every microbatch.

    Microbatches wait in a buffer that is spread over the stages, each with its share. At each step in which the first stage
    begins a microbatch it takes it from its share, puts one that is finished there, and the shares move on by one stage.
    So nothing is ever sent but to a neighbour. A stage that waits computes on zeros, and nothing of it is kept.

    Args:
        stage_fn: (params of the stage, repeat int32, x of one microbatch) -> (x, a pytree of sums).
        params: arrays [stages, ...].
        x: arrays [microbatches, ...].
        table: the schedule.
        names: the mesh axes that the stages are laid out over; none outside of a mesh.
        pin: settles the layout of what the stages begin, arrays [stages, ...].

    Returns: x after all stages, as it came in; and the sums, added up over stages, repeats and microbatches.
    """
    stages, share = table.stages, table.microbatches // table.stages
    assert share * stages == table.microbatches, "microbatches must be a multiple of stages"
    numbers = jnp.arange(stages)
    over_stages = jax.vmap(stage_fn, spmd_axis_name=names or None)

    def where(condition: jax.Array, a: Any, b: Any) -> Any:
        """Per stage: condition [stages] or scalar."""
        return jax.tree.map(lambda a, b: jnp.where(condition.reshape(-1, *(1,) * (a.ndim - 1)), a, b), a, b)

    def or_zero(condition: jax.Array, a: Any) -> Any:
        return where(condition, a, jax.tree.map(jnp.zeros_like, a))

    def exchange(step: jax.Array, state: Any, buffer: Any) -> tuple[Any, Any]:
        """What the stages begin: the first takes a microbatch from the buffer and gives a finished one, if it is time for that."""
        microbatch, repeat, _ = table.at(step, 0)
        waiting = jax.tree.map(lambda b: jax.lax.dynamic_index_in_dim(b, microbatch % share, 1, keepdims=False), buffer)
        first, fresh = numbers == 0, repeat == 0
        moved = jax.tree.map(lambda w: jnp.roll(w, -1, axis=0), where(first, state, waiting))
        kept = where(fresh, moved, waiting)
        buffer = jax.tree.map(lambda b, k: jax.lax.dynamic_update_index_in_dim(b, k, microbatch % share, 1), buffer, kept)
        return pin(where(first & fresh, waiting, state)), buffer

    def step(carry: tuple[Any, Any], number: jax.Array) -> tuple[tuple[Any, Any], Any]:
        state, buffer = exchange(number, *carry)
        _, repeat, busy = table.at(number, numbers)
        made, sums = over_stages(params, repeat, or_zero(busy, state))
        sums = jax.tree.map(lambda s: s.sum(axis=0), or_zero(busy, sums))
        return (jax.tree.map(lambda m: jnp.roll(m, 1, axis=0), made), buffer), sums

    buffer = jax.tree.map(lambda a: a.reshape(stages, share, *a.shape[1:]), x)
    empty = jax.tree.map(lambda b: jnp.zeros_like(b[:, 0]), buffer)
    carry, sums = jax.lax.scan(step, (empty, buffer), jnp.arange(table.steps))
    _, buffer = exchange(jnp.int32(table.steps), *carry)  # gives the last one back
    # the first that was finished found its place at step `stages`
    x = jax.tree.map(lambda b: jnp.roll(b, -(stages % share), axis=1).reshape(-1, *b.shape[2:]), buffer)
    return x, jax.tree.map(lambda s: s.sum(axis=0), sums)


# ------------------------------------------------------------------------------------------------- layers as stages


def timetable(layout: Layout, rows: int) -> Timetable:
    """The schedule for a batch of `rows` sequences, by itself with as many microbatches a stage as divide it, `MOST_PER_STAGE` at most."""
    stages, shards = layout.parts("layers"), layout.of_stage().parts("batch")
    per_stage = max(count for count in range(1, MOST_PER_STAGE + 1) if rows // shards // stages % count == 0)
    return Timetable(stages, layout.microbatches or stages * per_stage, layout.repeats)


def run_stages(
    block_fn: Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]],
    blocks: Any,
    x: jax.Array,
    axes: Axes,
    context: Any,
    policy: Any = None,
) -> tuple[jax.Array, Any]:
    """A scan over stacked blocks, as a pipeline over the mesh axes that split `layers` in the layout in use.

    Outside of it the devices of all stages share the batch, if the rule of `batch` says so: cutting it into microbatches and
    putting it together moves nothing then.

    Args:
        block_fn: (block, x, context) -> (x, a pytree of sums).
        blocks: parameters [num_blocks, ...], split over the stages in their order.
        x: [batch, ...], with the logical axes `axes`.
        context: arrays [batch, length] that go along with x.
        policy: what a block keeps for the backward pass besides its input; None for everything.

    Returns: x, and the sums over all blocks.
    """
    layout = sharding.in_use()
    assert layout is not None
    inner, table = layout.of_stage(), timetable(layout, x.shape[0])
    stages, repeats, shards = table.stages, table.repeats, inner.parts("batch")
    given_axes = axes, jax.tree.map(lambda _: ("batch", "length"), context)

    def cut(a: jax.Array, axes: Axes) -> jax.Array:
        """[batch, ...] -> [microbatches, rows, ...], rows of each device going to all microbatches."""
        parts = a.reshape(shards, stages, table.microbatches // stages, -1, *a.shape[1:])
        parts = jnp.moveaxis(parts, 0, 2).reshape(table.microbatches, -1, *a.shape[1:])
        return inner_constrain(parts, axes)

    def joined(a: jax.Array, axes: Axes) -> jax.Array:
        """The inverse of `cut`."""
        parts = inner_constrain(a, axes).reshape(stages, table.microbatches // stages, shards, -1, *a.shape[2:])
        return constrain(jnp.moveaxis(parts, 2, 0).reshape(-1, *a.shape[2:]), axes)

    def inner_constrain(a: jax.Array, axes: Axes) -> jax.Array:
        spec = jax.sharding.PartitionSpec(inner.stages, *inner.spec(axes))
        return jax.lax.with_sharding_constraint(a, jax.sharding.NamedSharding(layout.mesh, spec))

    def pin(state: Any) -> Any:
        return jax.tree.map(inner_constrain, state, given_axes)

    def stage(params: Any, repeat: jax.Array, given: tuple[jax.Array, Any]) -> tuple[tuple[jax.Array, Any], Any]:
        x, context = given
        x, sums = jax.lax.scan(lambda x, block: block_fn(block, checkpoint_name(x, INPUT), context), x, _group(params, repeat, repeats))
        return (x, context), jax.tree.map(lambda s: s.sum(axis=0), sums)

    if repeats > 1:  # or each step would keep a copy of the weights that were picked for it
        keep = jax.checkpoint_policies
        stage = jax.checkpoint(stage, policy=keep.save_from_both_policies(policy or _computed, keep.save_only_these_names(INPUT)))
    blocks = jax.tree.map(lambda p: by_stage(p, stages, repeats), blocks, is_leaf=is_param)
    given = jax.tree.map(cut, (x, context), given_axes)
    with sharding.use(inner):
        (x, _), sums = pipeline(stage, blocks, given, table, inner.stages, pin)
    return joined(x, axes), sums


def _computed(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whether an operation computes something; what only moves or converts can be done again."""
    return primitive.name not in MOVES


def _group(params: Any, repeat: jax.Array, repeats: int) -> Any:
    """The layers of a stage [repeats, layers, ...] that are run in a round."""
    if repeats == 1:
        return jax.tree.map(lambda p: p[0], params)

    def one(param: Any) -> Any:
        axes: Axes = (None, *param.get_metadata("axes"))
        pick = per_shard(lambda a, at: jax.lax.dynamic_index_in_dim(a, at, keepdims=False), ((None, *axes), ()), axes)
        return jax.tree.map(lambda a: pick(a, repeat), param)

    return jax.tree.map(one, params, is_leaf=is_param)


def by_stage(param: Any, stages: int, repeats: int) -> Any:
    """A stacked parameter [blocks, ...] -> [stages, repeats, layers, ...]; in round r, stage s runs the group r * stages + s."""
    axes = param_axes(param)

    def one(value: jax.Array) -> jax.Array:
        if repeats > 1:
            value = per_shard(lambda local: _dealt(local, stages, repeats), (axes,), axes)(value)
        value = value.reshape(stages, repeats, -1, *value.shape[1:])
        return constrain(value, ("layers", None, None, *axes[1:]))

    return jax.tree.map(one, param)


def _dealt(local: jax.Array, stages: int, repeats: int) -> jax.Array:
    """Within `per_shard`: neighbouring groups of layers, the `repeats` that this stage keeps -> those that it runs.

    Stage s keeps the groups s * repeats + j, and group g is run by stage g mod stages in round g // stages. In each of `repeats`
    exchanges every stage sends one and receives one; stages whose groups would go to the same stage take unlike j.
    """
    groups = local.reshape(repeats, -1, *local.shape[1:])
    me, found = sharding.index("layers"), jnp.zeros_like(groups)
    apart = stages // math.gcd(stages, repeats)
    for exchange in range(repeats):
        sent = [s * repeats + (s // apart + exchange) % repeats for s in range(stages)]
        targets = [group % stages for group in sent]
        rounds = [0] * stages
        for group in sent:
            rounds[group % stages] = group // stages
        layers = jax.lax.dynamic_index_in_dim(groups, jnp.array(sent)[me] % repeats, keepdims=False)
        layers = sharding.send(layers, "layers", list(enumerate(targets)))
        found = jax.lax.dynamic_update_index_in_dim(found, layers, jnp.array(rounds)[me], 0)
    return found.reshape(local.shape)
