"""Qwen3-MoE: Qwen3's attention, with norms of queries and keys, and a mixture of experts in all or some layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from maxtrain.config import schema
from maxtrain.models.families import pattern, rope
from maxtrain.models.families.family import Family, base, base_config
from maxtrain.models.families.fields import Fields
from maxtrain.models.families.rows import decoder, experts, gated
from maxtrain.models.families.tensors import Row, linear


def _feed_forward(model: schema.Model, slot: schema.Slot, ours: str, theirs: str) -> Iterator[Row]:
    """Routed experts or a gated feed-forward."""
    if slot.feed_forward == "dense":
        yield from gated(model, slot, ours, theirs)
        return
    yield linear(f"{ours}feed_forward/router", f"{theirs}mlp.gate.weight")
    names = ("gate_proj", "up_proj", "down_proj")
    yield from experts(model, ours, f"{theirs}mlp.experts.{{}}.", names, f"{theirs}mlp.experts.")


def _read(fields: Fields) -> schema.Model:
    moe = schema.Moe(
        num_experts=fields.get("num_experts", fields.get("num_local_experts", 128)),
        experts_per_token=fields.get("num_experts_per_tok", 8),
        mlp=fields.get("moe_intermediate_size", 768),
        routing="softmax",
        norm_topk=fields.get("norm_topk_prob", False),
        aux_loss=fields.get("router_aux_loss_coef", 0.001),
    )
    window = fields.get("sliding_window", 4096)
    window = window if fields.get("use_sliding_window", False) else None
    shared, biased = base(fields, max_length=32768), fields.get("attention_bias", False)
    step, only = fields.get("decoder_sparse_step", 1), fields.get("mlp_only_layers", [])
    kinds: list[Literal["dense", "moe"]] = [
        "dense" if index in only or (index + 1) % step else "moe" for index in range(shared["num_layers"])
    ]
    return schema.Model(
        **shared,
        mlp=fields.get("intermediate_size", 6144),
        rope=rope.read(fields),
        qk_norm="head",
        qkv_bias=biased,
        out_bias=biased,
        moe=moe if "moe" in kinds else None,
        **pattern.grouped(kinds, {kind: schema.Slot(feed_forward=kind, window=window) for kind in dict.fromkeys(kinds)}),
    )


def _write(model: schema.Model) -> dict[str, Any]:
    moe = model.moe or schema.Moe(num_experts=1, experts_per_token=1, mlp=model.mlp)
    window = model.slots[model.kinds[0]].window
    return {
        **base_config(model),
        "intermediate_size": model.mlp,
        "attention_bias": model.qkv_bias,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.mlp,
        "norm_topk_prob": moe.norm_topk,
        "router_aux_loss_coef": moe.aux_loss,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [index for index, kind in enumerate(model.kinds) if model.slots[kind].feed_forward == "dense"],
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "rope_parameters": rope.write(model.rope),
    }


FAMILIES = (
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        _read,
        _write,
        decoder(feed_forward=_feed_forward),
        ignored=frozenset({"output_router_logits", "max_window_layers"}),
        fixed={"qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0},  # named by Qwen3-Coder
    ),
)
