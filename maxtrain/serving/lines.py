"""Files of prompts and questions, lines of text or of JSON: read whole before any work, each mistake named by its line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from maxtrain.config.errors import Refused
from maxtrain.config.json_file import each_key_once
from maxtrain.config.paths import expand
from maxtrain.config.regular_file import read_bytes

MAX_BYTES = 2**30  # of a file


def read(path: str) -> list[str]:
    """The lines of a file, which end where a line break is and nowhere else.

    Raises:
        Refused: it is no regular file of at most `MAX_BYTES`, or cannot be read as UTF-8.
    """
    try:
        return read_bytes(expand(path, "the file"), MAX_BYTES).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise Refused(f"{path}: cannot be read: {error}") from error


def objects(path: str, allowed: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file of JSON lines, with the numbers of their lines; empty lines are left out.

    Raises:
        Refused: a line is no object, or has a key twice or one that is not allowed.
    """
    for number, line in enumerate(read(path), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line, object_pairs_hook=each_key_once, parse_constant=_no_number)
        except Refused as refusal:
            raise Refused(f"{path}:{number}: {refusal}") from None
        except (ValueError, RecursionError) as error:
            raise Refused(f"{path}:{number}: not JSON ({error})") from error
        if not isinstance(item, dict):
            raise Refused(f"{path}:{number}: write an object with one of the keys {', '.join(allowed)}, not {line:.80}")
        unknown = [key for key in item if key not in allowed]
        if unknown:
            raise Refused(f"{path}:{number}: unknown key {unknown[0]}; allowed are {', '.join(allowed)}")
        yield number, item


def _no_number(name: str) -> NoReturn:
    raise Refused(f"{name} is no number of JSON")
