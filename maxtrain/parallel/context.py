"""How devices that share sequences meet in attention: what `mesh.context_attention` and `mesh.context_order` come to on a layout."""

import dataclasses

from maxtrain.config import schema
from maxtrain.config.errors import Refused
from maxtrain.parallel.sharding import Layout


def lengths(config: schema.Config) -> dict[str, int]:
    """Tokens of the sequences that are trained on and scored, by the key that says so."""
    return {"data.length": config.data.length} | ({"eval.length": config.eval_length} if config.eval.sets else {})


def settled(config: schema.Config, layout: Layout) -> Layout:
    """The layout with its exchange and its order of tokens; `auto` is a ring, in the balanced order where nothing is against it.

    Raises:
        Refused: the sequences, the heads or the mixture of experts are against what the config asks for.
    """
    devices, cfg = layout.parts("length"), config.mesh
    if devices == 1:
        return dataclasses.replace(layout, exchange="gather", balanced=False)
    way = "ring" if cfg.context_attention == "auto" else cfg.context_attention
    if way == "all_to_all":
        _check_heads(config.model, layout)
    against = _against_balance(config, devices) if way == "ring" else "no ring"
    if cfg.context_order == "balanced" and against is not None:
        raise Refused(f"mesh.context_order=balanced: {against}, or take natural")
    return dataclasses.replace(layout, exchange=way, balanced=against is None and cfg.context_order != "natural")


def _against_balance(config: schema.Config, devices: int) -> str | None:
    """Why tokens cannot stand in the balanced order, and what could be changed; None if they can."""
    for key, length in lengths(config).items():
        if length % (2 * devices):
            return f"{key}={length} is not a multiple of {2 * devices}, two chunks for each of {devices} devices: choose another length"
    if config.model.moe is not None and config.model.moe.dispatch == "capacity":  # first come, first served
        return "model.moe.dispatch=capacity drops tokens by their order: choose dropless"
    ropes = (config.model.rope, *(slot.rope for slot in config.model.slots.values() if slot.rope))
    kinds = [rope.scaling.kind for rope in ropes if rope.scaling and rope.scaling.by_length]
    if kinds:  # they count the tokens of each document
        return f"{kinds[0]} (rope.scaling.kind) needs the tokens of a document side by side"
    return None


def _check_heads(model: schema.Model, layout: Layout) -> None:
    devices, names = layout.parts("heads") * layout.parts("length"), "+".join((*layout.split("heads"), *layout.split("length")))
    if model.num_heads % devices or (model.kv_heads % devices and devices % model.kv_heads):
        raise Refused(
            f"mesh.context_attention=all_to_all: model.num_heads={model.num_heads} and model.num_kv_heads={model.kv_heads} cannot be "
            f"shared by the {devices} devices of {names}: the heads must be a multiple of them, the kv heads a multiple or a divisor; "
            "or take ring"
        )
