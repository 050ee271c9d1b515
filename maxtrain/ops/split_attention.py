"""Attention over the devices: each at its sequences and heads, and ways for those that share a sequence to see all of it.

`gather` brings the whole sequence to each device, which computes all of it. `ring` keeps queries in place and sends keys and
values around (`ops.ring_attention`). `all_to_all` exchanges tokens for heads before attention and back behind it
(DeepSpeed-Ulysses, Jacobs et al., 2023). A way is a row of `EXCHANGES`; `mesh.context_attention` names one.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from maxtrain.ops.backends import BACKENDS
from maxtrain.ops.causal_attention import Options
from maxtrain.ops.ring_attention import ring_attention
from maxtrain.parallel.sharding import all_to_all, attention_backend, exchange, index, parts, per_shard


class Exchange(NamedTuple):
    """The axis along which a device has its part of queries, keys and values; the same of the segments; what it does with them."""

    tokens: str | None
    segments: str | None
    attention: Callable[..., jax.Array]


def _whole(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, indices: None, sinks: jax.Array | None, options: Options):
    assert indices is None, "only ring attention reads tokens that are not in natural order"
    return BACKENDS[attention_backend()].attention(q, k, v, segments, sinks, options)


def _all_to_all(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, indices: None, sinks: jax.Array | None, options: Options):
    """Each device attends with its share of the heads; too few kv heads are repeated for the devices that share one."""
    devices, heads = parts("length"), q.shape[2]
    k, v = _repeated(k, devices), _repeated(v, devices)
    q, k, v = (all_to_all(x, "length", split=2, concat=1) for x in (q, k, v))
    if sinks is not None:
        sinks = jax.lax.dynamic_slice_in_dim(sinks, index("length") * (heads // devices), heads // devices)
    return all_to_all(_whole(q, k, v, segments, indices, sinks, options), "length", split=1, concat=2)


EXCHANGES: Mapping[str, Exchange] = {
    "gather": Exchange(None, None, _whole),
    "ring": Exchange("length", "length", ring_attention),
    "all_to_all": Exchange("length", None, _all_to_all),
}


def split_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, indices: jax.Array | None, sinks: jax.Array | None, options: Options
) -> jax.Array:
    """`causal_attention` on the layout in use; indices as in `ops.attention.Context`."""
    way = EXCHANGES[exchange() if parts("length") > 1 else "gather"]
    devices = parts("heads")
    k, v = _repeated(k, devices), _repeated(v, devices)
    axes = ("batch", way.tokens, "heads", None)
    inputs = (axes, axes, axes, ("batch", way.segments), (way.tokens,), ("heads",))
    alone = parts("length") > 1 or attention_backend() != "xla"  # loops and kernels are nothing a compiler should share out
    local = per_shard(lambda *local: way.attention(*local, options), inputs, axes, always=alone)
    return local(q, k, v, segments, indices, sinks)


def _repeated(x: jax.Array, devices: int) -> jax.Array:
    """x [batch, length, kv_heads, width] with kv heads repeated until each device has one."""
    repeats = max(1, devices // x.shape[2])
    return x if repeats == 1 else jnp.repeat(x, repeats, axis=2)
