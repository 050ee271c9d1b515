"""The programs of a run, described without arrays: what is compiled is known before anything is allocated.

The loop, the dry run and compilation for another machine all start from here, so they speak of the very same step.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from maxtrain.config import schema
from maxtrain.ops import backends
from maxtrain.ops.linear import products_in
from maxtrain.parallel import context, sharding
from maxtrain.parallel.sharding import Layout
from maxtrain.training import state as states
from maxtrain.training.optimizer import make_optimizer
from maxtrain.training.state import TrainState
from maxtrain.training.step import LossFn, make_train_step, next_token_loss


@dataclass(frozen=True)
class Program:
    """A resolved config on a layout: the description of its state, and the step to compile."""

    config: schema.Config
    layout: Layout
    state: TrainState
    loss_fn: LossFn

    def create(self, seed: int, model: Any = None) -> TrainState:
        """The state before the first step, of a fresh model or the given one."""
        return states.create(self.state, make_optimizer(self.config.optimizer, self.config.precision), seed, model)

    def batch(self, rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Description of a batch of `rows` sequences of `length` tokens."""
        place = self.layout.sharding(("batch", "length"))
        spec = {
            name: jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=place) for name in ("tokens", "targets", "positions", "segments")
        }
        spec["weights"] = jax.ShapeDtypeStruct((rows, length), jnp.float32, sharding=place)
        return spec | {"source": jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=self.layout.sharding(("batch",)))}

    @property
    def stop(self) -> jax.ShapeDtypeStruct:
        """Description of the third input of the step: a number for each device, whether its process has been asked to stop."""
        mesh = self.layout.mesh
        return jax.ShapeDtypeStruct((mesh.size,), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec(mesh.axis_names)))

    def lower_step(self) -> Any:
        """The train step, ready to compile: (state, batch, stop) -> (state, metrics), the old state's memory given to the new."""
        out = jax.tree.map(lambda s: s.sharding, self.state), self.layout.sharding()
        with sharding.use(self.layout), products_in(self.config.precision.compute):
            step = jax.jit(make_train_step(self.config, self.loss_fn), donate_argnums=0, out_shardings=out)
            return step.lower(self.state, self.batch(self.config.data.batch_size, self.config.data.length), self.stop)

    def lower_eval(self, rows: int, length: int) -> Any:
        """The evaluation step, ready to compile: (model, batch) -> sums `loss` and `tokens` of the loss function."""

        def evaluate(model: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
            sums = self.loss_fn(model, batch)[1]
            return {name: sums[name] for name in ("loss", "tokens")}  # what only training needs is not computed

        with sharding.use(self.layout), products_in(self.config.precision.compute):
            step = jax.jit(evaluate, out_shardings=self.layout.sharding())
            return step.lower(self.state.model, self.batch(rows, length))


def make_program(config: schema.Config, layout: Layout, num_sources: int = 1, loss_fn: LossFn | None = None) -> Program:
    """The program of a resolved config on a layout, which is told how attention and a pipeline are computed on it."""
    layout = replace(layout, microbatches=config.mesh.pipeline_microbatches, repeats=config.mesh.pipeline_repeats)
    layout = context.settled(config, layout)
    layout = replace(layout, attention=backends.chosen(config, layout))
    state = states.describe(config, make_optimizer(config.optimizer, config.precision), layout)
    return Program(config, layout, state, loss_fn or next_token_loss(config, num_sources))


def put_batch(host: dict[str, Any], spec: dict[str, jax.ShapeDtypeStruct], rows: list[int]) -> dict[str, jax.Array]:
    """Arrays on the devices from this process's `rows` (sorted) of the global batch."""
    first = {row: index for index, row in enumerate(rows)}

    def one(name: str) -> jax.Array:
        def shard(index: Any) -> Any:
            start, stop, _ = index[0].indices(spec[name].shape[0])
            return host[name][first[start] : first[start] + stop - start][(slice(None), *index[1:])]

        return jax.make_array_from_callback(spec[name].shape, spec[name].sharding, shard)

    return {name: one(name) for name in spec}


def put_stop(asked: bool, spec: jax.ShapeDtypeStruct) -> jax.Array:
    """The input `stop` of a step, each process filling in whether it has been asked to stop."""
    return jax.make_array_from_callback(spec.shape, spec.sharding, lambda index: np.full(1, asked, np.int32))


def local_rows(spec: jax.ShapeDtypeStruct) -> list[int]:
    """The rows of a batch array that this process's devices hold, sorted."""
    assert spec.sharding is not None
    slices = [index[0].indices(spec.shape[0]) for index in spec.sharding.addressable_devices_indices_map(spec.shape).values()]
    return sorted({row for start, stop, _ in slices for row in range(start, stop)})
