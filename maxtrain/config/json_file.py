"""JSON objects in files that others wrote: of bounded size and depth, UTF-8, each key once; anything else is refused."""

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from maxtrain.config.errors import Refused
from maxtrain.config.regular_file import read_bytes

MAX_BYTES = 64_000_000  # tokenizer.json of the largest vocabularies has 33 MB
MAX_DEPTH = 100
REMEDY = "download or export it again"
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # half a character, or one of those beyond 0xFFFF


def read_object(path: str | os.PathLike[str], limit: int = MAX_BYTES) -> dict[str, Any]:
    """The object in a file of at most `limit` bytes.

    Raises:
        Refused: it cannot be read, is no regular file, is too large, or `parse_object` refuses what is in it.
    """
    return parse_object(read_bytes(path, limit), os.fspath(path))


def parse_object(data: bytes, place: str) -> dict[str, Any]:
    """The object that JSON text describes; `place` is what messages call it.

    Raises:
        Refused: it is not UTF-8, not JSON, no object, nested deeper than `MAX_DEPTH`, or names a key twice.
    """
    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=each_key_once)
        if SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # raises for half a character
    except Refused as refusal:
        raise Refused(f"{place}: {refusal}") from None
    except (ValueError, RecursionError) as error:
        raise Refused(f"{place}: not JSON ({error}): {REMEDY}") from None
    if not isinstance(value, dict):
        raise Refused(f"{place}: an object is expected, not {type(value).__name__}")
    if _deeper(value, MAX_DEPTH):
        raise Refused(f"{place}: it is nested more than {MAX_DEPTH} deep")
    return value


def each_key_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs, for `json.loads(object_pairs_hook=)`; `Refused` for a key that is there twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise Refused(f"the key {twice!r:.100} is there twice: remove one of them")
    return found


def _deeper(value: Any, limit: int) -> bool:
    """Whether lists and mappings are nested more than `limit` deep."""
    level = [value]
    for _ in range(limit + 1):
        parts = (part for item in level for part in (item.values() if isinstance(item, dict) else item))
        level = [part for part in parts if isinstance(part, dict | list)]
        if not level:
            return False
    return True
