"""Granite 3: Llama with multipliers on embeddings, residuals, attention and logits."""

from typing import Any

from maxtrain.config import schema
from maxtrain.models.families import rope
from maxtrain.models.families.family import Family, base, base_config
from maxtrain.models.families.fields import Fields
from maxtrain.models.families.rows import decoder


def _read(fields: Fields) -> schema.Model:
    bias = fields.get("attention_bias", False)
    return schema.Model(
        **base(fields),
        mlp=fields.need("intermediate_size"),
        rope=rope.read(fields),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.get("mlp_bias", False),
        embedding_multiplier=fields.get("embedding_multiplier", 1.0),
        residual_multiplier=fields.get("residual_multiplier", 1.0),
        attention_scale=fields.get("attention_multiplier", 1.0),
        logit_multiplier=1.0 / fields.get("logits_scaling", 1.0, least=1e-9),
    )


def _write(model: schema.Model) -> dict[str, Any]:
    found = {key: value for key, value in base_config(model).items() if key != "head_dim"}  # the class has none
    return {
        **found,
        "intermediate_size": model.mlp,
        "rope_parameters": rope.write(model.rope),
        "attention_bias": model.out_bias,
        "mlp_bias": model.mlp_bias,
        "embedding_multiplier": model.embedding_multiplier,
        "residual_multiplier": model.residual_multiplier,
        "attention_multiplier": model.attention_scale or model.head_width**-0.5,
        "logits_scaling": float(f"{1.0 / model.logit_multiplier:.12g}"),
    }


FAMILIES = (Family("granite", "GraniteForCausalLM", _read, _write, decoder()),)
