"""YAML files into one tree of values that remember their file and line: safe, YAML 1.2 scalars, layered by `include:`.

The rule of layers: mappings are merged key by key, everything else is replaced; `!replace` before a mapping replaces it as a
whole. Includes come first in their order, then the file itself, then the command line.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from maxtrain.config import keys
from maxtrain.config.errors import Refused
from maxtrain.config.paths import expand
from maxtrain.config.regular_file import read_bytes

COMMAND_LINE = "command line"
WORDS: dict[str, Any] = (
    dict.fromkeys(("", "~", "null", "Null", "NULL"))
    | dict.fromkeys(("true", "True", "TRUE"), True)
    | dict.fromkeys(("false", "False", "FALSE"), False)
)
NUMBER = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9](_?[0-9])*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
MAX_DEPTH = 30
MAX_BYTES = 2**20  # of one file
MAX_FILES = 200  # that one config is read from; a file that is included twice counts twice


@dataclass(frozen=True)
class Origin:
    """Where a value was set."""

    file: str
    line: int

    def __str__(self) -> str:
        return self.file if self.file == COMMAND_LINE else f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Entry:
    """A scalar, a list of entries or a mapping of names to entries, and where it was set."""

    value: Any
    origin: Origin
    replace: bool = False
    """Do not merge with the mapping of a lower layer."""


class _Reader(yaml.SafeLoader):
    """Composes nodes; refuses what would run code, hide where a value comes from or blow up: tags and aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        tag = getattr(event, "tag", None)
        if isinstance(event, yaml.AliasEvent):
            problem = f"the alias *{event.anchor} is not supported (nor are merge keys): share values with include:"
        elif tag == "!replace" and not isinstance(event, yaml.MappingStartEvent):
            problem = "!replace must stand before a mapping: anything else is replaced anyway"
        elif tag not in (None, "!replace"):
            problem = f"the tag {tag} is not supported: only !replace is"
        elif len(self.states) > MAX_DEPTH:
            problem = f"nested more than {MAX_DEPTH} levels deep"
        else:
            return super().compose_node(parent, index)
        raise yaml.composer.ComposerError(None, None, problem, event.start_mark)


def scalar(text: str) -> Any:
    """The value of an unquoted scalar: null, true, false, an int, a float, or the text itself (`no`, `1:30`, `010`, dates)."""
    if text in WORDS:
        return WORDS[text]
    if not NUMBER.fullmatch(text):
        return text
    digits = text.replace("_", "")
    return int(digits) if digits.lstrip("+-").isdigit() and len(digits) < 100 else float(digits)


def _entry(node: yaml.Node, file: str) -> Entry:
    origin = Origin(file, node.start_mark.line + 1)
    if isinstance(node, yaml.ScalarNode):
        return Entry(scalar(node.value) if node.style is None else node.value, origin)
    if isinstance(node, yaml.SequenceNode):
        return Entry([_entry(item, file) for item in node.value], origin)
    found: dict[str, Entry] = {}
    for key, item in node.value:
        here, name = Origin(file, key.start_mark.line + 1), key.value
        if not isinstance(key, yaml.ScalarNode):
            raise Refused(f"{here}: a key must be a word, not a list or mapping")
        if "." in name:
            raise Refused(f"{here}: the key {name} has a dot: here a section's keys are nested below it, dots are for the command line")
        if name in found:
            raise Refused(f"{here}: the key {name} is set twice, first in line {found[name].origin.line}")
        found[name] = dataclasses.replace(_entry(item, file), origin=here)
    return Entry(found, origin, replace=node.tag == "!replace")


def read(text: str, file: str) -> Entry:
    """The tree of one YAML document.

    Raises:
        Refused: it is not YAML, or not the part of it that a config needs.
    """
    try:
        node = _Reader(text).get_single_node()
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise Refused(f"{Origin(file, line)}: the character #x{error.character:04x} is not allowed in YAML") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        tab = " (indent with spaces, YAML allows no tabs)" if "\\t" in str(error.problem) else ""
        problem = ", ".join(filter(None, (error.context, error.problem)))
        raise Refused(f"{Origin(file, mark.line + 1 if mark else 1)}: {problem}{tab}") from None
    return _entry(node, file) if node else Entry(None, Origin(file, 1))


def merge(low: Entry, high: Entry) -> Entry:
    """The higher layer over the lower one. Associative: what replaces one layer also replaces the layers below that."""
    if not isinstance(low.value, dict) or not isinstance(high.value, dict) or high.replace:
        return dataclasses.replace(high, replace=True)
    both = {name: merge(low.value[name], high.value[name]) for name in low.value.keys() & high.value.keys()}
    return Entry({**low.value, **high.value, **both}, high.origin, replace=low.replace)


def _text(path: str, cited: str) -> str:
    try:
        data = read_bytes(path, MAX_BYTES)
    except Refused as refusal:
        folder, name = os.path.split(path)
        missing = "\0" not in path and not os.path.lexists(path) and os.path.isdir(folder or ".")
        raise Refused(f"{cited}{refusal}{keys.did_you_mean(name, os.listdir(folder or '.')) if missing else ''}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(f"{Origin(path, data[: error.start].count(10) + 1)}: not UTF-8 text") from None


def read_file(path: str) -> Entry:
    """The tree of a file over those of its includes, which are relative to the file that names them.

    Raises:
        Refused: a file is missing, unreadable, not a YAML mapping or includes itself, or there are more than `MAX_FILES`.
    """
    return _read_file(path, (), "", [])


def _read_file(path: str, above: Sequence[str], cited: str, taken: list[str]) -> Entry:
    """`read_file` below the files `above`, outermost first; `cited` is the `file:line: ` of the include, `taken` all files read so far."""
    if os.path.realpath(path) in map(os.path.realpath, above):
        raise Refused(f"{cited}the files include each other in a circle: {' -> '.join([*above, path])}")
    taken.append(path)
    if len(taken) > MAX_FILES:
        raise Refused(f"{cited}more than {MAX_FILES} files are included: do files include others twice?")
    tree = read(_text(path, cited), path)
    if tree.value is None:
        raise Refused(f"{tree.origin}: the file is empty: write sections such as `train:` with keys below them")
    if not isinstance(tree.value, dict):
        raise Refused(f"{tree.origin}: a config is a mapping of sections such as `train:` with keys below them, nothing else")
    include = tree.value.pop("include", None)
    result = Entry({}, tree.origin)
    for item in (include.value if isinstance(include.value, list) else [include]) if include else ():
        if not isinstance(item.value, str):
            raise Refused(f"{item.origin}: include must be a file name or a list of file names")
        target = os.path.join(os.path.dirname(path), expand(item.value, f"{item.origin}: include"))
        result = merge(result, _read_file(os.path.normpath(target), (*above, path), f"{item.origin}: include: ", taken))
    return merge(result, tree)


def override(word: str) -> tuple[str, Entry]:
    """The dotted key of one `section.key=value`, and the layer that sets it.

    The value is YAML, except that for a text key it is taken as it stands unless it begins with a quote or is null.
    """
    key, equals, text = word.partition("=")
    if not key or not equals:
        raise Refused(f"{COMMAND_LINE}: {word!r} sets nothing: write section.key=value")
    try:
        as_it_stands = keys.accepts(keys.at(key), str) and text[:1] not in ("'", '"') and scalar(text) is not None
        entry = Entry(text, Origin(COMMAND_LINE, 0)) if as_it_stands else read(text, COMMAND_LINE)
    except Refused as refusal:
        raise Refused(f"{refusal} (in {word})") from None
    for name in reversed(key.split(".")):
        entry = Entry({name: entry}, Origin(COMMAND_LINE, 0))
    return key, entry
