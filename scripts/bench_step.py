"""Train MaxTrain and PyTorch transformers side by side on this CPU: tokens/s, their ratio, share of the matmul peak.

`pip install -e '.[hf]'`, then `python scripts/bench_step.py [--shapes small,smollm2-135m] [--rounds 5]`. Each trainer is
a process of its own; they take steps in turn, so that a change of the machine's speed meets both, and medians are compared.
Both train in float32 with AdamW on the same random tokens. `--lengths 1024,4096,16384` trains the small shape on one sequence
of each length instead, and says what each process took from memory.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time

SHAPES = {  # name: (model, batch, length, steps a round)
    "small": ({"vocab_size": 4096, "embed": 384, "mlp": 1024, "num_layers": 6, "num_heads": 6, "num_kv_heads": 2}, 8, 256, 3),
    "smollm2-135m": ({"vocab_size": 49152, "embed": 576, "mlp": 1536, "num_layers": 30, "num_heads": 9, "num_kv_heads": 3}, 2, 512, 1),
}


def find(shape: str) -> tuple[dict, int, int, int]:
    """(model, batch, length, steps a round) of `SHAPES`, or of `small@LENGTH`: one sequence of that length."""
    name, _, length = shape.partition("@")
    model, batch, usual, steps = SHAPES[name]
    return (model | {"max_length": int(length)}, 1, int(length), 1) if length else (model, batch, usual, steps)


def maxtrain_step(model: dict, batch: int, length: int):
    """A function that takes one training step and returns the loss, and the operations of a token."""
    import jax
    import numpy as np

    from maxtrain.config import schema
    from maxtrain.models import flops
    from maxtrain.parallel import mesh
    from maxtrain.parallel.sharding import Layout
    from maxtrain.training.program import make_program, put_batch, put_stop

    config = schema.Config(
        model=schema.Model(**model),
        data=schema.Data(batch_size=batch, length=length),
        guard=schema.Guard(spike_sigmas=None),
        run=schema.Run(compile_cache=None),
    )
    mesh.start(config.run, config.mesh)
    device_mesh = mesh.make_mesh(config.mesh)
    program = make_program(mesh.resolve(config, device_mesh), Layout(device_mesh, config.mesh.rules))
    compiled, state = program.lower_step().compile(), program.create(0)
    tokens = np.random.default_rng(0).integers(0, model["vocab_size"], (batch, length + 1)).astype(np.int32)
    host = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.tile(np.arange(length, dtype=np.int32), (batch, 1)),
        "segments": np.ones((batch, length), np.int32),
        "weights": np.ones((batch, length), np.float32),
        "source": np.zeros(batch, np.int32),
    }
    spec, stop = program.batch(batch, length), put_stop(False, program.stop)

    def step() -> float:
        nonlocal state
        state, metrics = compiled(state, put_batch(host, spec, list(range(batch))), stop)
        return float(jax.device_get(metrics["objective"]))

    return step, flops.training(config.model, length)


def torch_step(model: dict, batch: int, length: int):
    """The same for PyTorch transformers."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    names = {"embed": "hidden_size", "mlp": "intermediate_size", "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}
    names |= {"num_kv_heads": "num_key_value_heads", "max_length": "max_position_embeddings"}
    config = LlamaConfig(**{names.get(key, key): value for key, value in model.items()}, tie_word_embeddings=True, use_cache=False)
    torch.manual_seed(0)
    net = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, model["vocab_size"], (batch, length + 1)))

    def step() -> float:
        logits = net(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step, 0.0


TRAINERS = {"maxtrain": maxtrain_step, "torch": torch_step}


def work(name: str, shape: str) -> None:
    """The process of one trainer: for every line on standard input, take a round of steps and print its seconds and loss."""
    model, batch, length, steps = find(shape)
    step, operations = TRAINERS[name](model, batch, length)
    step()
    peak = 0.0
    if name == "maxtrain":
        import jax

        from maxtrain.training import hardware

        peak = hardware.measure(jax.devices()[0])
    print("ready", operations, peak, flush=True)
    for _ in sys.stdin:
        start, loss = time.perf_counter(), 0.0
        for _ in range(steps):
            loss = step()
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print((time.perf_counter() - start) / steps, taken, loss, flush=True)


def compare(shape: str, rounds: int) -> None:
    """Run both trainers in turn and print one line of results."""
    _, batch, length, _ = find(shape)
    command = [sys.executable, __file__, "--shapes", shape, "--worker"]
    workers = {name: subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for name in TRAINERS}
    ready = {name: worker.stdout.readline().split() for name, worker in workers.items()}
    operations, peak = (float(x) for x in ready["maxtrain"][1:])
    seconds: dict[str, list[float]] = {name: [] for name in TRAINERS}
    memory = dict.fromkeys(TRAINERS, 0.0)
    for _ in range(rounds + 1):
        for name, worker in workers.items():
            worker.stdin.write("\n")
            worker.stdin.flush()
            took, memory[name], _ = map(float, worker.stdout.readline().split())
            seconds[name].append(took)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    rates = {name: batch * length / statistics.median(times[1:]) for name, times in seconds.items()}
    ratios = [b / a for a, b in zip(seconds["maxtrain"][1:], seconds["torch"][1:], strict=True)]
    share = rates["maxtrain"] * operations / (peak * 1e12)
    print(
        f"{shape:>14}: MaxTrain {rates['maxtrain']:7.1f} tok/s, PyTorch {rates['torch']:7.1f} tok/s, "
        f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f} over {rounds} rounds), "
        f"{share:.0%} of the matmul peak of {1000 * peak:.0f} GFLOP/s, "
        f"memory {memory['maxtrain']:.1f} and {memory['torch']:.1f} GiB",
        flush=True,
    )


def main() -> None:
    """Compare on each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--lengths", default="")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", choices=list(TRAINERS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    lengths = [f"small@{length}" for length in arguments.lengths.split(",") if length]
    for shape in lengths or arguments.shapes.split(","):
        if arguments.worker:
            work(arguments.worker, shape)
        else:
            compare(shape, arguments.rounds)


if __name__ == "__main__":
    main()
