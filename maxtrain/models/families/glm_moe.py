"""GLM-4.5 (`glm4_moe`): GLM-4's attention before the experts of DeepSeek-V3; GLM-4.7-Flash (`glm4_moe_lite`): all of DeepSeek-V3."""

from typing import Any

from maxtrain.config import schema
from maxtrain.config.errors import Refused
from maxtrain.models.families import deepseek, rope
from maxtrain.models.families.family import Family, base, base_config
from maxtrain.models.families.fields import Fields
from maxtrain.models.families.rows import decoder

AIR = {
    "n_routed_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1408,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
}  # what the config class takes for absent fields
FLASH = AIR | {"n_routed_experts": 64, "num_experts_per_tok": 4, "moe_intermediate_size": 1536, "routed_scaling_factor": 1.8}
KINDS = {"dense": "dense", "sparse": "moe"}  # mlp_layer_types -> feed_forward


def _read(fields: Fields) -> schema.Model:
    kinds = deepseek.leading_dense(fields, 1)
    return schema.Model(
        **base(fields, eps=1e-5, max_length=131072, kv_heads=8),
        **deepseek.layers(kinds, deepseek.sigmoid_moe(fields, **AIR)),
        mlp=fields.get("intermediate_size", 10944),
        rope=rope.read(fields, fraction=0.5),
        qkv_bias=fields.get("attention_bias", False),
        qk_norm="head" if fields.get("use_qk_norm", False) else "none",
        mtp=deepseek.mtp(fields, kinds, 1),
    )


def _read_lite(fields: Fields) -> schema.Model:
    count, found = fields.num_layers(), fields.listing("mlp_layer_types", str)
    types = ["sparse" if index else "dense" for index in range(count)] if found is None else found
    if len(types) != count or not set(types) <= set(KINDS):
        raise Refused(f"{fields.place}: mlp_layer_types = {types!r}: {' or '.join(KINDS)} is expected for each of the {count} layers")
    rotary = rope.read(fields, fraction=1.0).model_copy(update={"interleaved": fields.get("rope_interleave", True)})
    if rotary.fraction != 1.0:
        raise Refused(f"{fields.place}: partial_rotary_factor = {rotary.fraction}: only 1.0 is supported with latent attention")
    kinds, moe = [KINDS[kind] for kind in types], deepseek.sigmoid_moe(fields, **FLASH)
    mla = deepseek.mla(fields, q_rank=768, nope_dim=192, value_dim=256)
    shared = deepseek.latent_model(fields, kinds, moe, mla, rotary, eps=1e-5, max_length=202752, kv_heads=20)
    return schema.Model(**shared, mlp=fields.get("intermediate_size", 10240), mtp=deepseek.mtp(fields, kinds, 0))


def _write(model: schema.Model) -> dict[str, Any]:
    return {
        **base_config(model),
        **deepseek.moe_config(model),
        "intermediate_size": model.mlp,
        "attention_bias": model.qkv_bias,
        "use_qk_norm": model.qk_norm == "head",
        "rope_parameters": rope.write(model.rope) | {"partial_rotary_factor": model.rope.fraction},
    }


def _write_lite(model: schema.Model) -> dict[str, Any]:
    found = {name: value for name, value in deepseek.write_latent(model).items() if name != "first_k_dense_replace"}
    names = {ours: theirs for theirs, ours in KINDS.items()}
    return found | {"mlp_layer_types": [names[model.slots[kind].feed_forward] for kind in model.kinds]}


IGNORED = frozenset({"output_router_logits", "pretraining_tp", "qk_head_dim"})
FIXED = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}
FAMILIES = (
    Family(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        _read,
        _write,
        decoder(feed_forward=deepseek.feed_forward),
        ignored=IGNORED,
        fixed=FIXED,
    ),
    Family(
        "glm4_moe_lite",
        "Glm4MoeLiteForCausalLM",
        _read_lite,
        _write_lite,
        deepseek.ROWS,
        ignored=IGNORED | {"head_dim"},  # of the rotated part, a copy of qk_rope_head_dim
        fixed=FIXED | {"first_k_dense_replace": 1},  # what mlp_layer_types says where it is absent
    ),
)
