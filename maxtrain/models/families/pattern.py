"""From a list of the layers' kinds, as config.json has it, to the shortest prefix and period that repeat to it, and back."""

from collections.abc import Mapping, Sequence
from typing import Any

from maxtrain.config import schema
from maxtrain.config.errors import Refused
from maxtrain.models.families.fields import Fields

SLIDING, FULL = "sliding_attention", "full_attention"


def layer_types(fields: Fields, period: int | None) -> list[str]:
    """The type of each layer; where the config lists none, every `period`-th layer sees everything, all do for None."""
    count = fields.need("num_hidden_layers")
    return listed(fields, [SLIDING if period is not None and (index + 1) % period else FULL for index in range(count)])


def listed(fields: Fields, default: Sequence[str]) -> list[str]:
    """The field `layer_types`, `default` where it is absent; `Refused` for another type or number of layers."""
    types = list(fields.get("layer_types", default))
    if len(types) != len(default) or not set(types) <= {SLIDING, FULL}:
        raise Refused(f"{fields.place}: layer_types = {types!r:.200}: {SLIDING} or {FULL} is expected for each of {len(default)} layers")
    return types


def grouped(kinds: Sequence[str], slots: Mapping[str, schema.Slot]) -> dict[str, Any]:
    """The keys of `schema.Model` for layers of these kinds."""
    count = len(kinds)
    shapes = ((prefix, period) for total in range(1, count + 1) for period in range(1, total + 1) for prefix in (total - period,))
    prefix, period = next(
        (prefix, period)
        for prefix, period in shapes
        if all(kinds[index] == kinds[prefix + (index - prefix) % period] for index in range(prefix, count))
    )
    used = {kind: slots[kind] for kind in dict.fromkeys(kinds)}
    return {"slots": used, "prefix": tuple(kinds[:prefix]), "layer_pattern": tuple(kinds[prefix : prefix + period])}


def windowed(model: schema.Model) -> list[str]:
    """`layer_types` of a model: which of its layers have a window."""
    return [FULL if model.slots[kind].window is None else SLIDING for kind in model.kinds]


def window(model: schema.Model) -> int | None:
    """The window of the layers that have one."""
    return next((model.slots[kind].window for kind in model.kinds if model.slots[kind].window), None)
