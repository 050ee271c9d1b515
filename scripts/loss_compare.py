"""Compare what two revisions compute: `python scripts/loss_compare.py A B [--only WORD] [--no-tpu] [--keep DIR]`.

Both revisions (whatever git knows, or a folder) train the same miniatures from the same seeds: 12 on one device, which cover the
mechanisms, and 6 layouts of 8 simulated devices. Losses, gradient norms and whatever else their metrics say, greedy tokens and scores
must be equal bit for bit. Two programs compiled for a TPU must agree in collectives, and within 1% in the compiler's cycles and in peak
memory. Only what revisions keep in common is used: the commands, keys of configs that have not moved, `maxtrain.LLM`.

`--keep DIR` keeps the records of commits there, so that one that is compared often runs once. Exit status: 0 if all is equal, else 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

STEPS = 6
COMMON = [
    f"train.steps={STEPS}",
    "data.length=64",
    "data.batch_size=8",
    "data.sources.drawn.kind=synthetic",
    "data.sources.drawn.document_length=40",
    "schedule.learning_rate=3e-3",
    "schedule.warmup_steps=2",
    "checkpoint.every=6",
    "metrics.sinks=[jsonl]",
]
ONE = {  # mechanisms, on one device
    "llama": ["llama-tiny", "model.layers=scan", "train.microbatches=2"],
    "bfloat16": ["llama-tiny", "precision.compute=bfloat16", "precision.params=bfloat16", "remat.policy=full"],
    "windows, softcaps": ["gemma2-tiny", "remat.policy=dots"],
    "norms around": ["olmo2-tiny"],
    "layers without rotation": ["smollm3-tiny"],
    "parallel block": ["command-r-tiny"],
    "two ropes": ["gemma3-tiny", "model.layers=scan"],
    "sinks": ["gpt-oss-tiny"],
    "latent attention": ["deepseek-v3-tiny"],
    "shared expert": ["qwen2-moe-tiny"],
    "capacity": ["mixtral-tiny", "model.moe.dispatch=capacity", "train.microbatches=4"],
    "biases": ["qwen2.5-tiny", "optimizer.weight_decay=0.2", "guard.spike_sigmas=null"],
}
EIGHT = {  # layouts of 8 devices
    "fsdp": ["llama-tiny", "mesh.fsdp=8"],
    "data x fsdp x tensor": ["qwen3-moe-tiny", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"],
    "ring": ["gemma2-tiny", "mesh.fsdp=4", "mesh.context=2"],
    "all-to-all": ["llama-tiny", "mesh.fsdp=4", "mesh.context=2", "mesh.context_attention=all_to_all"],
    "experts": ["deepseek-v3-tiny", "mesh.fsdp=2", "mesh.expert=4"],
    "stages": ["mixtral-tiny", "mesh.fsdp=4", "mesh.stage=2", "model.num_layers=4"],
}
TPU = {  # programs that are only compiled
    "v5e dense": ["llama-tiny", "topology=v5e:2x2", "model.embed=512", "model.mlp=1024", "data.length=128"],
    "v5e experts": ["mixtral-tiny", "topology=v5e:2x2", "mesh.expert=2", "model.embed=512", "model.moe.mlp=512", "data.length=128"],
}
CLOCKS = ("second", "mfu", "tflops", "memory", "goodput")  # what a row of metrics says of the machine
ROOT = Path(__file__).resolve().parents[1]


def train(words: list[str], folder: Path, serve: bool) -> dict[str, Any]:
    """Metrics of all steps and, if asked for, greedy tokens and scores of the model that they end with."""
    from maxtrain.train import main

    preset, *overrides = words
    given = [*COMMON, *overrides, f"run.dir={folder}", f"data.cache_dir={folder.parent / 'cache'}", "run.compile_cache=null"]
    code = main([f"configs/models/{preset}.yml", *given])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {"exit": code, "metrics": [kept for row in rows if (kept := _computed(row))]}
    if serve:
        found |= generate(folder)
    return found


def _computed(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not any(word in key for word in CLOCKS)} if "loss" in row else {}


def generate(folder: Path) -> dict[str, Any]:
    """Greedy tokens, and the scores of continuations, of a run."""
    import numpy as np

    from maxtrain import LLM, SamplingParams

    llm = LLM(folder, max_requests=4, num_blocks=2, max_length=64)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 250, size).tolist() for size in (1, 9, 30)]
    rests = [rng.integers(0, 250, 8).tolist() for _ in prompts]
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True))
    scores = llm.score(prompts, rests)
    return {"tokens": [list(out.token_ids) for out in outputs], "scores": [list(map(float, score.token_logprobs)) for score in scores]}


def compile_for_tpu(words: list[str]) -> dict[str, Any]:
    """Collectives of the compiled program by kind, the compiler's cycles and its peak memory."""
    import re

    import jax

    from maxtrain.compile import main

    made, compile_ = [], jax.stages.Lowered.compile
    jax.stages.Lowered.compile = lambda lowered, *args, **kwargs: made.append(compile_(lowered, *args, **kwargs)) or made[-1]
    preset, *overrides = words
    code = main([f"configs/models/{preset}.yml", "data.batch_size=8", *overrides])
    text, memory = made[-1].as_text(), made[-1].memory_analysis()
    kinds = "all-gather|all-reduce|reduce-scatter|ragged-all-to-all|all-to-all|collective-permute"
    collectives: dict[str, int] = {}
    for kind in re.findall(rf" ({kinds})(?:-start)?\(", text):
        collectives[kind] = collectives.get(kind, 0) + 1
    peak = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    cycles = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text)))
    return {"exit": code, "collectives": dict(sorted(collectives.items())), "near": {"cycles": cycles, "peak bytes": peak}}


def work(kind: str, names: list[str]) -> None:
    """The process of one revision: print a line of JSON for every case, one that fails with what it raised."""
    cases = {"one": ONE, "eight": EIGHT, "tpu": TPU}[kind]
    sys.path.insert(0, os.getcwd())
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    found = compile_for_tpu(cases[name]) if kind == "tpu" else train(cases[name], Path(folder) / name, kind == "one")
            except BaseException as error:
                found = {"failed": f"{type(error).__name__}: {error}"[:2000]}
            print(json.dumps({"name": name, **found}), flush=True)


def record(revision: str, chosen: dict[str, list[str]], keep: Path | None) -> dict[str, Any]:
    """What a revision computes, by case."""
    found: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        if Path(revision).is_dir():
            folder, kept = Path(revision).resolve(), None
        else:
            commit = subprocess.check_output(["git", "rev-parse", f"{revision}^{{commit}}"], cwd=ROOT, text=True).strip()
            kept = keep and keep / f"{commit}.json"
            found = json.loads(kept.read_text()) if kept and kept.exists() else {}
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "tree"
            subprocess.run(["git", "worktree", "add", "--quiet", "--detach", folder, commit], cwd=ROOT, check=True)
            stack.callback(subprocess.run, ["git", "worktree", "remove", "--force", folder], cwd=ROOT, check=True)
        for kind, names in chosen.items():
            missing = [name for name in names if name not in found]
            if not missing:
                continue
            command = [sys.executable, str(Path(__file__).resolve()), "--work", kind, *missing]
            with subprocess.Popen(command, cwd=folder, env=_environment(kind, folder), stdout=subprocess.PIPE, text=True) as process:
                for line in process.stdout or ():
                    row = json.loads(line)
                    found[row.pop("name")] = row
                    print(f"{revision}: {len(found)} of {sum(map(len, chosen.values()))} recorded", file=sys.stderr, flush=True)
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(found))
    return found


def _environment(kind: str, folder: Path) -> dict[str, str]:
    """Of the process: its devices, and CPU programs compiled without LLVM's optimization, which takes a third of the time."""
    flags = []
    if kind != "tpu":
        flags = [f"--xla_force_host_platform_device_count={8 if kind == 'eight' else 1}", "--xla_backend_optimization_level=0"]
        if tuple(map(int, version("jaxlib").split(".")[:3])) < (0, 11, 1):  # later ones no longer know the flag
            flags.append("--xla_cpu_use_fusion_emitters=false")
    tpu = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    return {**os.environ, **tpu, "PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}


def differences(one: Any, other: Any, at: str = "") -> list[str]:
    """Where two records differ, with both values; what stands below `near` may be 1% apart."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = [*one, *(name for name in other if name not in one)]
        return [line for name in names for line in differences(one.get(name), other.get(name), f"{at} {name}".strip())]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [line for i, pair in enumerate(zip(one, other, strict=True)) for line in differences(*pair, f"{at}[{i}]")]
    if at.startswith("near") and one and other and abs(other / one - 1) <= 0.01:
        return []
    return [] if one == other and at != "failed" else [f"{at}: {one} and {other}"]


def main() -> int:
    """Record both revisions and print a line for each case."""
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], sys.argv[3:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("one", metavar="A")
    parser.add_argument("other", metavar="B")
    parser.add_argument("--only", default="", help="cases whose name holds this word")
    parser.add_argument("--no-tpu", action="store_true", help="leave out what is compiled for TPUs (needs the extra tpu)")
    parser.add_argument("--keep", type=Path, help="folder for the records of commits")
    options = parser.parse_args()
    kinds = {"one": ONE, "eight": EIGHT} | ({} if options.no_tpu else {"tpu": TPU})
    chosen = {kind: [name for name in cases if options.only in name] for kind, cases in kinds.items()}
    one, other = (record(revision, chosen, options.keep) for revision in (options.one, options.other))
    failed = 0
    for name in (name for names in chosen.values() for name in names):
        wrong = differences(one.get(name), other.get(name)) if name in one or name in other else ["not recorded"]
        failed += bool(wrong)
        print(f"{name}: {'equal' if not wrong else f'{len(wrong)} differences'}", *wrong[:5], sep="\n  ")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
