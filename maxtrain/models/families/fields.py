"""Reading a Hugging Face config.json so that nothing in it is overlooked: what was not read, and is not known to be
without effect, is refused by name; what was read has the type it must have."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from maxtrain.config.errors import Refused
from maxtrain.config.keys import did_you_mean
from maxtrain.models.families.harmless import ALSO_CALLED, DROPOUT, FIXED, NEVER_MATTERS

LOG = logging.getLogger("maxtrain")
LARGEST = 2**31 - 1  # of a whole number; sizes are far below
MAX_LAYERS, MAX_EXPERTS = 1000, 4096
MAX_TOLD = 20  # fields in a message
WORDS: Mapping[type, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def proposal(names: Collection[str]) -> str:
    """The setting that reads a config.json as if it had no such fields."""
    return (
        "model.ignore_fields=["
        + ",".join(name if re.fullmatch(r"[\w.]*[a-zA-Z][\w.]*", name) else json.dumps(name) for name in names)
        + "]"
    )


class Fields:
    """The fields of a config, of which those that were asked for are remembered."""

    def __init__(self, values: Mapping[str, Any], place: str, within: str = "") -> None:
        """`place` is what messages call it, usually the path of the file; `within` is the section it is, ending in a dot."""
        self.values, self.place, self.within = values, place, within
        self._read: dict[str, Any] = {}  # what was taken for each field
        self._shapeless: dict[str, Any] = {}  # sections that are no mapping
        self._sections: dict[str, Fields] = {}

    def optional(self, name: str, kind: type, *, least: float | None = None, most: float | None = None) -> Any:
        """The value of a field; None where it is absent or null.

        Raises:
            Refused: it is not of the type `kind`, or not from `least` (0 for a whole number) to `most`.
        """
        value = self.values.get(name)
        self._read[name] = None if value is None else self._checked(name, value, kind, least, most)
        return self._read[name]

    def get(self, name: str, default: Any, *, least: float | None = None, most: float | None = None) -> Any:
        """The value of a field, of the type of `default`, which is taken where it is absent or null; `Refused` as in `optional`."""
        value = self.optional(name, type(default), least=least, most=most)
        self._read[name] = default if value is None else value
        return self._read[name]

    def nullable(self, name: str, default: Any) -> Any:
        """The value of a field for which null is a value, None; `default`, whose type it has, where it is absent."""
        value = self.optional(name, type(default))
        self._read[name] = value if name in self.values else default
        return self._read[name]

    def need(self, name: str, kind: type = int, *, least: float | None = None, most: float | None = None) -> Any:
        """The value of a field that must be there; `Refused` otherwise, and as in `optional`."""
        value = self.optional(name, kind, least=least, most=most)
        if value is None:
            near = did_you_mean(name, [key for key in self.values if key not in self._read])
            raise Refused(f"{self.place}: the field {name} is missing{near}")
        return value

    def listing(self, name: str, kind: type) -> list[Any] | None:
        """The values of a list, all of type `kind`; None where it is absent or null; `Refused` for anything else."""
        self._read[name] = value = self.values.get(name)
        if value is not None and not isinstance(value, list):
            raise Refused(f"{self.place}: {name} = {value!r:.200}: a list is expected")
        return None if value is None else [self._checked(name, item, kind, None, None) for item in value]

    def num_layers(self) -> int:
        """How many layers there are, which are written out one by one."""
        return self.need("num_hidden_layers", least=1, most=MAX_LAYERS)

    def section(self, name: str) -> Fields | None:
        """The fields of a nested mapping; None where it is absent, null or empty."""
        self._read[name] = value = self.values.get(name)
        if value is None or value == {}:
            return None
        if not isinstance(value, Mapping):
            self._shapeless[name] = value
            return None
        return self._sections.setdefault(name, Fields(value, f"{self.place}: {name}", f"{self.within}{name}."))

    def one_of(self, name: str, table: Mapping[str, Any], default: str | None = None) -> Any:
        """The entry of `table` that a field names; `Refused` for a name that is not in it."""
        value = self.need(name, str) if default is None else self.get(name, default)
        if value not in table:
            raise Refused(f"{self.place}: {name} = {value!r:.200} is not supported: allowed are {', '.join(sorted(table))}")
        return table[value]

    def _checked(self, name: str, value: Any, kind: type, least: float | None, most: float | None) -> Any:
        right = isinstance(value, int | float if kind is float else kind) and (kind is bool or not isinstance(value, bool))
        if not right or (kind is float and not abs(value) < 1e300) or (kind is int and abs(value) > LARGEST):
            raise Refused(f"{self.place}: {name} = {value!r:.200}: {WORDS[kind]} is expected")
        least = 0 if least is None and kind is int else least
        if (least is not None and value < least) or (most is not None and value > most):
            bounds = f"{'' if least is None else f'at least {least:g}'}{'' if most is None else f', at most {most:g}'}"
            raise Refused(f"{self.place}: {name} = {value!r:.200}: {WORDS[kind]} of {bounds} is expected")
        return kind(value)

    def finish(self, ignored: Collection[str] = (), fixed: Mapping[str, Any] | None = None, removed: Collection[str] = ()) -> None:
        """Refuse every field that was neither read nor is without effect: in `ignored`, or in `fixed` with that very value.

        The message proposes to ignore those that are unknown, and `removed`, which were taken out before.
        """
        harmless, fixed = frozenset(ignored) | NEVER_MATTERS, {**FIXED, **(fixed or {})}
        unknown = list(self._shapeless)
        wrong = [f"{self.place}: {name} = {value!r:.200}: a mapping is expected" for name, value in self._shapeless.items()]
        for fields, field, value in self._unread():
            outermost = fields is self
            if outermost and (field in harmless or value is None or (field in fixed and value == fixed[field])):
                continue
            if outermost and field in ALSO_CALLED and self._read.get(ALSO_CALLED[field]) == value:
                continue
            if outermost and field in DROPOUT and isinstance(value, int | float):
                if not value:
                    continue
                LOG.warning(f"{self.place}: {field} = {value!r:.200}: nothing is dropped out here, neither in training nor when generating")
            elif outermost and field in fixed:
                wrong.append(f"{fields.place}: {field:.100} = {value!r:.200}: only {fixed[field]!r} is supported")
            elif value is not None:
                unknown.append(fields.within + field)
                wrong.append(f"{fields.place}: {field:.100} = {value!r:.200}: this field is unknown, it may change what the model computes")
        if len(wrong) > MAX_TOLD:
            wrong[MAX_TOLD:] = [f"and {len(wrong) - MAX_TOLD:,} more"]
        if 0 < len(unknown) <= 10 * MAX_TOLD:
            they = "it does" if len(unknown) == 1 else "they do"
            wrong.append(f"if {they} not, read the file as if without: {proposal([*removed, *unknown])}")
        if wrong:
            raise Refused("\n".join(wrong))

    def _unread(self) -> Iterator[tuple[Fields, str, Any]]:
        """Section, name and value of every field that nobody asked for."""
        yield from ((self, name, value) for name, value in self.values.items() if name not in self._read)
        for section in self._sections.values():
            yield from section._unread()
