"""The pools of pages in which serving keeps keys and values, and where the tokens of a step stand in them.

A pool is laid out for what reads it: plain XLA takes a pool for each head, the kernel for TPUs (`ops.ragged_attention`) pages in which
keys and values of all heads alternate.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maxtrain.parallel import sharding
from maxtrain.parallel.sharding import Axes

DROPPED = 1 << 30  # the place of a token whose keys and values are not kept
LANES = 128  # a TPU's registers are so wide: heads are padded to a multiple in the kernel's pages


class Pages(NamedTuple):
    """Where the tokens of a step write and what they read; rows come first, then blocks.

    slots: int32 [tokens], the place a token's keys and values take in the pool, page * page_size + offset; `DROPPED` for none.
    rows: int32 [num_rows, pages], the page table of each single token.
    blocks: int32 [num_blocks, pages], that of each block.
    """

    slots: jax.Array
    rows: jax.Array
    blocks: jax.Array

    def shifted(self, by: jax.Array, page_size: int) -> Pages:
        """The same places in a pool where they begin `by` pages later: stacked layers share one pool."""
        return Pages(self.slots + by * page_size, self.rows + by, self.blocks + by)


class Cache(NamedTuple):
    """The pool of one layer: keys and values [kv_heads, num_pages, page_size, width]; without values, the keys are the values too."""

    keys: jax.Array
    values: jax.Array | None

    @property
    def size(self) -> tuple[int, int]:
        """Number of pages, and tokens of a page."""
        return self.keys.shape[1], self.keys.shape[2]

    @property
    def axes(self) -> Axes:
        """Logical axes; heads that the devices of their axis cannot share evenly are kept whole on each."""
        return (None if self.keys.shape[0] % sharding.parts("kv_heads") else "kv_heads", None, None, None)


class Combined(NamedTuple):
    """The pool of one layer for the kernel of TPUs: [num_pages, page_size, 2 * kv_heads, width], a head's key before its value."""

    pages: jax.Array

    @property
    def size(self) -> tuple[int, int]:
        """Number of pages, and tokens of a page."""
        return self.pages.shape[0], self.pages.shape[1]

    @property
    def axes(self) -> Axes:
        """Logical axes; the kernel is only taken where the heads divide."""
        return (None, None, "kv_heads", None)


def is_pool(x: Any) -> bool:
    """Whether a node of a pytree is the pool of a layer."""
    return isinstance(x, (Cache, Combined))


def size_of(caches: Any) -> tuple[int, int]:
    """Number of pages, and tokens of a page, of the first of some pools."""
    return jax.tree.leaves(caches, is_leaf=is_pool)[0].size


def cache_spec(num_pages: int, page_size: int, kv_heads: int, widths: tuple[int, int | None], dtype: jnp.dtype, sinks: bool = False) -> Any:
    """The pool of a layer as shapes and format, for the layout in use.

    Args:
        num_pages: pages of the pool.
        page_size: tokens of a page.
        kv_heads: heads of keys and values.
        widths: of keys and values, None for keys that are the values too.
        dtype: format of both.
        sinks: whether the layer has attention sinks.
    """
    if sharding.platform() == "tpu" and not sinks and widths[0] == widths[1] and _tiles(kv_heads, dtype):
        width = -(-widths[0] // LANES) * LANES
        return Combined(_described((num_pages, page_size, 2 * kv_heads, width), dtype))
    keys, values = (width and _described((kv_heads, num_pages, page_size, width), dtype) for width in widths)
    return Cache(keys, values)  # type: ignore[arg-type]


def _described(shape: tuple[int, ...], dtype: jnp.dtype) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def _tiles(kv_heads: int, dtype: jnp.dtype) -> bool:
    """Whether the kernel can take so many heads of a device: they fill the rows of a tile, or a part that is a power of two."""
    devices = sharding.parts("kv_heads")
    rows, packed = divmod(2 * kv_heads // devices, 4 // dtype.itemsize)
    return kv_heads % devices == 0 and dtype.itemsize < 8 and not packed and (rows in (1, 2, 4, 8) or rows % 8 == 0)
