"""How fast it generates: tokens/s, share of the memory bandwidth, time to the first token, and how long a start takes."""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import time
from typing import Any

import clock
import jax
import numpy as np
import record
import training

from maxtrain.config import schema
from maxtrain.config.serving import SamplingParams
from maxtrain.parallel.sharding import initialise
from maxtrain.serving.api import LLM

PROMPT, NEW, CONCURRENT = 512, 256, (1, 32, 256)
SERVE = ("serve.max_requests=256", "serve.max_length=768", "serve.page_size=32", "serve.block=128", "serve.num_blocks=16")
TOY = ("serve.max_requests=4", "serve.max_length=32", "serve.num_blocks=2", "serve.memory_gib=0.05", "serve.deterministic=true")


def start(rec: record.Record, kind: str) -> tuple[LLM, schema.Config]:
    """An engine on random weights, and what it took to make it ready."""
    before = time.perf_counter()
    words = ("precision.compute=bfloat16", "precision.params=bfloat16", "model.layers=scan", "data.length=16")
    program = training.build(training.configure("llama-tiny" if rec.smoke else "llama3.2-1b", *words, *(TOY if rec.smoke else SERVE)))
    llm = LLM(lambda: initialise(program.state.model, 0), program.config, program.layout)
    llm.generate([[1, 2, 3]], SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True))
    rec.measure(f"{kind} start", seconds=time.perf_counter() - before, programs=len(llm.engine.programs.shapes))
    return llm, program.config


def serve(rec: record.Record) -> None:
    """Generate with an engine started from an empty compilation cache, then start one from the cache it filled."""
    record.describe_jax(rec)
    gb_per_s = clock.bandwidth(0.01 if rec.smoke else 2.0, 0.01 if rec.smoke else 1.0)
    rec.measure("memory", gb_per_s=gb_per_s)
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", os.path.join(folder, "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
        llm, config = start(rec, "cold")
        for count in (1, 3) if rec.smoke else CONCURRENT:
            with rec.trying(f"{count} requests"):
                rec.measure(f"{count} requests", **generate(llm, config, count, gb_per_s, rec))
        del llm
        jax.clear_caches()
        start(rec, "warm")


def generate(llm: LLM, config: schema.Config, count: int, gb_per_s: float, rec: record.Record) -> dict[str, Any]:
    """Numbers of `count` requests at once; each prompt is new, so nothing comes from the prefix cache."""
    prompt, new = (16, 6) if rec.smoke else (PROMPT, NEW)
    rng = np.random.default_rng(count)
    prompts = rng.integers(3, config.model.vocab_size, (count, prompt)).tolist()
    before = time.perf_counter()
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True))
    taken = time.perf_counter() - before
    times = [output.completions[0].times for output in outputs]
    assert all(len(each) == new for each in times), "every request asked for the same number of tokens"
    first = [each[0] for each in times]
    between = statistics.median(b - a for each in times for a, b in itertools.pairwise(each))
    moved = step_bytes(llm, config, count, prompt + new // 2)
    return {
        "tokens_per_s": count * new / taken,
        "first_token_seconds": statistics.median(first),
        "last_first_token_seconds": max(first),
        "between_tokens_seconds": between,
        "step_gb": moved / 1e9,
        "bandwidth_share": moved / between / 1e9 / gb_per_s,
        "preemptions": llm.engine.scheduler.num_preemptions,
    }


def step_bytes(llm: LLM, config: schema.Config, count: int, context: int) -> float:
    """The least a step that continues `count` requests of `context` tokens must read: every weight once, and their keys and values."""
    model, width = config.model, 2 if config.precision.compute == "bfloat16" else 4
    weights = sum(x.nbytes for x in jax.tree.leaves(llm.engine.model))
    return weights + count * context * model.num_layers * 2 * model.kv_heads * model.head_width * width


CASES = {"serving": serve}

if __name__ == "__main__":
    record.main(CASES)
