"""Whether the device computes what it should: miniatures against the CPU, bfloat16 against float32, attention by each, the engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import record
import training

from maxtrain.config import schema
from maxtrain.config.errors import Refused
from maxtrain.config.serving import SamplingParams
from maxtrain.models.decoder import Decoder
from maxtrain.ops import backends
from maxtrain.ops.attention import Context
from maxtrain.ops.causal_attention import Options, causal_attention
from maxtrain.ops.cudnn_attention import MOST, cudnn_attention
from maxtrain.ops.linear import products_in
from maxtrain.parallel.sharding import initialise
from maxtrain.serving.engine import Engine
from maxtrain.training.program import put_stop

LOSS, NORM = 1e-4, 1e-3  # of float32 on the device against the CPU, relative
HALF_LOSS = 1e-2  # of bfloat16 against float32
HALF_VALUES = 2e-2  # of attention in bfloat16 against float32, by norm
LOGIT = 1e-3  # by which a token that the engine takes may be less likely than another, of the largest logit
MINIATURES = {
    "dense": ("llama-tiny",),
    "mixture": ("mixtral-tiny", "model.init_scale=2.0"),  # a router that is sure of its choice, whatever the rounding
    "latent attention": ("deepseek-v2-tiny", "model.init_scale=2.0"),
    "windows": ("gemma3-tiny", "model.slots.sliding.window=16"),
}
SMOKE = ("dense",)


def trace(compute: str, names: list[str], steps: int) -> dict[str, dict[str, list[float]]]:
    """Losses and gradient norms of so many steps of each miniature, from the same weights and batches everywhere."""
    found = {}
    for name in names:
        words = (f"precision.compute={compute}", "model.layers=scan", "data.batch_size=4", "data.length=64", "train.attention=xla")
        config = training.configure(*MINIATURES[name], *words, "schedule.learning_rate=1e-3", f"train.steps={max(2, steps)}")
        program = training.build(config)
        drawn = jax.device_get(initialise(training.build(config, "cpu").state.model, 0))  # random numbers differ by rounding elsewhere
        state = program.create(0, jax.device_put(drawn, jax.tree.map(lambda s: s.sharding, program.state.model)))
        step, given, stop = program.lower_step().compile(), training.batches(program, documents=3), put_stop(False, program.stop)
        rows: dict[str, list[float]] = {"losses": [], "norms": []}
        for _ in range(steps):
            state, metrics = step(state, next(given), stop)
            rows["losses"].append(float(metrics["objective"]))
            rows["norms"].append(float(metrics["grad_norm"]))
        found[name] = rows
    return found


def difference(got: list[float], want: list[float]) -> float:
    """Largest relative difference."""
    return float(np.max(np.abs(np.array(got) - want) / np.abs(want)))


def steps_against_cpu(rec: record.Record) -> None:
    """Ten steps of each miniature in float32 beside this script's own run on the CPU, and in bfloat16 beside float32."""
    record.describe_jax(rec)
    names, steps = (list(SMOKE), 3) if rec.smoke else (list(MINIATURES), 10)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "cpu.json")
        command = [sys.executable, __file__, "--reference", path, str(steps), *names]
        device: dict[str, dict[str, list[float]]] = {}
        if rec.smoke:  # first, so that the reference, which is the same program then, comes from the compilation cache
            device |= trace("float32", names, steps)
        cpu = subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stderr=subprocess.PIPE, text=True)
        try:
            for name in (name for name in names if name not in device):
                with rec.trying(f"float32, {name}"):
                    device |= trace("float32", [name], steps)
            for name in names:
                with rec.trying(f"bfloat16, {name}"):
                    half = trace("bfloat16", [name], steps)
                    if name in device:
                        off = difference(half[name]["losses"], device[name]["losses"])
                        rec.check(f"{name}: losses in bfloat16 against float32", off, HALF_LOSS, steps=steps)
            _, errors = cpu.communicate(timeout=max(1.0, rec.left - 2))
        finally:
            cpu.kill()
            cpu.wait()
        if cpu.returncode:
            raise RuntimeError(f"the run on the CPU failed:\n{errors}")
        with open(path, encoding="utf-8") as file:
            reference: Mapping[str, Any] = json.load(file)
    for name in device:
        for what, most in (("losses", LOSS), ("norms", NORM)):
            off = difference(device[name][what], reference[name][what])
            rec.check(f"{name}: {what} in float32 against the CPU", off, most, steps=steps, last=device[name][what][-1])


def attention_by_each(rec: record.Record) -> None:
    """cuDNN's attention and plain XLA's, value and gradients in bfloat16, beside float32 at the highest precision."""
    refusals(rec)
    program = training.build(training.configure("llama-tiny", "precision.compute=bfloat16", "data.length=64", "model.head_dim=64"))
    reason = backends.reason_against("cudnn", program.config, program.layout)
    if reason is not None:
        rec.fact("attention by cudnn", f"not available here: {reason}")
    length = 64 if rec.smoke else 1024
    options = {"documents": Options(), "documents and a window": Options(window=length // 8)}
    for name, option in options.items():
        for documents in (1, 5, MOST + 8):
            inputs, segments, gradient = attention_inputs(length, documents)
            exact = gradients(causal_attention, inputs, segments, gradient, option, jnp.float32)
            for by, attention in (("xla", causal_attention), ("cudnn", cudnn_attention)):
                if by == "cudnn" and reason is not None:
                    continue
                with rec.trying(f"attention by {by}, {documents} {name}"):
                    found = gradients(attention, inputs, segments, gradient, option, jnp.bfloat16)
                    off = max(relative(a, b) for a, b in zip(found, exact, strict=True))
                    rec.check(f"attention by {by} in bfloat16: {documents} {name}", off, HALF_VALUES, length=length)
            if rec.smoke:
                break


def attention_inputs(length: int, documents: int) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
    """q, k, v float32, segments, and a gradient of the output; 8 heads share 2 of keys."""
    rng = np.random.default_rng(documents)
    q, k, v, gradient = (jnp.asarray(rng.normal(size=(2, length, heads, 64)), jnp.float32) for heads in (8, 2, 2, 8))
    segments = np.ones((2, length), np.int32)
    for row in segments:
        row += np.searchsorted(np.sort(rng.choice(np.arange(1, length), documents - 1, replace=False)), np.arange(length), side="right")
    return (q / 8, k, v), jnp.asarray(segments), gradient


def gradients(
    attention: Any, inputs: tuple[jax.Array, ...], segments: jax.Array, gradient: jax.Array, options: Options, dtype: Any
) -> list:
    """Output and gradients of q, k and v, computed in `dtype`."""

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, gradient: jax.Array) -> tuple[jax.Array, ...]:
        out, back = jax.vjp(lambda q, k, v: attention(q, k, v, segments, None, options), *(x.astype(dtype) for x in (q, k, v)))
        return out, *back(gradient.astype(dtype))

    with jax.default_matmul_precision("highest"):
        return [np.asarray(x, np.float64) for x in run(*inputs, gradient)]


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def refusals(rec: record.Record) -> None:
    """A cap of scores, which cuDNN has not, must be refused before anything is computed."""
    words = ("model.attention_softcap=5.0", "train.attention=cudnn", "precision.compute=bfloat16", "model.head_dim=64", "data.length=64")
    try:
        training.build(training.configure("llama-tiny", *words))
        rec.check("attention by cudnn with a softcap is refused", 1.0, 0.0, message="it was accepted")
    except Refused as refusal:
        rec.check("attention by cudnn with a softcap is refused", 0.0, 0.0, message=str(refusal))


def engine_against_forward(rec: record.Record) -> None:
    """Tokens that the engine takes greedily, in float32, beside the training forward over what it wrote."""
    for name in SMOKE if rec.smoke else MINIATURES:
        with rec.trying(f"engine, {name}"):
            words = ("precision.compute=float32", "model.layers=scan", "data.length=64", "serve.max_requests=4", "serve.max_length=96")
            program = training.build(training.configure(*MINIATURES[name], *words, "serve.deterministic=true", "serve.memory_gib=0.05"))
            rec.check(f"{name}: tokens of the engine against the training forward", *greedy(program))


def greedy(program: Any) -> tuple[float, float]:
    """By how much a token the engine took is less likely than the likeliest, at most, and what is allowed: of the largest logit."""
    config: schema.Config = program.config
    model = initialise(program.state.model, 3)
    engine = Engine(lambda: model, config, program.layout)
    rng, params = np.random.default_rng(0), SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    requests = [engine.add(rng.integers(0, config.model.vocab_size, size).tolist(), params) for size in (5, 40, 17)]
    while engine.busy:
        engine.step()
    tokens = np.zeros((len(requests), 64), np.int32)
    for row, request in zip(tokens, requests, strict=True):
        row[: len(request.tokens)] = request.tokens

    @jax.jit
    def forward(model: Decoder, tokens: jax.Array) -> jax.Array:
        at = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return model.logits(model(tokens, Context(at, jnp.ones_like(at))).hidden)

    with products_in("float32"):
        logits, worst = np.asarray(forward(model, tokens), np.float64), 0.0
    for row, request in zip(logits, requests, strict=True):
        for place in range(len(request.prompt), len(request.tokens)):
            worst = max(worst, row[place - 1].max() - row[place - 1][request.tokens[place]])
    return worst, LOGIT * float(np.abs(logits).max())


CASES = {
    "steps against the CPU": steps_against_cpu,
    "attention by each": attention_by_each,
    "engine against the forward": engine_against_forward,
}

if __name__ == "__main__":
    if sys.argv[1] == "--reference":
        result = trace("float32", sys.argv[4:], int(sys.argv[3]))
        with open(sys.argv[2], "w", encoding="utf-8") as out:
            json.dump(result, out)
    else:
        record.main(CASES)
