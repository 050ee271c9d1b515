"""The place where a prompt waits for its requests, and what they come to."""

from __future__ import annotations

import contextlib
import math
import queue
from collections.abc import Iterator
from typing import Any

from maxtrain.config.errors import Refused
from maxtrain.serving.outputs import Completion, Output, Score
from maxtrain.serving.scheduler import Request


class Ticket:
    """A prompt with its requests, or with the reason why it has none."""

    def __init__(self, prompt: Any) -> None:
        self.prompt = prompt
        self.error: str | None = None
        self.ids: list[int] = []
        self.wanted: list[dict[str, Any]] = []
        """Arguments of `Engine.prepare` for each sample."""
        self.requests: list[Request] = []
        self._ended: queue.SimpleQueue[Request | BaseException] = queue.SimpleQueue()

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """What goes wrong within belongs to this ticket alone."""
        try:
            yield
        except Refused as error:
            self.error = str(error)
        except Exception as error:  # a tokenizer or a template that fails is the model's: whatever it raises, the others go on
            self.error = f"the prompt cannot be read: {type(error).__name__}: {error}"

    def listen(self, news: Request | BaseException) -> None:
        """Note that a request has ended, or the engine has."""
        if isinstance(news, BaseException) or news.finish_reason is not None:
            self._ended.put(news)

    def wait(self) -> None:
        """Until all its requests have ended; raises what ended the engine, or the step that computed one of them."""
        for _ in self.requests:
            news = self._ended.get()
            error = news if isinstance(news, BaseException) else news.error
            if isinstance(error, Refused) and error is not news:
                self.error = str(error)
            elif error is not None:
                raise error

    def output(self) -> Output:
        """All samples of the prompt."""
        if self.error is not None:
            return Output(self.prompt, self.ids, [], None, 0, self.error)
        first, prompt_logprobs = self.requests[0], None
        if first.params.prompt_logprobs is not None:
            found = first.data.scored
            prompt_logprobs = [{ids: found[at][0]} | found[at][2] if at in found else None for at, ids in enumerate(self.ids)]
        return Output(self.prompt, self.ids, [_completion(request) for request in self.requests], prompt_logprobs, first.cached)

    def score(self) -> Score:
        """Of the targets of its one request."""
        if self.error is not None:
            return Score(math.nan, [], False, self.error)
        scored = [value for _, value in sorted(self.requests[0].data.scored.items())]
        values = [logprob for logprob, _, _ in scored]
        return Score(sum(values), values, all(greedy for _, greedy, _ in scored))


def _completion(request: Request) -> Completion:
    progress, tokens, logprobs = request.data, request.tokens[len(request.prompt) :], None
    if request.params.logprobs is not None:
        logprobs = [{token: own} | likeliest for token, (own, likeliest) in zip(tokens, progress.logprobs, strict=True)]
    text = "" if progress.stream is None else progress.stream.text
    return Completion(text, tokens, request.finish_reason or "", progress.stop, logprobs, [at - progress.added for at in progress.times])
