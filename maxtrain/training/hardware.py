"""Peak speed and memory of the devices, from a table; a CPU is measured and the best figure remembered."""

import contextlib
import json
import os
import platform
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from maxtrain.config.errors import Refused
from maxtrain.config.paths import expand


class Chip(NamedTuple):
    """Of one device as jax counts them, from the vendors' data sheets; networks as in "How to Scale Your Model" (jax-ml.github.io)."""

    tflops: float
    """Dense bfloat16 TFLOP/s."""
    memory: float
    """GiB."""
    bandwidth: float
    """GB/s of that memory."""
    ici: float | None = None
    """GB/s of the links along one axis of the torus, both directions together; None where there is no torus."""
    dcn: float | None = None
    """GB/s between slices."""
    float32: float | None = None
    """Dense TFLOP/s of products in float32, not TF32; None where they are six passes of bfloat16, as on TPUs."""

    def peak(self, compute: str) -> float:
        """TFLOP/s of products in a format."""
        return self.tflops if compute != "float32" else self.float32 or self.tflops / 6


CHIPS = {  # the longest key that begins the device kind, whole words, is taken
    "TPU v4": Chip(275, 32, 1200, 90, 6.25),
    "TPU v5 lite": Chip(197, 16, 819, 90, 6.25),
    "TPU v5e": Chip(197, 16, 819, 90, 6.25),
    "TPU v5p": Chip(459, 95, 2765, 180, 6.25),
    "TPU v5": Chip(459, 95, 2765, 180, 6.25),
    "TPU v6 lite": Chip(918, 32, 1638, 180, 12.5),
    "TPU v6e": Chip(918, 32, 1638, 180, 12.5),
    "TPU7x": Chip(1153.5, 96, 3690, 100, 6.25),  # two devices a chip share its memory, links and host
    "NVIDIA GeForce RTX 3090": Chip(71, 24, 936, float32=35.6),
    "NVIDIA GeForce RTX 4090": Chip(165.2, 24, 1008, float32=82.6),
    "NVIDIA GeForce RTX 5090": Chip(209.5, 32, 1792, float32=104.8),
    "NVIDIA A10": Chip(125, 24, 600, float32=31.2),
    "NVIDIA L4": Chip(121, 24, 300, float32=30.3),
    "NVIDIA L40S": Chip(362, 48, 864, float32=91.6),
    "NVIDIA A100": Chip(312, 80, 2039, float32=19.5),
    "NVIDIA A100-SXM4-40GB": Chip(312, 40, 1555, float32=19.5),
    "NVIDIA A100-PCIE-40GB": Chip(312, 40, 1555, float32=19.5),
    "NVIDIA A100 80GB PCIe": Chip(312, 80, 1935, float32=19.5),
    "NVIDIA H100": Chip(989, 80, 3350, float32=67),
    "NVIDIA H100 PCIe": Chip(756, 80, 2000, float32=51),
    "NVIDIA H100 NVL": Chip(835, 94, 3938, float32=60),
    "NVIDIA GH200": Chip(989, 96, 4000, float32=67),
    "NVIDIA H200": Chip(989, 141, 4800, float32=67),
    "NVIDIA H200 NVL": Chip(835, 141, 4800, float32=60),
    "NVIDIA B200": Chip(2250, 180, 7700, float32=75),
    "AMD Instinct MI300X": Chip(1307, 192, 5300, float32=163.4),
}


def chip(device: jax.Device) -> Chip | None:
    """The data sheet of an accelerator; None if it is not in the table."""
    kind = device.device_kind
    names = [name for name in CHIPS if kind.startswith(name) and not kind[len(name) : len(name) + 1].isalnum()]
    return CHIPS[max(names, key=len)] if names else None


def peak_tflops(device: jax.Device, compute: str, cache: str = "~/.cache/maxtrain/peak.json") -> float | None:
    """Peak TFLOP/s of one device in a format; None for an accelerator that is not in the table.

    The devices of one CPU share its cores: each is given its share of the measured peak. A `cache` that cannot be read or
    written costs the memory of earlier measurements, not the run.
    """
    if device.platform != "cpu":
        sheet = chip(device)
        return None if sheet is None else sheet.peak(compute)
    key, known = f"{_cpu_name()} x {os.cpu_count()}", {}
    with contextlib.suppress(Refused, OSError, ValueError, TypeError), open(expand(cache, "cache")) as file:
        known = {str(name): float(value) for name, value in dict(json.load(file)).items()}
    found = measure(device)
    if found > known.get(key, 0.0):  # a first measurement beside other work is too low: the best one counts
        known[key] = found
        with contextlib.suppress(Refused, OSError):
            path = expand(cache, "cache")
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
