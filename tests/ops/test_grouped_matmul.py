"""The CPU kernel for products by group and the native form with its gradient, against a loop and jax's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxtrain.ops import grouped_matmul as module
from maxtrain.ops.grouped_matmul import boxed_matmul, grouped_matmul
from maxtrain.ops.linear import Weight


@pytest.mark.parametrize("sizes", [[5, 0, 130, 65], [0, 0, 0, 200], [50, 50, 50, 50], [5, 70, 0, 60], [0, 0, 0, 0]])
@pytest.mark.parametrize("kernels", ["cpu", "native"])
def test_value_and_gradient(sizes, kernels, monkeypatch):
    """Rows behind the last group are in none: their results are 0, and they change no gradient."""
    rng = np.random.default_rng(0)
    x, w = jnp.asarray(rng.normal(size=(200, 6)), jnp.float32), jnp.asarray(rng.normal(size=(4, 6, 10)), jnp.float32)
    sizes = jnp.array(sizes, jnp.int32)
    group = np.repeat(np.arange(4), sizes)
    want = np.zeros((200, 10))
    for row, g in enumerate(group):
        want[row] = x[row] @ w[g]
    if kernels == "native":
        monkeypatch.setattr(module, "KERNELS", {})
    product = lambda x, w: grouped_matmul(x, Weight.of(w, x.dtype), sizes)  # noqa: E731
    np.testing.assert_allclose(product(x, w), want, rtol=1e-5, atol=1e-5)
    ours = jax.grad(lambda x, w: jnp.sum(jnp.sin(product(x, w))), argnums=(0, 1))(x, w)
    theirs = jax.grad(lambda x, w: jnp.sum(jnp.sin(jax.lax.ragged_dot(x, w, sizes))), argnums=(0, 1))(x, w)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_boxes_are_groups_of_equal_size():
    rng = np.random.default_rng(0)
    x, w = jnp.asarray(rng.normal(size=(4, 5, 6)), jnp.float32), jnp.asarray(rng.normal(size=(4, 6, 10)), jnp.float32)
    np.testing.assert_array_equal(boxed_matmul(x, Weight.of(w, x.dtype)), x @ w)
    ours = jax.grad(lambda x, w: jnp.sum(jnp.sin(boxed_matmul(x, Weight.of(w, x.dtype)))), argnums=(0, 1))(x, w)
    theirs = jax.grad(lambda x, w: jnp.sum(jnp.sin(x @ w)), argnums=(0, 1))(x, w)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
