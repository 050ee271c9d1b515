"""The engine: requests in, tokens out, a step at a time, on the weights it was handed last.

The host plans with integers (`scheduler`), the device runs one of a few programs compiled beforehand (`programs`, `step`). A
step is started before the one before it is read. One thread drives an engine; `api` shares it between several.
"""

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from maxtrain.config import schema
from maxtrain.config.errors import Refused
from maxtrain.config.serving import SamplingParams
from maxtrain.data.tokenizer import Tokenizer
from maxtrain.parallel.sharding import Layout
from maxtrain.serving.batch import arrange, is_marked
from maxtrain.serving.pages import PagePool, root_hash
from maxtrain.serving.programs import Programs
from maxtrain.serving.sampling import PROMPT, STOP
from maxtrain.serving.scheduler import Chunk, Limits, Request, Scheduler
from maxtrain.serving.text import TextStream

NGRAMS = (4, 3, 2)  # tokens at the end of a request that are looked up in it, to guess what follows


@dataclass
class Progress:
    """What the engine knows of a request beside its tokens."""

    seed: int
    ends: frozenset[int]
    """Tokens that end the output."""
    banned: Sequence[tuple[int, ...]] = ()
    """Tokens that are not generated in this order."""
    targets: Sequence[int] = ()
    """The prompt, and perhaps a token after it, whose log-probabilities may be asked for."""
    score_from: int | None = None
    """The first of `targets` whose log-probability is asked for, if any is."""
    stream: TextStream | None = None
    logprobs: list[tuple[float, dict[int, float]]] = field(default_factory=list)
    """Of each new token: its log-probability, and those of the likeliest tokens if they are asked for."""
    scored: dict[int, tuple[float, bool, dict[int, float]]] = field(default_factory=dict)
    """By place in the prompt: log-probability of the token there, whether it is the likeliest one, and the likeliest."""
    added: float = field(default_factory=time.perf_counter)
    times: list[float] = field(default_factory=list)
    """When each new token was read, as `added` by `time.perf_counter`."""
    stop: str | int | None = None
    """The text or token that ended the output."""
    guesses: Sequence[int] = ()
    """Of multi-token prediction, at what follows the last token."""
    marks: Any = None
    """What the device's rows of the slot were made for."""


@dataclass
class Stats:
    """Sums over the steps since the engine was made."""

    steps: int = 0
    rows: int = 0
    """Tokens computed in rows, guessed ones included."""
    prefilled: int = 0
    """Tokens computed in blocks."""
    generated: int = 0
    guessed: int = 0
    accepted: int = 0
    """Of the guessed tokens."""
    relayouts: int = 0
    """Copies of the weights in another layout."""
    waste: float = 0.0
    """Of `Scheduler.waste`."""


@dataclass(frozen=True)
class Flight:
    """A step under way: its chunks, where the outputs of each begin, and the arrays to come."""

    chunks: Sequence[Chunk]
    places: Sequence[int]
    num_rows: int
    outputs: Any


class Engine:
    """Continuous batching on a decoder.

    Args:
        model: gives the decoder with its arrays; called while the programs are compiled.
        config: the resolved config it was built from.
        layout: the mesh the arrays lie on.
        tokenizer: for end tokens, stop texts and bad words; None serves ids alone.

    Raises:
        Refused: `serve` contradicts the model, or the cache does not fit.
    """

    def __init__(self, model: Callable[[], Any], config: schema.Config, layout: Layout, tokenizer: Tokenizer | None = None) -> None:
        self.serve, self.tokenizer, self.vocab_size = config.serve, tokenizer, config.model.vocab_size
        self.valid = min(self.vocab_size, self.vocab_size if tokenizer is None else tokenizer.vocab_size)
        self.programs = Programs(config, layout, self.valid)
        self.max_length, self.version, self.stats = self.programs.max_length, 0, Stats()
        self.scheduler = Scheduler(
            PagePool(self.programs.num_pages, self.serve.page_size),
            Limits(self.programs.max_rows, self.serve.num_blocks, self.serve.block, self.serve.max_requests),
            prefix_cache=self.serve.prefix_cache,
            exact=self.serve.deterministic,
            window=_common_window(config.model),
            draft=self._draft if self.serve.speculate else None,
            ahead=max(0, self.programs.num_guesses - 1),
        )
        self._ids, self._arrivals = itertools.count(), itertools.count()
        self._seeds, self._flights = np.random.default_rng(self.serve.seed), deque[Flight]()
        self._news: list[Request] = []  # what `step` is to return
        self.failure: BaseException | None = None
        with self.programs.compiling():
            self.model = self._lay_out(model())
        self.state: Any = self.programs.state()

    def _lay_out(self, model: Any) -> Any:
        self.stats.relayouts += self.programs.on_one_cpu
        return self.programs.lay_out(model)

    def load(self, model: Any, version: int | None = None) -> None:
        """Go on with other weights. Running requests compute their tokens again; nothing that the cache holds is found again.

        Args:
            model: a decoder of the same shapes; its arrays are not copied, but on one CPU, where they are laid out anew.
            version: of the weights; the next number if None.

        Raises:
            Refused: the model is another one; nothing has changed then.
        """
        model = self._lay_out(model)
        try:
            while self._flights:
                self._read()
        except BaseException as error:
            self._begin_anew(error)
        self.model = model
        self.version = self.version + 1 if version is None else version
        self.scheduler.pool.forget_all()
        for request in list(self.scheduler.running):
            self.scheduler.preempt(request)
        for request in self.scheduler.waiting:
            request.root, request.names = root_hash(self.version), []

    # ---------------------------------------------------------------------------------------------- requests

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Raises `Refused` for a prompt that is empty, too long or out of the vocabulary, and for parameters that cannot be followed."""
        if not isinstance(params, SamplingParams):
            raise Refused(f"what a request asks for is a SamplingParams, not {params!r:.80}")
        if not len(prompt):
            raise Refused("the prompt is empty: there is no token to go on from")
        wrong = [token for token in prompt if not 0 <= token < self.vocab_size]
        if wrong:
            raise Refused(f"the prompt holds the token {wrong[0]}; the vocabulary ends at {self.vocab_size - 1}")
        if len(prompt) + (params.max_tokens or 1) > self.max_length:
            new = "one new token" if params.max_tokens is None else f"max_tokens={params.max_tokens}"
            raise Refused(f"a prompt of {len(prompt)} tokens and {new} exceed the context of {self.max_length} tokens")
        for name in ("logit_bias", "allowed_token_ids", "stop_token_ids"):
            wrong = [token for token in getattr(params, name) or () if not (isinstance(token, int) and 0 <= token < self.valid)]
            if wrong:
                raise Refused(f"{name} names the token {wrong[0]!r}; the vocabulary ends at {self.valid - 1}")
        if params.allowed_token_ids and params.min_tokens and self._ends(params) >= set(params.allowed_token_ids):
            raise Refused(f"all allowed_token_ids end the output, which min_tokens={params.min_tokens} rules out at first")
        if self.tokenizer is None and (params.stop or params.bad_words):
            raise Refused("stop and bad_words are texts, but the model has no tokenizer: use stop_token_ids")

    def _ends(self, params: SamplingParams) -> frozenset[int]:
        own = frozenset() if self.tokenizer is None or params.ignore_eos else self.tokenizer.end_ids
        special = {} if self.tokenizer is None else self.tokenizer.boundaries.special  # a token that has no text cannot stop by it
        return own | frozenset(params.stop_token_ids) | {special[text] for text in params.stop if text in special}

    def prepare(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        id: str | None = None,
        targets: Sequence[int] | None = None,
        score_from: int | None = None,
    ) -> Request:
        """One sample of a prompt, ready for `queue`; nothing of it is in the engine yet.

        Args:
            prompt: token ids.
            params: what is asked for; several samples (`n`) are several requests.
            priority: lower goes first.
            id: its name; a number if None.
            targets: the prompt, with one token more if that is to be scored too; the prompt if None.
            score_from: the first of `targets` whose log-probability is wanted, beside those that `params` ask for.

        Raises:
            Refused: see `check`.
        """
        self.check(prompt, params)
        if type(priority) is not int:
            raise Refused(f"priority={priority!r:.80}: write an integer, lower goes first")
        if params.prompt_logprobs is not None:
            score_from = 1
        banned = self._banned(params.bad_words)
        progress = Progress(
            seed=int(self._seeds.integers(2**32)) if params.seed is None else params.seed,
            ends=self._ends(params),
            banned=banned,
            targets=tuple(map(int, prompt if targets is None else targets)),
            score_from=score_from,
            stream=TextStream(self.tokenizer, params.stop, params.include_stop, prompt) if self.tokenizer else None,
        )
        return Request(
            id=str(next(self._ids)) if id is None else id,
            prompt=tuple(map(int, prompt)),
            params=params,
            max_tokens=params.max_tokens or self.max_length - len(prompt),
            root=root_hash(self.version),
            priority=priority,
            arrival=next(self._arrivals),
            reuse=None if score_from is None else score_from - 1,
            scored=score_from is not None,
            synchronous=any(len(word) > 1 for word in banned) or (self.serve.speculate > 0 and not is_marked(params)),
            data=progress,
        )

    def _banned(self, words: Sequence[str]) -> list[tuple[int, ...]]:
        """The tokens of words that are never to come, at the beginning of a text and after a blank."""
        if self.tokenizer is None or not words:
            return []
        found = [tuple(map(int, ids)) for ids in self.tokenizer.encode_batch([prefix + word for word in words for prefix in ("", " ")])]
        if () in found:
            raise Refused(f"bad_words: {words[found.index(()) // 2]!r} has no tokens, so it cannot be kept from coming: remove it")
        special = self.tokenizer.boundaries.special
        return sorted({*found, *((special[word],) for word in words if word in special)})

    def queue(self, request: Request) -> Request:
        """Take up a request of `prepare`."""
        self.scheduler.add(request)
        return request

    def add(self, prompt: Sequence[int], params: SamplingParams, **options: Any) -> Request:
        """`prepare` and `queue` in one."""
        return self.queue(self.prepare(prompt, params, **options))

    def abort(self, request: Request) -> None:
        """End a request now, if it has not ended; its pages are free at once."""
        if request.finish_reason is None:
            self._finish(request, "abort")

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._news or self._flights or self.scheduler.running or self.scheduler.waiting)

    # -------------------------------------------------------------------------------------------- a step out

    def step(self) -> list[Request]:
        """Start the next step and read the one before; returns the requests of which something new is known.

        A step that fails ends the requests that it computed, with what it raised as their `error`, and raises it; the next call
        returns them. The engine goes on with a cache that is empty, unless that fails too (`failure`).
        """
        if not self._news:
            try:
                plan = self.scheduler.schedule()
                if plan:
                    self._start(plan)
                if self._flights and (not plan or not self.serve.overlap or len(self._flights) > 1):
                    self._read()
            except BaseException as error:
                self._begin_anew(error)
                raise
        news, self._news = self._news, []
        return news

    def _start(self, plan: Sequence[Chunk]) -> None:
        for chunk in plan:
            self._mark(chunk.request)
        shape, inputs, places = arrange(plan, self.programs)
        self.state, outputs = self.programs.step(shape, self.model, self.state, inputs)
        self._flights.append(Flight(plan, places, shape.num_rows, outputs))
        self.stats.steps += 1
        self.stats.rows += sum(1 + len(chunk.drafts) for chunk in plan if chunk.in_rows)
        self.stats.prefilled += sum(chunk.count for chunk in plan if not chunk.in_rows)
        self.stats.waste += self.scheduler.waste()

    def _begin_anew(self, error: BaseException) -> None:
        """After a step that failed, whose state was given away: end its requests, and make a state in which nothing is cached."""
        try:
            self._flights.clear()
            for request in list(self.scheduler.running or self.scheduler.waiting):  # if none runs, those that wait are at fault
                self._fail(request, error)
                self._news.append(request)
            for request in self.scheduler.waiting:
                request.pending = 0  # of steps that are lost: these tokens are drawn again
            self.scheduler.pool.forget_all()
            self.state = None  # freed before the next one is made
            self.state = self.programs.state()
        except BaseException as failure:
            self.failure = failure
            raise

    def _mark(self, request: Request) -> None:
        """Give the device the rows of a slot whose logits depend on earlier tokens or a bias, if it does not have them."""
        params, progress = request.params, request.data
        if not is_marked(params) or request.slot is None:
            return
        banned = {word[-1] for word in progress.banned if len(word) == 1 or tuple(request.tokens[1 - len(word) :]) == word[:-1]}
        marks = (request.slot, request.preemptions, banned)
        if marks == progress.marks:
            return
        progress.marks = marks
        counts = np.bincount(request.tokens[len(request.prompt) :], minlength=self.vocab_size).astype(np.int32)
        counts[list(set(request.prompt))] |= PROMPT
        counts[[token for token in progress.ends if token < self.vocab_size]] |= STOP
        bias = np.zeros(self.vocab_size, np.float32)
        if params.allowed_token_ids is not None:
            bias[:] = -np.inf
            bias[list(params.allowed_token_ids)] = 0
        for token, value in (params.logit_bias or {}).items():
            bias[token] += value
        bias[list(banned)] = -np.inf
        self.state = self.programs.mark(self.state, request.slot, counts, bias)

    def _draft(self, request: Request) -> Sequence[int]:
        """Guesses of multi-token prediction; without it, what followed the last time the request's last few tokens stood in it."""
        if self.programs.num_guesses:
            return request.data.guesses
        tokens = np.asarray(request.tokens, np.int32).tobytes()
        for length in NGRAMS:
            tail = tokens[-4 * length :]
            at = tokens.rfind(tail, 0, len(tokens) - 4)
            while at > 0 and at % 4:  # bytes of two tokens
                at = tokens.rfind(tail, 0, at + len(tail) - 1)
            if at >= 0 and at % 4 == 0 and len(request.tokens) > length:
                start = at // 4 + length
                return request.tokens[start : start + self.serve.speculate]
        return ()

    # --------------------------------------------------------------------------------------------- a step in

    def _read(self) -> None:
        """Wait for the oldest step under way and take its tokens; its requests are news."""
        flight = self._flights.popleft()
        drawn, scored, guesses = jax.device_get(flight.outputs)
        now = time.perf_counter()
        for chunk, place in zip(flight.chunks, flight.places, strict=True):
            request = chunk.request
            request.pending -= chunk.samples
            if request.finish_reason is not None:
                continue
            if not chunk.in_rows and request.data.score_from is not None:
                self._take_scores(chunk, place, scored)
            if chunk.samples:
                output = place if chunk.in_rows else flight.num_rows + place + (chunk.count - 1) // self.serve.block
                self._news.append(request)
                self._take_tokens(chunk, output, drawn, guesses, now)

    def _take_scores(self, chunk: Chunk, block: int, scored: Any) -> None:
        request, progress = chunk.request, chunk.request.data
        tops = request.params.prompt_logprobs or 0
        for place in range(max(chunk.start + 1, progress.score_from), min(chunk.start + chunk.count + 1, len(progress.targets))):
            at = block * self.serve.block + place - 1 - chunk.start
            likeliest = dict(zip(scored.top_ids[at, :tops].tolist(), scored.top_logprobs[at, :tops].tolist(), strict=True))
            progress.scored[place] = float(scored.logprob[at]), bool(scored.greedy[at]), likeliest

    def _take_tokens(self, chunk: Chunk, output: int, drawn: Any, guesses: np.ndarray, now: float) -> None:
        """The token of a chunk, and those after its drafts as long as these are what was drawn."""
        request, progress, tops = chunk.request, chunk.request.data, chunk.request.params.logprobs or 0
        self.stats.guessed += len(chunk.drafts)
        for offset in range(1 + len(chunk.drafts)):
            token = int(drawn.token[output + offset])
            request.tokens.append(token)
            likeliest = dict(
                zip(drawn.top_ids[output + offset, :tops].tolist(), drawn.top_logprobs[output + offset, :tops].tolist(), strict=True)
            )
            progress.logprobs.append((float(drawn.logprob[output + offset]), likeliest))
            progress.times.append(now)
            self.stats.generated += 1
            self._look_for_end(request, token)
            progress.guesses = guesses[output + offset].tolist()
            if request.finish_reason is not None or offset == len(chunk.drafts) or chunk.drafts[offset] != token:
                return
            self.stats.accepted += 1
            if request.slot is not None:
                request.computed += 1

    def _look_for_end(self, request: Request, token: int) -> None:
        progress, count = request.data, len(request.tokens) - len(request.prompt)
        may_stop = count >= request.params.min_tokens
        if token in progress.ends and may_stop:
            progress.stop = token
            self._finish(request, "stop")
            return
        if progress.stream is not None:
            try:
                progress.stream.push(token, may_stop)
            except Exception as error:  # of the model's tokenizer
                self._fail(request, Refused(f"the tokenizer cannot decode the output: {type(error).__name__}: {error}"))
                return
            if progress.stream.stop is not None:
                progress.stop = progress.stream.stop
                self._finish(request, "stop")
                return
        if count >= request.max_tokens:
            self._finish(request, "length")

    def _finish(self, request: Request, reason: str) -> None:
        request.finish_reason = reason
        self.scheduler.remove(request)
        if request.data.stream is not None:
            with contextlib.suppress(Exception):  # a tokenizer that cannot decode half a character leaves it out
                request.data.stream.finish()

    def _fail(self, request: Request, error: BaseException) -> None:
        request.finish_reason, request.error = "error", error
        self.scheduler.remove(request)


def _common_window(model: schema.Model) -> int | None:
    """How far back any layer looks; None if one sees everything."""
    windows = [model.slots[kind].window for kind in (*model.prefix, *model.layer_pattern, *model.remainder)]
    return None if None in windows else max(window for window in windows if window is not None)
