"""The device's part of a serving step: forward, sampling, log-probabilities and the update of the state in one program.

A step has `num_rows` single tokens, then `num_blocks` blocks of equally many. Each row and each block may yield one token. The
state stays on the device; a token of -1 is the one that its slot got last, so a step can start before the one before is read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maxtrain.config.serving import MAX_LOGPROBS
from maxtrain.ops.attention import Context
from maxtrain.ops.pages import DROPPED, Pages, is_pool, size_of
from maxtrain.parallel.sharding import Layout
from maxtrain.serving.sampling import DTYPES, NEUTRAL, Rows, Sampled, sample, top_logprobs

CHUNK = 64  # rows whose logits exist at the same time


class Shape(NamedTuple):
    """The sizes that make one program of many."""

    num_rows: int
    num_blocks: int
    block: int
    width: int
    """Pages of a table."""

    @property
    def num_tokens(self) -> int:
        """Places for tokens."""
        return self.num_rows + self.num_blocks * self.block

    @property
    def num_outputs(self) -> int:
        """Places for what is sampled: one for each row and block."""
        return self.num_rows + self.num_blocks


class State(NamedTuple):
    """What stays on the device; the last slot is a place for what nobody owns."""

    caches: Any
    ahead: Any
    """The cache of multi-token prediction; None where it does not guess."""
    last: jax.Array
    """int32 [slots + 1], the token that each slot got last."""
    counts: jax.Array
    """int32 [slots + 1, vocab], see `sampling`."""
    bias: jax.Array
    """float32 [slots + 1, vocab]."""


class Inputs(NamedTuple):
    """What the host says about a step; `empty` makes them."""

    tokens: Any
    """int32 [tokens]; -1 for the last one of the slot."""
    positions: Any
    """int32 [tokens]; -1 where there is no token."""
    slots: Any
    """int32 [tokens], see `Pages`."""
    follows: Any
    """int32 [tokens], the token that follows; -1 for the one that is drawn."""
    guessed: Any
    """bool [rows], whether the row's token is a guess at what the row before draws."""
    targets: Any
    """int32 [blocks * block], the token that follows, where its log-probability is asked for; else -1."""
    row_tables: Any
    block_tables: Any
    owners: Any
    """int32 [rows + blocks], the slot of each."""
    ends: Any
    """int32 [blocks], the place in each block after which a token is sampled."""
    sampled: Any
    """bool [rows + blocks], whether a token is wanted."""
    prompt_tops: Any
    """bool [], whether the likeliest tokens are asked for at targets."""
    rows: Rows

    @classmethod
    def empty(cls, shape: Shape, num_slots: int) -> Inputs:
        """Inputs, as numpy arrays to be filled, of a step without tokens."""
        places = shape.num_tokens - shape.num_rows

        def full(size: Any, value: Any, dtype: str = "int32") -> np.ndarray:
            return np.full(size, value, dtype)

        return cls(
            tokens=full(shape.num_tokens, 0),
            positions=full(shape.num_tokens, -1),
            slots=full(shape.num_tokens, DROPPED),
            follows=full(shape.num_tokens, -1),
            guessed=full(shape.num_rows, False, "bool"),
            targets=full(places, -1),
            row_tables=full((shape.num_rows, shape.width), 0),
            block_tables=full((shape.num_blocks, shape.width), 0),
            owners=full(shape.num_outputs, num_slots),
            ends=full(shape.num_blocks, 0),
            sampled=full(shape.num_outputs, False, "bool"),
            prompt_tops=full((), False, "bool"),
            rows=Rows(*(full(shape.num_outputs, value, dtype) for value, dtype in zip(NEUTRAL, DTYPES, strict=True))),
        )


class Scored(NamedTuple):
    """Of each target [blocks * block]: its log-probability, whether it is the likeliest token, and the likeliest ones."""

    logprob: jax.Array
    greedy: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array


def make_step(valid: int, num_guesses: int = 0) -> Any:
    """The function to compile: (model, state, inputs) -> (state, (Sampled, Scored, guesses)).

    Args:
        valid: as in `sample`.
        num_guesses: how many tokens multi-token prediction guesses behind each that is drawn, int32 [rows + blocks, num_guesses].
    """

    def step(model: Any, state: State, inputs: Inputs) -> tuple[State, tuple[Sampled, Scored, jax.Array]]:
        num_rows, num_blocks = len(inputs.row_tables), len(inputs.block_tables)
        block = len(inputs.targets) // max(1, num_blocks)
        owners = inputs.owners
        first = inputs.tokens[:num_rows]
        tokens = jnp.concatenate([jnp.where(first < 0, state.last[owners[:num_rows]], first), inputs.tokens[num_rows:]])
        positions = inputs.positions[:, None]
        context = Context(positions, (positions >= 0).astype(jnp.int32), Pages(inputs.slots, inputs.row_tables, inputs.block_tables))
        hidden, caches, _ = model(tokens[:, None], context, state.caches)
        ends = jnp.concatenate([jnp.arange(num_rows), num_rows + jnp.arange(num_blocks) * block + inputs.ends])

        def draw_chunk(chunk: tuple[jax.Array, jax.Array, Rows]) -> Sampled:
            hidden, owners, rows = chunk
            return sample(model.logits(hidden)[:, 0], rows, owners, state.counts, state.bias, valid)

        def draw(hidden: jax.Array, rows: Rows) -> Sampled:
            return _in_chunks(draw_chunk, (hidden, owners, rows))

        drawn = draw(hidden[ends], inputs.rows)
        guesses, ahead = jnp.zeros((len(owners), 0), jnp.int32), state.ahead
        if num_guesses:
            guesses, ahead = _guess(model, inputs, context, ahead, hidden, ends, drawn.token, draw, num_guesses)
        in_blocks = hidden[num_rows:].reshape(num_blocks, block, 1, hidden.shape[-1])
        scored = _score(model, in_blocks, inputs.targets.reshape(num_blocks, block), inputs.prompt_tops)
        mine = jnp.where(inputs.sampled, owners, len(state.last) - 1)
        counted = jnp.where(inputs.rows.marked, mine, len(state.last) - 1)

        def count(counts: jax.Array) -> jax.Array:
            return counts.at[counted, drawn.token].add(1)

        counts = jax.lax.cond(jnp.any(inputs.rows.marked), count, lambda counts: counts, state.counts)
        return State(caches, ahead, state.last.at[mine].set(drawn.token), counts, state.bias), (drawn, scored, guesses)

    return step


def _guess(
    model: Any,
    inputs: Inputs,
    context: Context,
    cache: Any,
    hidden: jax.Array,
    ends: jax.Array,
    drawn: jax.Array,
    draw: Callable[[jax.Array, Rows], Sampled],
    count: int,
) -> tuple[jax.Array, Any]:
    """What may follow each drawn token: int32 [rows + blocks, count], and the cache of the module.

    The first module of multi-token prediction sees every token of the step, and goes on from its own guesses for further ones,
    drawing with the noise that will be used when they are checked. What it keeps of those is written again with what came true.
    """
    follows = inputs.follows.at[ends].set(jnp.where(inputs.follows[ends] < 0, drawn, inputs.follows[ends]))
    hidden, cache, _ = model.ahead(0, follows[:, None], hidden, context, cache)
    hidden, guesses = hidden[ends], list[jax.Array]()
    tables = jnp.concatenate([inputs.row_tables, inputs.block_tables])
    goes_on = inputs.sampled & jnp.append(_last_true(inputs, drawn), jnp.ones(len(inputs.block_tables), bool))
    _, page_size = size_of(cache)
    for step in range(1, count + 1):
        guesses.append(draw(hidden, inputs.rows._replace(index=inputs.rows.index + step)).token)
        if step < count:
            positions = jnp.where(inputs.positions[ends] < 0, -1, inputs.positions[ends] + step)
            page = jnp.take_along_axis(tables, jnp.maximum(positions, 0)[:, None] // page_size, axis=1, mode="fill", fill_value=0)[:, 0]
            slots = jnp.where(goes_on & (positions >= 0) & (page > 0), page * page_size + positions % page_size, DROPPED)
            pages = Pages(slots, tables, inputs.block_tables[:0])
            there = Context(positions[:, None], (positions >= 0).astype(jnp.int32)[:, None], pages)
            hidden, cache, _ = model.ahead(0, guesses[-1][:, None], hidden, there, cache)
    return jnp.stack(guesses, axis=1), cache


def _last_true(inputs: Inputs, drawn: jax.Array) -> jax.Array:
    """bool [rows], whether a row is the last of its request whose token came true: all guesses up to it are what was drawn."""
    wrong = inputs.guessed & (jnp.roll(drawn[: len(inputs.guessed)], 1) != inputs.tokens[: len(inputs.guessed)])
    faults = jnp.cumsum(wrong)
    true = faults == jax.lax.cummax(jnp.where(inputs.guessed, 0, faults))
    return true & ~jnp.append((inputs.guessed & true)[1:], False)


def _in_chunks(function: Any, rows: Any) -> Any:
    """`function` of at most `CHUNK` rows of every array at a time."""
    size = len(jax.tree.leaves(rows)[0])
    if size <= CHUNK:
        return function(rows)
    chunks = -(-size // CHUNK)
    padded = jax.tree.map(lambda x: jnp.pad(x, ((0, chunks * CHUNK - size), *[(0, 0)] * (x.ndim - 1))), rows)
    out = jax.lax.map(function, jax.tree.map(lambda x: x.reshape(chunks, CHUNK, *x.shape[1:]), padded))
    return jax.tree.map(lambda x: x.reshape(chunks * CHUNK, *x.shape[2:])[:size], out)


def _score(model: Any, hidden: jax.Array, targets: jax.Array, tops: jax.Array) -> Scored:
    """Log-probabilities of targets [blocks, block] after hidden [blocks, block, 1, embed]; a block without targets costs nothing."""

    def one(pair: tuple[jax.Array, jax.Array]) -> Scored:
        hidden, targets = pair

        def scored() -> Scored:
            logits = model.logits(hidden)[:, 0]
            log_total = jax.nn.logsumexp(logits, axis=-1)
            value = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=-1)[:, 0]
            return Scored(value - log_total, jnp.argmax(logits, axis=-1) == targets, *top_logprobs(logits, log_total, tops))

        def nothing() -> Scored:
            return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(scored))

        return jax.lax.cond(jnp.any(targets >= 0), scored, nothing)

    if not len(targets):
        count = min(MAX_LOGPROBS, model.cfg.vocab_size)
        return Scored(jnp.zeros(0), jnp.zeros(0, bool), jnp.zeros((0, count), jnp.int32), jnp.zeros((0, count)))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(one, (hidden, targets)))


def mark(state: State, slot: jax.Array, counts: jax.Array, bias: jax.Array) -> State:
    """The state with the rows counts [vocab] and bias [vocab] for a slot."""
    return state._replace(counts=state.counts.at[slot].set(counts), bias=state.bias.at[slot].set(bias))


def describe(model: Any, num_pages: int, page_size: int, num_slots: int, layout: Layout, guesses: bool) -> State:
    """Abstract state on the layout in use: pools split by head where heads divide over the devices, the rest whole on each."""

    def pool(spec: Any) -> Any:
        place = layout.sharding(spec.axes)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), spec)

    def whole(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding())

    rows = (num_slots + 1, model.cfg.vocab_size)
    caches = jax.tree.map(pool, model.cache_spec(num_pages, page_size), is_leaf=is_pool)
    ahead = jax.tree.map(pool, model.ahead_cache_spec(num_pages, page_size), is_leaf=is_pool) if guesses else None
    return State(caches, ahead, whole(rows[:1], jnp.int32), whole(rows, jnp.int32), whole(rows, jnp.float32))
