"""An engine for people: texts in, texts out, from any thread, waiting for all, token by token, or with asyncio."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from typing import Any

from rich.progress import Progress as Bar

from maxtrain.config import schema
from maxtrain.config.errors import Refused
from maxtrain.config.serving import SamplingParams
from maxtrain.data.tokenizer import Tokenizer
from maxtrain.parallel.sharding import Layout
from maxtrain.serving import prompts as forms
from maxtrain.serving.driver import Driver
from maxtrain.serving.engine import Engine
from maxtrain.serving.outputs import Completion, Delta, Logprobs, Output, Score
from maxtrain.serving.prompts import Conversation, Prompt
from maxtrain.serving.scheduler import Request
from maxtrain.serving.tickets import Ticket

__all__ = ["LLM", "Completion", "Conversation", "Delta", "Driver", "Logprobs", "Output", "Params", "Prompt", "Score", "Ticket"]

Params = SamplingParams | Sequence[SamplingParams] | None
SCORING = SamplingParams(max_tokens=1, temperature=0.0)


class LLM:
    """A model that generates, chats and scores.

    Args:
        model: gives the decoder with its arrays; called while the programs are compiled.
        config: the resolved config it was built from; `serve` is the engine's section.
        layout: the mesh the arrays lie on.
        tokenizer: None for prompts of token ids alone.
    """

    def __init__(self, model: Callable[[], Any], config: schema.Config, layout: Layout, tokenizer: Tokenizer | None = None) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.engine = Engine(model, config, layout, tokenizer)
        self.driver = Driver(self.engine)

    def load(self, model: Any, version: int | None = None) -> None:
        """Go on with other weights, see `Engine.load`."""
        self.driver.do(lambda: self.engine.load(model, version))

    # ------------------------------------------------------------------------------------------------ generating

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params = None,
        *,
        priority: int = 0,
        progress: bool = False,
        special: bool = False,
    ) -> list[Output]:
        """Continue prompts, texts or token ids, in order; a prompt that is refused has an `error` and does not stop the others.

        Args:
            prompts: one or several.
            params: for all, or for each; `serve.sampling` if None.
            priority: lower goes first among all requests of the engine.
            progress: show a bar.
            special: whether special tokens that are spelled out in a text count as such; if not, they are text like any other.
        """
        return self._generate(forms.each(prompts), partial(self._encode, special=special), params, priority, progress)

    def chat(
        self, messages: Conversation | Sequence[Conversation], params: Params = None, *, special: bool = False, **options: Any
    ) -> list[Output]:
        """Answer a conversation (a list of messages with role and content), or each of several; else as `generate`."""
        return self._generate(forms.each_conversation(messages), partial(self._encode_chat, special=special), params, **options)

    def _generate(
        self, prompts: Sequence[Any], encode: Callable[[Any], list[int]], params: Params, priority: int = 0, progress: bool = False
    ) -> list[Output]:
        if isinstance(params, SamplingParams | None):
            every = [params or self.config.serve.sampling] * len(prompts)
        elif forms.is_list(params):
            every = list(params)
        else:
            raise Refused(f"params is one SamplingParams, or a list with one for each prompt, not {params!r:.80}")
        if len(every) != len(prompts):
            raise Refused(f"{len(every)} sampling parameters are given for {len(prompts)} prompts")
        tickets = []
        for prompt, wanted in zip(prompts, every, strict=True):
            ticket = Ticket(prompt)
            tickets.append(ticket)
            with ticket.refusing():
                ticket.ids = encode(prompt)
                self.engine.check(ticket.ids, wanted)
                for index in range(wanted.n):
                    seed = None if wanted.seed is None else (wanted.seed + index) % 2**32
                    ticket.wanted.append({"prompt": ticket.ids, "params": wanted.model_copy(update={"seed": seed}), "priority": priority})
        self._serve(tickets, progress)
        return [ticket.output() for ticket in tickets]

    def stream(
        self, prompt: Prompt | Conversation, params: SamplingParams | None = None, *, priority: int = 0, special: bool = False
    ) -> Iterator[Delta]:
        """Continue a prompt or answer a conversation, piece by piece, else as `generate`; a stream closed early ends the request.

        Raises:
            Refused: the request cannot be served.
        """
        news: queue.SimpleQueue[Any] = queue.SimpleQueue()
        requests: list[Request] = []
        self._check_may_wait()
        try:
            self.driver.post(self._streaming(prompt, params, priority, special, news.put, requests), news.put)
            while isinstance(item := news.get(), Delta):
                yield item
                if item.finish_reason is not None:
                    return
            raise item
        finally:
            self.driver.abort(requests)

    async def astream(
        self, prompt: Prompt | Conversation, params: SamplingParams | None = None, *, priority: int = 0, special: bool = False
    ) -> AsyncIterator[Delta]:
        """`stream` for asyncio."""
        loop, news = asyncio.get_running_loop(), asyncio.Queue[Any]()
        requests: list[Request] = []

        def put(item: Any) -> None:
            loop.call_soon_threadsafe(news.put_nowait, item)

        self._check_may_wait()
        try:
            add = await asyncio.to_thread(self._streaming, prompt, params, priority, special, put, requests)
            self.driver.post(add, put)
            while isinstance(item := await news.get(), Delta):
                yield item
                if item.finish_reason is not None:
                    return
            raise item
        finally:
            self.driver.abort(requests)

    def _streaming(
        self,
        prompt: Any,
        params: SamplingParams | None,
        priority: int,
        special: bool,
        put: Callable[[Any], None],
        requests: list[Request],
    ) -> Callable[[], None]:
        """What takes up a streamed request in the engine's thread, and adds it to `requests`; `put` is given all that is new of it."""
        params = self.config.serve.sampling if params is None else params
        encode, sent = self._encode_chat if forms.is_conversation(prompt) else self._encode, [0, 0]
        ids = encode(prompt, special)
        if isinstance(params, SamplingParams) and params.n > 1:
            raise Refused(f"n={params.n}: a stream is of one sample")
        self.engine.check(ids, params)

        def listener(news: Request | BaseException) -> None:
            error = news if isinstance(news, BaseException) else news.error
            if error is not None or isinstance(news, BaseException):
                put(error)
                return
            output, stream = news.tokens[len(news.prompt) :], news.data.stream
            text = "" if stream is None else stream.text if news.finish_reason else stream.text[: stream.safe]
            put(Delta(text[sent[0] :], output[sent[1] :], news.finish_reason))
            sent[:] = max(len(text), sent[0]), len(output)

        def add() -> None:
            request = self.engine.prepare(ids, params, priority=priority)
            requests.append(self.engine.queue(request))
            self.driver.listen(request, listener)

        return add

    # --------------------------------------------------------------------------------------------------- scoring

    def score(
        self, prompts: Sequence[Prompt], continuations: Sequence[Prompt], *, priority: int = 0, progress: bool = False
    ) -> list[Score]:
        """Log-probability of each continuation after its prompt, which may be empty; both texts, or both token ids.

        A pair longer than the context keeps its end. Prompts that begin alike share what is computed for them.
        """
        first, second = forms.each(prompts), forms.each(continuations)
        if len(first) != len(second):
            raise Refused(f"{len(second)} continuations are given for {len(first)} prompts")
        tickets = []
        for prompt, continuation in zip(first, second, strict=True):
            ticket = Ticket(prompt)
            tickets.append(ticket)
            with ticket.refusing():
                context, rest = self.pair(prompt, continuation)
                tokens = [*context, *rest][-self.engine.max_length :]
                start = len(tokens) - len(rest)
                if not rest or start < 1:
                    raise Refused(f"a continuation of {len(rest)} tokens: from 1 to {self.engine.max_length - 1} can be scored")
                # the last token is only a target, and needs no place in the cache
                wanted = {"prompt": tokens[:-1], "params": SCORING, "priority": priority, "targets": tokens, "score_from": start}
                ticket.wanted.append(wanted)
        self._serve(tickets, progress)
        return [ticket.score() for ticket in tickets]

    def pair(self, prompt: Prompt, continuation: Prompt) -> tuple[list[int], list[int]]:
        """Token ids of a prompt, never empty, and of what is to be scored after it, see `Tokenizer.encode_pair`."""
        if isinstance(prompt, str) != isinstance(continuation, str):
            raise Refused("prompt and continuation must both be texts, or both be token ids")
        if isinstance(prompt, str) and isinstance(continuation, str):
            return self._known_tokenizer.encode_pair(forms.text(prompt), forms.text(continuation))
        context, rest = forms.token_ids(prompt), forms.token_ids(continuation)
        return context or self._known_tokenizer.encode_prompt(""), rest

    # -------------------------------------------------------------------------------------------------- requests

    @property
    def _known_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise Refused("the model has no tokenizer: give it token ids")
        return self.tokenizer

    def _encode(self, prompt: Any, special: bool = False) -> list[int]:
        if not isinstance(prompt, str):
            return forms.token_ids(prompt)
        return self._known_tokenizer.encode_prompt(forms.text(prompt), special=special)

    def _encode_chat(self, messages: Any, special: bool = False) -> list[int]:
        return self._known_tokenizer.encode_chat(messages, special=special)

    def _check_may_wait(self) -> None:
        if self.driver.is_mine:
            raise Refused("whoever is called by the engine cannot wait for it: do this in another thread")

    def _serve(self, tickets: Sequence[Ticket], progress: bool) -> None:
        """Queue the requests of all tickets that can be served at once, and wait until they are done."""
        every: list[Request] = []

        def add() -> None:
            for ticket in tickets:
                with ticket.refusing():
                    ticket.requests = [self.engine.prepare(**wanted) for wanted in ticket.wanted] if ticket.error is None else []
            for ticket in tickets:
                for request in ticket.requests:
                    every.append(self.engine.queue(request))
                    self.driver.listen(request, ticket.listen)

        self._check_may_wait()
        try:
            self.driver.do(add)
            with Bar(disable=not progress, transient=True) as bar:
                for ticket in bar.track(tickets, description="requests"):
                    ticket.wait()
        except BaseException:
            self.driver.abort(every)
            raise
