"""Llama (2, 3, 3.1, 3.2), SmolLM2 and all else of model type `llama`; Mistral, which has no biases and adds a sliding window."""

from typing import Any

from maxtrain.config import schema
from maxtrain.models.families import rope
from maxtrain.models.families.family import Family, base, base_config
from maxtrain.models.families.fields import Fields
from maxtrain.models.families.rows import decoder


def _read_llama(fields: Fields) -> schema.Model:
    bias, mlp_bias = fields.get("attention_bias", False), fields.get("mlp_bias", False)
    biases = {"qkv_bias": bias, "out_bias": bias, "mlp_bias": mlp_bias}
    return schema.Model(**base(fields), **biases, mlp=fields.need("intermediate_size"), rope=rope.read(fields))


def _write(model: schema.Model) -> dict[str, Any]:
    return {**base_config(model), "intermediate_size": model.mlp, "rope_parameters": rope.write(model.rope)}


def _read_mistral(fields: Fields) -> schema.Model:
    slots = {"layer": schema.Slot(window=fields.nullable("sliding_window", 4096))}
    return schema.Model(
        **base(fields, max_length=131072, kv_heads=8), mlp=fields.need("intermediate_size"), rope=rope.read(fields), slots=slots
    )


def _write_mistral(model: schema.Model) -> dict[str, Any]:
    return {**_write(model), "sliding_window": model.slots[model.kinds[0]].window}


SURPLUS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)  # saved by early versions of transformers
FAMILIES = (
    Family(
        "llama",
        "LlamaForCausalLM",
        _read_llama,
        lambda model: _write(model) | {"attention_bias": model.out_bias, "mlp_bias": model.mlp_bias},
        decoder(),
        ignored=frozenset({"pretraining_tp", "is_llama_config"}),  # the first only cuts products into parts
        fixed={"rope_interleaved": False},
        surplus=SURPLUS,
    ),
    Family("mistral", "MistralForCausalLM", _read_mistral, _write_mistral, decoder(), surplus=SURPLUS),
)
