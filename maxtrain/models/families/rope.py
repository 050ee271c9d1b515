"""Rotary embeddings between a config.json and `schema.Rope`: today's `rope_parameters`, and `rope_theta` with `rope_scaling` before."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from maxtrain.config import schema
from maxtrain.config.errors import Refused
from maxtrain.models.families.fields import Fields


class Scaling(NamedTuple):
    """How one kind of scaling is read from the fields that describe it (second, those of the whole config), and written."""

    read: Callable[[Fields, Fields], schema.RopeScaling | None]
    write: Callable[[schema.RopeScaling], dict[str, Any]]


def _read_llama3(rope: Fields, config: Fields) -> schema.RopeScaling:
    return schema.RopeScaling(
        kind="llama3",
        factor=rope.need("factor", float),
        low_freq_factor=rope.need("low_freq_factor", float),
        high_freq_factor=rope.need("high_freq_factor", float),
        original_length=rope.need("original_max_position_embeddings"),
    )


def _write_llama3(scaling: schema.RopeScaling) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_length,
    }


YARN = {  # optional, and called alike
    "beta_fast": float,
    "beta_slow": float,
    "attention_factor": float,
    "mscale": float,
    "mscale_all_dim": float,
    "truncate": bool,
}


def _read_yarn(rope: Fields, config: Fields) -> schema.RopeScaling:
    optional = {name: rope.optional(name, kind) for name, kind in YARN.items()}
    if optional["attention_factor"] is not None or not (optional["mscale"] and optional["mscale_all_dim"]):
        optional |= {"mscale": None, "mscale_all_dim": None}  # of no effect alone or beside an explicit factor
    return schema.RopeScaling(
        kind="yarn",
        factor=rope.need("factor", float),
        original_length=rope.optional("original_max_position_embeddings", int) or config.need("max_position_embeddings"),
        **{name: value for name, value in optional.items() if value is not None},
    )


def _write_yarn(scaling: schema.RopeScaling) -> dict[str, Any]:
    optional = {name: getattr(scaling, name) for name in YARN}
    return {
        "rope_type": "yarn",
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_length,
        **{name: value for name, value in optional.items() if value is not None},
    }


def read_longrope(rope: Fields, config: Fields, default: int | None = None) -> schema.RopeScaling:
    """LongRoPE, whose original length may be named beside its section, which counts; `default` is a family's."""
    inner, length = rope.optional("original_max_position_embeddings", int), config.need("max_position_embeddings", least=1)
    original = config.optional("original_max_position_embeddings", int) or default or inner or length
    return schema.RopeScaling(
        kind="longrope",
        factor=rope.get("factor", length / original),
        original_length=original,
        attention_factor=rope.optional("attention_factor", float),
        short_factors=tuple(rope.listing("short_factor", float) or ()),
        long_factors=tuple(rope.listing("long_factor", float) or ()),
    )


def _write_longrope(scaling: schema.RopeScaling) -> dict[str, Any]:
    optional = {} if scaling.attention_factor is None else {"attention_factor": scaling.attention_factor}
    return {
        "rope_type": "longrope",
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_length,
        "short_factor": list(scaling.short_factors),
        "long_factor": list(scaling.long_factors),
        **optional,
    }


def _read_dynamic(rope: Fields, config: Fields) -> schema.RopeScaling:
    length = config.need("max_position_embeddings", least=1)
    if rope.get("original_max_position_embeddings", length) != length:
        raise Refused(f"{rope.place}: original_max_position_embeddings is of no effect in dynamic: only {length} (max_position_embeddings)")
    return schema.RopeScaling(kind="dynamic", factor=rope.need("factor", float, least=1), original_length=length)


def _write_dynamic(scaling: schema.RopeScaling) -> dict[str, Any]:
    return {"rope_type": "dynamic", "factor": scaling.factor}


SCALINGS: Mapping[str, Scaling] = {
    "default": Scaling(lambda rope, config: None, lambda scaling: {"rope_type": "default"}),
    "linear": Scaling(
        lambda rope, config: schema.RopeScaling(kind="linear", factor=rope.need("factor", float)),
        lambda scaling: {"rope_type": "linear", "factor": scaling.factor},
    ),
    "dynamic": Scaling(_read_dynamic, _write_dynamic),
    "llama3": Scaling(_read_llama3, _write_llama3),
    "yarn": Scaling(_read_yarn, _write_yarn),
    "longrope": Scaling(read_longrope, _write_longrope),
}


def read(
    config: Fields,
    theta: float = 10000.0,
    layer_type: str | None = None,
    fraction: float | None = None,
    kinds: Mapping[str, Scaling] = SCALINGS,
) -> schema.Rope:
    """The rotary embedding of a config.

    Args:
        config: all its fields.
        theta: the family's base where the config names none.
        layer_type: which entry to take where `rope_parameters` has one for each type of layer (`full_attention`).
        fraction: the share of a head that is rotated where the config names none; None for families that rotate all of it.
        kinds: what the family calls the kinds of scaling.

    Raises:
        Refused: the kind of scaling is not supported, or both forms are there and differ.
    """
    today, before = config.section("rope_parameters"), config.section("rope_scaling")
    if today is not None and layer_type is not None and isinstance(today.values.get(layer_type), Mapping):
        today = today.section(layer_type)
    if today is not None and before is not None and today.values != before.values:
        raise Refused(f"{config.place}: rope_parameters and rope_scaling differ: remove one of them")
    outer = config.get("rope_theta", theta)
    if today is not None and before is None and "rope_theta" in config.values and today.get("rope_theta", outer) != outer:
        raise Refused(f"{config.place}: rope_theta and rope_parameters.rope_theta differ: remove one of them")
    scaling = today or before
    if fraction is not None:
        fraction = config.get("partial_rotary_factor", fraction)
        fraction = fraction if scaling is None else scaling.get("partial_rotary_factor", fraction)
    fraction = 1.0 if fraction is None else fraction
    if scaling is None:
        return schema.Rope(theta=outer, fraction=fraction)
    kind = "rope_type" if "rope_type" in scaling.values else "type"
    if kind == "rope_type":
        scaling.optional("type", str)  # older files repeat it under this name
    found = scaling.one_of(kind, kinds, "default").read(scaling, config)
    return schema.Rope(theta=scaling.get("rope_theta", outer), fraction=fraction, scaling=found)


def write(rope: schema.Rope) -> dict[str, Any]:
    """`rope_parameters` of today's form."""
    kind = "default" if rope.scaling is None else rope.scaling.kind
    part = {} if rope.fraction == 1.0 else {"partial_rotary_factor": rope.fraction}
    return {"rope_theta": rope.theta, **part, **SCALINGS[kind].write(rope.scaling)}  # type: ignore[arg-type]
