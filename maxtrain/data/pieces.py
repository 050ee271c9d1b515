"""A long text tokenised a piece at a time, cut where that changes no token.

A tokenizer of the `tokenizers` library splits a text into words and makes tokens of each word by itself: between two words a text
can be cut. Within a word (SentencePiece's models take a whole text for one) it can be cut between two characters that stand side by
side in no token of the vocabulary. Whether the rest gives the same tokens by itself is tried at every cut.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

SIZE = 2**19  # characters of a piece
AHEAD = 2048  # characters behind a cut that must give the same tokens with and without what stands before it
TRIES = 32  # cuts that are tried before more of the text is read
META = "▁"  # SentencePiece's blank


class Cutter:
    """Tokenises pieces of a text as the whole text would be; `text` is the tokenizer.json."""

    def __init__(self, text: str) -> None:
        description = json.loads(text)
        self._first, self._later = _backend(description), _backend(_without_prefix(description))
        self._pairs, self._spelt = _pairs(description), _spelt(description)

    def encode(self, chunks: Iterable[str], grown: Callable[[int], None], size: int | None = None) -> Iterator[np.ndarray]:
        """Token ids of the text that the chunks make together, in parts [num_tokens] int32.

        Args:
            chunks: The text in order; where it is cut there does not matter.
            grown: Called with the number of characters that are held when no cut is found in so many, so that more are read.
            size: Characters of a piece; `SIZE` when None.
        """
        size = size or SIZE
        backend, wanted = self._first, size
        held: list[str] = []
        length = 0
        for chunk in chunks:
            held.append(chunk)
            length += len(chunk)
            while length >= wanted + AHEAD:
                text = "".join(held)
                encoding = backend.encode(text[: wanted + AHEAD], add_special_tokens=False)
                index, cut = self._cut(text[: wanted + AHEAD], encoding)
                held, length = [text[cut:]], length - cut
                if cut:
                    yield np.array(encoding.ids[:index], np.int32)
                    backend, wanted = self._later, size
                else:
                    wanted *= 2
                    grown(wanted)
        yield np.array(backend.encode("".join(held), add_special_tokens=False).ids, np.int32)

    def _cut(self, text: str, encoding: Encoding) -> tuple[int, int]:
        """Index of a token before which the text can be cut, and of the character there; zeros if none of those tried is one."""
        tried, ids, words, offsets = 0, encoding.ids, encoding.word_ids, encoding.offsets
        for index in range(len(ids) - 1, 0, -1):
            cut = offsets[index][0]
            if cut > len(text) - AHEAD or not 0 < cut == offsets[index - 1][1]:
                continue
            if not (text[cut - 1].isascii() and text[cut].isascii()):  # what a normalisation may join
                continue
            if words[index] == words[index - 1] and self._may_join(text[cut - 1], text[cut]):
                continue
            if self._later.encode(text[cut:], add_special_tokens=False).ids == ids[index:]:
                return index, cut
            tried += 1
            if tried == TRIES:
                break
        return 0, 0

    def _may_join(self, left: str, right: str) -> bool:
        """Whether a token may hold both characters, which stand side by side."""
        spelt = self._spelt.get(left, left) + self._spelt.get(right, right)
        return self._pairs is None or bool({spelt, left + right} & self._pairs)


def _backend(description: dict[str, Any]) -> Backend:
    backend = Backend.from_str(json.dumps(description | {"post_processor": None}))  # which would move the offsets of words
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return backend


def _without_prefix(description: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer for what is not the beginning of a text: it adds no blank in front."""
    return description | {part: _later(description.get(part)) for part in ("normalizer", "pre_tokenizer")}


def _later(part: dict[str, Any] | None) -> dict[str, Any] | None:
    if part is None or part["type"] == "Prepend":
        return None
    for name in ("normalizers", "pretokenizers"):
        if name in part:
            return part | {name: [later for later in map(_later, part[name]) if later is not None]}
    if part["type"] == "Metaspace":
        return part | {"prepend_scheme": "never"}
    return part | {"add_prefix_space": False} if "add_prefix_space" in part else part


def _pairs(description: dict[str, Any]) -> set[str] | None:
    """Pairs of characters that stand side by side in some token, as the vocabulary spells them; None for a model of whole words."""
    if description["model"].get("type") not in ("BPE", "Unigram"):
        return None
    vocab = description["model"]["vocab"]
    tokens = vocab if isinstance(vocab, dict) else (token for token, _ in vocab)
    return {token[i : i + 2] for token in tokens for i in range(len(token) - 1)}


def _spelt(description: dict[str, Any]) -> dict[str, str]:
    """How the vocabulary spells ASCII characters, where it is not as they are."""
    words = description["pre_tokenizer"] or {}
    if "ByteLevel" in {part.get("type") for part in words.get("pretokenizers", [words])}:
        return {chr(code): chr(0x100 + code) for code in range(33)} | {
            "\x7f": "\u0121"
        }  # GPT-2's characters for bytes that cannot be printed
    return {" ": META}
