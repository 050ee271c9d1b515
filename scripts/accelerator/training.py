"""The step of a training run on random tokens, ready to be taken."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from maxtrain.config import load, schema
from maxtrain.parallel import mesh
from maxtrain.parallel.sharding import Layout
from maxtrain.training.program import Program, make_program, put_batch

COMMON = ("run.compile_cache=null", "guard.spike_sigmas=null", "metrics.peak_tflops=1")


def configure(preset: str, *words: str) -> schema.Config:
    """The config of a preset model with `section.key=value`."""
    return load(f"configs/models/{preset}.yml", [*COMMON, *words]).config


def build(config: schema.Config, platform: str | None = None) -> Program:
    """The program of a config on one device, of jax's first platform unless another is named."""
    mesh.start(config.run, config.mesh)
    device_mesh = mesh.make_mesh(config.mesh, jax.devices(platform)[:1])
    return make_program(mesh.resolve(config, device_mesh), Layout(device_mesh, config.mesh.rules))


def batches(program: Program, documents: int, seed: int = 0) -> Iterator[dict[str, jax.Array]]:
    """Batches of random tokens, so many documents of unequal lengths in each sequence."""
    rows, length = program.config.data.batch_size, program.config.data.length
    rng, spec = np.random.default_rng(seed), program.batch(rows, length)
    while True:
        tokens = rng.integers(0, program.config.model.vocab_size, (rows, length + 1)).astype(np.int32)
        begins = np.zeros((rows, length), bool)
        for row in begins:
            row[rng.choice(np.arange(1, length), documents - 1, replace=False)] = True
        begins[:, 0] = True
        column = np.arange(length, dtype=np.int32)
        host: dict[str, Any] = {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "positions": column - np.maximum.accumulate(np.where(begins, column, 0), axis=1),
            "segments": np.cumsum(begins, axis=1, dtype=np.int32),
            "weights": np.pad(~begins[:, 1:], ((0, 0), (0, 1)), constant_values=True).astype(np.float32),
            "source": np.zeros(rows, np.int32),
        }
        yield put_batch(host, spec, list(range(rows)))
