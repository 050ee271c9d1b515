"""From layered YAML and `section.key=value` to a validated `Config`, knowing where every value was set, and back to YAML."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from maxtrain.config import keys, layers
from maxtrain.config.errors import Refused
from maxtrain.config.layers import COMMAND_LINE, Entry, Origin
from maxtrain.config.paths import expand
from maxtrain.config.schema import Config

MAX_PROBLEMS = 20  # of a config that are explained


@dataclass(frozen=True)
class Loaded:
    """A config, and where each dotted key was set; keys that are absent have their default."""

    config: Config
    origins: dict[str, Origin]


def load(path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> Loaded:
    """Read a config file over its includes and under the command line.

    Args:
        path: The YAML file; None for the defaults alone.
        overrides: `section.key=value`, the value being YAML.

    Raises:
        Refused: with every problem on a line of its own, naming file, line, key, value and what is allowed.
    """
    tree = Entry({}, Origin(COMMAND_LINE, 0)) if path is None else layers.read_file(expand(path, "the config"))
    seen: set[str] = set()
    for word in overrides:
        key, layer = layers.override(word)
        if key in seen:
            raise Refused(f"{COMMAND_LINE}: {key} is set twice")
        seen.add(key)
        tree = layers.merge(tree, layer)
    origins: dict[str, Origin] = {}
    data = _plain(tree, keys.ROOT, "", origins)
    try:
        return Loaded(Config.model_validate(data), origins)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        lines = [line for details in problems[:MAX_PROBLEMS] for line in _explain(details, origins)]
        more = [f"... and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
        raise Refused("\n".join([*dict.fromkeys(lines), *more])) from None


def _plain(entry: Entry, field: FieldInfo | None, path: str, origins: dict[str, Origin]) -> Any:
    """The tree without its origins, which are noted by dotted key; a whole 1e6 becomes an int where only an int may stand."""
    value = entry.value
    if isinstance(value, dict):
        origins |= {keys.join(path, name): item.origin for name, item in value.items()}
        return {name: _plain(item, keys.below(field, name), keys.join(path, name), origins) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, None, path, {}) for item in value]
    whole = isinstance(value, float) and value.is_integer() and keys.accepts(field, int) and not keys.accepts(field, float)
    return int(value) if whole else value


def _explain(error: Mapping[str, Any], origins: Mapping[str, Origin]) -> Iterator[str]:
    """One line for each problem of a validation error."""
    path = unknown = ""
    loc = error["loc"]
    if loc and loc[-1] == "[key]" and keys.at(name := ".".join(map(str, loc[:-1]))) is not None:  # a mapping from numbers
        yield f"{_where(name, origins)}{name.rpartition('.')[0]}: the key {text(loc[-2])} is refused: write {_allowed_key(name)}"
        return
    for part in loc:
        unknown = keys.join(path, str(part))
        if keys.at(unknown) is None:
            break
        path = unknown
    field, kind = keys.at(path) or keys.ROOT, error["type"]
    about = f" ({' '.join(field.description.split())})" if field.description else ""
    if kind == "value_error":
        yield from (_clash(path, message, origins) for message in str(error["ctx"]["error"]).split("\n"))
    elif kind == "extra_forbidden" or loc[-1] == "[key]":
        yield f"{_where(unknown, origins)}unknown key {unknown}{keys.nearest(unknown)}"
    elif kind == "missing":
        yield f"{_where(path, origins)}{path} is missing: write {keys.allowed(field)}{_lost_default(path)}{about}"
    else:
        value = error["input"]
        hint = keys.did_you_mean(value, keys.choices(field)) if isinstance(value, str) else ""
        if keys.accepts(field, str) and isinstance(value, int | float):
            hint = f", in quotes: '{text(value)}'"
        most = error.get("ctx", {}).get("le") if kind == "less_than_equal" else None
        hint = f", at most {most:,}" if most in keys.UNSAID else hint
        yield f"{_where(path, origins)}{path}: {text(value)} is refused: write {keys.allowed(field)}{hint}{about}"


def _allowed_key(path: str) -> str:
    """What the names of a mapping are, of one of which `path` is the dotted key."""
    names = next(get_args(option.annotation)[0] for option in keys.options(keys.at(path.rpartition(".")[0]) or keys.ROOT))
    return keys.allowed(FieldInfo.from_annotation(names))


def _lost_default(path: str) -> str:
    """What explains a missing `data.sources.stdlib.kind`: setting a part of a mapping replaces its default."""
    mapping, _, name = path.rpartition(".")[0].rpartition(".")
    default = getattr(keys.at(mapping), "default", None)
    lost = isinstance(default, dict) and name in default
    return f"; the default of {mapping} is gone once a part of it is set" if lost else ""


def _where(path: str, origins: Mapping[str, Origin]) -> str:
    """`file:line: ` of a key, or of the innermost section around it that is set."""
    while path and path not in origins:
        path = path.rpartition(".")[0]
    return f"{origins[path]}: " if path else ""


def _clash(section: str, message: str, origins: Mapping[str, Origin]) -> str:
    """A message of the schema about keys that do not fit together, with the places where the keys it names are set."""
    words = re.findall(r"\w+(?:\.\w+)*", message)
    named = list(dict.fromkeys(key for word in words for key in (keys.join(section, word), word) if key in origins))
    also = ", ".join(f"{key}: {origins[key]}" for key in named[1:])
    return f"{_where(named[0] if named else section, origins)}{f'{section}: ' if section else ''}{message}{f' ({also})' if also else ''}"


class _Writer(yaml.SafeDumper):
    """Block mappings, lists in one line, and quotes around whatever YAML 1.1 or 1.2 would not read back as text."""


_Writer.add_implicit_resolver("tag:yaml.org,2002:float", layers.NUMBER, list("-+.0123456789"))
_Writer.add_representer(list, lambda writer, value: writer.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True))
_Writer.add_representer(
    str, lambda writer, value: writer.represent_scalar("tag:yaml.org,2002:str", value, style=None if value.isprintable() else '"')
)


def _yaml(value: Any, *, flow: bool = False) -> str:
    return yaml.dump(value, Dumper=_Writer, default_flow_style=flow, sort_keys=False, allow_unicode=True, width=2**31)


def text(value: Any) -> str:
    """A value in one line of YAML, cut off at 80 characters."""
    line = _yaml(value, flow=True).removesuffix("...\n").strip()
    return line if len(line) <= 80 else f"{line[:77]}..."


def dump(config: Config) -> str:
    """Every value of the config as YAML, which `load` reads back to an equal config."""
    return _yaml(config.model_dump(mode="json"))


def render(loaded: Loaded, diff: bool = False) -> str:
    """The config as YAML with `# file:line` or `# default` behind every value; with `diff` only what is not the default."""
    data = loaded.config.model_dump(mode="json", exclude_defaults=diff)
    if not data:
        return "# every value is the default\n"
    lines = _yaml(data).rstrip("\n").split("\n")
    width = min(80, max(map(len, lines)))
    for path, entry in _leaves(layers.read("\n".join(lines), "resolved"), ""):
        index = entry.origin.line - 1
        lines[index] = f"{lines[index]:<{width}}  # {loaded.origins.get(path, 'default')}"
    return "\n".join(lines) + "\n"


def _leaves(entry: Entry, path: str) -> Iterator[tuple[str, Entry]]:
    if not isinstance(entry.value, dict) or not entry.value:
        yield path, entry
        return
    for name, item in entry.value.items():
        yield from _leaves(item, keys.join(path, name))
