"""OLMo 2 and 3: norms behind attention and feed-forward, queries and keys normalised over all heads; 3 has windows."""

from collections.abc import Mapping
from typing import Any

from maxtrain.config import schema
from maxtrain.models.families import pattern, rope
from maxtrain.models.families.family import Family, base, base_config
from maxtrain.models.families.fields import Fields
from maxtrain.models.families.rows import decoder

NORMS = {"attention_post_norm": "post_attention_layernorm", "feed_forward_post_norm": "post_feedforward_layernorm"}


def _shared(fields: Fields) -> dict[str, Any]:
    bias = fields.get("attention_bias", False)
    parts = {"norm": "rms_float32", "norm_placement": "post", "qk_norm": "projection", "qkv_bias": bias, "out_bias": bias}
    return {**base(fields, eps=1e-5), "mlp": fields.need("intermediate_size"), **parts}


def _read2(fields: Fields) -> schema.Model:
    return schema.Model(**_shared(fields), rope=rope.read(fields))


def _read3(fields: Fields) -> schema.Model:
    full = rope.read(fields, 5e5, pattern.FULL)
    nested = isinstance(fields.values.get("rope_parameters"), Mapping)
    local = rope.read(fields, 5e5, pattern.SLIDING) if nested else full.model_copy(update={"scaling": None})
    slots = {pattern.FULL: schema.Slot(), pattern.SLIDING: schema.Slot(window=fields.nullable("sliding_window", 4096), rope=local)}
    return schema.Model(**_shared(fields), **pattern.grouped(pattern.layer_types(fields, 4), slots), rope=full)


def _write2(model: schema.Model) -> dict[str, Any]:
    found = {key: value for key, value in base_config(model).items() if key != "head_dim"}  # the class has none
    return {**found, "intermediate_size": model.mlp, "rope_parameters": rope.write(model.rope), "attention_bias": model.out_bias}


def _write3(model: schema.Model) -> dict[str, Any]:
    local = next((model.slots[kind].rope for kind in model.kinds if model.slots[kind].rope), None)
    ropes = {pattern.FULL: rope.write(model.rope), pattern.SLIDING: rope.write(local or model.rope)}
    window = {"sliding_window": pattern.window(model) or 4096, "layer_types": pattern.windowed(model)}
    return {**_write2(model), **window, "rope_parameters": ropes}


FAMILIES = (
    Family("olmo2", "Olmo2ForCausalLM", _read2, _write2, decoder(NORMS)),
    Family("olmo3", "Olmo3ForCausalLM", _read3, _write3, decoder(NORMS)),
)
