"""Everything that depends on the devices: starting processes, building the mesh, and settling `auto` values.

Called only after the config has been validated, so a misspelt key never costs a cluster start.
"""

import ctypes
import functools
import importlib.util
import math
import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import jax
import numpy as np
from jax.experimental import mesh_utils

from maxtrain.config import schema
from maxtrain.config.errors import Refused
from maxtrain.config.paths import expand
from maxtrain.parallel import compile_cache, context
from maxtrain.parallel.peers import JOIN_SECONDS, PEER_LOST, leave
from maxtrain.parallel.pipeline import timetable
from maxtrain.parallel.sharding import Layout

ACCELERATORS = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin")  # packages without which jax finds CPUs only
AXES = get_args(schema.MeshAxis)
SHUTDOWN_SECONDS = 60  # that a process which is done waits for the others


@functools.cache
def keep_memory() -> None:
    """On a machine without accelerators, let glibc keep what is freed; to be called before the devices are asked for.

    XLA:CPU allocates the temporaries of a step anew each time: 2.8 GB for SmolLM2-135M, batch 2 x 512. Given back to the system
    and taken again page by page they cost 7% of the step, and 20% if they lie on a heap that is trimmed. Only one arena
    (`M_ARENA_MAX`) can hold blocks of any size without mmap, and only a trim threshold of -1 keeps more than 2 GiB.
    """
    cpu = getattr(jax.config, "jax_platforms", None) == "cpu" or not any(map(importlib.util.find_spec, ACCELERATORS))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if cpu and os.name == "posix" else None
    if mallopt is not None:  # glibc
        for parameter, value in ((-8, 1), (-4, 0), (-1, -1)):  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD
            mallopt(parameter, value)


def start(run: schema.Run, mesh: schema.Mesh) -> None:
    """Join the other processes (if there are any) and switch on the compilation cache. Idempotent."""
    keep_memory()
    cache = _compile_cache(run)
    if cache is not None:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
        compile_cache.mend(cache)
    if mesh.num_processes == 1 or jax.distributed.is_initialized():
        return
    # JAX's own answer to SIGTERM would take the place of ours: a run asks all its processes in every step
    jax.config.update("jax_enable_preemption_service", False)
    late = f"mesh.num_processes={mesh.num_processes}: not all processes came within {JOIN_SECONDS} s; start them all again"
    timer = threading.Timer(JOIN_SECONDS, leave, (PEER_LOST, late))  # then JAX would abort with a dump
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            mesh.coordinator,
            None if mesh.num_processes == "auto" else mesh.num_processes,
            mesh.process_id,
            initialization_timeout=JOIN_SECONDS + 30,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except ValueError as error:  # what was not given was not found either
        raise Refused(
            f"mesh.num_processes={mesh.num_processes}: no cluster says who the processes are ({error}): "
            "set mesh.coordinator, mesh.num_processes and mesh.process_id"
        ) from error
    finally:
        timer.cancel()
    if mesh.num_processes not in ("auto", jax.process_count()):
        raise Refused(f"mesh.num_processes={mesh.num_processes}, but {jax.process_count()} processes joined")


def _compile_cache(run: schema.Run) -> str | None:
    """The folder of the compilation cache; None where there is none, also because the default's home folder is unknown."""
    if run.compile_cache is None:
        return None
    try:
        return expand(run.compile_cache, "run.compile_cache")
    except Refused:
        if "compile_cache" in run.changed:
            raise
        return None  # it only saves time


def sizes(cfg: schema.Mesh, num_devices: int) -> tuple[int, ...]:
    """Number of devices on each of `AXES`, slices included, the -1 filled in.

    Raises:
        Refused: the axes do not multiply to `num_devices`.
    """
    asked, across = [getattr(cfg, axis) for axis in AXES], [cfg.dcn.get(axis, 1) for axis in AXES]
    fixed = math.prod(size for size in asked if size != -1) * math.prod(across)
    if num_devices % fixed or (-1 not in asked and fixed != num_devices):
        named = [f"mesh.{axis}={size}" for axis, size in zip(AXES, asked, strict=True) if size != 1 or axis in ("data", "fsdp")]
        named += [f"mesh.dcn.{axis}={size}" for axis, size in cfg.dcn.items()]
        raise Refused(f"{', '.join(named)} does not fit {num_devices} devices: the product must be {num_devices}, -1 takes what is left")
    return tuple((num_devices // fixed if size == -1 else size) * factor for size, factor in zip(asked, across, strict=True))


def make_mesh(cfg: schema.Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The device mesh of a run, with neighbours on an axis in one slice as far as `mesh.dcn` allows; sharding mode is auto."""
    devices = list(jax.devices() if devices is None else devices)
    total, across = sizes(cfg, len(devices)), tuple(cfg.dcn.get(axis, 1) for axis in AXES)
    within = tuple(size // factor for size, factor in zip(total, across, strict=True))
    auto: Any = (jax.sharding.AxisType.Auto,) * len(AXES)
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if num_slices > 1:
        if math.prod(across) != num_slices:
            raise Refused(
                f"the devices come in {num_slices} slices, mesh.dcn={dict(cfg.dcn)} multiplies to {math.prod(across)}: they must agree"
            )
        return jax.sharding.Mesh(mesh_utils.create_hybrid_device_mesh(within, across, devices), AXES, axis_types=auto)
    if math.prod(across) == 1:
        try:
            return jax.make_mesh(total, AXES, axis_types=auto, devices=devices)
        except NotImplementedError:  # no whole axes of the torus multiply to this shape: one is divided
            grid = mesh_utils.create_device_mesh(total, devices, allow_split_physical_axes=True)
            return jax.sharding.Mesh(grid, AXES, axis_types=auto)
        except ValueError:  # a topology that has no contiguous layout for this shape
            return jax.sharding.Mesh(np.array(devices).reshape(total), AXES, axis_types=auto)
    # simulated devices know no slices: equal runs of them stand for slices, the outer part of each axis
    grid = np.array(devices).reshape(across + within)
    grid = grid.transpose([axis + side * len(AXES) for axis in range(len(AXES)) for side in (0, 1)])
    return jax.sharding.Mesh(grid.reshape(total), AXES, axis_types=auto)


def optimizer_layout(cfg: schema.Mesh, layout: Layout) -> Layout:
    """The layout of the optimizer's moments."""
    return Layout(layout.mesh, {**layout.rules, "embed": (*layout.rules.get("embed", ()), "data")}) if cfg.zero1 else layout


def resolve(config: schema.Config, mesh: jax.sharding.Mesh) -> schema.Config:
    """The config with every `auto` settled for the mesh's platform.

    Raises:
        Refused: the batch, its sequences or the heads do not divide over the devices.
    """
    layout = Layout(mesh, config.mesh.rules)
    check(config, layout)
    return settle(config, mesh.devices.flat[0].platform == "cpu", layout.parts("layers") > 1)


def settle(config: schema.Config, on_cpu: bool, staged: bool = False) -> schema.Config:
    """The config with every `auto` settled for CPUs, or for accelerators; the stages of a pipeline share stacked layers."""
    unroll = on_cpu and not staged and config.remat.policy == "none"  # unrolled, XLA:CPU computes nothing again: it merges equal layers
    settled = {
        "model": {"layers": "unroll" if unroll else "scan"} if config.model.layers == "auto" else {},
        "precision": {"compute": "float32" if on_cpu else "bfloat16"} if config.precision.compute == "auto" else {},
    }
    return config.model_copy(update={name: getattr(config, name).model_copy(update=new) for name, new in settled.items() if new})


def check(config: schema.Config, layout: Layout) -> None:
    """Raise `Refused` if batch, sequences or heads do not divide over the devices of a layout."""
    _check_batch(config, layout.parts("batch"))
    _check_parts(config, layout)
    _check_stages(config, layout)
    if config.mesh.zero1 and (layout.mesh.shape["data"] == 1 or "data" in layout.rules.get("embed", ())):
        raise Refused("mesh.zero1 has no effect: there are no replicas (mesh.data=1, or mesh.rules.embed names data): remove it")


def _check_batch(config: schema.Config, shards: int) -> None:
    rows = config.data.batch_size // config.train.microbatches
    if rows % shards:
        raise Refused(
            f"data.batch_size={config.data.batch_size} in train.microbatches={config.train.microbatches} gives {rows} sequences at a time, "
            f"which {shards} devices cannot share evenly: choose a multiple of {shards * config.train.microbatches}"
        )
    if (config.eval.batch_size or 0) % shards:
        raise Refused(f"eval.batch_size={config.eval.batch_size} is not a multiple of the {shards} devices that share a batch")


def _check_parts(config: schema.Config, layout: Layout) -> None:
    """Refuse what the devices of an axis cannot share evenly, as far as the shapes of parameters do not show it."""
    for key, length in context.lengths(config).items():
        for axis in ("length", "residual"):
            if length % layout.parts(axis):
                names = "+".join(layout.split(axis))
                raise Refused(f"{key}={length} is not a multiple of the {layout.parts(axis)} devices ({names}) that share a sequence")
    model, devices = config.model, layout.parts("heads")
    if model.num_heads % devices or (model.kv_heads % devices and devices % model.kv_heads):
        raise Refused(
            f"model.num_heads={model.num_heads} and model.num_kv_heads={model.kv_heads} cannot be shared by the {devices} devices of "
            f"{'+'.join(layout.split('heads'))}: the heads must be a multiple of them, the kv heads a multiple or a divisor"
        )
    context.settled(config, layout)


def _check_stages(config: schema.Config, layout: Layout) -> None:
    """Refuse layers and batches that the stages of a pipeline cannot share evenly."""
    cfg, model, stages = config.mesh, config.model, layout.parts("layers")
    if stages == 1:
        unread = sorted(cfg.changed & {"pipeline_microbatches", "pipeline_repeats"})
        if unread:
            raise Refused(f"mesh.{unread[0]}={getattr(cfg, unread[0])} has no effect without a pipeline: raise mesh.stage or remove it")
        return
    names = "+".join(layout.split("layers"))
    if model.layers == "unroll":
        raise Refused(f"model.layers=unroll: the {stages} stages of a pipeline ({names}) share stacked layers: set it to scan or auto")
    groups = stages * cfg.pipeline_repeats
    if model.num_periods == 0 or model.num_periods % groups:
        pattern = len(model.layer_pattern)
        raise Refused(
            f"model.num_layers={model.num_layers}: behind a prefix of {len(model.prefix)} there are {model.num_periods} periods of "
            f"{pattern} layers, which {stages} stages ({names}) times mesh.pipeline_repeats={cfg.pipeline_repeats} cannot share evenly: "
            f"name the first layers in model.prefix until the periods are a multiple of {groups}, or choose other numbers"
        )
    if config.eval.prompts or config.eval.questions:
        raise Refused(
            f"eval.prompts, eval.questions: a model in {stages} stages ({names}) does not generate: remove them, and use "
            "`python -m maxtrain.decode` on a checkpoint"
        )
    layout = replace(layout, microbatches=cfg.pipeline_microbatches, repeats=cfg.pipeline_repeats)
    if (cfg.pipeline_microbatches or stages) % stages:
        raise Refused(f"mesh.pipeline_microbatches={cfg.pipeline_microbatches} is not a multiple of the {stages} stages ({names})")
    batches = {"data.batch_size": config.data.batch_size // config.train.microbatches}
    batches |= {"eval.batch_size": config.eval.batch_size or config.data.batch_size} if config.eval.sets else {}
    for key, rows in batches.items():
        microbatches, shards = timetable(layout, rows).microbatches, layout.of_stage().parts("batch")
        if rows % (microbatches * shards):
            raise Refused(
                f"{key}: {rows} sequences at a time cannot be cut into {microbatches} microbatches of a pipeline, each for {shards} "
                f"devices: choose a multiple of {microbatches * shards}, or another mesh.pipeline_microbatches"
            )
