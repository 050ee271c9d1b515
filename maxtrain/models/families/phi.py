"""Phi-3 and Phi-4: Llama with fused projections; LongRoPE in those of long context, a part of each head rotated in Phi-4-mini."""

from typing import Any

from maxtrain.config import schema
from maxtrain.models.families import rope
from maxtrain.models.families.family import Family, base, base_config
from maxtrain.models.families.fields import Fields
from maxtrain.models.families.rows import decoder, fused_gated, fused_qkv

LONGROPE = rope.SCALINGS["longrope"]._replace(read=lambda section, config: rope.read_longrope(section, config, 4096))
KINDS = {"default": rope.SCALINGS["default"]} | dict.fromkeys(("longrope", "su", "yarn"), LONGROPE)  # the last two in early files


def _read(fields: Fields) -> schema.Model:
    slots = {"layer": schema.Slot(window=fields.optional("sliding_window", int))}
    keys, rotary = base(fields, eps=1e-5, max_length=4096), rope.read(fields, fraction=1.0, kinds=KINDS)
    return schema.Model(**keys, mlp=fields.need("intermediate_size"), rope=rotary, slots=slots)


def _write(model: schema.Model) -> dict[str, Any]:
    scaling, window = model.rope.scaling, model.slots[model.kinds[0]].window
    found = {key: value for key, value in base_config(model).items() if key != "head_dim"}  # the class has none
    return {
        **found,
        "intermediate_size": model.mlp,
        "rope_parameters": rope.write(model.rope),
        "original_max_position_embeddings": scaling.original_length if scaling else model.max_length,
        "sliding_window": window,
    }


FAMILIES = (
    Family(
        "phi3",
        "Phi3ForCausalLM",
        _read,
        _write,
        decoder(attention=fused_qkv, feed_forward=fused_gated),
        ignored=frozenset({"original_max_position_embeddings"}),  # read with LongRoPE only
        fixed={"attention_bias": False, "mlp_bias": False, "lm_head_bias": False, "full_attn_mod": 1, "interpolate_factor": 1},
    ),
)
