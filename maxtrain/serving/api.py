"""An engine for people: texts in, texts out, from any thread, waiting for all, token by token, or with asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import math
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.progress import Progress as Bar

from maxtrain.config import schema
from maxtrain.config.errors import Refused
from maxtrain.config.serving import SamplingParams
from maxtrain.data.tokenizer import Tokenizer
from maxtrain.parallel.sharding import Layout
from maxtrain.serving.engine import Engine
from maxtrain.serving.scheduler import Request

Prompt = str | Sequence[int]
Conversation = Sequence[Mapping[str, str]]
Params = SamplingParams | Sequence[SamplingParams] | None
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

    prompt: Prompt
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


class Driver:
    """The thread that steps an engine, there while there is work. Everything that touches the engine runs in it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._lock, self._inbox = threading.Lock(), list[Callable[[], None]]()
        self._thread: threading.Thread | None = None
        self._listeners: dict[Request, Callable[[Request | BaseException], None]] = {}

    def do(self, action: Callable[[], Any]) -> Any:
        """Run `action` between two steps; its result."""
        done: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def run() -> None:
            try:
                done.put((action(), None))
            except BaseException as error:
                done.put((None, error))

        with self._lock:
            self._inbox.append(run)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
                self._thread.start()
        result, error = done.get()
        if error is not None:
            raise error
        return result

    def listen(self, request: Request, listener: Callable[[Request | BaseException], None]) -> None:
        """Call `listener` in the engine's thread whenever the request has news, or with the error that ended all; to be called there."""
        self._listeners[request] = listener

    def abort(self, requests: Sequence[Request]) -> None:
        """End requests that have not ended."""

        def action() -> None:
            for request in requests:
                self.engine.abort(request)
                self._tell(request)

        self.do(action)

    def _tell(self, request: Request) -> None:
        listener = self._listeners.get(request)
        if listener is not None:
            if request.finish_reason is not None:
                del self._listeners[request]
            listener(request)

    def _run(self) -> None:
        while True:
            with self._lock:
                actions, self._inbox = self._inbox, []
                if not actions and not self.engine.busy:
                    self._thread = None
                    return
            for action in actions:
                action()
            try:
                for request in self.engine.step() if self.engine.busy else ():
                    self._tell(request)
            except BaseException as error:
                for request in list(self.engine.scheduler.requests()):
                    self.engine.abort(request)
                listeners, self._listeners = list(self._listeners.values()), {}
                for listener in listeners:
                    listener(error)


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
        self, prompts: Prompt | Sequence[Prompt], params: Params = None, *, priority: int = 0, progress: bool = False
    ) -> list[Output]:
        """Continue prompts, texts or token ids, in order; a prompt that is refused has an `error` and does not stop the others.

        Args:
            prompts: one or several.
            params: for all, or for each; `serve.sampling` if None.
            priority: lower goes first among all requests of the engine.
            progress: show a bar.
        """
        one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        return self._generate([prompts] if one else prompts, self._encode, params, priority, progress)

    def chat(self, messages: Conversation | Sequence[Conversation], params: Params = None, **options: Any) -> list[Output]:
        """Answer a conversation (a list of messages with role and content), or each of several; else as `generate`."""
        one = len(messages) > 0 and isinstance(messages[0], Mapping)
        return self._generate([messages] if one else messages, self._encode_chat, params, **options)

    def _generate(
        self, prompts: Sequence[Any], encode: Callable[[Any], list[int]], params: Params, priority: int = 0, progress: bool = False
    ) -> list[Output]:
        every = [params or self.config.serve.sampling] * len(prompts) if isinstance(params, SamplingParams | None) else params
        if len(every) != len(prompts):
            raise Refused(f"{len(every)} sampling parameters are given for {len(prompts)} prompts")
        tickets = []
        for prompt, wanted in zip(prompts, every, strict=True):
            ticket = Ticket(prompt)
            tickets.append(ticket)
            with ticket.refusing():
                ticket.ids = encode(prompt)
                for index in range(wanted.n):
                    seed = None if wanted.seed is None else (wanted.seed + index) % 2**32
                    ticket.wanted.append({"prompt": ticket.ids, "params": wanted.model_copy(update={"seed": seed}), "priority": priority})
        self._serve(tickets, progress)
        return [_output(ticket) for ticket in tickets]

    def stream(self, prompt: Prompt | Conversation, params: SamplingParams | None = None, *, priority: int = 0) -> Iterator[Delta]:
        """Continue a prompt or answer a conversation, piece by piece; a stream that is closed early ends the request.

        Raises:
            Refused: the request cannot be served.
        """
        news: queue.SimpleQueue[Any] = queue.SimpleQueue()
        request = self._start_stream(prompt, params, priority, news.put)
        try:
            while isinstance(item := news.get(), Delta):
                yield item
                if item.finish_reason is not None:
                    return
            raise item
        finally:
            self.driver.abort([request])

    async def astream(
        self, prompt: Prompt | Conversation, params: SamplingParams | None = None, *, priority: int = 0
    ) -> AsyncIterator[Delta]:
        """`stream` for asyncio."""
        loop, news = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def put(item: Any) -> None:
            loop.call_soon_threadsafe(news.put_nowait, item)

        request = await asyncio.to_thread(self._start_stream, prompt, params, priority, put)
        try:
            while isinstance(item := await news.get(), Delta):
                yield item
                if item.finish_reason is not None:
                    return
            raise item
        finally:
            await asyncio.to_thread(self.driver.abort, [request])

    def _start_stream(self, prompt: Any, params: SamplingParams | None, priority: int, put: Callable[[Any], None]) -> Request:
        params = params or self.config.serve.sampling
        if params.n > 1:
            raise Refused(f"n={params.n}: a stream is of one sample")
        talk = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
        ids, sent = self._encode_chat(prompt) if talk else self._encode(prompt), [0, 0]

        def listener(news: Request | BaseException) -> None:
            if isinstance(news, BaseException):
                put(news)
                return
            output, stream = news.tokens[len(news.prompt) :], news.data.stream
            text = "" if stream is None else stream.text if news.finish_reason else stream.text[: stream.safe]
            put(Delta(text[sent[0] :], output[sent[1] :], news.finish_reason))
            sent[:] = max(len(text), sent[0]), len(output)

        def add() -> Request:
            request = self.engine.add(ids, params, priority=priority)
            self.driver.listen(request, listener)
            return request

        return self.driver.do(add)

    # --------------------------------------------------------------------------------------------------- scoring

    def score(
        self, prompts: Sequence[Prompt], continuations: Sequence[Prompt], *, priority: int = 0, progress: bool = False
    ) -> list[Score]:
        """Log-probability of each continuation after its prompt, which may be empty; both texts, or both token ids.

        A pair longer than the context keeps its end. Prompts that begin alike share what is computed for them.
        """
        tickets = []
        for prompt, continuation in zip(prompts, continuations, strict=True):
            ticket = Ticket(prompt)
            tickets.append(ticket)
            with ticket.refusing():
                context, rest = self._pair(prompt, continuation)
                tokens = [*context, *rest][-self.engine.max_length :]
                start = len(tokens) - len(rest)
                if not rest or start < 1:
                    raise Refused(f"a continuation of {len(rest)} tokens: from 1 to {self.engine.max_length - 1} can be scored")
                # the last token is only a target, and needs no place in the cache
                wanted = {"prompt": tokens[:-1], "params": SCORING, "priority": priority, "targets": tokens, "score_from": start}
                ticket.wanted.append(wanted)
        self._serve(tickets, progress)
        return [_score(ticket) for ticket in tickets]

    def _pair(self, prompt: Prompt, continuation: Prompt) -> tuple[list[int], list[int]]:
        """Token ids of both, see `Tokenizer.encode_pair`; an empty prompt is what a document begins with."""
        if isinstance(prompt, str) != isinstance(continuation, str):
            raise Refused("prompt and continuation must both be texts, or both be token ids")
        if isinstance(prompt, str) and isinstance(continuation, str):
            return self._known_tokenizer.encode_pair(prompt, continuation)
        return list(prompt) or self._known_tokenizer.encode_prompt(""), list(continuation)  # type: ignore[arg-type]

    # -------------------------------------------------------------------------------------------------- requests

    @property
    def _known_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise Refused("the model has no tokenizer: give it token ids")
        return self.tokenizer

    def _encode(self, prompt: Prompt) -> list[int]:
        return self._known_tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else list(prompt)

    def _encode_chat(self, messages: Conversation) -> list[int]:
        return self._known_tokenizer.encode_chat(messages)

    def _serve(self, tickets: Sequence[Ticket], progress: bool) -> None:
        """Queue the requests of all tickets at once, and wait until they are done."""

        def add() -> None:
            for ticket in tickets:
                with ticket.refusing():
                    for wanted in ticket.wanted:
                        request = self.engine.add(**wanted)
                        ticket.requests.append(request)
                        self.driver.listen(request, ticket.listen)

        self.driver.do(add)
        try:
            with Bar(disable=not progress, transient=True) as bar:
                for ticket in bar.track(tickets, description="requests"):
                    ticket.wait()
        except BaseException:
            self.driver.abort([request for ticket in tickets for request in ticket.requests])
            raise


SCORING = SamplingParams(max_tokens=1, temperature=0.0)


class Ticket:
    """A prompt with its requests, or with the reason why it has none."""

    def __init__(self, prompt: Any) -> None:
        self.prompt = prompt
        self.error: str | None = None
        self.ids: list[int] = []
        self.wanted: list[dict[str, Any]] = []
        self.requests: list[Request] = []
        self._done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """What is refused within belongs to this ticket alone."""
        try:
            yield
        except Refused as error:
            self.error = str(error)

    def listen(self, news: Request | BaseException) -> None:
        """Note that a request has ended."""
        if isinstance(news, BaseException):
            self._done.put(news)
        elif news.finish_reason is not None:
            self._done.put(None)

    def wait(self) -> None:
        """Until all its requests have ended; raises what ended the engine."""
        for _ in self.requests:
            error = self._done.get()
            if error is not None:
                raise error


def _output(ticket: Ticket) -> Output:
    if ticket.error is not None:
        return Output(ticket.prompt, ticket.ids, [], None, 0, ticket.error)
    first, prompt_logprobs = ticket.requests[0], None
    if first.params.prompt_logprobs is not None:
        found = first.data.scored
        prompt_logprobs = [{ids: found[at][0]} | found[at][2] if at in found else None for at, ids in enumerate(ticket.ids)]
    return Output(ticket.prompt, ticket.ids, [_completion(request) for request in ticket.requests], prompt_logprobs, first.cached)


def _completion(request: Request) -> Completion:
    progress, tokens, logprobs = request.data, request.tokens[len(request.prompt) :], None
    if request.params.logprobs is not None:
        logprobs = [{token: own} | likeliest for token, (own, likeliest) in zip(tokens, progress.logprobs, strict=True)]
    text = "" if progress.stream is None else progress.stream.text
    return Completion(text, tokens, request.finish_reason or "", progress.stop, logprobs, [at - progress.added for at in progress.times])


def _score(ticket: Ticket) -> Score:
    if ticket.error is not None:
        return Score(math.nan, [], False, ticket.error)
    scored = [value for _, value in sorted(ticket.requests[0].data.scored.items())]
    values = [logprob for logprob, _, _ in scored]
    return Score(sum(values), values, all(greedy for _, greedy, _ in scored))
