"""PyTorch with transformers on the same shapes: torch.compile, flash attention, float32 weights multiplied in bfloat16, fused AdamW."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import record

LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
}
TOY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
TOY |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256}
ATTEMPTS = {2048: (8, 4, 2, 1), 8192: (2, 1)}  # batches, the first that fits being taken


def train(length: int, rec: record.Record) -> None:
    """Time the train step of the dense shape at the largest batch that fits."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        rec.fact("peer", f"not available here: {' and '.join(missing)} cannot be imported")
        return
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not rec.smoke:
        rec.fact("peer", f"not available here: torch {torch.__version__} sees no CUDA device")
        return
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    rec.measure("torch", device=name, torch=torch.__version__, transformers=transformers.__version__, cuda=torch.version.cuda)
    if rec.smoke:
        length = 32
    for batch in (2,) if rec.smoke else ATTEMPTS[length]:
        try:
            rec.measure(f"1B dense, {length:,}, PyTorch", batch=batch, **step(batch, length, device, rec))
            return
        except torch.OutOfMemoryError as error:
            rec.fact(f"1B dense, {length:,}, PyTorch, batch {batch}", f"out of memory: {str(error)[:300]}")
        gc.collect()
        torch.cuda.empty_cache()


def step(batch: int, length: int, device: str, rec: record.Record) -> dict[str, Any]:
    """Numbers of one shape: seconds of the first step (compiling) and of the others, tokens/s, memory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**(TOY if rec.smoke else LLAMA_1B), tie_word_embeddings=True, use_cache=False, attn_implementation="sdpa")
    with torch.device(device):
        net = LlamaForCausalLM(config).train()
        tokens = torch.randint(0, config.vocab_size, (batch, length))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    model: Any = torch.compile(net, dynamic=False, backend="eager" if rec.smoke else "inductor")

    def run() -> Any:
        with torch.autocast(device, torch.bfloat16), flash(device):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    losses = [float(run())]
    first = time.perf_counter() - start
    each = seconds(run, (lambda: torch.cuda.synchronize()) if device == "cuda" else (lambda: None), 0.05 if rec.smoke else 6.0)
    losses.append(float(run()))
    return {
        "tokens_per_s": batch * length / each,
        "step_seconds": each,
        "compile_seconds": first,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def flash(device: str) -> contextlib.AbstractContextManager:
    """Only flash attention, which then fails where it cannot, instead of another that is slower."""
    if device == "cpu":
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.FLASH_ATTENTION)


def seconds(run: Callable[[], Any], wait: Callable[[], None], budget: float) -> float:
    """Median time of a run in three groups; the first two runs are not counted."""
    run()
    wait()
    start = time.perf_counter()
    run()
    wait()
    size, groups = max(1, min(50, int(budget / 3 / max(time.perf_counter() - start, 1e-6)))), []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(size):
            run()
        wait()
        groups.append((time.perf_counter() - start) / size)
    return statistics.median(groups)


CASES = {"1B dense, 2,048": partial(train, 2048), "1B dense, 8,192": partial(train, 8192)}

if __name__ == "__main__":
    record.main(CASES)
