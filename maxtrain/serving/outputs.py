"""What callers get: outputs with their samples, pieces of a stream, and scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from maxtrain.config.errors import Refused

Logprobs = dict[int, float]


@dataclass(frozen=True)
class Completion:
    """One sample. `logprobs` has for each token its id and the likeliest ones, with their log-probabilities; None if not asked for."""

    text: str
    token_ids: list[int]
    finish_reason: str
    """`stop`, `length` or `abort`."""
    stop: str | int | None
    """The text or token that ended it."""
    logprobs: list[Logprobs] | None
    times: list[float]
    """Seconds from the request to each token."""


@dataclass(frozen=True)
class Output:
    """What became of a prompt; `text` and `token_ids` are those of its first sample."""

    prompt: str | Sequence[int]
    prompt_token_ids: list[int]
    completions: list[Completion]
    prompt_logprobs: list[Logprobs | None] | None
    """For each token of the prompt, None for the first."""
    cached_tokens: int
    """Tokens of the prompt that were in the cache already."""
    error: str | None = None
    """Why the request was refused; the others went on."""

    @property
    def text(self) -> str:
        """Text of the first sample; raises `Refused` if the request was."""
        return self._first.text

    @property
    def token_ids(self) -> list[int]:
        """Tokens of the first sample; raises `Refused` if the request was."""
        return self._first.token_ids

    @property
    def _first(self) -> Completion:
        if self.error is not None:
            raise Refused(self.error)
        return self.completions[0]


@dataclass(frozen=True)
class Score:
    """Log-probability of a continuation: the sum, that of each token, and whether each is the likeliest."""

    logprob: float
    token_logprobs: list[float]
    is_greedy: bool
    error: str | None = None


@dataclass(frozen=True)
class Delta:
    """What is new of a streamed output."""

    text: str
    token_ids: list[int]
    finish_reason: str | None
