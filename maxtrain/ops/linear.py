"""The matrix product of the model, with a gradient spelled so that XLA:CPU reaches the speed of its matmul kernel.

Left alone, XLA:CPU fuses the element-wise neighbours of a product into transposed copies of its operands and calls the
kernel in a slow orientation. `settle` marks where a value is to be finished before it is read; elsewhere than on CPU it
does nothing, since there such fusions are what one wants.
"""

from __future__ import annotations

from typing import TypeVar

import jax

from maxtrain.parallel.sharding import is_split, platform

T = TypeVar("T")


def settle(values: T) -> T:
    """The same arrays, on CPU computed in full before anything that reads them."""
    return jax.lax.optimization_barrier(values) if platform() == "cpu" else values


@jax.custom_vjp
def linear(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., in] times w [in, out] -> [..., out]."""
    return x @ w


def _forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ w, (x, w)


def _backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    (x, w), dy = saved, settle(dy)
    x = settle(x)
    dx = jax.lax.dot_general(dy, w, (((dy.ndim - 1,), (1,)), ((), ())))
    if is_split():  # no reshape: batch and length may lie over different devices, and merged they would have to be gathered
        sums = tuple(range(x.ndim - 1))
        return dx, jax.lax.dot_general(x, dy, ((sums, sums), ((), ())))
    rows, d_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    # The CPU kernel packs the narrower operand faster when it stands on the left
    dw = rows.T @ d_rows if w.shape[0] <= w.shape[1] else settle(d_rows.T @ rows).T
    return dx, dw


linear.defvjp(_forward, _backward)
