"""From a list of the layers' kinds, as config.json has it, to the shortest prefix and period that repeat to it, and back."""

from collections.abc import Mapping, Sequence
from typing import Any

from maxtrain.config import schema
from maxtrain.config.errors import Refused
from maxtrain.models.families.fields import Fields

SLIDING, FULL = "sliding_attention", "full_attention"


def layer_types(fields: Fields, period: int | None) -> list[str]:
    """The type of each layer; where the config lists none, every `period`-th layer sees everything, all do for None."""
    count = fields.num_layers()
    return listed(fields, [SLIDING if period is not None and (index + 1) % period else FULL for index in range(count)])


def listed(fields: Fields, default: Sequence[str]) -> list[str]:
    """The field `layer_types`, `default` where it is absent; `Refused` for another type or number of layers."""
    found = fields.listing("layer_types", str)
    types = list(default) if found is None else [FULL if kind == "attention" else kind for kind in found]  # an old name
    if len(types) != len(default) or not set(types) <= {SLIDING, FULL}:
        raise Refused(f"{fields.place}: layer_types = {types!r:.200}: {SLIDING} or {FULL} is expected for each of {len(default)} layers")
    return types


def period(fields: Fields, default: int) -> int:
    """Every how manieth layer sees everything, where the config lists no types."""
    return fields.get("sliding_window_pattern", fields.get("_sliding_window_pattern", default, least=1), least=1)


def grouped(kinds: Sequence[str], slots: Mapping[str, schema.Slot]) -> dict[str, Any]:
    """The keys of `schema.Model` for layers of these kinds."""
    border, borders = 0, [0]  # of every beginning of the reversed list, so of every end: its longest proper part at both its ends
    turned = kinds[::-1]
    for index in range(1, len(turned)):
        while border and turned[index] != turned[border]:
            border = borders[border - 1]
        border += turned[index] == turned[border]
        borders.append(border)
    shapes = [(len(kinds) - size, size - border) for size, border in enumerate(borders, 1)]  # the last `size` layers repeat
    prefix, length = min(shapes, key=lambda shape: (sum(shape), shape[1]))
    used = {kind: slots[kind] for kind in dict.fromkeys(kinds)}
    return {"slots": used, "prefix": tuple(kinds[:prefix]), "layer_pattern": tuple(kinds[prefix : prefix + length])}


def windowed(model: schema.Model) -> list[str]:
    """`layer_types` of a model: which of its layers have a window."""
    return [FULL if model.slots[kind].window is None else SLIDING for kind in model.kinds]


def window(model: schema.Model) -> int | None:
    """The window of the layers that have one."""
    return next((model.slots[kind].window for kind in model.kinds if model.slots[kind].window), None)
