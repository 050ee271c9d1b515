"""Peak speed and memory of the devices, from a table; a CPU is measured and the best figure remembered."""

from __future__ import annotations

import json
import os
import platform
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Chip(NamedTuple):
    """Of one device as jax counts them: dense bfloat16 TFLOP/s and memory in GiB, from the vendors' data sheets."""

    tflops: float
    memory: float


CHIPS = {  # the first key that begins the device kind is taken
    "TPU v4": Chip(275, 32),
    "TPU v5 lite": Chip(197, 16),
    "TPU v5e": Chip(197, 16),
    "TPU v5p": Chip(459, 95),
    "TPU v5": Chip(459, 95),
    "TPU v6 lite": Chip(918, 32),
    "TPU v6e": Chip(918, 32),
    "TPU7x": Chip(1153.5, 96),  # two devices a chip
    "NVIDIA L4": Chip(121, 24),
    "NVIDIA A100": Chip(312, 80),
    "NVIDIA H100": Chip(989, 80),
    "NVIDIA H200": Chip(989, 141),
    "NVIDIA B200": Chip(2250, 180),
    "AMD Instinct MI300X": Chip(1307, 192),
}


def peak_tflops(device: jax.Device, cache: str = "~/.cache/maxtrain/peak.json") -> float | None:
    """Peak TFLOP/s of one device; None for an accelerator that is not in the table.

    The devices of one CPU share its cores: each is given its share of the measured peak.
    """
    if device.platform != "cpu":
        return next((chip.tflops for name, chip in CHIPS.items() if device.device_kind.startswith(name)), None)
    key, path = f"{_cpu_name()} x {os.cpu_count()}", os.path.expanduser(cache)
    try:
        with open(path) as file:
            known = json.load(file)
    except (OSError, ValueError):
        known = {}
    found = measure(device)
    if found > known.get(key, 0.0):  # a first measurement beside other work is too low: the best one counts
        known[key] = found
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(f"{path}.{os.getpid()}", "w") as file:
            json.dump(known, file)
        os.replace(f"{path}.{os.getpid()}", path)
    return known[key] / jax.local_device_count()


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def measure(device: jax.Device, size: int = 1536, repeats: int = 4) -> float:
    """Best TFLOP/s of a square float32 product of all cores."""
    x = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times) / 1e12


def memory_peak_bytes() -> int:
    """Most memory in use so far: of the first device where it keeps count, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    import resource  # not on every platform

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
