"""Floating-point operations of a model, counted from its layer pattern.

A multiply and an add are two operations. Attention is counted over the keys a causal, windowed query really sees,
an expert for the tokens sent to it; norms, softmax and rotary embedding are left out, as is usual for MFU.
"""

from maxtrain.config import schema


def visible_keys(length: int, window: int | None) -> float:
    """Mean number of keys a query sees in a causal sequence of `length` tokens, itself included."""
    seen = min(window or length, length)
    return (seen * (seen + 1) / 2 + (length - seen) * seen) / length


def projections(cfg: schema.Model) -> int:
    """Elements of the matrices before and behind a layer's attention."""
    queries, values, embed, mla = cfg.num_heads * cfg.head_width, cfg.num_heads * cfg.value_width, cfg.embed, cfg.mla
    if mla is None:
        return embed * (queries + values + 2 * cfg.num_kv_heads * cfg.head_width)
    of_queries = embed * queries if mla.q_rank is None else (embed + queries) * mla.q_rank
    return of_queries + embed * mla.cached + mla.kv_rank * cfg.num_heads * (mla.nope_dim + mla.value_dim) + values * embed


def forward(cfg: schema.Model, length: int, training: bool = False) -> dict[str, float]:
    """Operations per token of a forward pass over sequences of `length` tokens, by part of the model.

    That of training has the layers of multi-token prediction in it.
    """
    kinds = cfg.trained_kinds if training else cfg.kinds
    ahead = len(kinds) - cfg.num_layers
    parts = {"projections": 4.0 * cfg.embed**2 * ahead, "attention": 0.0, "feed_forward": 0.0}
    parts["head"] = 2.0 * cfg.embed * cfg.vocab_size * (1 + ahead)
    for name in kinds:
        slot = cfg.slots[name]
        parts["projections"] += 2.0 * projections(cfg)
        parts["attention"] += 2.0 * cfg.num_heads * (cfg.head_width + cfg.value_width) * visible_keys(length, slot.window)
        if slot.feed_forward == "moe":
            assert cfg.moe is not None
            experts = 3 * (cfg.moe.mlp * cfg.moe.experts_per_token + (cfg.moe.shared_mlp or 0))
            parts["feed_forward"] += 2.0 * cfg.embed * (experts + cfg.moe.num_experts + cfg.moe.shared_gate)
        else:
            parts["feed_forward"] += 6.0 * cfg.embed * cfg.mlp
    return parts


def training(cfg: schema.Model, length: int) -> float:
    """Operations per token of forward and backward pass: three times the forward pass. Rematerialisation is not counted."""
    return 3.0 * sum(forward(cfg, length, training=True).values())
