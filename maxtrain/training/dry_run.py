"""What a run would cost, from shapes alone: no step is run and no array is made."""

import math
from collections import Counter
from typing import Any

import jax
from rich.table import Table

from maxtrain.config import schema
from maxtrain.models import flops
from maxtrain.parallel import mesh
from maxtrain.parallel.pipeline import timetable
from maxtrain.parallel.sharding import Layout, kind, parameter_table
from maxtrain.training import estimate, pretrained
from maxtrain.training.compilation import table, text
from maxtrain.training.estimate import Work
from maxtrain.training.optimizer import check_trainable
from maxtrain.training.program import Program, make_program


def bytes_per_device(tree: Any) -> int:
    """Bytes one device holds of a described pytree."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _parameters(program: Program) -> Table:
    made, sizes, arrays = table("Parameters", "kind", "arrays", "elements"), Counter[str](), Counter[str]()
    for parameter in parameter_table(program.state.model).values():
        sizes[kind(parameter.axes)] += parameter.size
        arrays[kind(parameter.axes)] += 1
    for name, size in sizes.items():
        made.add_row(name, f"{arrays[name]:,}", f"{size:,}")
    made.add_row("total", f"{sum(arrays.values()):,}", f"{sum(sizes.values()):,}")
    return made


def _operations(config: schema.Config) -> Table:
    made = table(f"Operations per token at length {config.data.length:,} (causal and windowed attention as computed)", "part", "FLOPs")
    for part, count in flops.forward(config.model, config.data.length, training=True).items():
        made.add_row(part, f"{count:,.0f}")
    training = flops.training(config.model, config.data.length)
    made.add_row("forward and backward", f"{training:,.0f}")
    made.add_row("one step", f"{training * config.data.batch_size * config.data.length:,.0f}")
    return made


def _pipeline(program: Program) -> Table:
    config, layout = program.config, program.layout
    rows = config.data.batch_size // config.train.microbatches
    times = timetable(layout, rows)
    made = table(f"Pipeline over the mesh ({'+'.join(layout.split('layers'))})", "what", "number")
    layers = config.model.num_periods * len(config.model.layer_pattern)
    for name, count in {
        "stages": times.stages,
        "layers of a stage": layers // times.stages,
        "groups of layers in a stage (mesh.pipeline_repeats)": times.repeats,
        "microbatches (mesh.pipeline_microbatches)": times.microbatches,
        "sequences of a microbatch": rows // times.microbatches,
        "steps": times.steps,
    }.items():
        made.add_row(name, f"{count:,}")
    made.add_row("share of the time a stage waits", f"{times.bubble:.1%}")
    return made


def _memory(program: Program) -> Table:
    layout = program.layout
    made = table(f"Bytes per device, {layout.mesh.size} x {layout.mesh.devices.flat[0].device_kind}", "what", "bytes", "MiB")
    rows = estimate.memory(Work.of(program.config), layout)
    for name, size in (rows | {"total": sum(rows.values())}).items():
        made.add_row(name, f"{size:,.0f}", f"{size / 2**20:,.1f}")
    return made


def _arrays(program: Program) -> Table:
    mesh_shape = ", ".join(f"{axis}={size}" for axis, size in program.layout.mesh.shape.items())
    made = table(f"Layout over the mesh ({mesh_shape})", "array", "shape", "axes", "partition")
    for name, parameter in parameter_table(program.state.model).items():
        spec = [part if part else "-" for part in program.layout.spec(parameter.axes)]
        made.add_row(name, str(parameter.shape), " ".join(str(axis) for axis in parameter.axes), " ".join(map(str, spec)))
    return made


def report(config: schema.Config) -> str:
    """The tables, as text."""
    check_trainable(config)
    config, _ = pretrained.settle(config, save=False)
    device_mesh = mesh.make_mesh(config.mesh)
    program = make_program(mesh.resolve(config, device_mesh), Layout(device_mesh, config.mesh.rules), len(config.data.sources))
    pipeline = [_pipeline(program)] if program.layout.parts("layers") > 1 else []
    return text(_parameters(program), _operations(program.config), _memory(program), *pipeline, _arrays(program))
