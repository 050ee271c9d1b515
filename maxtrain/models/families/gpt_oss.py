"""GPT-OSS: attention with sinks and biases, windowed in every second layer, and experts with biases behind a clamped SwiGLU."""

from collections.abc import Iterator
from typing import Any

from maxtrain.config import schema
from maxtrain.models.families import pattern, rope
from maxtrain.models.families.family import Family, base, base_config
from maxtrain.models.families.fields import MAX_EXPERTS, Fields
from maxtrain.models.families.rows import decoder
from maxtrain.models.families.tensors import ALTERNATING, Form, Row, linear, same

TYPES = (pattern.SLIDING, pattern.FULL)


def _experts(model: schema.Model, slot: schema.Slot, ours: str, theirs: str) -> Iterator[Row]:
    """Router and experts with biases; the matrices are not transposed, and columns of gate and up alternate."""
    part = f"{ours}feed_forward/"
    yield linear(f"{part}router", f"{theirs}mlp.router.weight")
    yield same(f"{part}router_bias", f"{theirs}mlp.router.bias")
    for bias in ("", "_bias"):
        both = (Form((f"{theirs}mlp.experts.gate_up_proj{bias}",), ALTERNATING),)
        yield Row((f"{part}gate{bias}", f"{part}up{bias}"), both)
        yield same(f"{part}down{bias}", f"{theirs}mlp.experts.down_proj{bias}")


def _read(fields: Fields) -> schema.Model:
    moe = schema.Moe(
        num_experts=fields.get("num_local_experts", fields.get("num_experts", 128, most=MAX_EXPERTS), most=MAX_EXPERTS),
        experts_per_token=fields.get("num_experts_per_tok", 4),
        mlp=fields.get("intermediate_size", 2880),
        routing="softmax",
        norm_topk=True,
        router_bias=True,
        expert_bias=True,
        aux_loss=fields.get("router_aux_loss_coef", 0.001),
    )
    shared, biased = base(fields, eps=1e-5, max_length=131072, kv_heads=8), fields.get("attention_bias", True)
    window, rotary = fields.nullable("sliding_window", 128), rope.read(fields, 150000.0)
    if fields.section("rope_parameters") is None and fields.section("rope_scaling") is None:
        scaling = schema.RopeScaling(kind="yarn", factor=32.0, original_length=4096, truncate=False)
        rotary = rotary.model_copy(update={"scaling": scaling})
    types = pattern.layer_types(fields, 2)
    windows = dict(zip(TYPES, (window, None), strict=True))
    return schema.Model(
        norm="rms_float32",
        **shared | {"activation": "clamped_swiglu", "head_dim": fields.get("head_dim", 64)},
        rope=rotary,
        qkv_bias=biased,
        out_bias=biased,
        attention_sinks=True,
        moe=moe,
        **pattern.grouped(types, {kind: schema.Slot(feed_forward="moe", window=windows[kind]) for kind in dict.fromkeys(types)}),
    )


def _write(model: schema.Model) -> dict[str, Any]:
    moe = model.moe or schema.Moe(num_experts=1, experts_per_token=1, mlp=model.mlp)
    windows = [model.slots[kind].window for kind in model.kinds]
    return {
        **base_config(model),
        "intermediate_size": moe.mlp,
        "attention_bias": model.qkv_bias,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "router_aux_loss_coef": moe.aux_loss,
        "layer_types": [TYPES[window is None] for window in windows],
        "sliding_window": next((window for window in windows if window is not None), None),
        "rope_parameters": rope.write(model.rope),
    }


FAMILIES = (
    Family(
        "gpt_oss",
        "GptOssForCausalLM",
        _read,
        _write,
        decoder(feed_forward=_experts),
        ignored=frozenset({"output_router_logits", "initial_context_length", "experts_per_token"}),
        fixed={"swiglu_limit": 7.0, "swiglu_alpha": 1.702},
    ),
)
