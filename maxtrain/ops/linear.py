"""The matrix product of the model, with a gradient spelled so that XLA:CPU reaches the speed of its matmul kernel.

Left alone, XLA:CPU fuses the element-wise neighbours of a product into transposed copies of its operands and calls the
kernel in a slow orientation. `settle` marks where a value is to be finished before it is read; elsewhere than on CPU it
does nothing, since there such fusions are what one wants.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import jax

from maxtrain.parallel.sharding import is_split, platform

T = TypeVar("T")


def settle(values: T) -> T:
    """The same arrays, on CPU computed in full before anything that reads them."""
    return jax.lax.optimization_barrier(values) if platform() == "cpu" else values


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Transposed:
    """A weight [in, out] kept as rows [out, in]: how XLA:CPU multiplies few activations fastest (`serving.engine`).

    On 2 cores with AVX-512, GFLOP/s of x @ w / w.T @ x.T at 1, 8, 32, 64, 288 activations and 576 x 1536: 16 / 20, 69 / 81,
    134 / 170, 162 / 187, 171 / 166; the first and the last as x @ rows.T.
    """

    rows: jax.Array

    def astype(self, dtype: Any) -> Transposed:
        """In another format."""
        return Transposed(self.rows.astype(dtype))


def rows_of(w: jax.Array | Transposed) -> jax.Array:
    """The weight [in, out] as rows [out, in]."""
    return w.rows if isinstance(w, Transposed) else w.T


def rows_product(x: jax.Array, rows: jax.Array, dtype: Any = None) -> jax.Array:
    """x [..., in] times the transpose of rows [out, in], -> [..., out], with sums in `dtype`."""
    flat = x.reshape(-1, x.shape[-1])
    if platform() == "cpu" and 1 < len(flat) <= 128:
        y = settle(jax.lax.dot_general(rows, settle(flat.T), (((1,), (0,)), ((), ())), preferred_element_type=dtype)).T
    else:
        y = jax.lax.dot_general(flat, rows, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
    return y.reshape(*x.shape[:-1], -1)


def linear(x: jax.Array, w: jax.Array | Transposed) -> jax.Array:
    """x [..., in] times w [in, out] -> [..., out]."""
    return rows_product(x, w.rows) if isinstance(w, Transposed) else _linear(x, w)


@jax.custom_vjp
def _linear(x: jax.Array, w: jax.Array) -> jax.Array:
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


_linear.defvjp(_forward, _backward)
