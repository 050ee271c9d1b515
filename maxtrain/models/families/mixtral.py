"""Mixtral: Mistral with a mixture of experts in every layer."""

from collections.abc import Iterator
from typing import Any

from maxtrain.config import schema
from maxtrain.models.families import rope
from maxtrain.models.families.family import Family, base, base_config
from maxtrain.models.families.fields import MAX_EXPERTS, Fields
from maxtrain.models.families.rows import decoder, experts
from maxtrain.models.families.tensors import Row, linear


def _experts(model: schema.Model, slot: schema.Slot, ours: str, theirs: str) -> Iterator[Row]:
    """Routed experts under their published names, and under those of transformers 5."""
    yield linear(f"{ours}feed_forward/router", f"{theirs}block_sparse_moe.gate.weight", f"{theirs}mlp.gate.weight")
    yield from experts(model, ours, f"{theirs}block_sparse_moe.experts.{{}}.", ("w1", "w3", "w2"), f"{theirs}mlp.experts.")


def _read(fields: Fields) -> schema.Model:
    moe = schema.Moe(
        num_experts=fields.get("num_local_experts", 8, most=MAX_EXPERTS),
        experts_per_token=fields.get("num_experts_per_tok", 2),
        mlp=fields.need("intermediate_size"),
        routing="softmax",
        norm_topk=True,
        aux_loss=fields.get("router_aux_loss_coef", 0.001),
    )
    slots = {"layer": schema.Slot(feed_forward="moe", window=fields.optional("sliding_window", int))}
    return schema.Model(**base(fields, eps=1e-5, max_length=131072, kv_heads=8), rope=rope.read(fields, 1e6), moe=moe, slots=slots)


def _write(model: schema.Model) -> dict[str, Any]:
    moe = model.moe or schema.Moe(num_experts=1, experts_per_token=1, mlp=model.mlp)
    return {
        **base_config(model),
        "intermediate_size": moe.mlp,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "router_aux_loss_coef": moe.aux_loss,
        "rope_parameters": rope.write(model.rope),
        "sliding_window": model.slots[model.kinds[0]].window,
    }


FAMILIES = (
    Family(
        "mixtral",
        "MixtralForCausalLM",
        _read,
        _write,
        decoder(feed_forward=_experts),
        ignored=frozenset({"output_router_logits", "pretraining_tp"}),
        fixed={"moe_frequency": 1},
    ),
)
