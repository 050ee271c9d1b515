"""SmolLM3: Llama in which some layers, every fourth as published, carry no positions."""

from typing import Any

from maxtrain.config import schema
from maxtrain.config.errors import Refused
from maxtrain.models.families import pattern, rope
from maxtrain.models.families.family import Family, base, base_config
from maxtrain.models.families.fields import Fields
from maxtrain.models.families.rows import decoder


def _read(fields: Fields) -> schema.Model:
    count, bias = fields.num_layers(), fields.get("attention_bias", False)
    interval, rotated = fields.get("no_rope_layer_interval", 4, least=1), fields.listing("no_rope_layers", int)  # 1 where there is rope
    if rotated is None:
        rotated = [int((index + 1) % interval != 0) for index in range(count)]
    if len(rotated) != count:
        raise Refused(f"{fields.place}: no_rope_layers has {len(rotated)} entries, one for each of {count} layers is expected")
    kinds = ["rotary" if there else "plain" for there in rotated]
    layers = pattern.grouped(kinds, {"rotary": schema.Slot(), "plain": schema.Slot(rotary=False)})
    keys = base(fields, max_length=32768, tied=True, kv_heads=4)
    parts = {"mlp": fields.need("intermediate_size"), "rope": rope.read(fields, 2e6), "qkv_bias": bias, "out_bias": bias}
    parts["mlp_bias"] = fields.get("mlp_bias", False)
    return schema.Model(**keys, **layers, **parts)


def _write(model: schema.Model) -> dict[str, Any]:
    found = {key: value for key, value in base_config(model).items() if key != "head_dim"}  # the class has none
    return {
        **found,
        "intermediate_size": model.mlp,
        "rope_parameters": rope.write(model.rope),
        "attention_bias": model.out_bias,
        "mlp_bias": model.mlp_bias,
        "no_rope_layers": [int(model.slots[kind].rotary) for kind in model.kinds],
    }


FAMILIES = (
    Family(
        "smollm3",
        "SmolLM3ForCausalLM",
        _read,
        _write,
        decoder(),
        ignored=frozenset({"layer_types", "max_window_layers", "sliding_window", "pretraining_tp"}),  # for use_sliding_window and training
        fixed={"use_sliding_window": False},
    ),
)
