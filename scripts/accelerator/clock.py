"""What a device can do at most, and how long a step takes on it: measured, not read from a data sheet."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def seconds(run: Callable[[], Any], budget: float, most: int = 50) -> float:
    """Median time of one run in groups of runs; a run returns arrays, which are waited for at the end of a group.

    budget: seconds to spend, about; a few groups are run in any case. The first run is not counted.
    """
    jax.block_until_ready(run())
    start = time.perf_counter()
    jax.block_until_ready(run())
    once = max(time.perf_counter() - start, 1e-6)
    size = max(1, min(most, int(budget / 3 / once)))
    groups = []
    for _ in range(3):
        start, last = time.perf_counter(), None
        for _ in range(size):
            last = run()
        jax.block_until_ready(last)
        groups.append((time.perf_counter() - start) / size)
    return statistics.median(groups)


def bandwidth(gib: float, budget: float = 1.0) -> float:
    """GB/s of device memory, read and written, in a + s * b -> c over arrays of `gib` GiB each."""
    length = int(gib * 2**30) // 4
    a, b = (jnp.full(length, value, jnp.float32) for value in (1.5, 2.5))
    triad = jax.jit(lambda a, b, s: a + s * b)
    return 3 * 4 * length / seconds(lambda: triad(a, b, 3.0), budget) / 1e9


def matmul_tflops(size: int, budget: float = 1.0) -> float:
    """TFLOP/s of a square bfloat16 product of random numbers."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / seconds(lambda: product(a, b), budget) / 1e12


def memory_peak_gib() -> float | None:
    """Most device memory in use so far in this process; None where the device keeps no count."""
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return None if peak is None else peak / 2**30


def compiled_gib(program: Any) -> float | None:
    """Device memory of a compiled program by its compiler: arguments, results beside them, temporaries."""
    sizes = program.memory_analysis()
    if sizes is None:
        return None
    own = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes + sizes.temp_size_in_bytes
    return own / 2**30


def out_of_memory(error: Exception) -> bool:
    """Whether the device had too little memory."""
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()
