"""The products of the model with its parameters, whose gradients are sums over tokens and are taken in float32.

The gradient of the matrix product is spelled so that XLA:CPU reaches the speed of its matmul kernel. Left alone, it fuses the
element-wise neighbours of a product into transposed copies of its operands and calls the kernel in a slow orientation. `settle`
marks where a value is to be finished before it is read; elsewhere than on CPU it does nothing, since there such fusions are what
one wants.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp

from maxtrain.parallel.sharding import is_split, platform

T = TypeVar("T")


def products_in(compute: str) -> contextlib.AbstractContextManager[None]:
    """Within it, the products of a model that computes in this format are traced at its full precision.

    Left to their default, TPUs multiply float32 in one pass of bfloat16 and NVIDIA's GPUs in TF32. The whole program is traced within,
    since a backward pass is traced after the forward pass has returned.
    """
    return jax.default_matmul_precision("highest" if compute == "float32" else None)


def settle(values: T) -> T:
    """The same arrays, on CPU computed in full before anything that reads them."""
    return jax.lax.optimization_barrier(values) if platform() == "cpu" else values


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Weight:
    """A parameter as products read it: `value` in the compute format, and `wide` in float32, which takes their gradient.

    A cotangent has the format of what it belongs to, so a gradient of `value` would be added up in the compute format, over devices
    and microbatches, blocks and repeated rows; in bfloat16 a sum no longer grows once it is 256 times what is added. Nothing reads
    `wide`, so it is neither copied nor gathered.
    """

    value: jax.Array
    wide: jax.Array

    @classmethod
    def of(cls, param: jax.Array, dtype: Any) -> Weight:
        """A parameter to be computed with in this format."""
        return cls(param.astype(dtype), param.astype(jnp.float32))

    @classmethod
    def gradient(cls, d_wide: jax.Array) -> Any:
        """What the backward pass of a product returns for a weight."""
        return cls(cast(Any, None), d_wide)


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
    """x [..., in] times a parameter w [in, out], in the format of x, -> [..., out]."""
    if isinstance(w, Transposed):
        return rows_product(x, w.rows.astype(x.dtype))
    return _linear(x, Weight.of(w, x.dtype))


@jax.custom_vjp
def _linear(x: jax.Array, w: Weight) -> jax.Array:
    return x @ w.value


def _forward(x: jax.Array, w: Weight) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ w.value, (x, w.value)


def _backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, Weight]:
    (x, w), dy = saved, settle(dy)
    x = settle(x)
    dx = jax.lax.dot_general(dy, w, (((dy.ndim - 1,), (1,)), ((), ())))
    if is_split():  # no reshape: batch and length may lie over different devices, and merged they would have to be gathered
        sums = tuple(range(x.ndim - 1))
        return dx, Weight.gradient(jax.lax.dot_general(x, dy, ((sums, sums), ((), ())), preferred_element_type=jnp.float32))
    rows, d_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    product = partial(jnp.matmul, preferred_element_type=jnp.float32)
    # The CPU kernel packs the narrower operand faster when it stands on the left
    dw = product(rows.T, d_rows) if w.shape[0] <= w.shape[1] else settle(product(d_rows.T, rows)).T
    return dx, Weight.gradient(dw)


_linear.defvjp(_forward, _backward)


@jax.custom_vjp
def rows_at(table: Weight, indices: jax.Array) -> jax.Array:
    """Rows of a table [rows, width] at indices int [...] -> [..., width]."""
    return table.value[indices]


def _rows_backward(saved: tuple[Weight, jax.Array], dy: jax.Array) -> tuple[Weight, None]:
    table, indices = saved
    return Weight.gradient(jnp.zeros_like(table.wide).at[indices].add(dy.astype(jnp.float32))), None


rows_at.defvjp(lambda table, indices: (rows_at(table, indices), (table, indices)), _rows_backward)


@jax.custom_vjp
def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """y [..., out] plus bias [out], in the format of y; the bias's gradient is summed in float32."""
    return y + bias.astype(y.dtype)


def _bias_backward(bias: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    return dy, jnp.sum(dy, axis=tuple(range(dy.ndim - 1)), dtype=jnp.float32).astype(bias.dtype)


add_bias.defvjp(lambda y, bias: (add_bias(y, bias), bias), _bias_backward)
