"""Everything that depends on the devices: starting processes, building the mesh, and settling `auto` values.

Called only after the config has been validated, so a misspelt key never costs a cluster start.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math
import os
from collections.abc import Sequence

import jax
import numpy as np

from maxtrain.config import schema
from maxtrain.config.errors import Refused

AXES = ("data", "fsdp")
ACCELERATORS = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin")  # packages without which jax finds CPUs only


@functools.cache
def keep_memory() -> None:
    """On a machine without accelerators, let glibc keep what is freed; to be called before the devices are asked for.

    XLA:CPU allocates the temporaries of a step anew each time. Given back to the system and taken again page by page, they
    cost an eighth of a SmolLM2-135M step. Only one arena (`M_ARENA_MAX`) can hold blocks of any size without mmap.
    """
    cpu = getattr(jax.config, "jax_platforms", None) == "cpu" or not any(map(importlib.util.find_spec, ACCELERATORS))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if cpu and os.name == "posix" else None
    if mallopt is not None:  # glibc
        for parameter, value in ((-8, 1), (-4, 0), (-1, 2**31 - 1)):  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD
            mallopt(parameter, value)


def start(run: schema.Run, mesh: schema.Mesh) -> None:
    """Join the other processes (if there are any) and switch on the compilation cache. Idempotent."""
    keep_memory()
    if run.compile_cache is not None:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(run.compile_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    if mesh.num_processes == 1 or jax.distributed.is_initialized():
        return
    if mesh.num_processes == "auto":
        jax.distributed.initialize()
    else:
        jax.distributed.initialize(mesh.coordinator, mesh.num_processes, mesh.process_id)
        if jax.process_count() != mesh.num_processes:
            raise Refused(f"mesh.num_processes={mesh.num_processes}, but {jax.process_count()} processes joined")


def sizes(cfg: schema.Mesh, num_devices: int) -> tuple[int, ...]:
    """Number of devices on each of `AXES`, the -1 filled in.

    Raises:
        Refused: the axes do not multiply to `num_devices`.
    """
    asked = [getattr(cfg, axis) for axis in AXES]
    fixed = math.prod(size for size in asked if size != -1)
    if num_devices % fixed or (-1 not in asked and fixed != num_devices):
        shape = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, asked, strict=True))
        raise Refused(f"{shape} does not fit {num_devices} devices: the product must be {num_devices}, -1 takes what is left")
    return tuple(num_devices // fixed if size == -1 else size for size in asked)


def make_mesh(cfg: schema.Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The device mesh of a run; sharding mode is auto."""
    devices = list(jax.devices() if devices is None else devices)
    shape = sizes(cfg, len(devices))
    try:
        return jax.make_mesh(shape, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES), devices=devices)
    except ValueError:  # a topology that has no contiguous layout for this shape
        return jax.sharding.Mesh(np.array(devices).reshape(shape), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def resolve(config: schema.Config, mesh: jax.sharding.Mesh) -> schema.Config:
    """The config with every `auto` settled for the mesh's platform.

    Raises:
        Refused: the batch does not divide over the devices.
    """
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    shards = math.prod(mesh.shape[axis] for axis in config.mesh.rules.get("batch", ()))
    rows = config.data.batch_size // config.train.microbatches
    if rows % shards:
        raise Refused(
            f"data.batch_size={config.data.batch_size} in train.microbatches={config.train.microbatches} gives {rows} sequences at a time, "
            f"which {shards} devices cannot share evenly: choose a multiple of {shards * config.train.microbatches}"
        )
    if (config.eval.batch_size or 0) % shards:
        raise Refused(f"eval.batch_size={config.eval.batch_size} is not a multiple of the {shards} devices that share a batch")
    settled = {
        "model": {"layers": "unroll" if on_cpu else "scan"} if config.model.layers == "auto" else {},
        "precision": {"compute": "float32" if on_cpu else "bfloat16"} if config.precision.compute == "auto" else {},
    }
    return config.model_copy(update={name: getattr(config, name).model_copy(update=new) for name, new in settled.items() if new})
