"""Tiny programs and batches for the tests of this folder."""

import functools
import itertools
import math
from unittest import mock

import jax
import numpy as np

from maxtrain.config import schema
from maxtrain.ops.attention import Context
from maxtrain.parallel import mesh
from maxtrain.parallel.sharding import Layout
from maxtrain.training.program import make_program, put_batch, put_stop

MOE = {"slots": {"layer": schema.Slot(feed_forward="moe")}}
EXPERTS = {"num_experts": 4, "experts_per_token": 2, "mlp": 40}
MODELS = {
    "dense": schema.Model(vocab_size=264, embed=32, mlp=64, layers="scan"),
    "dropless": schema.Model(vocab_size=264, embed=32, layers="scan", moe=schema.Moe(**EXPERTS), **MOE),
    "capacity": schema.Model(vocab_size=264, embed=32, layers="scan", moe=schema.Moe(**EXPERTS, dispatch="capacity"), **MOE),
}
BATCH, LENGTH = 8, 48


def make_config(model="dense", *, data=1, fsdp=1, steps=20, microbatches=1, axes=None, **sections):
    """A config of a tiny run on data x fsdp devices, times those of other mesh axes."""
    defaults = {
        "model": MODELS[model] if isinstance(model, str) else model,
        "mesh": schema.Mesh(data=data, fsdp=fsdp, **(axes or {})),
        "data": schema.Data(batch_size=BATCH, length=LENGTH),
        "train": schema.Train(steps=steps, microbatches=microbatches, loss_chunk=20, z_loss=1e-4),
        "schedule": schema.Schedule(learning_rate=1e-3, warmup_steps=4),
    }
    return schema.Config(**(defaults | sections))


def build(config, num_sources=1, loss_fn=None):
    """The program of a config on as many of the simulated devices as its mesh names."""
    device_mesh = mesh.make_mesh(config.mesh, jax.devices()[: math.prod(getattr(config.mesh, axis) for axis in mesh.AXES)])
    return make_program(mesh.resolve(config, device_mesh), Layout(device_mesh, config.mesh.rules), num_sources, loss_fn)


def draw_batches():
    """Batches of varied text-like tokens: two documents a row, a fifth of the positions without weight."""
    rng = np.random.default_rng(0)
    positions = np.tile(np.concatenate([np.arange(LENGTH - 20), np.arange(20)]), (BATCH, 1)).astype(np.int32)
    segments = np.tile(np.repeat([1, 2], [LENGTH - 20, 20]), (BATCH, 1)).astype(np.int32)
    while True:
        tokens = (rng.integers(0, 250, (BATCH, LENGTH + 1)) ** 2 // 250).astype(np.int32)  # low ids are frequent
        yield {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "positions": positions,
            "segments": segments,
            "weights": (rng.random((BATCH, LENGTH)) < 0.8).astype(np.float32),
            "source": (np.arange(BATCH, dtype=np.int32) % 2),
        }


@functools.cache
def batches(count):
    """The first `count` batches."""
    return list(itertools.islice(draw_batches(), count))


@functools.cache
def decided_batches(model, count=20):
    """Batches for a run of a mixture of experts in which the router leaves no token near a tie.

    Between two experts of equal probability, rounding alone would choose, and each layout rounds in its own way.
    """
    program, gaps, found, top_k = build(make_config(model), 2), [], [], jax.lax.top_k

    def watched(probabilities, k):
        values, experts = top_k(probabilities, k + 1)
        jax.debug.callback(gaps.append, (values[..., :-1] - values[..., 1:]).min())
        return values[..., :k], experts[..., :k]

    forward = jax.jit(lambda model, batch: model(batch["tokens"], Context(batch["positions"], batch["segments"])).hidden)
    state, candidates = program.create(0), draw_batches()
    while len(found) < count:
        batch = next(candidates)
        with mock.patch.object(jax.lax, "top_k", watched):
            jax.block_until_ready(forward(state.model, batch))
        jax.effects_barrier()
        if min(gaps) > 1e-4:
            found.append(batch)
            _, state = run(program, [batch], state)
        gaps.clear()
    return found


_compiled = {}  # the last few: each holds thousands of memory maps, of which a process may have 65,530


def compiled(program):
    """The compiled step of a program, kept for the tests that follow."""
    if id(program) not in _compiled:
        while len(_compiled) >= 6:
            del _compiled[next(iter(_compiled))]
        _compiled[id(program)] = program, program.lower_step().compile()
    return _compiled[id(program)][1]


def run(program, given, state=None):
    """Metrics of one step for each batch, and the state after them."""
    step, spec, stop = compiled(program), program.batch(BATCH, LENGTH), put_stop(False, program.stop)
    state = program.create(0) if state is None else state
    rows = []
    for batch in given:
        state, metrics = step(state, put_batch(batch, spec, list(range(BATCH))), stop)
        rows.append(jax.device_get(metrics))
    return rows, state


def losses(rows):
    """Mean loss of each step."""
    return np.array([row["loss"] / row["tokens"] for row in rows])


def norms(rows):
    """Gradient norm of each step."""
    return np.array([row["grad_norm"] for row in rows])
