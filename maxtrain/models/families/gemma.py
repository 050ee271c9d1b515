"""Gemma 1, 2 and 3 (text): norms of 1 + w, embeddings times the root of their width, GeGLU; from 2 on sandwich norms and windows."""

from collections.abc import Mapping
from typing import Any

from maxtrain.config import schema
from maxtrain.models.families import pattern, rope
from maxtrain.models.families.family import ACTIVATIONS, Family, base, base_config
from maxtrain.models.families.fields import Fields
from maxtrain.models.families.rows import decoder

SANDWICH = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "feed_forward_norm": "pre_feedforward_layernorm",
    "feed_forward_post_norm": "post_feedforward_layernorm",
}


def _shared(fields: Fields, activation: str, kv_heads: int) -> dict[str, Any]:
    """What the three have in common; `activation` is the field that names it."""
    return {
        **base(fields, max_length=8192, tied=True, kv_heads=kv_heads),
        "head_dim": fields.get("head_dim", 256),
        "mlp": fields.need("intermediate_size"),
        "activation": fields.one_of(activation, ACTIVATIONS, "gelu_pytorch_tanh"),
        "norm": "rms_one_plus",
        "embedding_multiplier": fields.need("hidden_size") ** 0.5,
    }


def _read(fields: Fields) -> schema.Model:
    keys = _shared(fields, "hidden_act", 16)
    if keys["activation"] == "gelu":  # as published: the class takes it for the form the models were trained with
        keys["activation"] = "gelu_tanh"
    return schema.Model(**keys, rope=rope.read(fields))


def _later(fields: Fields, softcaps: tuple[float, float] | tuple[None, None] = (None, None)) -> dict[str, Any]:
    """What came with Gemma 2: norms on both sides, a scale and softcaps, which are these where absent and none where null."""
    names = ("attn_logit_softcapping", "final_logit_softcapping")
    caps = [
        fields.optional(name, float) if default is None else fields.nullable(name, default)
        for name, default in zip(names, softcaps, strict=True)
    ]
    scale = fields.get("query_pre_attn_scalar", 256.0, least=1e-9) ** -0.5
    found = {"attention_softcap": caps[0], "final_softcap": caps[1], "norm_placement": "sandwich", "attention_scale": scale}
    return {**_shared(fields, "hidden_activation", 4), **found}


def _read2(fields: Fields) -> schema.Model:
    slots = {pattern.FULL: schema.Slot(), pattern.SLIDING: schema.Slot(window=fields.nullable("sliding_window", 4096))}
    return schema.Model(**_later(fields, (50.0, 30.0)), **pattern.grouped(pattern.layer_types(fields, 2), slots), rope=rope.read(fields))


def _read3(fields: Fields) -> schema.Model:
    keys = _later(fields) | {"max_length": fields.get("max_position_embeddings", 131072), "qk_norm": "head"}
    if isinstance(fields.values.get("rope_parameters"), Mapping):
        local = rope.read(fields, 1e4, pattern.SLIDING)
    else:
        local = schema.Rope(theta=fields.get("rope_local_base_freq", 1e4))
    slots = {pattern.FULL: schema.Slot(), pattern.SLIDING: schema.Slot(window=fields.nullable("sliding_window", 4096), rope=local)}
    period = pattern.period(fields, 6)
    layers = pattern.grouped(pattern.layer_types(fields, period), slots)
    return schema.Model(**keys, **layers, rope=rope.read(fields, 1e6, pattern.FULL))


def _write(model: schema.Model) -> dict[str, Any]:
    return {**base_config(model), "intermediate_size": model.mlp, "rope_parameters": rope.write(model.rope)}


def _write2(model: schema.Model) -> dict[str, Any]:
    return {
        **_write(model),
        "hidden_activation": base_config(model)["hidden_act"],
        "query_pre_attn_scalar": round((model.attention_scale or model.head_width**-0.5) ** -2),
        "attn_logit_softcapping": model.attention_softcap,
        "final_logit_softcapping": model.final_softcap,
        "sliding_window": pattern.window(model) or 4096,
        "layer_types": pattern.windowed(model),
    }


def _write3(model: schema.Model) -> dict[str, Any]:
    local = next((model.slots[kind].rope for kind in model.kinds if model.slots[kind].rope), None)
    ropes = {pattern.FULL: rope.write(model.rope), pattern.SLIDING: rope.write(local or schema.Rope())}
    return {**_write2(model), "rope_parameters": ropes}


FIXED = {"attention_bias": False, "use_bidirectional_attention": False}
IGNORED = frozenset({"hidden_act", "hidden_activation"})  # which of the two is read depends on the version
FAMILIES = (
    Family("gemma", "GemmaForCausalLM", _read, _write, decoder(), ignored=IGNORED, fixed=FIXED),
    Family("gemma2", "Gemma2ForCausalLM", _read2, _write2, decoder(SANDWICH), ignored=IGNORED, fixed=FIXED),
    Family("gemma3_text", "Gemma3ForCausalLM", _read3, _write3, decoder(SANDWICH), ignored=IGNORED, fixed=FIXED),
)
