"""DeepSeek-V2 and V3, and what has their form (Kimi-K2): latent attention, and experts of which some see every token."""

from collections.abc import Iterator
from typing import Any

from maxtrain.config import schema
from maxtrain.config.errors import Refused
from maxtrain.models.families import pattern, rope
from maxtrain.models.families.family import Family, base, base_config
from maxtrain.models.families.fields import MAX_EXPERTS, MAX_LAYERS, Fields
from maxtrain.models.families.rows import decoder, experts, gated
from maxtrain.models.families.tensors import Row, linear, same

EXPERT = ("gate_proj", "up_proj", "down_proj")


def latent_attention(model: schema.Model, slot: schema.Slot, ours: str, theirs: str) -> Iterator[Row]:
    """The projections to latent vectors and from them, with the norms between."""
    assert model.mla is not None
    ours, theirs = f"{ours}attention/", f"{theirs}self_attn."
    if model.mla.q_rank is None:
        yield linear(f"{ours}q", f"{theirs}q_proj.weight")
    else:
        yield linear(f"{ours}q_down", f"{theirs}q_a_proj.weight")
        yield same(f"{ours}q_norm/scale", f"{theirs}q_a_layernorm.weight")
        yield linear(f"{ours}q", f"{theirs}q_b_proj.weight")
    yield linear(f"{ours}kv_down", f"{theirs}kv_a_proj_with_mqa.weight")
    yield same(f"{ours}kv_norm/scale", f"{theirs}kv_a_layernorm.weight")
    yield linear(f"{ours}kv_up", f"{theirs}kv_b_proj.weight")
    yield linear(f"{ours}out", f"{theirs}o_proj.weight")
    if model.qkv_bias:
        if model.mla.q_rank is not None:
            yield same(f"{ours}q_down_bias", f"{theirs}q_a_proj.bias")
        yield same(f"{ours}kv_down_bias", f"{theirs}kv_a_proj_with_mqa.bias")


def feed_forward(model: schema.Model, slot: schema.Slot, ours: str, theirs: str) -> Iterator[Row]:
    """Routed experts with a balancing bias and a shared one, or a gated feed-forward."""
    if slot.feed_forward == "dense":
        yield from gated(model, slot, ours, theirs)
        return
    assert model.moe is not None
    part = f"{ours}feed_forward/"
    yield linear(f"{part}router", f"{theirs}mlp.gate.weight")
    if model.moe.balance_rate is not None:
        yield same(f"{part}balance_bias", f"{theirs}mlp.gate.e_score_correction_bias")
    yield from experts(model, ours, f"{theirs}mlp.experts.{{}}.", EXPERT, f"{theirs}mlp.experts.")
    if model.moe.shared_mlp:
        for name in ("gate", "up", "down"):
            yield linear(f"{part}shared/{name}", f"{theirs}mlp.shared_experts.{name}_proj.weight")


def sigmoid_moe(fields: Fields, **defaults: Any) -> schema.Moe:
    """The router of DeepSeek-V3: sigmoid scores, the best groups by their two best experts, a bias that balances the choice."""
    names = ("num_experts_per_tok", "moe_intermediate_size", "n_shared_experts", "n_group", "topk_group")
    chosen, mlp, shared, groups, open_groups = (fields.get(name, defaults[name]) for name in names)
    return schema.Moe(
        num_experts=fields.get("n_routed_experts", defaults["n_routed_experts"], most=MAX_EXPERTS),
        experts_per_token=chosen,
        mlp=mlp,
        routing="sigmoid",
        norm_topk=fields.get("norm_topk_prob", True),
        routed_scale=fields.get("routed_scaling_factor", defaults["routed_scaling_factor"]),
        num_groups=groups,
        groups_per_token=open_groups,
        group_score="top2" if open_groups < groups else "max",
        shared_mlp=shared * mlp or None,
        aux_loss=fields.get("aux_loss_alpha", 0.0001),
        balance_rate=0.001,  # of the training of DeepSeek-V3 (section 4.2 of its report), not in the file
    )


def _softmax_moe(fields: Fields) -> schema.Moe:
    """The router of DeepSeek-V2: softmax, in all experts or in the groups of the best of them."""
    method = fields.one_of("topk_method", {name: name for name in ("greedy", "group_limited_greedy")}, "greedy")
    groups = (fields.get("n_group", 1), fields.get("topk_group", 1)) if method == "group_limited_greedy" else (1, 1)
    mlp = fields.get("moe_intermediate_size", 1407)
    return schema.Moe(
        num_experts=fields.get("n_routed_experts", 64, most=MAX_EXPERTS),
        experts_per_token=fields.need("num_experts_per_tok"),
        mlp=mlp,
        norm_topk=False,
        routed_scale=fields.get("routed_scaling_factor", 1.0),
        num_groups=groups[0],
        groups_per_token=groups[1],
        shared_mlp=fields.get("n_shared_experts", 2) * mlp or None,
        aux_loss=fields.get("aux_loss_alpha", 0.001),
    )


def mla(fields: Fields, q_rank: int = 1536, nope_dim: int = 128, value_dim: int = 128) -> schema.Mla:
    """The section `model.mla`; a null `q_lora_rank` is a value: no latent vector of the queries."""
    return schema.Mla(
        q_rank=fields.nullable("q_lora_rank", q_rank),
        kv_rank=fields.get("kv_lora_rank", 512),
        nope_dim=fields.get("qk_nope_head_dim", nope_dim),
        rope_dim=fields.get("qk_rope_head_dim", 64),
        value_dim=fields.get("v_head_dim", value_dim),
    )


def leading_dense(fields: Fields, default: int) -> list[str]:
    """The feed-forward of each layer: dense in the first `first_k_dense_replace`."""
    first = fields.get("first_k_dense_replace", default)
    return ["dense" if index < first else "moe" for index in range(fields.num_layers())]


def layers(kinds: list[str], moe: schema.Moe) -> dict[str, Any]:
    """The keys of `schema.Model` for layers of these kinds of feed-forward."""
    slots = {"dense": schema.Slot(), "moe": schema.Slot(feed_forward="moe")}
    return {"moe": moe if "moe" in kinds else None, **pattern.grouped(kinds, slots)}


def mtp(fields: Fields, kinds: list[str], default: int) -> schema.Mtp | None:
    """The section `model.mtp` of a model with layers of these kinds."""
    count = fields.get("num_nextn_predict_layers", default, most=MAX_LAYERS)
    if count and kinds[-1] != "moe":
        raise Refused(f"{fields.place}: num_nextn_predict_layers = {count}: the last layer must have experts, as they do")
    return schema.Mtp(num_layers=count) if count else None


def latent_model(
    fields: Fields, kinds: list[str], moe: schema.Moe, mla: schema.Mla, rotary: schema.Rope, **defaults: Any
) -> dict[str, Any]:
    """The keys of `schema.Model` of a config with latent attention and these kinds of layers; `defaults` are those of `base`."""
    shared = base(fields, **defaults)
    heads, kv_heads = shared["num_heads"], shared.pop("num_kv_heads")
    shared.pop("head_dim")
    if heads != kv_heads:
        raise Refused(f"{fields.place}: num_key_value_heads = {kv_heads!r}: latent attention has as many as num_attention_heads = {heads}")
    scaling = rotary.scaling
    for section in filter(None, (fields.section("rope_parameters"), fields.section("rope_scaling"))):
        if section.optional("mscale_all_dim", float) and (scaling is None or scaling.mscale_all_dim is None):
            raise Refused(f"{section.place}: mscale_all_dim is only supported together with yarn's mscale, without an attention_factor")
    biased = fields.get("attention_bias", False)
    return {**shared, **layers(kinds, moe), "mla": mla, "rope": rotary, "qkv_bias": biased, "out_bias": biased}


def _read_v2(fields: Fields) -> schema.Model:
    rotary, kinds = rope.read(fields).model_copy(update={"interleaved": True}), leading_dense(fields, 0)
    found = latent_model(fields, kinds, _softmax_moe(fields), mla(fields), rotary, max_length=2048)
    return schema.Model(**found, mlp=fields.need("intermediate_size"))


V3 = {
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
}  # what DeepSeek-V3's config class takes for absent fields


def _read_v3(fields: Fields) -> schema.Model:
    rotary = rope.read(fields).model_copy(update={"interleaved": fields.get("rope_interleave", True)})
    kinds, moe = leading_dense(fields, 3), sigmoid_moe(fields, **V3)
    found = latent_model(fields, kinds, moe, mla(fields), rotary, max_length=4096, kv_heads=128)
    return schema.Model(**found, mlp=fields.need("intermediate_size"), mtp=mtp(fields, kinds, 1))


def moe_config(model: schema.Model) -> dict[str, Any]:
    """The fields of the experts, of the leading dense layers and of multi-token prediction."""
    moe = model.moe or schema.Moe(num_experts=2, experts_per_token=1, mlp=model.mlp, shared_mlp=model.mlp)
    dense = [model.slots[kind].feed_forward == "dense" for kind in model.kinds]
    return {
        "first_k_dense_replace": next((index for index, is_dense in enumerate(dense) if not is_dense), len(dense)),
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.mlp,
        "n_shared_experts": (moe.shared_mlp or 0) // moe.mlp,
        "routed_scaling_factor": moe.routed_scale,
        "norm_topk_prob": moe.norm_topk,
        "n_group": moe.num_groups,
        "topk_group": moe.groups_per_token,
        "aux_loss_alpha": moe.aux_loss,
        "num_nextn_predict_layers": model.mtp.num_layers if model.mtp else 0,
    }


def write_latent(model: schema.Model) -> dict[str, Any]:
    """The fields of a model with latent attention."""
    mla = model.mla or schema.Mla()
    return {
        **{name: value for name, value in base_config(model).items() if name != "head_dim"},
        **moe_config(model),
        "num_key_value_heads": model.num_heads,
        "intermediate_size": model.mlp,
        "attention_bias": model.qkv_bias,
        "q_lora_rank": mla.q_rank,
        "kv_lora_rank": mla.kv_rank,
        "qk_nope_head_dim": mla.nope_dim,
        "qk_rope_head_dim": mla.rope_dim,
        "v_head_dim": mla.value_dim,
        "rope_parameters": rope.write(model.rope),
        "rope_interleave": model.rope.interleaved,
    }


def _write_v2(model: schema.Model) -> dict[str, Any]:
    limited = model.moe is not None and model.moe.groups_per_token < model.moe.num_groups
    later = ("rope_interleave", "num_nextn_predict_layers")
    found = {name: value for name, value in write_latent(model).items() if name not in later}
    return {**found, "norm_topk_prob": False, "topk_method": "group_limited_greedy" if limited else "greedy"}


IGNORED = frozenset(
    {
        "attn_impl",
        "auto_map",
        "ep_size",
        "head_dim",  # of the rotated part, a copy of qk_rope_head_dim
        "output_router_logits",
        "pretraining_tp",
        "qk_head_dim",
        "seq_aux",
    }
)
FIXED = {"moe_layer_freq": 1}
ROWS = decoder(attention=latent_attention, feed_forward=feed_forward)

FAMILIES = (
    Family(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        _read_v2,
        _write_v2,
        ROWS,
        ignored=IGNORED | {"n_group", "topk_group"},
        fixed=FIXED | {"scoring_func": "softmax", "norm_topk_prob": False, "mlp_bias": False},
    ),
    *(
        Family(
            name,
            "DeepseekV3ForCausalLM",
            _read_v3,
            write_latent,
            ROWS,
            ignored=IGNORED,
            fixed=FIXED | {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
        )
        for name in ("deepseek_v3", "kimi_k2")
    ),
)
