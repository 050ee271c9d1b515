"""GLM-4 (9B of 2024, `glm`) and GLM-4-0414 (`glm4`, sandwich norms): half of each head is rotated, neighbours as pairs."""

from typing import Any

from maxtrain.config import schema
from maxtrain.models.families import rope
from maxtrain.models.families.family import Family, base, base_config
from maxtrain.models.families.fields import Fields
from maxtrain.models.families.rows import decoder, fused_gated

SANDWICH = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_self_attn_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward_post_norm": "post_mlp_layernorm",
}


def _keys(fields: Fields) -> dict[str, Any]:
    turned = rope.read(fields, fraction=0.5).model_copy(update={"interleaved": True})
    keys = base(fields, eps=1.5625e-7, max_length=131072, kv_heads=2) | {"head_dim": fields.get("head_dim", 128)}
    return {**keys, "mlp": fields.need("intermediate_size"), "rope": turned, "qkv_bias": fields.get("attention_bias", True)}


def _write(model: schema.Model) -> dict[str, Any]:
    part = {"partial_rotary_factor": model.rope.fraction}
    return {
        **base_config(model),
        "intermediate_size": model.mlp,
        "rope_parameters": rope.write(model.rope) | part,
        "attention_bias": model.qkv_bias,
    }


FAMILIES = (
    Family("glm", "GlmForCausalLM", lambda fields: schema.Model(**_keys(fields)), _write, decoder(feed_forward=fused_gated)),
    Family(
        "glm4",
        "Glm4ForCausalLM",
        lambda fields: schema.Model(**_keys(fields), norm_placement="sandwich"),
        _write,
        decoder(SANDWICH, feed_forward=fused_gated),
    ),
)
