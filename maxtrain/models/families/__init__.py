"""Families of models: one file each, tables that import from and export to Hugging Face derive from.

A new family is a file with `FAMILIES` and its name in `MODULES`; a new size of a known family needs nothing here.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from maxtrain.config import schema
from maxtrain.config.errors import Refused
from maxtrain.config.keys import did_you_mean
from maxtrain.models.families import (
    cohere,
    deepseek,
    gemma,
    glm,
    glm_moe,
    gpt_oss,
    granite,
    llama,
    mixtral,
    olmo,
    phi,
    qwen,
    qwen_moe,
    smollm3,
    wrapper,
)
from maxtrain.models.families.family import Family
from maxtrain.models.families.tensors import Form, Row

MODULES = (
    llama,
    mixtral,
    qwen,
    gemma,
    olmo,
    phi,
    glm,
    granite,
    cohere,
    smollm3,
    qwen_moe,
    gpt_oss,
    deepseek,
    glm_moe,
)
FAMILIES: Mapping[str, Family] = {family.model_type: family for module in MODULES for family in module.FAMILIES}

__all__ = ["FAMILIES", "Family", "Form", "Row", "choose", "of_config", "of_model", "read"]


def of_config(config: Mapping[str, Any], place: str = "config.json") -> Family:
    """The family of a config.json.

    Raises:
        Refused: it is of no known family.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        near = did_you_mean(name, list(FAMILIES)) if isinstance(name, str) else ""
        raise Refused(f"{place}: model_type = {name!r:.100} is not supported{near}: allowed are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]


def read(config: Mapping[str, Any], place: str = "config.json", ignore: Collection[str] = ()) -> tuple[Family, schema.Model]:
    """Family and section `model` of a config.json, in a wrapper those of its language model.

    Args:
        config: all of it.
        place: what messages call the file.
        ignore: fields that are taken as absent, dotted within sections (`model.ignore_fields`).

    Raises:
        Refused: the family is not known, a field to ignore is not there, or what `Family.model` refuses.
    """
    section = wrapper.section_of(config)
    inner = without(wrapper.language_model(config, place), ignore, place)
    place = place if section is None else f"{place}: {section}"
    family = of_config(inner, place)
    return family, family.model(inner, place, ignore)


def without(config: Mapping[str, Any], ignore: Collection[str], place: str) -> dict[str, Any]:
    """The config without some of its fields; `Refused` for one that it does not have."""
    found = dict(config)
    for path in ignore:
        *sections, name = [path] if path in found else path.split(".")
        part = found
        for section in sections:
            part[section] = dict(part[section]) if isinstance(part.get(section), Mapping) else {}
            part = part[section]
        if name not in part:
            raise Refused(f"{place}: it has no field {path}, which model.ignore_fields names{did_you_mean(name, list(part))}")
        del part[name]
    return found


def of_model(model: schema.Model, name: str | None = None) -> tuple[Family, dict[str, Any]]:
    """A family that describes this very model, and the config.json it writes: the named one or the first that fits.

    Raises:
        Refused: no family does, with what each would lose.
    """
    if name is not None and name not in FAMILIES:
        raise Refused(f"family {name!r} is not known{did_you_mean(name, list(FAMILIES))}: allowed are {', '.join(sorted(FAMILIES))}")
    reasons = []
    for family in FAMILIES.values() if name is None else (FAMILIES[name],):
        try:
            return family, family.config(model)
        except Refused as refusal:
            reasons.append(str(refusal))
    raise Refused("no family of Hugging Face describes this model:\n  " + "\n  ".join(reasons))


def choose(row: Row, available: Iterable[str] | Mapping[str, Any]) -> Form:
    """The form of a row that is there in full; else the one of which most is there, for a message that says what is missing."""
    names = available if isinstance(available, Mapping) else set(available)
    return max(row.forms, key=lambda form: sum(name in names for name in form.names) / len(form.names))
