"""Qwen2-MoE, Qwen3-MoE and OLMoE: softmax over all experts, in all or some layers; Qwen2's has a gated one that sees every token."""

from collections.abc import Iterator
from typing import Any

from maxtrain.config import schema
from maxtrain.models.families import pattern, rope
from maxtrain.models.families.family import Family, base, base_config
from maxtrain.models.families.fields import MAX_EXPERTS, Fields
from maxtrain.models.families.rows import decoder, experts, gated
from maxtrain.models.families.tensors import Row, linear


def _feed_forward(model: schema.Model, slot: schema.Slot, ours: str, theirs: str) -> Iterator[Row]:
    """Routed experts and the shared one, or a gated feed-forward."""
    if slot.feed_forward == "dense":
        yield from gated(model, slot, ours, theirs)
        return
    assert model.moe is not None
    part, names = f"{ours}feed_forward/", ("gate_proj", "up_proj", "down_proj")
    yield linear(f"{part}router", f"{theirs}mlp.gate.weight")
    yield from experts(model, ours, f"{theirs}mlp.experts.{{}}.", names, f"{theirs}mlp.experts.")
    if model.moe.shared_mlp:
        for name in ("gate", "up", "down"):
            yield linear(f"{part}shared/{name}", f"{theirs}mlp.shared_expert.{name}_proj.weight")
    if model.moe.shared_gate:
        yield linear(f"{part}shared_gate", f"{theirs}mlp.shared_expert_gate.weight")


def _moe(fields: Fields, count: int, chosen: int, mlp: int, aux_loss: float, **more: Any) -> schema.Moe:
    """The router and its experts, with a family's defaults."""
    return schema.Moe(
        num_experts=fields.get("num_experts", fields.get("num_local_experts", count, most=MAX_EXPERTS), most=MAX_EXPERTS),
        experts_per_token=fields.get("num_experts_per_tok", chosen),
        mlp=mlp,
        routing="softmax",
        norm_topk=fields.get("norm_topk_prob", False),
        aux_loss=fields.get("router_aux_loss_coef", aux_loss),
        **more,
    )


def _layers(fields: Fields, moe: schema.Moe, windows: list[int | None]) -> dict[str, Any]:
    """The layers' kinds: experts in every `decoder_sparse_step`-th of those that are not named as dense, and each one's window."""
    step, only = fields.get("decoder_sparse_step", 1, least=1), fields.listing("mlp_only_layers", int) or []
    slots = [
        schema.Slot(feed_forward="dense" if index in only or (index + 1) % step else "moe", window=window)
        for index, window in enumerate(windows)
    ]
    kinds = [slot.feed_forward + "_window" * (slot.window is not None) for slot in slots]
    used = any(slot.feed_forward == "moe" for slot in slots)
    return {"moe": moe if used else None, **pattern.grouped(kinds, dict(zip(kinds, slots, strict=True)))}


def _window(fields: Fields) -> int | None:
    window = fields.nullable("sliding_window", 4096)
    return window if fields.get("use_sliding_window", False) else None


def _read2(fields: Fields) -> schema.Model:
    shared, window = base(fields, max_length=32768, kv_heads=16), _window(fields)
    width, below = fields.get("shared_expert_intermediate_size", 5632), fields.get("max_window_layers", 28)
    moe = _moe(fields, 60, 4, fields.get("moe_intermediate_size", 1408), 0.001, shared_mlp=width or None, shared_gate=width > 0)
    default = [pattern.SLIDING if window and index < below and not index % 2 else pattern.FULL for index in range(shared["num_layers"])]
    windows = {pattern.FULL: None, pattern.SLIDING: window}
    layers = _layers(fields, moe, [windows[kind] for kind in pattern.listed(fields, default)])
    mlp, bias = fields.get("intermediate_size", 5632), fields.get("qkv_bias", True)
    return schema.Model(**shared, **layers, mlp=mlp, rope=rope.read(fields), qkv_bias=bias)


def _read3(fields: Fields) -> schema.Model:
    shared, biased = base(fields, max_length=32768, kv_heads=4), fields.get("attention_bias", False)
    moe = _moe(fields, 128, 8, fields.get("moe_intermediate_size", 768), 0.001)
    layers = _layers(fields, moe, [_window(fields)] * shared["num_layers"])
    parts = {"qk_norm": "head", "qkv_bias": biased, "out_bias": biased}
    return schema.Model(**shared, **layers, **parts, mlp=fields.get("intermediate_size", 6144), rope=rope.read(fields))


def _read_olmoe(fields: Fields) -> schema.Model:
    biased = fields.get("attention_bias", False)
    moe = _moe(fields, 64, 8, fields.get("intermediate_size", 2048), 0.01)
    slots = {"layer": schema.Slot(feed_forward="moe")}
    parts = {"qk_norm": "projection", "qkv_bias": biased, "out_bias": biased}
    return schema.Model(**base(fields, eps=1e-5, max_length=4096), **parts, rope=rope.read(fields), moe=moe, slots=slots)


def _shared_config(model: schema.Model) -> tuple[schema.Moe, dict[str, Any]]:
    """The experts, some for a model that has none, and the fields that all three write."""
    moe = model.moe or schema.Moe(num_experts=1, experts_per_token=1, mlp=model.mlp)
    return moe, {
        **base_config(model),
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "norm_topk_prob": moe.norm_topk,
        "router_aux_loss_coef": moe.aux_loss,
        "rope_parameters": rope.write(model.rope),
    }


def _write_layers(model: schema.Model, moe: schema.Moe) -> dict[str, Any]:
    window = pattern.window(model)
    return {
        "intermediate_size": model.mlp,
        "moe_intermediate_size": moe.mlp,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [index for index, kind in enumerate(model.kinds) if model.slots[kind].feed_forward == "dense"],
        "use_sliding_window": window is not None,
        "sliding_window": window,
    }


def _write2(model: schema.Model) -> dict[str, Any]:
    moe, found = _shared_config(model)
    more = {"qkv_bias": model.qkv_bias, "shared_expert_intermediate_size": moe.shared_mlp, "layer_types": pattern.windowed(model)}
    return {**found, **_write_layers(model, moe), **more}


def _write3(model: schema.Model) -> dict[str, Any]:
    moe, found = _shared_config(model)
    return {**found, **_write_layers(model, moe), "attention_bias": model.qkv_bias}


def _write_olmoe(model: schema.Model) -> dict[str, Any]:
    moe, found = _shared_config(model)
    found.pop("head_dim")  # the class has none
    return {**found, "intermediate_size": moe.mlp, "attention_bias": model.out_bias}


ROWS = decoder(feed_forward=_feed_forward)
IGNORED = frozenset({"output_router_logits"})
FAMILIES = (
    Family("qwen2_moe", "Qwen2MoeForCausalLM", _read2, _write2, ROWS, ignored=IGNORED),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        _read3,
        _write3,
        ROWS,
        ignored=IGNORED | {"max_window_layers"},
        fixed={"qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0},  # named by Qwen3-Coder
    ),
    Family("olmoe", "OlmoeForCausalLM", _read_olmoe, _write_olmoe, ROWS, ignored=IGNORED, fixed={"clip_qkv": None}),
)
