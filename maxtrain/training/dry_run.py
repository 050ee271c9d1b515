"""What a run would cost, from shapes alone: no step is run and no array is made."""

import io
import math
from collections import Counter
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from maxtrain.config import schema
from maxtrain.models import flops
from maxtrain.parallel import mesh
from maxtrain.parallel.pipeline import timetable
from maxtrain.parallel.sharding import Layout, kind, parameter_table
from maxtrain.training import pretrained
from maxtrain.training.program import Program, make_program


def bytes_per_device(tree: Any) -> int:
    """Bytes one device holds of a described pytree."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def activation_bytes(config: schema.Config, shards: int) -> int:
    """An estimate of what one microbatch keeps for the backward pass on one device, by remat policy."""
    model, width = config.model, 4 if config.precision.compute == "float32" else 2
    tokens = config.data.batch_size * config.data.length // config.train.microbatches // shards
    heads, kv_heads = model.num_heads * model.head_width, model.kv_heads * model.head_width
    total = 0.0
    for name in model.trained_kinds:
        slot = model.slots[name]
        mlp = model.mlp
        if slot.feed_forward == "moe" and model.moe:
            mlp = model.moe.mlp * model.moe.experts_per_token + (model.moe.shared_mlp or 0)
        products = heads + 2 * kv_heads + model.embed + 2 * mlp + model.embed
        scores = 2 * model.num_heads * flops.visible_keys(config.data.length, slot.window)
        kept = {"full": 0.0, "dots": products, "none": products + heads + 3 * model.embed + 2 * mlp + scores}
        total += model.embed + kept[config.remat.policy]
    logits = tokens * min(config.train.loss_chunk, config.data.length) / config.data.length * model.vocab_size * 8
    return round(tokens * total * width + logits)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index > 0 and column not in ("axes", "partition") else "left")
    return table


def _parameters(program: Program) -> Table:
    table, sizes, arrays = _table("Parameters", "kind", "arrays", "elements"), Counter[str](), Counter[str]()
    for parameter in parameter_table(program.state.model).values():
        sizes[kind(parameter.axes)] += parameter.size
        arrays[kind(parameter.axes)] += 1
    for name, size in sizes.items():
        table.add_row(name, f"{arrays[name]:,}", f"{size:,}")
    table.add_row("total", f"{sum(arrays.values()):,}", f"{sum(sizes.values()):,}")
    return table


def _operations(config: schema.Config) -> Table:
    table = _table(f"Operations per token at length {config.data.length:,} (causal and windowed attention as computed)", "part", "FLOPs")
    for part, count in flops.forward(config.model, config.data.length, training=True).items():
        table.add_row(part, f"{count:,.0f}")
    training = flops.training(config.model, config.data.length)
    table.add_row("forward and backward", f"{training:,.0f}")
    table.add_row("one step", f"{training * config.data.batch_size * config.data.length:,.0f}")
    return table


def _pipeline(program: Program) -> Table:
    config, layout = program.config, program.layout
    rows = config.data.batch_size // config.train.microbatches
    times = timetable(layout, rows)
    table = _table(f"Pipeline over the mesh ({'+'.join(layout.split('layers'))})", "what", "number")
    layers = config.model.num_periods * len(config.model.layer_pattern)
    for name, count in {
        "stages": times.stages,
        "layers of a stage": layers // times.stages,
        "groups of layers in a stage (mesh.pipeline_repeats)": times.repeats,
        "microbatches (mesh.pipeline_microbatches)": times.microbatches,
        "sequences of a microbatch": rows // times.microbatches,
        "steps": times.steps,
    }.items():
        table.add_row(name, f"{count:,}")
    table.add_row("share of the time a stage waits", f"{times.bubble:.1%}")
    return table


def _memory(program: Program) -> Table:
    config, layout = program.config, program.layout
    shards = layout.parts("batch") * layout.parts("residual")
    parameters = bytes_per_device(program.state.model)
    rows = {
        "parameters": parameters,
        "optimizer": bytes_per_device(program.state.opt_state),
        "gradients": sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * 4 for leaf in jax.tree.leaves(program.state.model)),
        "batch": bytes_per_device(program.batch(config.data.batch_size, config.data.length)),
        "activations (an estimate)": activation_bytes(config, shards),
    }
    table = _table(f"Bytes per device, {layout.mesh.size} x {layout.mesh.devices.flat[0].device_kind}", "what", "bytes", "MiB")
    for name, size in (rows | {"total": sum(rows.values())}).items():
        table.add_row(name, f"{size:,}", f"{size / 2**20:,.1f}")
    return table


def _arrays(program: Program) -> Table:
    mesh_shape = ", ".join(f"{axis}={size}" for axis, size in program.layout.mesh.shape.items())
    table = _table(f"Layout over the mesh ({mesh_shape})", "array", "shape", "axes", "partition")
    for name, parameter in parameter_table(program.state.model).items():
        spec = [part if part else "-" for part in program.layout.spec(parameter.axes)]
        table.add_row(name, str(parameter.shape), " ".join(str(axis) for axis in parameter.axes), " ".join(map(str, spec)))
    return table


def report(config: schema.Config) -> str:
    """The tables, as text."""
    config, _ = pretrained.settle(config, save=False)
    device_mesh = mesh.make_mesh(config.mesh)
    program = make_program(mesh.resolve(config, device_mesh), Layout(device_mesh, config.mesh.rules), len(config.data.sources))
    console = Console(file=io.StringIO(), width=120)
    pipeline = [_pipeline(program)] if program.layout.parts("layers") > 1 else []
    for table in (_parameters(program), _operations(program.config), _memory(program), *pipeline, _arrays(program)):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
