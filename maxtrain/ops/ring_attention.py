"""Ring attention (Liu et al., 2023): each device keeps its queries, keys and values of all devices come past.

Keys and values travel with their segments and indices from neighbour to neighbour, and the softmax of each row is put
together from what it saw, in float32. In the backward pass they travel again, and their gradients with them until they are
home. What no query of a device may see (later tokens, beyond the window, other documents) is not computed.

In natural order, the device with the last tokens has all the work while that with the first has next to none. In the
balanced order (`balanced_order`), device i of n holds chunks i and 2n - 1 - i of 2n, and all have the same.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from maxtrain.ops.causal_attention import (
    MAX_BLOCKS,
    MIN_BLOCK,
    Block,
    Options,
    Rows,
    block_backward,
    block_forward,
    blocks,
    delta_rows,
    fold,
    of_group,
    seen,
    sink_gradient,
    sink_rows,
    tied,
    unfold,
)
from maxtrain.ops.linear import settle
from maxtrain.parallel.sharding import index, is_balanced, parts, permute

C = TypeVar("C")


def balanced_order(length: int) -> jax.Array | None:
    """Which token stands where, int32 [length], if the layout in use has the balanced order; None for the natural one."""
    if not is_balanced():
        return None
    devices = parts("length")
    chunks = np.arange(length, dtype=np.int32).reshape(2 * devices, -1)
    return jnp.asarray(np.concatenate([chunks[part] for i in range(devices) for part in (i, 2 * devices - 1 - i)]))


class Tokens(NamedTuple):
    """Where tokens stand: indices in the sequence int32 [1, length], rising within a chunk; segments int32 [batch, length]."""

    indices: jax.Array
    segments: jax.Array


class Keys(NamedTuple):
    """What travels: folded keys and values [batch * kv_heads, length, width] and where they stand."""

    k: jax.Array
    v: jax.Array
    tokens: Tokens


Tile = Callable[[Any, Keys, jax.Array, Any, Any], tuple[Any, Any]]
"""(rows, keys, visible, what is summed up for the rows, and for the keys) -> both sums with the block of rows and keys added."""


def ring_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, indices: jax.Array | None, sinks: jax.Array | None, options: Options
) -> jax.Array:
    """Within `per_shard`: `causal_attention` of sequences that are split over the devices of `length`.

    Shapes are those of this device's part. indices: int32 [length], where in the sequence each token stands, in the balanced
    order; None in natural order.
    """
    chunks = 1 if indices is None else 2
    if indices is None:
        indices = index("length") * q.shape[1] + jnp.arange(q.shape[1], dtype=jnp.int32)
    return _ring(q, k, v, Tokens(indices[None], segments), sinks, options, chunks)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _ring(q: jax.Array, k: jax.Array, v: jax.Array, tokens: Tokens, sinks: jax.Array | None, options: Options, chunks: int) -> jax.Array:
    return _forward(q, k, v, tokens, sinks, options, chunks)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, tokens: Tokens, sinks: jax.Array | None, options: Options, chunks: int):
    shape, kv_heads, tokens = q.shape, k.shape[2], tied(tokens, q)
    q, k, v = settle(tuple(fold(x, kv_heads) for x in (q, k, v)))
    group, found = shape[2] // kv_heads, []
    for rows, columns, visible in _own_blocks(tokens, options.window):
        sink = None if sinks is None else sink_rows(sinks, kv_heads, shape[0], rows.stop - rows.start)
        found.append(block_forward(of_group(q, rows, group), k[:, columns], v[:, columns], visible, options.softcap, sink))
    own = Block(*(jnp.concatenate(parts, axis=1) for parts in zip(*found, strict=True)))

    def tile(rows: jax.Array, keys: Keys, visible: jax.Array, before: Block, nothing: tuple[()]) -> tuple[Block, tuple[()]]:
        return _merged(before, block_forward(rows, keys.k, keys.v, visible, options.softcap, None)), nothing

    block, _ = _around(q, Keys(k, v, tokens), own, (), tile, options.window, chunks)
    out = (block.product / block.total).astype(q.dtype)
    return settle(unfold(out, shape)), (q, k, v, tokens, sinks, out, block.log_sum)


def _merged(a: Block, b: Block) -> Block:
    """Attention over the keys of both, rescaled to the higher top."""
    top = jnp.maximum(a.top, b.top)
    of_a, of_b = jnp.exp(a.top - top), jnp.exp(b.top - top)
    return Block(a.product * of_a + b.product * of_b, top, a.total * of_a + b.total * of_b)


def _backward(options: Options, chunks: int, saved: tuple, d_out: jax.Array):
    q, k, v, tokens, sinks, out, log_sum = saved
    shape, kv_heads = d_out.shape, k.shape[0] // d_out.shape[0]
    group = shape[2] // kv_heads
    d_out = settle(fold(d_out, kv_heads))
    delta = delta_rows(d_out, out)
    all_rows, blocks_q, d_k, d_v = Rows(q, d_out, delta, log_sum), [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for rows, columns, visible in _own_blocks(tokens, options.window):
        own = Rows(*settle(tuple(of_group(x, rows, group) for x in all_rows)))
        part_q, part_k, part_v = block_backward(own, k[:, columns], v[:, columns], visible, options.softcap)
        d_k, d_v = d_k.at[:, columns].add(part_k), d_v.at[:, columns].add(part_v)
        blocks_q.append(part_q)

    def tile(rows: Rows, keys: Keys, visible: jax.Array, d_q: jax.Array, d_keys: tuple[jax.Array, jax.Array]):
        part_q, part_k, part_v = block_backward(rows, keys.k, keys.v, visible, options.softcap)
        return d_q + part_q, (d_keys[0] + part_k, d_keys[1] + part_v)

    d_q, (d_k, d_v) = _around(all_rows, Keys(k, v, tokens), jnp.concatenate(blocks_q, axis=1), (d_k, d_v), tile, options.window, chunks)
    d_sinks = None if sinks is None else sink_gradient(sinks, delta, log_sum, shape)
    kv_shape = (*shape[:2], kv_heads)
    d_q, d_k, d_v = d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)
    return *settle((unfold(d_q, shape), unfold(d_k, kv_shape), unfold(d_v, kv_shape))), None, d_sinks


_ring.defvjp(_forward, _backward)


def _own_blocks(tokens: Tokens, window: int | None) -> Iterator[tuple[slice, slice, jax.Array]]:
    """Blocks of a device's own queries, the keys of its own they may see, and which of them they do: later tokens stand later."""
    indices, segments = tokens.indices[0], tokens.segments
    for rows, columns in blocks(indices.shape[0], window):
        yield rows, columns, seen(indices[rows, None] - indices[columns], segments[:, rows], segments[:, columns], window)


def _around(rows: Any, keys: Keys, at_rows: Any, at_keys: Any, tile: Tile, window: int | None, chunks: int) -> tuple[Any, Any]:
    """Let the keys of all other devices come past the rows of this one.

    Args:
        rows: what a tile needs of this device's queries; a pytree of arrays with a second dim of length * group.
        keys: those of this device.
        at_rows: what is summed up for the rows; stays.
        at_keys: what is summed up for the keys; travels with them, and home in the end.
    """
    here = _chunks((keys.tokens, rows), chunks)

    def visit(keys: Keys, at_rows: Any, at_keys: Any) -> tuple[Any, Any]:
        there, to_rows, to_keys = _chunks(keys, chunks), _chunks(at_rows, chunks), _chunks(at_keys, chunks)
        for a, (tokens, part) in enumerate(here):
            for b in range(chunks - (chunks == 2 and a == 0)):  # every second chunk is later than every first one
                to_rows[a], to_keys[b] = _meet(tokens, part, there[b], to_rows[a], to_keys[b], tile, window)
        return _joined(to_rows), _joined(to_keys)

    def step(carry: tuple[Keys, Any, Any], _: None) -> tuple[tuple[Keys, Any, Any], None]:
        keys, at_rows, at_keys = carry
        following = permute(keys, "length")  # under way while the ones that are here are used
        at_rows, at_keys = visit(keys, at_rows, at_keys)
        return (following, at_rows, permute(at_keys, "length")), None

    carry = permute(keys, "length"), at_rows, permute(at_keys, "length")
    carry, _ = jax.lax.scan(step, carry, None, parts("length") - 2)
    at_rows, at_keys = visit(*carry)
    return at_rows, permute(at_keys, "length")


def _meet(tokens: Tokens, rows: Any, keys: Keys, at_rows: Any, at_keys: Any, tile: Tile, window: int | None) -> tuple[Any, Any]:
    """One chunk of queries and one chunk of keys, block by block of queries, as far as they see any of the keys."""
    length = tokens.indices.shape[1]
    size = next(size for size in range(min(length, max(MIN_BLOCK, -(-length // MAX_BLOCKS))), length + 1) if length % size == 0)

    def one(at_keys: Any, block: tuple[Tokens, Any, Any]) -> tuple[Any, Any]:
        tokens, rows, at_rows = block

        def see(at_rows: Any, at_keys: Any) -> tuple[Any, Any]:
            distance = tokens.indices[0, :, None] - keys.tokens.indices[0]
            return tile(rows, keys, seen(distance, tokens.segments, keys.tokens.segments, window), at_rows, at_keys)

        at_rows, at_keys = _if(_near(tokens, keys.tokens, window), see, at_rows, at_keys)
        return at_keys, at_rows

    def see_all(at_rows: Any, at_keys: Any) -> tuple[Any, Any]:
        cut = jax.tree.map(lambda x: jnp.stack(jnp.split(x, length // size, axis=1)), (tokens, rows, at_rows))
        at_keys, at_rows = jax.lax.scan(one, at_keys, cut)
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]), at_rows), at_keys

    return _if(_near(tokens, keys.tokens, window), see_all, at_rows, at_keys)


def _if(condition: jax.Array, then: Callable[[Any, Any], tuple[Any, Any]], at_rows: Any, at_keys: Any) -> tuple[Any, Any]:
    return jax.lax.cond(condition, then, lambda *same: same, at_rows, at_keys)


def _near(queries: Tokens, keys: Tokens, window: int | None) -> jax.Array:
    """Whether any query may see any key, for all that the ends of both tell."""
    near = keys.indices[0, 0] <= queries.indices[0, -1]
    if window is not None:
        near &= queries.indices[0, 0] - keys.indices[0, -1] < window
    first = jnp.maximum(queries.segments.min(axis=1), keys.segments.min(axis=1))
    last = jnp.minimum(queries.segments.max(axis=1), keys.segments.max(axis=1))
    return near & jnp.any(first <= last)


def _chunks(tree: C, chunks: int) -> list[C]:
    """The chunks of arrays [.., length, ...], one tree each."""
    return [jax.tree.map(lambda x, i=i: jnp.split(x, chunks, axis=1)[i], tree) for i in range(chunks)]


def _joined(chunks: list[C]) -> C:
    """The inverse of `_chunks`."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *chunks)
