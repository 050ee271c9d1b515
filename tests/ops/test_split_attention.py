"""Attention of sequences that several devices share, against `causal_attention` on one: values, gradients, what is exchanged."""

import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxtrain.config import schema
from maxtrain.ops import attention_tiles
from maxtrain.ops.causal_attention import Options, causal_attention
from maxtrain.ops.ring_attention import balanced_order
from maxtrain.ops.split_attention import split_attention
from maxtrain.parallel import mesh, sharding
from maxtrain.parallel.sharding import Layout

WAYS = [("gather", False), ("ring", False), ("ring", True), ("all_to_all", False)]


def layout(way, axes):
    cfg = schema.Mesh(fsdp=1, **axes)
    count = int(np.prod(list(axes.values())))
    return Layout(mesh.make_mesh(cfg, jax.devices()[:count]), cfg.rules, *way)


def arrays(length, heads, kv_heads, width, value_width, sink, documents, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((heads, width), (kv_heads, width), (kv_heads, value_width), (heads, value_width))
    q, k, v, out = (jnp.asarray(rng.normal(size=(2, length, *shape)), jnp.float32) for shape in shapes)
    sinks = jnp.asarray(rng.normal(size=heads), jnp.float32) if sink else None
    segments = jnp.asarray(np.sort(rng.integers(1, documents + 1, (2, length))), jnp.int32)
    return q, k, v, out, sinks, segments


def split_vjp(place, q, k, v, out, sinks, segments, options):
    """Value and gradients, in natural order."""
    with sharding.use(place):
        order = balanced_order(q.shape[1])

        def f(q, k, v, sinks):
            q, k, v, there = (x if order is None else x[:, order] for x in (q, k, v, segments))
            y = split_attention(q, k, v, there, order, sinks, options)
            return y if order is None else y[:, jnp.argsort(order)]

        got, back = jax.jit(lambda *x: jax.vjp(f, *x))(q, k, v, sinks)
        return got, jax.jit(back)(out)


CASES = [  # length, heads, kv_heads, value width, options, sinks, documents
    (64, 8, 8, 8, Options(), False, 1),
    (64, 8, 2, 8, Options(), True, 3),
    (192, 8, 1, 5, Options(window=7), False, 2),
    (192, 8, 4, 12, Options(window=50, softcap=1.5), True, 1),
    (1024, 8, 2, 8, Options(softcap=0.5), False, 9),
    (2048, 8, 8, 8, Options(window=129), True, 2),
]
SHORT = [(("ring", True), {"context": 4}, 3), (("all_to_all", False), {"context": 4}, 1)]
LONG = [(way, axes, case) for way in WAYS for axes in ({"context": 2}, {"context": 4}, {"context": 8}) for case in range(len(CASES))]
LONG += [(way, {"tensor": 2, "context": 2, "data": 2}, case) for way in WAYS for case in (1, 3)]


def close(way, axes, case):
    length, heads, kv_heads, value_width, options, sink, documents = CASES[case]
    given = arrays(length, heads, kv_heads, 8, value_width, sink, documents)
    q, k, v, out, sinks, segments = given
    got, back = split_vjp(layout(way, axes), *given, options)
    want, reference = jax.vjp(lambda q, k, v, sinks: causal_attention(q, k, v, segments, sinks, options), q, k, v, sinks)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(reference(out)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize(("way", "axes", "case"), SHORT)
def test_a_shared_sequence_gives_what_one_device_gives(way, axes, case):
    close(way, axes, case)


@pytest.mark.slow
@pytest.mark.parametrize(("way", "axes", "case"), [each for each in LONG if each not in SHORT])
def test_every_shared_sequence_gives_what_one_device_gives(way, axes, case):
    close(way, axes, case)


def exchanged(way):
    """Kinds of exchange in the compiled value and gradient, each with the shapes that it moves."""
    q, k, v, _, _, segments = arrays(64, 8, 4, 8, 8, False, 2)
    place = layout(way, {"context": 4})

    def f(q, k, v):
        q, k, v = (sharding.constrain(x, ("batch", "length", "heads", None)) for x in (q, k, v))
        return split_attention(q, k, v, segments, balanced_order(64), None, Options()).sum()

    with sharding.use(place):
        at = place.sharding(("batch", "length", "heads", None))
        text = jax.jit(jax.grad(f, argnums=(0, 1, 2)), in_shardings=at, out_shardings=at).lower(q, k, v).compile().as_text()
    return re.findall(r"= (.*?) (all-gather|all-to-all|collective-permute)(?:-start)?\(", text)


def test_a_ring_gathers_nothing():
    """Keys and values come from the neighbour, a device's share at a time, and no more than their gradients travel besides."""
    found = exchanged(("ring", True))
    assert {kind for _, kind in found} == {"collective-permute"}
    floats = [shape for shape, _ in found if "f32" in shape]
    assert set(re.findall(r"f32\[([\d,]*)\]", " ".join(floats))) == {"8,16,8"}  # batch x kv heads, a quarter of the length, width
    assert {kind for _, kind in exchanged(("all_to_all", False))} == {"all-to-all"}
    assert {kind for _, kind in exchanged(("gather", False))} == {"all-gather"}


def test_in_the_balanced_order_every_device_has_an_early_and_a_late_chunk():
    with sharding.use(layout(("ring", True), {"context": 4})):
        order = np.asarray(balanced_order(16)).reshape(4, 4)
    assert order.tolist() == [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]]
    seen = (np.arange(16) <= order[:, :, None]).sum(axis=(1, 2))
    assert set(seen) == {34}
    with sharding.use(layout(("ring", False), {"context": 4})):
        assert balanced_order(16) is None


def counted(way, window, documents):
    """How many blocks and tiles of queries and keys the ring computes, on all devices together."""
    given = arrays(512, 2, 2, 8, 8, False, documents)
    tiles, forward = [], attention_tiles.block_forward
    place = layout(way, {"context": 4})

    def watched(*args):
        jax.debug.callback(lambda: tiles.append(1))
        return forward(*args)

    with mock.patch.object(attention_tiles, "block_forward", watched):
        split_vjp(place, *given, Options(window=window))
    jax.effects_barrier()
    return len(tiles)


@pytest.mark.slow
def test_what_no_query_sees_is_not_computed():
    """A device has 128 tokens: 2 blocks of its own, and 2 x 2 tiles of 64 queries and 64 keys with those of another device.

    Natural: all tiles of 6 pairs of devices. Balanced: half of the tiles of 12 pairs, in each of which one chunk of two sees the other.
    """
    assert counted(("ring", False), None, 1) == 4 * 2 + 6 * 4
    assert counted(("ring", True), None, 1) == 4 * 2 + 12 * 2
    assert counted(("ring", False), 2, 1) == 4 * 2 + 3  # across each border
    assert counted(("ring", False), None, 512) <= 4 * 2 + 3  # documents of about a token
