"""A tokenizer.json as the tokenizers library has it, with what that library leaves to its callers: errors in words, and bounds."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, normalizers, processors
from tokenizers import Tokenizer as Backend

from maxtrain.config.errors import Refused

MAX_BYTES = 256_000_000  # of a tokenizer.json; the largest published has 33 MB
MAX_GROWTH = 256  # characters that normalisers may make of one
PROBE = "a B1.\n\té日本🙂 \u0301x"  # letters of several scripts, a digit, blanks, a mark that combines


@contextlib.contextmanager
def in_words(place: object) -> Iterator[None]:
    """Whatever the library raises, a panic of its Rust code too, as `Refused`."""
    try:
        yield
    except Refused:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise Refused(f"{place}: its tokenizer.json does not work ({error}): download or export it again") from None


def open_backend(text: str, place: object) -> Backend:
    """The tokenizer that the text of a tokenizer.json describes, with special tokens as text, nothing cut off or filled up.

    Raises:
        Refused: it is no tokenizer, cannot encode text, draws lots, or blows text up.
    """
    try:
        backend = Backend.from_str(text)
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise Refused(f"{place}: not a tokenizer.json ({error})") from None
    if getattr(backend.model, "dropout", None):
        raise Refused(f"{place}: model.dropout = {backend.model.dropout} gives other tokens at each call: set it to null")
    growth = _growth(_parts(backend.normalizer))
    if growth > MAX_GROWTH:
        raise Refused(f"{place}: its normalizer makes up to {growth:.3g} characters of one, more than {MAX_GROWTH}: correct it")
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    with in_words(place):
        largest = max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        for sample in (PROBE, "a"):
            backend.encode(sample)
            largest = max(largest, *backend.encode(sample, add_special_tokens=False).ids, -1)
    if not 0 <= largest < 2**31 - 1:
        raise Refused(f"{place}: its vocabulary {'is empty' if largest < 0 else f'has the id {largest}, which is too large'}")
    return backend


def _parts(normalizer: Any) -> list[Mapping[str, Any]]:
    """The single normalisers of a sequence of sequences, as JSON describes them."""
    found: list[Mapping[str, Any]] = []
    todo = [] if normalizer is None else [json.loads(normalizer.__getstate__())]
    while todo:
        part = todo.pop(0)
        todo = [*part["normalizers"], *todo] if part.get("type") == "Sequence" else todo
        found += [part] if part.get("type") != "Sequence" else []
    return found


def _growth(parts: Sequence[Mapping[str, Any]]) -> float:
    """A bound of the characters that replacing normalisers make of one."""
    growth = 1.0
    for part in parts:
        if part.get("type") == "Replace":
            pattern, content = part["pattern"].get("String"), len(part["content"])
            growth *= max(1.0, content / len(pattern)) if pattern else 1.0 + content  # an expression may match nothing, everywhere
        elif part.get("type") == "Prepend":
            growth *= 1.0 + len(part["prepend"]) / len(PROBE)  # once for a text
    return growth


def added_by_itself(backend: Backend) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids that the post-processor puts before and behind a text."""
    for sample in ("a", PROBE):
        found = backend.encode(sample)
        text = [place for place, special in enumerate(found.special_tokens_mask) if not special]
        if text:
            return tuple(found.ids[: text[0]]), tuple(found.ids[text[-1] + 1 :])
    return (), ()


def surround(backend: Backend, begin: Sequence[int], behind: Sequence[int] = ()) -> None:
    """Make the post-processor put the ids `begin` before a text and `behind` behind it."""
    texts = {index: backend.id_to_token(index) or "" for index in (*begin, *behind)}
    # a template cannot spell every name
    names = {index: text if re.fullmatch(r"[^\s:$]+", text) else f"token{index}" for index, text in texts.items()}
    single = [*(names[index] for index in begin), "$A", *(names[index] for index in behind)]
    second = [*(f"{names[index]}:1" for index in begin), "$B:1", *(f"{names[index]}:1" for index in behind)]
    tokens = [{"id": names[index], "ids": [index], "tokens": [text]} for index, text in texts.items()]
    pair = " ".join([*single, *second])
    backend.post_processor = processors.TemplateProcessing(single=" ".join(single), pair=pair, special_tokens=tokens)


def special_tokens(backend: Backend) -> dict[str, int]:
    """Id of each special token by its text."""
    return {token.content: index for index, token in backend.get_added_tokens_decoder().items() if token.special}


def mark_special(backend: Backend, texts: Sequence[str]) -> None:
    """Make tokens of the vocabulary special that are not yet, as transformers does with those that a config names."""
    known = special_tokens(backend)
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in texts if text not in known])


def with_marks(backend: Backend, marks: Mapping[str, str]) -> Backend:
    """`backend` for text in which marks stand for the characters (character -> mark) that look-alikes of special tokens begin with.

    Special tokens are found before text is normalised, and only then do the marks become what they stand for: so it stays text.
    """
    values = json.loads(backend.to_str())
    for token in values["added_tokens"]:
        token["normalized"] = token["normalized"] and not token["special"]
    marked = Backend.from_str(json.dumps(values))
    back = [normalizers.Replace(mark, character) for character, mark in marks.items()]
    marked.normalizer = normalizers.Sequence([*back, *([backend.normalizer] if backend.normalizer is not None else [])])
    marked.encode_special_tokens = False
    return marked
