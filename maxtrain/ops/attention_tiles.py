"""Which blocks of queries meet which blocks of keys, and the loops over them: memory grows with the length, not with its square.

A sequence is cut into spans of at most 512 tokens. Within a span, blocks of queries are unrolled, each with the keys that its causal mask
and window leave; the spans follow one another in a loop. Queries meet keys outside of their span in tiles of fixed size, one after the
other, and what a row has seen is put together in float32. A tile of which no query sees a key is not computed, and one of which every
query sees every key needs no mask.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from maxtrain.ops.attention_block import Block, Rows, block_backward, block_forward, seen, sink_rows

T = TypeVar("T")
SPAN = 512  # tokens whose blocks are unrolled: 2,048 tokens take 250 ms in spans of 512 and 415 ms in one (one core with AVX2)
MIN_BLOCK, MAX_BLOCKS = 64, 4  # blocks of queries in a span: small enough to skip masked keys, large enough for two cores


class Tokens(NamedTuple):
    """Where tokens stand: indices in the sequence int32 [1, length], rising; segments int32 [batch, length]."""

    indices: jax.Array
    segments: jax.Array


class Keys(NamedTuple):
    """Folded keys and values [batch * kv_heads, length, width] and where they stand."""

    k: jax.Array
    v: jax.Array
    tokens: Tokens


Tile = Callable[[Any, Keys, jax.Array | None, Any, Any], tuple[Any, Any]]
"""(rows, keys, visible or None, what is summed up for the rows, and for the keys) -> both sums with the tile of rows and keys added."""


def tied(tokens: T, to: jax.Array) -> T:
    """The same arrays, for tracing no earlier known than `to`.

    Masks follow from where tokens stand. Left so, jax computes them once for all layers and keeps them: bytes by the square of the length.
    """
    return jax.lax.optimization_barrier((tokens, to.reshape(-1)[:1]))[0]


# ----------------------------------------------------------------------------------------------------------- plans


class Spans(NamedTuple):
    """How a sequence is cut: `num` spans of `size` tokens, the last filled up; a span's blocks see `halo` tokens before it."""

    num: int
    size: int
    halo: int

    @classmethod
    def of(cls, length: int, window: int | None) -> "Spans":
        """Of a sequence on one device."""
        if length <= SPAN:
            return cls(1, length, 0)
        num = -(-length // SPAN)
        size = -(-length // num // MIN_BLOCK) * MIN_BLOCK
        return cls(-(-length // size), size, window - 1 if window and window <= size else 0)

    @property
    def length(self) -> int:
        """With what the last span is filled up by."""
        return self.num * self.size

    def blocks(self, window: int | None) -> list[tuple[slice, slice]]:
        """Blocks of a span's queries with the keys each may see, counted from `halo` tokens before the span."""
        step = MIN_BLOCK if self.halo else max(MIN_BLOCK, -(-self.size // MAX_BLOCKS))
        ends = [(at, min(at + step, self.size)) for at in range(0, self.size, step)]
        return [(slice(at, end), slice(max(0, self.halo + at + 1 - window) if window else 0, self.halo + end)) for at, end in ends]

    def scores(self, window: int | None) -> int:
        """Products of queries and keys that a head has in memory at a time: of the longest block, or of a tile."""
        made = [(rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns in self.blocks(window)]
        tiles = self.earlier(window)
        return max(*made, tiles.queries * tiles.keys if len(tiles.starts) else 0)

    def earlier(self, window: int | None) -> "Tiles":
        """Tiles in which queries see keys of earlier spans: half a span of queries by a span of keys."""
        queries, keys = max(1, self.size // 2), self.size
        starts = ((q, k) for q in range(0, self.length, queries) for k in range(0, q // self.size * self.size, keys))
        seen = [(q, k) for q, k in starts if not window or q - (k + keys - 1) < window]
        return Tiles(self.length, queries, keys, np.array([] if self.halo else seen, np.int32).reshape(-1, 2))

    def all(self) -> "Tiles":
        """Every tile of queries and keys, half a span of each: where spans fill the sequence, none has keys of both balanced chunks."""
        size = self.size // 2 if self.size % 2 == 0 else self.size
        starts = [(q, k) for q in range(0, self.length, size) for k in range(0, self.length, size)]
        return Tiles(self.length, size, size, np.array(starts, np.int32))


class Tiles(NamedTuple):
    """Tiles of a sequence of `length` tokens: `queries` x `keys` each; starts: int32 [tiles, 2], the first query and key of each."""

    length: int
    queries: int
    keys: int
    starts: np.ndarray


# ----------------------------------------------------------------------------------------------------------- parts


def part(tree: T, start: Any, size: int, length: int) -> T:
    """The tokens from `start` on of arrays [.., length, ...] and folded ones [.., length * group, ...]."""

    def one(x: jax.Array) -> jax.Array:
        group = x.shape[1] // length
        return jax.lax.dynamic_slice_in_dim(x, start * group, size * group, axis=1)

    return jax.tree.map(one, tree)


def _put(tree: T, new: T, start: Any, length: int) -> T:
    """The arrays with new tokens from `start` on."""
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, start * (x.shape[1] // length), axis=1), tree, new)


def _static(tree: T, at: slice, length: int) -> T:
    """`part` of what is known when traced."""
    return jax.tree.map(lambda x: x[:, at.start * (x.shape[1] // length) : at.stop * (x.shape[1] // length)], tree)


def _filled(tree: T, length: int, before: int, after: int) -> T:
    """Arrays with zeros before and after their tokens."""

    def one(x: jax.Array) -> jax.Array:
        group = x.shape[1] // length
        return jnp.pad(x, ((0, 0), (before * group, after * group), *((0, 0),) * (x.ndim - 2)))

    return jax.tree.map(one, tree) if before or after else tree


def _filled_tokens(tokens: Tokens, before: int, after: int) -> Tokens:
    """Tokens with others before and after them, which no document holds."""
    around = (0, 0), (before, after)
    return Tokens(jnp.pad(tokens.indices, around, mode="edge"), jnp.pad(tokens.segments, around, constant_values=-1))


def _joined(stacked: T) -> T:
    """[spans, n, rows, ...] -> [n, spans * rows, ...]."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]), stacked)


# ----------------------------------------------------------------------------------------------------------- loops


def own(rows: Any, keys: Keys, at_keys: Any, first: Callable[..., tuple[Any, Any]], tile: Tile, window: int | None) -> tuple[Any, Any]:
    """Queries over the keys of their own sequence, or of the part of it that a device has: later tokens stand later.

    Args:
        rows: what is known of the queries; a pytree of folded arrays.
        keys: of the same tokens.
        at_keys: zeros in the shape of what is summed up for the keys.
        first: (rows, keys, visible) -> what to sum up for the rows, and for the keys, of a block in which each row sees itself.
        tile: adds the keys of earlier spans.

    Returns: both sums.
    """
    length = keys.tokens.indices.shape[1]
    spans = Spans.of(length, window)
    after = spans.length - length
    rows, tokens = _filled(rows, length, 0, after), _filled_tokens(keys.tokens, 0, after)
    there = _filled_tokens(keys.tokens, spans.halo, after)
    k, v, at_keys = _filled((keys.k, keys.v, at_keys), length, spans.halo, after)
    keys, reach = Keys(k, v, there), spans.length + spans.halo

    def span(rows: Any, tokens: Tokens, keys: Keys) -> tuple[Any, Any]:
        found, sums, wide = (
            [],
            jax.tree.map(lambda x: jnp.zeros((x.shape[0], keys.k.shape[1], x.shape[2]), x.dtype), at_keys),
            keys.k.shape[1],
        )
        for at, columns in spans.blocks(window):
            (here, at_tokens), there = _static((rows, tokens), at, spans.size), _static(keys, columns, wide)
            mine, theirs = first(here, there, visible_keys(at_tokens, there.tokens, window))
            pad = (0, 0), (columns.start, wide - columns.stop), (0, 0)
            sums = jax.tree.map(lambda total, x, pad=pad: total + jnp.pad(x, pad), sums, theirs)
            found.append(mine)
        return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *found), sums

    if spans.num == 1:
        return span(rows, tokens, keys)

    def step(at_keys: Any, start: jax.Array) -> tuple[Any, Any]:
        here, there = part((rows, tokens), start, spans.size, spans.length), part(keys, start, spans.size + spans.halo, reach)
        mine, theirs = span(*here, there)
        before = part(at_keys, start, spans.size + spans.halo, reach)
        return _put(at_keys, jax.tree.map(jnp.add, before, theirs), start, reach), mine

    at_keys, found = jax.lax.scan(step, at_keys, jnp.arange(spans.num) * spans.size)
    at_rows, at_keys = _over(spans.earlier(window), (rows, tokens), keys, (_joined(found), at_keys), tile, window)
    return _static(at_rows, slice(0, length), spans.length), _static(at_keys, slice(spans.halo, spans.halo + length), reach)


def met(rows: Any, tokens: Tokens, keys: Keys, at_rows: Any, at_keys: Any, tile: Tile, window: int | None) -> tuple[Any, Any]:
    """Both sums with what queries see of the keys of as many other tokens added; all arguments as in `own`, tokens being the queries'."""
    length = tokens.indices.shape[1]
    spans = Spans.of(length, None)
    after = spans.length - length
    rows, at_rows, at_keys, k, v = _filled((rows, at_rows, at_keys, keys.k, keys.v), length, 0, after)
    here, there = _filled_tokens(tokens, 0, after), _filled_tokens(keys.tokens, 0, after)
    sums = _over(spans.all(), (rows, here), Keys(k, v, there), (at_rows, at_keys), tile, window)
    return _static(sums, slice(0, length), spans.length)


def _over(tiles: Tiles, queries: tuple[Any, Tokens], keys: Keys, sums: tuple[Any, Any], tile: Tile, window: int | None) -> tuple[Any, Any]:
    """Both sums with the tiles added, one after the other, as far as any query of a tile may see any key."""

    def at_start(tree: T, start: jax.Array, size: int) -> T:
        return part(tree, start, size, tiles.length)

    def step(sums: tuple[Any, Any], start: jax.Array) -> tuple[tuple[Any, Any], None]:
        rows, tokens = at_start(queries, start[0], tiles.queries)
        there = at_start(keys, start[1], tiles.keys)
        mine, theirs = at_start(sums[0], start[0], tiles.queries), at_start(sums[1], start[1], tiles.keys)

        def all_seen(mine: Any, theirs: Any) -> tuple[Any, Any]:
            return tile(rows, there, None, mine, theirs)

        def some_seen(mine: Any, theirs: Any) -> tuple[Any, Any]:
            return tile(rows, there, visible_keys(tokens, there.tokens, window), mine, theirs)

        any_near, all_near = near(tokens, there.tokens, window)
        case = jnp.where(all_near, 2, any_near.astype(jnp.int32))
        mine, theirs = jax.lax.switch(case, (lambda *same: same, some_seen, all_seen), mine, theirs)
        return (_put(sums[0], mine, start[0], tiles.length), _put(sums[1], theirs, start[1], tiles.length)), None

    return jax.lax.scan(step, sums, jnp.asarray(tiles.starts))[0] if len(tiles.starts) else sums


def visible_keys(queries: Tokens, keys: Tokens, window: int | None) -> jax.Array:
    """Which keys count: bool [batch, queries, keys]."""
    return seen(queries.indices[0, :, None] - keys.indices[0], queries.segments, keys.segments, window)


def near(queries: Tokens, keys: Tokens, window: int | None) -> tuple[jax.Array, jax.Array]:
    """Whether any query may see any key, and whether every query sees every key, for all that the ends of both tell."""
    least, most = queries.indices[0, 0] - keys.indices[0, -1], queries.indices[0, -1] - keys.indices[0, 0]  # distances
    some, every = most >= 0, least >= 0
    if window is not None:
        some, every = some & (least < window), every & (most < window)
    low, high = ((f(queries.segments, axis=1), f(keys.segments, axis=1)) for f in (jnp.min, jnp.max))
    some &= jnp.any(jnp.maximum(*low) <= jnp.minimum(*high))
    return some, every & jnp.all(jnp.minimum(*low) == jnp.maximum(*high))


# ------------------------------------------------------------------------------------------- forward and backward


class Passes(NamedTuple):
    """What the loops do at each block, forward and backward, of a layer with this window and cap of scores."""

    window: int | None
    softcap: float | None

    def forward(self, q: jax.Array, keys: Keys, sinks: jax.Array | None) -> Block:
        """Attention over the own keys; sinks [heads]."""
        batch, kv_heads = keys.tokens.segments.shape[0], q.shape[0] // keys.tokens.segments.shape[0]
        sink = None if sinks is None else sink_rows(sinks, kv_heads, batch, keys.k.shape[1])

        def first(rows: tuple[jax.Array, jax.Array | None], keys: Keys, visible: jax.Array) -> tuple[Block, tuple[()]]:
            return block_forward(rows[0], keys.k, keys.v, visible, self.softcap, rows[1]), ()

        def tile(rows: Any, keys: Keys, visible: jax.Array | None, before: Block, nothing: tuple[()]) -> tuple[Block, tuple[()]]:
            return self.tile_forward(rows[0], keys, visible, before, nothing)

        return own((q, sink), keys, (), first, tile, self.window)[0]

    def tile_forward(
        self, q: jax.Array, keys: Keys, visible: jax.Array | None, before: Block, nothing: tuple[()]
    ) -> tuple[Block, tuple[()]]:
        """A `Tile` of the forward pass."""
        return before.merged(block_forward(q, keys.k, keys.v, visible, self.softcap, None)), nothing

    def backward(self, rows: Rows, keys: Keys) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Gradients of q, and of k and v, through the own keys, in float32."""

        def first(rows: Rows, keys: Keys, visible: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
            d_q, *d_keys = block_backward(rows, keys.k, keys.v, visible, self.softcap)
            return d_q, tuple(d_keys)

        zeros = jnp.zeros(keys.k.shape, jnp.float32), jnp.zeros(keys.v.shape, jnp.float32)
        return own(rows, keys, zeros, first, self.tile_backward, self.window)

    def tile_backward(self, rows: Rows, keys: Keys, visible: jax.Array | None, d_q: jax.Array, d_keys: Any) -> tuple[jax.Array, Any]:
        """A `Tile` of the backward pass."""
        part_q, part_k, part_v = block_backward(rows, keys.k, keys.v, visible, self.softcap)
        return d_q + part_q, (d_keys[0] + part_k, d_keys[1] + part_v)
