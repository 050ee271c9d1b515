"""Generate with MaxTrain and with PyTorch transformers on this CPU: tokens/s, latencies, ratios, what the prefix cache saves.

`pip install -e '.[hf,gguf]'`, then `python scripts/bench_decode.py MODEL [--rounds 3] [--concurrency 1,8,32]`, MODEL being a GGUF
file or a folder of Hugging Face's. Both generate 64 tokens, greedily and in float32, for the same prompts of 16 to 128 random
tokens, in turn, so that a change of the machine's speed meets both; medians of the rounds are compared.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time

import numpy as np

NEW, SHORTEST, LONGEST = 64, 16, 128


def make_prompts(count: int, vocab: int, seed: int, prefix: int = 0) -> list[list[int]]:
    """Random tokens, after `prefix` that all have in common."""
    rng = np.random.default_rng(seed)
    common = rng.integers(3, vocab, prefix).tolist()
    return [[*common, *rng.integers(3, vocab, rng.integers(SHORTEST, LONGEST + 1)).tolist()] for _ in range(count)]


def reference(path: str):
    """A function that generates for a batch of prompts with transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()

    def generate(prompts: list[list[int]]) -> None:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.no_grad():
            out = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)
        assert out.shape[1] == longest + NEW

    return generate


def exported(path: str, folder: str) -> str:
    """The model as a folder that transformers opens."""
    if os.path.isdir(path):
        return path
    from maxtrain.checkpoint import gguf
    from maxtrain.training import pretrained

    pretrained.import_model(gguf.File(path), os.path.join(folder, "run"))
    pretrained.export_model(os.path.join(folder, "run"), os.path.join(folder, "hf"))
    return os.path.join(folder, "hf")


def seconds(action, *arguments) -> tuple[float, object]:
    """Wall time of a call, and its result."""
    start = time.perf_counter()
    result = action(*arguments)
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", default="1,8,32")
    options = parser.parse_args()
    import jax

    from maxtrain import LLM, SamplingParams
    from maxtrain.training.hardware import measure

    taken, llm = seconds(lambda: LLM(options.model, max_length=1024))
    print(f"ready in {taken:.1f} s")
    vocab, asked = llm.engine.valid, SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
    size = sum(x.size for x in jax.tree.leaves(llm.engine.model))
    peak = measure(jax.devices()[0]) * 1e12
    print(f"{size / 1e6:.1f}M parameters; matmul peak {peak / 1e9:.0f} GFLOP/s")
    with tempfile.TemporaryDirectory() as folder:
        theirs = reference(exported(options.model, folder))
        for count in map(int, options.concurrency.split(",")):
            ours_taken, theirs_taken, first, between, bound = [], [], [], [], 0.0
            for round_ in range(options.rounds + 1):  # the first warms up
                prompts = make_prompts(count, vocab, seed=round_)
                own, outputs = seconds(llm.generate, prompts, asked)
                other, _ = seconds(theirs, prompts)
                if round_:
                    ours_taken.append(own)
                    theirs_taken.append(other)
                    bound = (sum(map(len, prompts)) + count * NEW) * 2 * size / peak
                    for output in outputs:
                        times = output.completions[0].times
                        first.append(times[0])
                        between += [after - before for before, after in itertools.pairwise(times)]
            own, other = statistics.median(ours_taken), statistics.median(theirs_taken)
            ratios = sorted(b / a for a, b in zip(ours_taken, theirs_taken, strict=True))
            print(
                f"{count:3d} at once: {count * NEW / own:6.1f} tokens/s, transformers {count * NEW / other:6.1f}, ratio {other / own:.2f} "
                f"({ratios[0]:.2f}-{ratios[-1]:.2f}), {bound / own:.0%} of the matmul peak; first token {statistics.median(first):.3f} s, "
                f"between tokens {statistics.median(between) * 1000:.1f} ms"
            )
        scheduler = llm.engine.scheduler
        ratios = []
        for round_ in range(options.rounds):
            prompts = make_prompts(32, vocab, seed=100 + round_, prefix=512)
            short, times = SamplingParams(temperature=0.0, max_tokens=1), {}
            for cached in (False, True):
                scheduler.pool.forget_all()
                scheduler.prefix_cache = cached
                times[cached], _ = seconds(llm.generate, prompts, short)
            ratios.append(times[False] / times[True])
        scheduler.prefix_cache = True
        print(f"32 prompts with 512 tokens in common: prefill {statistics.median(ratios):.1f} times as fast with the prefix cache")
    stats = llm.engine.stats
    print(f"waste of the cache {stats.waste / stats.steps:.1%}, {stats.steps} steps, {scheduler.num_preemptions} preemptions")


if __name__ == "__main__":
    main()
