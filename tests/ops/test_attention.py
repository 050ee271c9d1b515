"""Blocked causal attention against the whole score matrix, value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxtrain.ops.attention import causal_attention


def whole(q, k, v, segments, window):
    """The textbook form: every score, one mask."""
    length, group = q.shape[1], q.shape[2] // k.shape[2]
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, jnp.repeat(k, group, axis=2))
    distance = jnp.arange(length)[:, None] - jnp.arange(length)
    visible = (distance >= 0) & (distance < (window or length)) & (segments[:, :, None] == segments[:, None])
    return jnp.einsum(
        "bhqk,bkhd->bqhd", jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1), jnp.repeat(v, group, axis=2)
    )


@pytest.mark.parametrize(("length", "window"), [(5, None), (150, None), (150, 7), (150, 100), (1100, 65)])
def test_value_and_gradient(length, window):
    rng = np.random.default_rng(0)
    q, k, v, out = (jnp.asarray(rng.normal(size=(2, length, heads, 8)), jnp.float32) for heads in (4, 2, 2, 4))
    segments = jnp.asarray(np.sort(rng.integers(1, 4, (2, length))), jnp.int32)
    got, back = jax.vjp(lambda *a: causal_attention(*a, segments, window), q, k, v)
    want, reference = jax.vjp(lambda *a: whole(*a, segments, window), q, k, v)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    for a, b in zip(back(out), reference(out), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def test_masked_keys_are_not_computed():
    """Half of the score matrix is never made, and with a window only a band of it."""

    def products(window):
        x = jnp.zeros((1, 1024, 1, 8))
        text = jax.jit(lambda q: causal_attention(q, q, q, jnp.ones((1, 1024), jnp.int32), window)).lower(x).as_text()
        return [line for line in text.splitlines() if "dot_general" in line]

    assert not any("1x1024x1024" in line for line in products(None))
    assert any("1x64x1024" in line for line in products(None))
    assert not any("1x64x256x" in line or "1x64x1024x" in line for line in products(64))
