"""Which tokens of which requests the next step computes. There are no phases: every request's cache catches up with its tokens.

A step has places for single tokens (rows) and for blocks of neighbours. Running requests are served first, by priority and
arrival, then waiting ones. When no page is free, the least urgent running request gives its pages back and computes them again
later. Everything here is integers; nothing knows a device.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from maxtrain.serving.pages import PagePool, next_hash


@dataclass(eq=False)
class Request:
    """A prompt and what has become of it."""

    id: str
    prompt: tuple[int, ...]
    params: Any
    max_tokens: int
    """Most tokens of the output."""
    root: bytes
    """Where its chain of page names starts, see `pages.root_hash`."""
    priority: int = 0
    """Lower goes first."""
    arrival: int = 0
    reuse: int | None = None
    """How many tokens of the prompt may come from the prefix cache; None for all but the last."""
    scored: bool = False
    """Log-probabilities of the prompt are wanted: it is computed in blocks, never in a row."""
    synchronous: bool = False
    """The next token can only be scheduled when the one before has been read."""

    tokens: list[int] = field(default_factory=list)
    """Prompt and output, as far as the host knows it."""
    computed: int = 0
    """Tokens whose keys and values are in the cache, or will be when the steps under way are done."""
    pending: int = 0
    """Tokens that steps under way will yield."""
    pages: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)
    slot: int | None = None
    finish_reason: str | None = None
    error: BaseException | None = None
    """What ended it: `Refused` for what concerns this request alone, else what the step raised."""
    cached: int = 0
    """Tokens of the prompt that came from the prefix cache when it was first admitted."""
    preemptions: int = 0
    data: Any = None
    """The engine's own."""

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def num_output(self) -> int:
        """Tokens generated, those under way included."""
        return len(self.tokens) + self.pending - len(self.prompt)

    @property
    def order(self) -> tuple[int, int]:
        """The place in the queue."""
        return self.priority, self.arrival


@dataclass(frozen=True)
class Chunk:
    """Neighbouring tokens of a request that a step computes, in rows or in blocks; the last one may yield a token."""

    request: Request
    start: int
    count: int
    in_rows: bool
    samples: bool
    """Whether it ends with the last token of the request, so that a new one is drawn."""
    drafts: tuple[int, ...] = ()
    """Guesses at what follows the last known token; each in a row of its own behind it."""


@dataclass(frozen=True)
class Limits:
    """The places of a step, and the number of requests that run at the same time."""

    rows: int
    blocks: int
    block: int
    slots: int


class Scheduler:
    """The queue and the running requests of an engine.

    Args:
        prefix_cache: whether pages of a known prefix are used again.
        exact: compute prompts in blocks and what follows in rows, also when it is computed again, so that rounding is the same.
        window: no layer looks back further, so that pages behind it are free; None if one sees everything.
        draft: proposes tokens that may follow those of a request, for requests that are `synchronous`.
        ahead: places behind its last token, and behind its drafts, that the step writes to for such a request if they are held.
    """

    def __init__(
        self,
        pool: PagePool,
        limits: Limits,
        *,
        prefix_cache: bool = True,
        exact: bool = False,
        window: int | None = None,
        draft: Callable[[Request], Sequence[int]] | None = None,
        ahead: int = 0,
    ) -> None:
        self.pool, self.limits, self.prefix_cache, self.exact, self.window = pool, limits, prefix_cache, exact, window
        self.draft, self.ahead = draft, ahead
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self._slots = list(range(limits.slots))[::-1]
        self.num_preemptions = self.num_hits = self.num_asked = 0

    def add(self, request: Request) -> None:
        """Put a request into the queue. Alone, it must fit into the pool."""
        assert self.pages_of(len(request.prompt) + request.max_tokens - 1) < self.pool.num_pages, "the request can never be served"
        self.waiting.append(request)

    def pages_of(self, tokens: int) -> int:
        """Pages that so many tokens take."""
        return -(-tokens // self.pool.page_size)

    def remove(self, request: Request) -> None:
        """Take a request out, finished or not; its pages and its slot are free."""
        if request in self.running:
            self.running.remove(request)
            self._give_back(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def preempt(self, request: Request) -> None:
        """Send a running request back to the queue; all its tokens are to be computed again."""
        self.running.remove(request)
        self._give_back(request)
        request.preemptions += 1
        self.num_preemptions += 1
        self.waiting.append(request)

    def _give_back(self, request: Request) -> None:
        self.pool.release([page for page in request.pages if page])
        assert request.slot is not None
        self._slots.append(request.slot)
        request.pages, request.slot, request.computed = [], None, 0

    # ----------------------------------------------------------------------------------------------- a step

    def schedule(self) -> list[Chunk]:
        """What the next step computes; empty if nothing can be done before the steps under way have been read."""
        plan: list[Chunk] = []
        self._make_way()
        rows, blocks, preempted = self.limits.rows, self.limits.blocks, self.num_preemptions
        for request in sorted(self.running, key=lambda request: request.order):
            if request.slot is not None:  # else preempted by one before it
                chunk = self._chunk(request, rows, blocks)
                if chunk is not None and self._find_room(request, chunk):
                    rows, blocks = self._plan(plan, chunk, rows, blocks)
        if preempted != self.num_preemptions:  # what had to go does not come back at once
            return plan
        for request in sorted(self.waiting, key=lambda request: request.order):
            if request.pending:
                continue
            if not self._admit(request, rows, blocks):
                break
            chunk = self._chunk(request, rows, blocks)
            assert chunk is not None, "admitted without places"
            grown = self._grow(request, chunk.start + chunk.count)
            assert grown, "admitted without pages"
            rows, blocks = self._plan(plan, chunk, rows, blocks)
        return plan

    def _chunk(self, request: Request, rows: int, blocks: int) -> Chunk | None:
        """The next tokens of a request that fit into the places left."""
        left = len(request.tokens) + request.pending - request.computed
        if request.num_output >= request.max_tokens or (request.synchronous and request.pending):
            return None
        if self._in_rows(request, request.computed):
            room = min(rows, request.max_tokens - request.num_output) - 1
            drafts = self.draft(request)[: max(0, room)] if self.draft is not None and request.synchronous and left == 1 else ()
            return Chunk(request, request.computed, 1, True, left == 1, tuple(drafts)) if rows else None
        end = len(request.prompt) - request.computed if self.exact else left
        count = min(end, blocks * self.limits.block)
        return Chunk(request, request.computed, count, False, count == left) if count else None

    def _in_rows(self, request: Request, start: int) -> bool:
        """Whether the next token of a request, at `start`, is computed alone."""
        if self.exact or (request.scored and start < len(request.prompt)):
            return start >= len(request.prompt)
        return len(request.tokens) + request.pending - start == 1

    def _plan(self, plan: list[Chunk], chunk: Chunk, rows: int, blocks: int) -> tuple[int, int]:
        """Add a chunk whose pages are there; returns the places left."""
        plan.append(chunk)
        request = chunk.request
        self._leave_behind(request)
        request.computed += chunk.count
        self.name_pages(request)
        request.pending += chunk.samples
        if self.ahead and request.synchronous and chunk.samples:  # where there is room; guesses are worse without
            self._grow(request, min(request.computed + len(chunk.drafts) + self.ahead, len(request.prompt) + request.max_tokens - 1))
        if chunk.in_rows:
            return rows - 1 - len(chunk.drafts), blocks
        return rows, blocks - -(-chunk.count // self.limits.block)

    def _find_room(self, request: Request, chunk: Chunk) -> bool:
        """Pages for a chunk of a running request, taken from less urgent ones if need be; False if it had to go itself."""
        while not self._grow(request, chunk.start + chunk.count + len(chunk.drafts)):
            victim = max(self.running, key=lambda request: request.order)  # not before `request`, so not planned yet
            self.preempt(victim)
            if victim is request:
                return False
        return True

    def _grow(self, request: Request, tokens: int) -> bool:
        taken = self.pool.take(max(0, self.pages_of(tokens) - len(request.pages)))
        if taken is None:
            return False
        request.pages += taken
        return True

    def _admit(self, request: Request, rows: int, blocks: int) -> bool:
        """Give a waiting request a slot and the pages of its known prefix; False if there is no room for all its tokens."""
        known = len(request.tokens) - 1
        if request.reuse is not None and known < len(request.prompt):
            known = request.reuse
        pages = self.pool.find(self._names(request, known)) if self.prefix_cache else []
        start = len(pages) * self.pool.page_size
        places = rows if self._in_rows(request, start) else blocks
        self.pool.hold(pages)
        if not self._slots or not places or self.pool.num_free < self.pages_of(len(request.tokens)) - len(pages):
            self.pool.release(pages)
            return False
        request.pages = pages
        self.waiting.remove(request)
        self.running.append(request)
        request.slot, request.computed = self._slots.pop(), start
        if not request.preemptions:
            request.cached = start
            self.num_hits, self.num_asked = self.num_hits + start, self.num_asked + len(request.prompt)
        return True

    def _make_way(self) -> None:
        """Preempt what has a lower priority than the most urgent waiting request, while that lacks a slot or pages."""
        ready = [request for request in self.waiting if not request.pending]
        first = min(ready, key=lambda request: request.order, default=None)
        while first is not None and (not self._slots or self.pool.num_free < self.pages_of(len(first.tokens))):
            lesser = [other for other in self.running if other.priority > first.priority]
            if not lesser:
                return
            self.preempt(max(lesser, key=lambda other: other.order))

    def _leave_behind(self, request: Request) -> None:
        """Release the pages that no layer looks back to from the first token that is not computed."""
        if self.window is not None:
            dead = max(0, request.computed - self.window + 1) // self.pool.page_size
            self.pool.release([page for page in request.pages[:dead] if page])
            request.pages[:dead] = [0] * dead

    # ------------------------------------------------------------------------------------------ names of pages

    def _names(self, request: Request, tokens: int) -> list[bytes]:
        """Names of the pages that the first `tokens` known tokens fill."""
        size = self.pool.page_size
        while len(request.names) < tokens // size:
            at = len(request.names)
            parent = request.names[-1] if request.names else request.root
            request.names.append(next_hash(parent, request.tokens[at * size : (at + 1) * size]))
        return request.names[: tokens // size]

    def name_pages(self, request: Request) -> None:
        """Make the request's pages that are full of known tokens findable."""
        if self.prefix_cache and request.slot is not None:
            names = self._names(request, min(request.computed, len(request.prompt if self.exact else request.tokens)))
            for page, name in zip(request.pages, names, strict=False):
                if page:
                    self.pool.name(page, name)

    # ------------------------------------------------------------------------------------------------- counts

    def requests(self) -> Iterator[Request]:
        """All that are running or waiting."""
        yield from self.running
        yield from self.waiting

    def waste(self) -> float:
        """Share of the places in held pages that hold no token, pages counted once for all their holders."""
        size, filled = self.pool.page_size, dict[int, int]()
        for request in self.running:
            for index, page in enumerate(request.pages):
                if page:
                    filled[page] = max(filled.get(page, 0), min(size, request.computed - index * size))
        return 1 - sum(max(0, count) for count in filled.values()) / (len(filled) * size) if filled else 0.0

    def check(self) -> None:
        """Assert that pages and slots are held by the running requests and by nobody else."""
        self.pool.check()
        holders: dict[int, int] = {}
        for request in self.running:
            assert request.slot is not None
            assert request.computed <= len(request.pages) * self.pool.page_size
            for page in filter(None, request.pages):
                holders[page] = holders.get(page, 0) + 1
        assert len(holders) == self.pool.num_held
        assert all(self.pool.holders(page) == count for page, count in holders.items())
        slots = [request.slot for request in self.running if request.slot is not None] + self._slots
        assert sorted(slots) == list(range(self.limits.slots))
        assert all(request.slot is None and not request.pages for request in self.waiting)
