"""The files below a folder of text that a pattern names, and what is left out there.

Links to files and folders are followed. What begins with a dot is left out unless that part of the pattern begins with one
too, as in a shell: tools leave copies there (`.git`, `.ipynb_checkpoints`, `.DS_Store`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from maxtrain.config.errors import Refused


class Corpus(NamedTuple):
    """Files as (name, path), sorted by name, which is the path below the root; and hidden names that are left out."""

    files: list[tuple[str, Path]]
    hidden: list[str]


def find(root: Path, pattern: str) -> Corpus:
    """The files below the folder `root` that `pattern` names; `**` stands for any number of folders.

    Raises:
        OSError: a folder cannot be read.
        Refused: the pattern is none.
    """
    parts = _parts(pattern)
    descend = any(part.startswith(".") for part in parts)
    found: list[tuple[str, Path]] = []
    hidden: list[str] = []
    for names, path in _walk(root, (), (os.path.realpath(root),), descend, hidden):
        if _matches(names, parts):
            found.append(("/".join(names), path))
    taken = tuple(name for name, _ in found)
    return Corpus(sorted(found), sorted(name for name in hidden if not any(f"{other}/".startswith(f"{name}/") for other in taken)))


def takes(pattern: str, name: str) -> bool:
    """Whether the pattern names a file of this name, its path below the root; `Refused` if it is no pattern."""
    return _matches(name.split("/"), _parts(pattern))


def _parts(pattern: str) -> list[str]:
    parts = pattern.split("/")
    if parts[0] == "":
        raise Refused(f"pattern {pattern!r}: write it relative to the source's path")
    if {"", ".", ".."} & set(parts) or any("**" in part and part != "**" for part in parts):
        raise Refused(f"pattern {pattern!r}: its parts are names with *, ? and [], or ** for any number of folders")
    return [part for index, part in enumerate(parts) if part != "**" or parts[index - 1 : index] != ["**"]]


def _walk(
    folder: Path, names: tuple[str, ...], above: tuple[str, ...], descend: bool, hidden: list[str]
) -> Iterator[tuple[tuple[str, ...], Path]]:
    """The files below `folder` with their names' parts; `above` are the real paths of the folders that lead there."""
    with os.scandir(folder) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    for entry in listed:
        own = (*names, entry.name)
        if entry.name.startswith("."):
            hidden.append("/".join(own))
            if not descend:
                continue
        if not entry.is_dir():
            yield own, Path(entry.path)
        elif (real := os.path.realpath(entry.path)) not in above:  # else a link back to a folder that is being read
            yield from _walk(Path(entry.path), own, (*above, real), descend, hidden)


def _matches(names: Sequence[str], parts: Sequence[str]) -> bool:
    if not parts or not names:
        return not names and all(part == "**" for part in parts)
    if parts[0] == "**":
        return _matches(names, parts[1:]) or (not names[0].startswith(".") and _matches(names[1:], parts))
    shown = parts[0].startswith(".") or not names[0].startswith(".")
    return shown and fnmatchcase(names[0], parts[0]) and _matches(names[1:], parts[1:])
