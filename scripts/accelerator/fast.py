"""How fast it trains, by every attention that can: tokens/s, share of the peak, memory beside the estimate; dense and a mixture."""

from __future__ import annotations

import gc
import time
from functools import partial
from typing import Any, NamedTuple

import clock
import jax
import record
import training

from maxtrain.config.errors import Refused
from maxtrain.models import flops
from maxtrain.training import estimate, hardware
from maxtrain.training.program import put_stop


class Shape(NamedTuple):
    """A preset model at a length; the batches and rematerialisation to try, the first that fits being taken."""

    preset: str
    length: int
    attempts: tuple[tuple[int, str], ...]
    words: tuple[str, ...] = ()


HALF = ("precision.params=bfloat16", "precision.moments=bfloat16")  # 7 billion parameters with float32 state are 84 GB
SHAPES = {
    "1B dense, 2,048": Shape("llama3.2-1b", 2048, ((8, "none"), (8, "dots"), (4, "dots"), (4, "full"), (1, "full"))),
    "1B dense, 8,192": Shape("llama3.2-1b", 8192, ((2, "none"), (2, "dots"), (1, "dots"), (1, "full"))),
    "7B mixture, 2,048": Shape("olmoe-1b-7b", 2048, ((8, "full"), (4, "full"), (2, "full"), (1, "full")), HALF),
}
TOYS = {
    "1B dense, 2,048": Shape("llama-tiny", 64, ((2, "none"),)),
}
CASES = ("1B dense, 2,048: cudnn", "1B dense, 8,192: cudnn", "1B dense, 2,048: xla", "7B mixture, 2,048: cudnn", "7B mixture, 2,048: xla")
CASES = (*CASES, "1B dense, 8,192: xla")


def ceilings(rec: record.Record) -> None:
    """What the device can do at most."""
    record.describe_jax(rec)
    gib, size = (0.01, 512) if rec.smoke else (2.0, 8192)
    rec.measure("memory", gb_per_s=clock.bandwidth(gib, 0.01 if rec.smoke else 1.0))
    rec.measure("bfloat16 product", size=size, tflops=clock.matmul_tflops(size, 0.01 if rec.smoke else 1.0))


def train(name: str, attention: str, rec: record.Record) -> None:
    """Time the train step of a shape at the largest batch that fits."""
    shape = (TOYS if rec.smoke else SHAPES).get(name)
    if shape is None:
        return
    device = jax.devices()[0]
    room = (device.memory_stats() or {}).get("bytes_limit", 16 << 30)
    for batch, remat in shape.attempts:
        words = [f"data.batch_size={batch}", f"data.length={shape.length}", f"remat.policy={remat}", f"train.attention={attention}"]
        config = training.configure(shape.preset, "precision.compute=bfloat16", "model.layers=scan", *shape.words, *words)
        try:
            program = training.build(config)
        except Refused as refusal:
            rec.fact(f"{name}, {attention}", f"not available here: {refusal}")
            return
        expected = sum(estimate.memory(estimate.Work.of(program.config), program.layout).values())
        about = {"batch": batch, "remat": remat, "estimate_gib": expected / 2**30}
        if expected > room and (batch, remat) != shape.attempts[-1]:
            rec.fact(f"{name}, {attention}, batch {batch}, remat {remat}", f"not tried: {expected / 2**30:.1f} GiB by the estimate")
            continue
        try:
            rec.measure(f"{name}, {attention}", **about, **step(program, device, rec))
            return
        except Exception as error:
            if not clock.out_of_memory(error):
                raise
            rec.fact(f"{name}, {attention}, batch {batch}, remat {remat}", f"out of memory: {str(error)[:300]}")
        gc.collect()


def step(program: Any, device: jax.Device, rec: record.Record) -> dict[str, Any]:
    """Numbers of one program: seconds of compiling and of a step, tokens/s, MFU, memory."""
    start = time.perf_counter()
    compiled = program.lower_step().compile()
    compiling = time.perf_counter() - start
    state, batch, stop = program.create(0), next(training.batches(program, documents=1)), put_stop(False, program.stop)
    losses: list[float] = []

    def run() -> Any:
        nonlocal state
        state, metrics = compiled(state, batch, stop)
        return metrics["objective"]

    start = time.perf_counter()
    losses.append(float(run()))
    first = time.perf_counter() - start
    each = clock.seconds(run, max(0.1, min(6.0, rec.left - 5.0)) if not rec.smoke else 0.05)
    losses.append(float(run()))
    config = program.config
    rate = config.data.batch_size * config.data.length / each
    done = rate * flops.training(config.model, config.data.length) / 1e12
    sheet = hardware.chip(device)
    return {
        "tokens_per_s": rate,
        "step_seconds": each,
        "tflops": done,
        "mfu": None if sheet is None else done / sheet.peak(config.precision.compute),
        "compile_seconds": compiling,
        "first_step_seconds": first,
        "peak_gib": clock.memory_peak_gib(),
        "compiled_gib": clock.compiled_gib(compiled),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


ALL = {"ceilings": ceilings} | {case: partial(train, *case.split(": ")) for case in CASES}

if __name__ == "__main__":
    record.main(ALL)
