"""Tokens travel to the devices that hold their experts, and the results back; the exchange is chosen by platform.

All of it runs within `per_shard`. Where no rule splits the experts, nothing happens. An expert receives rows in boxes, one
of each sender. On TPU a ragged all-to-all moves only what is in the boxes; XLA:CPU has none, and moves them padded.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from maxtrain.parallel import sharding
from maxtrain.parallel.sharding import all_to_all, parts

Rows = Callable[[jax.Array], jax.Array]


def boxes_to_owners(boxes: jax.Array) -> jax.Array:
    """Boxes of all experts [experts, slots, width] -> those of this device's experts, of all senders [experts / n, n * slots, width]."""
    return boxes if parts("expert") == 1 else all_to_all(boxes, "expert", split=0, concat=1)


def boxes_to_senders(boxes: jax.Array) -> jax.Array:
    """The inverse of `boxes_to_owners`."""
    return boxes if parts("expert") == 1 else all_to_all(boxes, "expert", split=1, concat=0)


class Transfer(NamedTuple):
    """Where rows start and how many there are, int32 [n] each: for every owner here, and for this owner at every sender."""

    starts: jax.Array
    counts: jax.Array
    sender_starts: jax.Array
    sender_counts: jax.Array


def rows_to_owners(rows: jax.Array, sizes: jax.Array) -> tuple[jax.Array, jax.Array, Rows]:
    """Send rows to the owners of their experts; no row is dropped, so an owner has room for all rows of all senders.

    Shapes: rows [rows, width], sorted by expert; sizes int32 [experts], summing to rows.
    Returns: rows [n * rows, width] sorted by this device's experts, the empty ones last; their sizes [experts / n], in which the empty
    rows are not counted; and the function that brings results [n * rows, width] back, in the order of `rows`.
    """
    n, num_rows = parts("expert"), rows.shape[0]
    if n == 1:
        return rows, sizes, lambda out: out
    by_owner = sizes.reshape(n, -1)
    by_sender = all_to_all(by_owner, "expert", split=0, concat=0)  # of this device's experts
    counts = by_owner.sum(axis=1)
    starts = jnp.cumsum(counts) - counts
    transfer = Transfer(starts, counts, all_to_all(starts, "expert", split=0, concat=0), by_sender.sum(axis=1))
    there, back = EXCHANGES.get(sharding.platform(), (_padded_there, _padded_back))
    boxes = there(rows, transfer)
    expert = jax.vmap(lambda ends: jnp.searchsorted(ends, jnp.arange(num_rows), side="right"))(jnp.cumsum(by_sender, axis=1))
    order = jnp.argsort(expert.reshape(-1), stable=True)
    return boxes[order], by_sender.sum(axis=0), lambda out: back(out[jnp.argsort(order)], num_rows, transfer)


def _padded_there(rows: jax.Array, transfer: Transfer) -> jax.Array:
    """rows [rows, width] -> one box of each sender, [n * rows, width], filled up with zeros."""
    slots = jnp.arange(rows.shape[0])
    places = transfer.starts[:, None] + slots
    boxes = jnp.where((slots < transfer.counts[:, None])[..., None], rows.at[places].get(mode="clip"), 0)
    return all_to_all(boxes.reshape(-1, rows.shape[1]), "expert", split=0, concat=0)


def _padded_back(boxes: jax.Array, num_rows: int, transfer: Transfer) -> jax.Array:
    """The inverse of `_padded_there`."""
    returned = all_to_all(boxes, "expert", split=0, concat=0)
    owner = jnp.searchsorted(jnp.cumsum(transfer.counts), jnp.arange(num_rows), side="right")
    return returned[owner * num_rows + jnp.arange(num_rows) - transfer.starts[owner]]


def _ragged_there(rows: jax.Array, transfer: Transfer) -> jax.Array:
    num_rows, n = rows.shape[0], transfer.starts.shape[0]
    room = jnp.zeros((n * num_rows, rows.shape[1]), rows.dtype)
    at = jnp.full((n,), sharding.index("expert") * num_rows, jnp.int32)
    return sharding.ragged_all_to_all(rows, room, (transfer.starts, transfer.counts, at, transfer.sender_counts), "expert")


def _ragged_back(boxes: jax.Array, num_rows: int, transfer: Transfer) -> jax.Array:
    room = jnp.zeros((num_rows, boxes.shape[1]), boxes.dtype)
    starts = jnp.arange(transfer.starts.shape[0], dtype=jnp.int32) * num_rows
    return sharding.ragged_all_to_all(boxes, room, (starts, transfer.sender_counts, transfer.sender_starts, transfer.counts), "expert")


EXCHANGES = {"tpu": (_ragged_there, _ragged_back)}
