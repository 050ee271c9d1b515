"""Chunked cross-entropy against the textbook formula in numpy and its gradient by autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxtrain.ops.loss import cross_entropy


def case(length=20, vocab=37):
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(3, length, 8)).astype(np.float32), rng.normal(size=(vocab, 8)).astype(np.float32)
    targets = rng.integers(0, vocab, (3, length)).astype(np.int32)
    weights = (rng.random((3, length)) < 0.7).astype(np.float32)
    return hidden, head, targets, weights


def plain(hidden, head, targets, weights, z_loss, softcap=None):
    logits = hidden @ head.T
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    lse = jax.nn.logsumexp(logits, axis=-1)
    ce = lse - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return jnp.sum(weights * (ce + z_loss * lse**2)), jnp.sum(weights * ce, axis=1)


@pytest.mark.parametrize("chunk", [1, 7, 20, 64])
@pytest.mark.parametrize(("z_loss", "softcap"), [(0.0, None), (0.01, None), (0.01, 2.0)])
def test_value_and_gradient(chunk, z_loss, softcap):
    hidden, head, targets, weights = case()
    ours = lambda h, w: cross_entropy(h, w, targets, weights, z_loss=z_loss, chunk=chunk, softcap=softcap)  # noqa: E731
    theirs = lambda h, w: plain(h, w, targets, weights, z_loss, softcap)  # noqa: E731
    np.testing.assert_allclose(ours(hidden, head)[0], theirs(hidden, head)[0], rtol=1e-6)
    np.testing.assert_allclose(ours(hidden, head)[1], theirs(hidden, head)[1], rtol=1e-6)
    got = jax.grad(lambda *a: 3 * ours(*a)[0], argnums=(0, 1))(hidden, head)
    want = jax.grad(lambda *a: 3 * theirs(*a)[0], argnums=(0, 1))(hidden, head)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert np.abs(got[0][weights == 0]).max() == 0


def test_logits_are_never_whole():
    hidden, head, targets, weights = case(length=64, vocab=97)
    grad = jax.grad(lambda h, w: cross_entropy(h, w, targets, weights, z_loss=0.0, chunk=16)[0], argnums=(0, 1))
    text = jax.jit(grad).lower(hidden, head).as_text()
    assert "48x97xf32" in text
    assert "192x97x" not in text
    assert "3x64x97x" not in text
