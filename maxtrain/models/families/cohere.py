"""Command R and R+ (`cohere`) and Command R7B (`cohere2`): one layer norm before attention and feed-forward side by side;
the second has windows with, and full attention without, positions."""

from typing import Any

from maxtrain.config import schema
from maxtrain.models.families import pattern, rope
from maxtrain.models.families.family import Family, base, base_config
from maxtrain.models.families.fields import Fields
from maxtrain.models.families.rows import decoder


def _keys(fields: Fields) -> dict[str, Any]:
    bias, shared = fields.get("attention_bias", False), base(fields, max_length=8192, tied=True)
    return {
        **shared,
        "max_length": fields.get("model_max_length", shared["max_length"]),  # Command R: 131072, beside 8192 for the cache of angles
        "norm_eps": fields.get("layer_norm_eps", 1e-5),
        "mlp": fields.need("intermediate_size"),
        "rope": rope.read(fields, 5e5 if fields.values["model_type"] == "cohere" else 1e4).model_copy(update={"interleaved": True}),
        "norm": "layer",
        "norm_placement": "parallel",
        "logit_multiplier": fields.get("logit_scale", 0.0625),
        "qkv_bias": bias,
        "out_bias": bias,
    }


def _read(fields: Fields) -> schema.Model:
    return schema.Model(**_keys(fields), qk_norm="each_head" if fields.get("use_qk_norm", False) else "none")


def _read2(fields: Fields) -> schema.Model:
    window = fields.nullable("sliding_window", 4096)
    slots = {pattern.FULL: schema.Slot(rotary=False), pattern.SLIDING: schema.Slot(window=window)}
    period = pattern.period(fields, 4)
    return schema.Model(**_keys(fields), **pattern.grouped(pattern.layer_types(fields, period), slots))


def _write(model: schema.Model) -> dict[str, Any]:
    found = {key: value for key, value in base_config(model).items() if key not in ("head_dim", "rms_norm_eps")}
    return {
        **found,
        "layer_norm_eps": model.norm_eps,
        "intermediate_size": model.mlp,
        "rope_parameters": rope.write(model.rope),
        "logit_scale": model.logit_multiplier,
        "attention_bias": model.out_bias,
    }


def _write2(model: schema.Model) -> dict[str, Any]:
    return {**_write(model), "sliding_window": pattern.window(model) or 4096, "layer_types": pattern.windowed(model)}


FAMILIES = (
    Family(
        "cohere",
        "CohereForCausalLM",
        _read,
        lambda model: _write(model) | {"use_qk_norm": model.qk_norm == "each_head"},
        decoder({"attention_norm": "input_layernorm"}),
    ),
    Family(
        "cohere2",
        "Cohere2ForCausalLM",
        _read2,
        _write2,
        decoder({"attention_norm": "input_layernorm"}),
        ignored=frozenset(
            {
                "cache_implementation",
                "order_of_interleaved_layers",
                "position_embedding_type",
                "rotary_pct",
                "use_embedding_sharing",
                "use_gated_activation",
                "use_parallel_block",
                "use_parallel_embedding",
            }
        ),
        fixed={"use_qk_norm": False},
    ),
)
