"""Qwen2.5 (biases in queries, keys and values) and Qwen3 (normalised heads); both may have windows from some layer on."""

from typing import Any

from maxtrain.config import schema
from maxtrain.models.families import pattern, rope
from maxtrain.models.families.family import Family, base, base_config
from maxtrain.models.families.fields import Fields
from maxtrain.models.families.rows import decoder


def _layers(fields: Fields) -> dict[str, Any]:
    count, first = fields.num_layers(), fields.get("max_window_layers", 28)
    window = fields.nullable("sliding_window", 4096)
    window = window if fields.get("use_sliding_window", False) else None
    default = [pattern.SLIDING if window and index >= first else pattern.FULL for index in range(count)]
    return pattern.grouped(pattern.listed(fields, default), {pattern.FULL: schema.Slot(), pattern.SLIDING: schema.Slot(window=window)})


def _read(fields: Fields) -> schema.Model:
    return schema.Model(
        **base(fields, max_length=32768, kv_heads=32),
        **_layers(fields),
        mlp=fields.need("intermediate_size"),
        rope=rope.read(fields),
        qkv_bias=True,
    )


def _read3(fields: Fields) -> schema.Model:
    bias = fields.get("attention_bias", False)
    keys = {**base(fields, max_length=32768, kv_heads=32), "head_dim": fields.get("head_dim", 128)}
    parts = {"mlp": fields.need("intermediate_size"), "rope": rope.read(fields), "qk_norm": "head", "qkv_bias": bias, "out_bias": bias}
    return schema.Model(**keys, **_layers(fields), **parts)


def _write(model: schema.Model) -> dict[str, Any]:
    window = pattern.window(model)
    return {
        **base_config(model),
        "intermediate_size": model.mlp,
        "rope_parameters": rope.write(model.rope),
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": pattern.windowed(model),
        "max_window_layers": next((index for index, kind in enumerate(model.kinds) if model.slots[kind].window), model.num_layers),
    }


FAMILIES = (
    Family("qwen2", "Qwen2ForCausalLM", _read, _write, decoder(), ignored=frozenset({"use_mrope"}), fixed={"attention_bias": True}),
    Family("qwen3", "Qwen3ForCausalLM", _read3, lambda model: _write(model) | {"attention_bias": model.out_bias}, decoder()),
)
