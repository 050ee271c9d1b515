"""The train step compiled ahead of time for devices that are not there, and a report of what it will need from them."""

import io
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from maxtrain.config import schema
from maxtrain.config.errors import Refused
from maxtrain.parallel import mesh as meshes
from maxtrain.parallel.sharding import Layout
from maxtrain.training import collectives, estimate, hardware
from maxtrain.training.collectives import Collective
from maxtrain.training.estimate import Time, Work, network_seconds
from maxtrain.training.program import Program, make_program

GIB = 1 << 30
ASSUMED = (
    "Bounds, not measurements: products at the chip's bf16 peak, memory at its bandwidth, every collective both ways along all axes of "
    "the torus that its devices lie on. Weights and gradients (axes stage, data, fsdp) travel beside the products, what tensor, context "
    "and expert exchange does not."
)


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program; `missing` is what it lacks if it does not fit."""

    seconds: float
    arguments: int = 0
    """Bytes on a device: state and batch, or weights and cache."""
    temporary: int = 0
    """What is alive beside them at the moment that takes most."""
    code: int = 0
    available: int | None = None
    """Of the device's memory, where the compiler names it."""
    missing: str | None = None
    traffic: Sequence[Collective] = field(default=())

    @property
    def total(self) -> int:
        """Bytes on a device."""
        return self.arguments + self.temporary + self.code


def program(config: schema.Config, devices: Sequence[jax.Device]) -> Program:
    """The train step's program for these devices, as `train` makes it."""
    mesh = meshes.make_mesh(config.mesh, devices)
    return make_program(meshes.resolve(config, mesh), Layout(mesh, config.mesh.rules), len(config.data.sources))


def compiled(lowered: Any, mesh: jax.sharding.Mesh) -> Compiled:
    """Compile, and read what came of it; a program that does not fit the memory is an answer, not an error."""
    start = time.perf_counter()
    try:
        done = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(time.perf_counter() - start, missing=_missing(str(error)))
    sizes = done.memory_analysis()
    arguments = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return Compiled(
        time.perf_counter() - start,
        arguments,
        temporary=max(0, sizes.peak_memory_in_bytes - arguments),
        code=sizes.generated_code_size_in_bytes,
        traffic=collectives.read(done.as_text(), mesh),
    )


def _missing(message: str) -> str:
    """The compiler's first words on the memory that a program lacks."""
    line = next((line for line in message.splitlines() if re.search(r"[Rr]an out of memory|exceed", line)), message.splitlines()[0])
    return line.removeprefix("RESOURCE_EXHAUSTED: ").strip()


# ------------------------------------------------------------------------------------------------------ the report


def table(title: str, *columns: str) -> Table:
    """A table with its first column and words to the left, figures to the right."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 or column in ("axes", "partition") else "right")
    return made


def text(*parts: Table | str) -> str:
    """Tables and lines as text."""
    console = Console(file=io.StringIO(), width=120)
    for part in parts:
        console.print(part, highlight=False)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def chip_of(device: jax.Device) -> hardware.Chip:
    """The data sheet of a device."""
    found = hardware.chip(device)
    if found is None:
        raise Refused(f"there is no data sheet of the device {device.device_kind!r}: known are {', '.join(hardware.CHIPS)}")
    return found


def memory_table(sizes: dict[str, float], done: Compiled, chip: hardware.Chip) -> Table:
    """Estimated bytes by kind, and what the compiler counts, against the device's memory."""
    made = table(f"Memory of a device, of {chip.memory:g} GiB", "what", "GiB", "share")
    for name, size in (*sizes.items(), ("together, estimated", sum(sizes.values()))):
        made.add_row(name, f"{size / GIB:.2f}", f"{size / GIB / chip.memory:.1%}", end_section=name == list(sizes)[-1])
    if done.missing is None:
        counted = {"arguments": done.arguments, "temporaries": done.temporary, "code": done.code, "together, compiled": done.total}
        for name, value in counted.items():
            made.add_row(name, f"{value / GIB:.2f}", f"{value / GIB / chip.memory:.1%}")
    return made


def traffic_table(traffic: Sequence[Collective], chip: hardware.Chip) -> Table:
    """The collectives of a step by kind, mesh axes and network."""
    made = table("Collectives of a step", "kind", "mesh axes", "network", "runs", "MiB a device sends", "ms")
    seconds: dict[Any, float] = {}
    for item in traffic:
        key = item.kind, item.axes, item.network
        seconds[key] = seconds.get(key, 0.0) + network_seconds(item, chip)
    for (kind, axes, network), (runs, sent) in collectives.total(traffic).items():
        made.add_row(kind, "+".join(axes), network, f"{runs:,}", f"{sent / 2**20:,.1f}", f"{1e3 * seconds[kind, axes, network]:,.2f}")
    return made


def time_table(work: Work, layout: Layout, chip: hardware.Chip, found: Time) -> Table:
    """The roofline, and what follows from it."""
    devices, config = layout.mesh.size, work.config
    made = table("Roofline of a step", "what", "figure")
    made.add_row("model FLOPs of a step", f"{work.model_flops:.4g}")
    made.add_row("with what is computed again", f"{work.hardware_flops:.4g}")
    for name, value in {"products": found.compute, "memory": found.memory, **found.hidden, "exposed ICI": found.exposed}.items():
        made.add_row(f"{name}, ms", f"{1e3 * value:,.2f}")
    made.add_row("bound by", found.bound)
    made.add_row("step at best, ms", f"{1e3 * found.step:,.2f}")
    made.add_row("MFU at most", f"{work.model_flops / devices / chip.tflops / 1e12 / found.step:.1%}")
    made.add_row("tokens/s at most", f"{config.data.batch_size * config.data.length / found.step:,.0f}")
    return made


def report(made: Program, done: Compiled, name: str) -> str:
    """All that is known of a compiled train step."""
    mesh, config = made.layout.mesh, made.config
    chip, work = chip_of(mesh.devices.flat[0]), Work.of(config)
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    head = (
        f"{name}: {mesh.size} devices ({mesh.devices.flat[0].device_kind}), mesh {axes}; batch {config.data.batch_size} x "
        f"{config.data.length} in {config.train.microbatches}, remat {config.remat.policy}; compiled in {done.seconds:.0f} s"
    )
    sizes = memory_table(estimate.memory(work, made.layout), done, chip)
    if done.missing is not None:
        return text(head, sizes, f"It does not fit: {done.missing}")
    found = estimate.time(work, made.layout, chip, done.traffic)
    return text(head, sizes, traffic_table(done.traffic, chip), time_table(work, made.layout, chip, found), ASSUMED)
