"""Text from tokens as they come, and the texts that end it."""

from collections.abc import Sequence
from typing import Protocol

CONTEXT = 8  # tokens of the prompt that the first ones of a stream are decoded with


class Decoding(Protocol):
    """What is needed of a tokenizer."""

    def decode(self, ids: Sequence[int], /) -> str:
        """The text of ids."""


class TextStream:
    """The text of a growing list of tokens.

    A token's text depends on those before it and may be half a character: a token is decoded together with the last ones that
    made whole text, and its text waits until it is whole.

    Args:
        tokenizer: decodes.
        stops: texts that end the stream.
        include_stop: keep the text that ended it.
        prompt: tokens before the stream, because some tokenizers decode the first word of a text without its blank.
    """

    def __init__(self, tokenizer: Decoding, stops: Sequence[str] = (), include_stop: bool = False, prompt: Sequence[int] = ()) -> None:
        self._tokenizer, self._stops, self._include_stop = tokenizer, tuple(stops), include_stop
        self._tokens = [int(token) for token in prompt[-CONTEXT:]]
        if self._tokens and tokenizer.decode(self._tokens).endswith("\ufffd"):  # half a character, which the stream may complete
            self._tokens = []
        self._start, self._read = 0, len(self._tokens)
        self.text = ""
        self.stop: str | None = None
        """The text that ended it."""

    def push(self, token: int, may_stop: bool = True) -> None:
        """Add a token."""
        self._tokens.append(token)
        known = len(self.text)
        self._advance(whole=False)
        if may_stop:
            self._look_for_stop(known)

    def _advance(self, whole: bool) -> None:
        before = self._tokenizer.decode(self._tokens[self._start : self._read])
        after = self._tokenizer.decode(self._tokens[self._start :])
        if len(after) > len(before) and (whole or not after.endswith("\ufffd")):
            self.text += after[len(before) :]
            self._start, self._read = self._read, len(self._tokens)

    def _look_for_stop(self, known: int) -> None:
        """Find the first stop that ends in what came after the first `known` characters."""
        found = [(at, stop) for stop in self._stops if (at := self.text.find(stop, max(0, known - len(stop) + 1))) >= 0]
        if found:
            at, self.stop = min(found)
            self.text = self.text[: at + len(self.stop) * self._include_stop]

    def finish(self) -> None:
        """No token follows: what waits comes out."""
        if self.stop is None:
            self._advance(whole=True)

    @property
    def safe(self) -> int:
        """How many characters of `text` cannot be taken back by a stop that is not complete yet."""
        if self.stop is not None:
            return len(self.text)
        longest = max((size for stop in self._stops for size in range(1, len(stop)) if self.text.endswith(stop[:size])), default=0)
        return len(self.text) - longest
