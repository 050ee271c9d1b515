"""Floating-point operations of a model, counted from its layer pattern.

A multiply and an add are two operations. Attention is counted over the keys a causal, windowed query really sees,
an expert for the tokens sent to it; norms, softmax and rotary embedding are left out, as is usual for MFU.
"""

from __future__ import annotations

from maxtrain.config import schema


def visible_keys(length: int, window: int | None) -> float:
    """Mean number of keys a query sees in a causal sequence of `length` tokens, itself included."""
    seen = min(window or length, length)
    return (seen * (seen + 1) / 2 + (length - seen) * seen) / length


def forward(cfg: schema.Model, length: int) -> dict[str, float]:
    """Operations per token of a forward pass over sequences of `length` tokens, by part of the model."""
    heads = cfg.num_heads * cfg.head_width
    kv_heads = cfg.num_kv_heads * cfg.head_width
    parts = {"projections": 0.0, "attention": 0.0, "feed_forward": 0.0, "head": 2.0 * cfg.embed * cfg.vocab_size}
    for name in cfg.kinds:
        slot = cfg.slots[name]
        parts["projections"] += 2.0 * cfg.embed * (2 * heads + 2 * kv_heads)
        parts["attention"] += 4.0 * heads * visible_keys(length, slot.window)
        if slot.feed_forward == "moe":
            assert cfg.moe is not None
            experts = 3 * (cfg.moe.mlp * cfg.moe.experts_per_token + (cfg.moe.shared_mlp or 0))
            parts["feed_forward"] += 2.0 * cfg.embed * (experts + cfg.moe.num_experts + cfg.moe.shared_gate)
        else:
            parts["feed_forward"] += 6.0 * cfg.embed * cfg.mlp
    return parts


def training(cfg: schema.Model, length: int) -> float:
    """Operations per token of forward and backward pass: three times the forward pass. Rematerialisation is not counted."""
    return 3.0 * sum(forward(cfg, length).values())
