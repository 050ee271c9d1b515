"""Which mesh, rematerialisation and microbatches train a config fastest: searched by arithmetic, confirmed by compiling."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from maxtrain.config import schema
from maxtrain.config.errors import Refused
from maxtrain.parallel import mesh as meshes
from maxtrain.parallel.sharding import Layout
from maxtrain.training import compilation, estimate
from maxtrain.training.compilation import GIB, Compiled
from maxtrain.training.estimate import Time, Work

POLICIES = ("none", "dots", "full")
FULL = 0.88  # share of the memory that an estimate may take
AXES = ("data", "fsdp", "expert", "context", "tensor")
CONFIRMED = 3


@dataclass(frozen=True)
class Plan:
    """One way to train."""

    config: schema.Config
    sizes: dict[str, int]
    """Of the mesh axes, slices included."""
    given: schema.Mesh
    """What the config says of them."""
    memory: float
    time: Time

    @property
    def lines(self) -> list[str]:
        """The words that say it on the command line."""
        sizes = {axis: getattr(self.config.mesh, axis) for axis in (*AXES, "stage")}
        mesh = [f"mesh.{axis}={size}" for axis, size in sizes.items() if axis == "fsdp" or size != getattr(self.given, axis)]
        mesh += [f"mesh.dcn.{axis}={size}" for axis, size in self.config.mesh.dcn.items()]
        return [*mesh, f"remat.policy={self.config.remat.policy}", f"train.microbatches={self.config.train.microbatches}"]


def plans(config: schema.Config, devices: Sequence[jax.Device]) -> list[Plan]:
    """All that can be run, fastest first; what does not fit comes last, the smallest first."""
    chip, slices = (
        compilation.chip_of(devices[0]),
        len({getattr(d, "slice_index", None) or 0 for d in devices}),
    )
    torus = [len(set(along)) for along in zip(*(getattr(d, "coords", ()) for d in devices), strict=True)]
    work, found = Work.of(meshes.settle(config, on_cpu=False)), list[Plan]()
    for sizes in _meshes(work.config, len(devices), slices):
        settled = work.config.model_copy(update={"mesh": _mesh(config, sizes, slices)})
        layout = Layout(abstract(sizes), settled.mesh.rules)
        if not _divides(work, layout):
            continue
        for policy, parts in itertools.product(POLICIES, _microbatches(settled, layout)):
            asked = settled.model_copy(
                update={
                    "remat": settled.remat.model_copy(update={"policy": policy}),
                    "train": settled.train.model_copy(update={"microbatches": parts}),
                }
            )
            try:
                meshes.check(asked, layout)
            except Refused:
                continue
            tried = Work(asked, work.parameters, work.moments)
            across = {axis: slices for axis in ("data", "fsdp") if settled.mesh.dcn.get(axis, 1) > 1}
            seconds = estimate.time(tried, layout, chip, estimate.traffic(tried, layout, across, torus))
            found.append(Plan(asked, sizes, config.mesh, sum(estimate.memory(tried, layout).values()), seconds))
    room = FULL * chip.memory * GIB
    return sorted(found, key=lambda plan: (plan.memory > room, plan.memory if plan.memory > room else plan.time.step))


def _mesh(config: schema.Config, sizes: dict[str, int], slices: int) -> schema.Mesh:
    """The config's mesh section with other sizes; replicas lie across slices."""
    axes = dict.fromkeys(AXES, 1) | sizes
    dcn = {}
    if slices > 1:
        axis = "data" if axes["data"] % slices == 0 else "fsdp"
        dcn, axes[axis] = {axis: slices}, axes[axis] // slices
    return config.mesh.model_copy(update={**axes, "stage": 1, "dcn": dcn})


def abstract(sizes: dict[str, int]) -> Any:
    """A mesh of no devices, of which only the sizes are asked for."""
    full = dict.fromkeys(meshes.AXES, 1) | sizes
    return jax.sharding.AbstractMesh(tuple(full.values()), tuple(full))


def _meshes(config: schema.Config, devices: int, slices: int) -> Iterator[dict[str, int]]:
    """Sizes of the axes that multiply to the devices: one axis or two besides fsdp, and replicas where there are slices."""
    model = config.model
    powers = [2**exponent for exponent in range(int(math.log2(devices)) + 1)]
    experts = [n for n in powers if model.moe and model.moe.num_experts % n == 0] or [1]
    tensors = [n for n in powers if n <= 16 and model.num_heads % n == 0]
    contexts = [n for n in powers if n <= 8 and config.data.length >= 8192 * n] or [1]
    for data, expert, context, tensor in itertools.product(dict.fromkeys((1, slices)), experts, {1, *contexts}, tensors):
        if devices % (data * expert * context * tensor) == 0:
            yield {
                "data": data,
                "fsdp": devices // (data * expert * context * tensor),
                "expert": expert,
                "context": context,
                "tensor": tensor,
            }


def _microbatches(config: schema.Config, layout: Layout) -> Iterable[int]:
    most = config.data.batch_size // layout.parts("batch")
    return (parts for parts in (1, 2, 4, 8, 16, 32) if most % parts == 0 and parts <= most)


def _divides(work: Work, layout: Layout) -> bool:
    return all(size % layout.parts(axis) == 0 for leaf in work.parameters for size, axis in zip(leaf.shape, leaf.axes, strict=True))


def report(config: schema.Config, devices: Sequence[jax.Device], name: str) -> tuple[str, bool]:
    """The best plans compiled, as a table with the words that say them; and whether any fits."""
    found = plans(config, devices)
    if not found:
        raise Refused(f"no mesh of {len(devices)} devices can share this config: choose another data.batch_size or another slice")
    chip = compilation.chip_of(devices[0])
    room = FULL * chip.memory * GIB
    chosen, confirmed = _distinct(found), list[tuple[Plan, Compiled, Time | None]]()
    for plan in chosen:
        made = compilation.program(plan.config, devices)
        done = compilation.compiled(made.lower_step(), made.layout.mesh)
        fits = done.missing is None
        confirmed.append((plan, done, estimate.time(Work.of(made.config), made.layout, chip, done.traffic) if fits else None))
    confirmed.sort(key=lambda item: item[2].step if item[2] else math.inf)
    table = compilation.table(
        f"Plans for {name}: batch {config.data.batch_size} x {config.data.length}; {len(found)} tried, "
        f"{sum(plan.memory <= room for plan in found)} fit by estimate",
        "plan",
        "GiB, estimated",
        "compiled",
        "step, ms: estimated",
        "compiled",
        "MFU at most",
        "bound by",
    )
    for plan, done, seconds in confirmed:
        share = Work(plan.config, [], []).model_flops / len(devices) / chip.tflops / 1e12
        cells = [f"{done.total / GIB:.2f}" if seconds else "does not fit", f"{1e3 * plan.time.step:,.1f}"]
        cells += [f"{1e3 * seconds.step:,.1f}", f"{share / seconds.step:.0%}", seconds.bound] if seconds else ["-", "-", plan.time.bound]
        table.add_row(" ".join(plan.lines[:-2]) + "\n" + " ".join(plan.lines[-2:]), f"{plan.memory / GIB:.2f}", *cells)
    fits = confirmed[0][2] is not None
    return compilation.text(
        table, compilation.ASSUMED, "", *(["To run the first:", "  " + " ".join(confirmed[0][0].lines)] if fits else [])
    ), fits


def _distinct(found: Sequence[Plan]) -> list[Plan]:
    """The first few, one for each mesh."""
    by_mesh: dict[tuple[int, ...], Plan] = {}
    for plan in found:
        by_mesh.setdefault(tuple(plan.sizes.values()), plan)
    return list(by_mesh.values())[:CONFIRMED]


def advice(config: schema.Config, devices: Sequence[jax.Device]) -> str:
    """What to change, nearest first, so that a config that does not fit these devices would by estimate."""
    chip = compilation.chip_of(devices[0])
    found = [plan for plan in plans(config, devices) if plan.memory <= FULL * chip.memory * GIB]
    if not found:
        smallest = min(plans(config, devices), key=lambda plan: plan.memory)
        return (
            f"No mesh, remat or microbatches would fit: the least is {smallest.memory / GIB:.1f} GiB of {chip.memory:g} with "
            f"{' '.join(smallest.lines)}. Take more devices, a smaller data.batch_size or a shorter data.length."
        )

    def changed(plan: Plan) -> int:
        was = (config.remat.policy, config.train.microbatches, *(getattr(config.mesh, axis) for axis in AXES if axis != "fsdp"))
        now = (plan.config.remat.policy, plan.config.train.microbatches, *(plan.sizes[axis] for axis in AXES if axis != "fsdp"))
        return sum(a != b for a, b in zip(was, now, strict=True))

    best = sorted(found, key=lambda plan: (changed(plan), plan.time.step))[:3]
    return "By estimate these would fit:\n" + "\n".join(f"  {' '.join(plan.lines)}  ({plan.memory / GIB:.1f} GiB)" for plan in best)
