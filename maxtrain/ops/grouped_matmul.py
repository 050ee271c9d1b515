"""Products of rows with the weights of their group (expert), the kernel chosen by platform.

`ragged_dot` is the native form on TPU and GPU; on CPU it multiplies every row with every group, so there rows are padded
to blocks of one group each and a loop over blocks multiplies with that group's weights. The gradient of the weights is
summed in float32.
"""

import jax
import jax.numpy as jnp

from maxtrain.ops.linear import Weight
from maxtrain.parallel.sharding import platform

BLOCK = 64  # rows of one group multiplied together on CPU
OF_WEIGHTS = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[])


def grouped_matmul(x: jax.Array, weights: Weight, group_sizes: jax.Array) -> jax.Array:
    """Row i of x times the weights of the group it lies in; 0 for rows behind the last group, which cost nothing on TPU.

    Shapes: x [rows, in], sorted by group; weights [groups, in, out]; group_sizes int32 [groups]; result [rows, out].
    """
    rows = group_sizes.sum()
    return _cut(KERNELS.get(platform(), _ragged)(_cut(x, rows), weights, group_sizes), rows)


@jax.custom_vjp
def _cut(y: jax.Array, rows: jax.Array) -> jax.Array:
    """y with 0 behind its first rows, where a kernel leaves anything; the same is done to its gradient."""
    return jnp.where(jnp.arange(y.shape[0])[:, None] < rows, y, 0)


_cut.defvjp(lambda y, rows: (_cut(y, rows), rows), lambda rows, dy: (_cut(dy, rows), None))


@jax.custom_vjp
def _ragged(x: jax.Array, weights: Weight, group_sizes: jax.Array) -> jax.Array:
    """The form of `grouped_matmul` that a compiler for accelerators knows."""
    return jax.lax.ragged_dot(x, weights.value, group_sizes)


def _ragged_backward(saved: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array, Weight, None]:
    x, weights, group_sizes = saved
    (dx,) = jax.linear_transpose(lambda x: jax.lax.ragged_dot(x, weights, group_sizes), x)(dy)
    return dx, Weight.gradient(jax.lax.ragged_dot_general(x, dy, group_sizes, OF_WEIGHTS, preferred_element_type=jnp.float32)), None


_ragged.defvjp(lambda x, weights, sizes: (_ragged(x, weights, sizes), (x, weights.value, sizes)), _ragged_backward)


def _blocked(x: jax.Array, weights: Weight, group_sizes: jax.Array) -> jax.Array:
    """The CPU form of `grouped_matmul`."""
    num_groups, num_rows = weights.value.shape[0], x.shape[0]
    padded_sizes = -(-group_sizes // BLOCK) * BLOCK
    ends, padded_ends = jnp.cumsum(group_sizes), jnp.cumsum(padded_sizes)
    group = jnp.repeat(jnp.arange(num_groups), group_sizes, total_repeat_length=num_rows)
    place = jnp.arange(num_rows) - (ends - group_sizes)[group] + (padded_ends - padded_sizes)[group]
    num_blocks = -(-num_rows // BLOCK) + num_groups
    blocks = jnp.zeros((num_blocks * BLOCK, x.shape[1]), x.dtype).at[place].set(x, unique_indices=True)
    owner = jnp.searchsorted(padded_ends, jnp.arange(num_blocks) * BLOCK, side="right")
    y = _block_products(blocks.reshape(num_blocks, BLOCK, -1), weights, jnp.minimum(owner, num_groups - 1))
    return y.reshape(num_blocks * BLOCK, -1)[place]


@jax.custom_vjp
def _block_products(blocks: jax.Array, weights: Weight, owner: jax.Array) -> jax.Array:
    """blocks [n, BLOCK, in] times weights[owner[n]] -> [n, BLOCK, out]."""
    return jax.lax.map(lambda pair: pair[0] @ weights.value[pair[1]], (blocks, owner))


def _forward(blocks: jax.Array, weights: Weight, owner: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _block_products(blocks, weights, owner), (blocks, weights.value, owner)


def _backward(saved: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array, Weight, None]:
    blocks, weights, owner = saved

    def one(dw: jax.Array, row: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, g, group = row
        return dw.at[group].add(jnp.matmul(x.T, g, preferred_element_type=jnp.float32)), g @ weights[group].T

    dw, dx = jax.lax.scan(one, jnp.zeros(weights.shape, jnp.float32), (blocks, dy, owner))
    return dx, Weight.gradient(dw), None


_block_products.defvjp(_forward, _backward)


KERNELS = {"cpu": _blocked}


@jax.custom_vjp
def boxed_matmul(x: jax.Array, weights: Weight) -> jax.Array:
    """x [groups, rows, in], as many rows of each group, times weights [groups, in, out] -> [groups, rows, out]."""
    return x @ weights.value


def _boxed_backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, Weight]:
    x, weights = saved
    dx = jax.lax.dot_general(dy, weights, (((2,), (2,)), ((0,), (0,))))
    dw = jax.lax.dot_general(dy, x, (((1,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)
    return dx, Weight.gradient(dw.swapaxes(1, 2))


boxed_matmul.defvjp(lambda x, weights: (boxed_matmul(x, weights), (x, weights.value)), _boxed_backward)
