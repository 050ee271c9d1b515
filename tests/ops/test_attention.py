"""Blocked causal attention against the whole score matrix, value and gradient."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxtrain.ops.attention import Context, Options, attend, causal_attention
from maxtrain.ops.pages import Cache, Pages


def whole(q, k, v, segments, sinks, options):
    """The textbook form: every score, one mask."""
    length, group = q.shape[1], q.shape[2] // k.shape[2]
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, jnp.repeat(k, group, axis=2))
    if options.softcap:
        scores = options.softcap * jnp.tanh(scores / options.softcap)
    distance = jnp.arange(length)[:, None] - jnp.arange(length)
    visible = (distance >= 0) & (distance < (options.window or length)) & (segments[:, :, None] == segments[:, None])
    scores = jnp.where(visible[:, None], scores, -jnp.inf)
    if sinks is not None:
        scores = jnp.concatenate([scores, jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:3], 1))], axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1)[..., :length], jnp.repeat(v, group, axis=2))


@pytest.mark.parametrize(
    ("length", "documents", "options", "sink", "value_width"),
    [
        (5, 3, Options(), False, 8),
        (150, 3, Options(), True, 8),
        (150, 3, Options(window=7), False, 5),
        (150, 3, Options(window=100, softcap=1.5), True, 12),
        (150, 3, Options(softcap=0.5), False, 8),
        (1100, 3, Options(), True, 8),
        (1100, 3, Options(window=65), False, 8),
        (1100, 1, Options(window=700, softcap=2.0), True, 5),
    ],
)
def test_value_and_gradient(length, documents, options, sink, value_width):
    rng = np.random.default_rng(0)
    shapes = ((4, 8), (2, 8), (2, value_width), (4, value_width))
    q, k, v, out = (jnp.asarray(rng.normal(size=(2, length, *shape)), jnp.float32) for shape in shapes)
    sinks = jnp.asarray(rng.normal(size=4), jnp.float32) if sink else None
    segments = jnp.asarray(np.sort(rng.integers(0, documents, (2, length))), jnp.int32)
    got, back = jax.vjp(lambda q, k, v, sinks: causal_attention(q, k, v, segments, sinks, options), q, k, v, sinks)
    want, reference = jax.vjp(lambda q, k, v, sinks: whole(q, k, v, segments, sinks, options), q, k, v, sinks)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(back(out)), jax.tree.leaves(reference(out)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("options", [Options(), Options(window=5, scale=0.3, softcap=2.0)])
@pytest.mark.parametrize("sink", [False, True])
def test_cache_gives_what_the_sequence_gives(options, sink):
    """A prompt of 9 tokens at once, then one a call."""
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 14, *shape)), jnp.float32) for shape in ((4, 8), (2, 8), (2, 6)))
    sinks = jnp.asarray(rng.normal(size=4), jnp.float32) if sink else None
    positions = jnp.tile(jnp.arange(14), (2, 1))
    want, _ = attend(q, k, v, None, Context(positions, jnp.ones_like(positions)), options, sinks)
    cache, got = Cache(jnp.zeros((2, 10, 4, 8)), jnp.zeros((2, 10, 4, 6))), []
    tables = jnp.array([[7, 1, 4, 9], [2, 8, 3, 5]])
    for part in (slice(0, 9), *(slice(at, at + 1) for at in range(9, 14))):
        at = positions[:, part]
        slots = (jnp.take_along_axis(tables, at // 4, axis=1) * 4 + at % 4).reshape(-1)
        rows, blocks = (tables[:0], tables) if at.shape[1] > 1 else (tables, tables[:0])
        context = Context(at.reshape(-1, 1), jnp.ones((at.size, 1)), Pages(slots, rows, blocks))
        y, cache = attend(*(x[:, part].reshape(-1, 1, *x.shape[2:]) for x in (q, k, v)), cache, context, options, sinks)
        got.append(y.reshape(2, -1, 4, 6))
    np.testing.assert_allclose(jnp.concatenate(got, axis=1), want, rtol=1e-5, atol=1e-5)


def test_masked_keys_are_not_computed():
    """Half of the score matrix is never made, and with a window only a band of it."""

    def products(window):
        x = jnp.zeros((1, 1024, 1, 8))
        text = jax.jit(lambda q: causal_attention(q, q, q, jnp.ones((1, 1024), jnp.int32), None, Options(window))).lower(x).as_text()
        return [line for line in text.splitlines() if "dot_general" in line]

    def made(window):
        """Queries and keys of each product that makes scores."""
        return {
            (int(rows), int(keys)) for line in products(window) for rows, keys in re.findall(r"-> tensor<1x(\d+)x(\d+)xf32>", line)
        } - values

    values = {(rows, 8) for rows in (64, 128, 256)}
    assert made(None) == {(128, keys) for keys in range(128, 513, 128)} | {(256, 512)}
    assert made(64) == {(64, 127)}


def test_no_product_of_the_backward_pass_is_turned_around():
    """XLA moves a transpose that follows a product into it, and then sums over columns of both sides, at a third of the speed."""
    x = jnp.zeros((2, 600, 1, 8))

    def gradients(x):
        return jax.vjp(lambda q, k, v: causal_attention(q, k, v, jnp.ones((2, 600), jnp.int32), None, Options()), x, x, x)[1](x)

    products = [line for line in jax.jit(gradients).lower(x).compile().as_text().splitlines() if " dot(" in line]
    assert len(products) > 7
    assert all("lhs_contracting_dims={2}" in line and "rhs_contracting_dims={1}" in line for line in products)
