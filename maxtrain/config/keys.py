"""The schema as a table of dotted keys: what each accepts, in words, and which key an unknown one was meant to be.

`--help`, error messages and the golden list of keys all read this table, so that none of them can fall behind the schema.
"""

from __future__ import annotations

import difflib
import functools
import itertools
from collections.abc import Iterable, Iterator
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from maxtrain.config.schema import Config, Section
from maxtrain.config.section import MAX_FLOAT, MAX_INT

ROOT = FieldInfo.from_annotation(Config)
ANY_NAME = "<name>"
WORDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
UNSAID = (MAX_INT, MAX_FLOAT, -MAX_FLOAT, 2**63)  # bounds that nobody meets but by mistake
MAX_WORD = 64  # characters of what is compared with the names of keys and files
MAX_CANDIDATES = 1000


def options(field: FieldInfo) -> list[FieldInfo]:
    """The alternatives of a union, one field each; the field itself where there is no choice."""
    if get_origin(field.annotation) in (Union, UnionType):
        return [option for member in get_args(field.annotation) for option in options(FieldInfo.from_annotation(member))]
    return [field]


def children(field: FieldInfo | None) -> dict[str, FieldInfo]:
    """The keys below a section or mapping; a mapping with free names has the one key `<name>`."""
    found: dict[str, FieldInfo] = {}
    for option in options(field) if field else ():
        kind: Any = option.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            found |= kind.model_fields
        elif get_origin(kind) is dict:
            names, value = get_args(kind)
            listed = get_args(names) if get_origin(names) is Literal else (ANY_NAME,)
            found |= {name: FieldInfo.from_annotation(value) for name in listed}
    return found


def below(field: FieldInfo | None, name: str) -> FieldInfo | None:
    """The field of one key below `field`; None when it has no such key."""
    found = children(field)
    return found.get(name) or found.get(ANY_NAME)


def at(path: str) -> FieldInfo | None:
    """The field of a dotted key; None when there is no such key."""
    field: FieldInfo | None = ROOT
    for name in path.split(".") if path else ():
        field = below(field, name)
    return field


def join(parent: str, name: str) -> str:
    """The dotted key of `name` below `parent`, which is empty for the whole config."""
    return f"{parent}.{name}" if parent else name


def walk(field: FieldInfo = ROOT, path: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted key with its field, sections before what is in them."""
    for name, child in children(field).items():
        yield join(path, name), child
        yield from walk(child, join(path, name))


@functools.cache
def _paths() -> tuple[str, ...]:
    return tuple(path for path, _ in walk())


def accepts(field: FieldInfo | None, kind: type) -> bool:
    """Whether a value of exactly this type may stand there."""
    return field is not None and any(option.annotation is kind for option in options(field))


def allowed(field: FieldInfo) -> str:
    """What may be written there, in words: `a whole number >= 1 or null`."""
    words: list[str] = []
    for option in options(field):
        origin, args = get_origin(option.annotation), get_args(option.annotation)
        if origin is Literal:
            words += map(str, args)
        elif origin is tuple:
            words.append(f"a list of {allowed(FieldInfo.from_annotation(args[0]))}")
        elif origin is dict:
            words.append(f"a mapping of {', '.join(children(option))} to {allowed(FieldInfo.from_annotation(args[1]))}")
        elif keys := children(option):
            words.append(f"a section ({', '.join(keys)})")
        else:
            bounds = [(sign, getattr(bound, name)) for bound in option.metadata for name, sign in BOUNDS.items() if hasattr(bound, name)]
            limits = [f"{sign} {bound}" for sign, bound in bounds if bound not in UNSAID]
            words.append(" ".join([WORDS[option.annotation], " and ".join(limits)]).rstrip())
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def choices(field: FieldInfo) -> list[str]:
    """The words that may be written there, or in the list that may."""
    found: list[str] = []
    for option in options(field):
        origin, args = get_origin(option.annotation), get_args(option.annotation)
        found += map(str, args) if origin is Literal else choices(FieldInfo.from_annotation(args[0])) if origin is tuple else ()
    return found


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """`; did you mean X?`, or nothing when no candidate is near."""
    short = (candidate for candidate in itertools.islice(candidates, MAX_CANDIDATES) if len(candidate) <= MAX_WORD)
    near = difflib.get_close_matches(word, list(short), n=1) if len(word) <= MAX_WORD else []
    return f"; did you mean {near[0]}?" if near else ""


def nearest(path: str) -> str:
    """What an unknown key was meant to be, as the end of a sentence: same-named and similar keys, neighbours before others."""
    parent, _, name = path.rpartition(".")
    if len(name) > MAX_WORD:
        return ""
    siblings = [join(parent, sibling) for sibling in children(at(parent)) if sibling != ANY_NAME]

    def score(key: str) -> float:
        return difflib.SequenceMatcher(None, name, key.rpartition(".")[2]).ratio() + 0.1 * (key in siblings)

    scores = {key: score(key) for key in (*siblings, *_paths())}
    best = max(scores.values())
    if best < 0.6:
        return f"; {parent or 'a config'} has {', '.join(sibling.rpartition('.')[2] for sibling in siblings)}"
    return f"; did you mean {' or '.join([key for key in scores if scores[key] == best][:3])}?"
