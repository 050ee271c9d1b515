"""Gated activations: act(gate) * up, with a gradient that keeps only its inputs."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from maxtrain.ops.linear import settle

Gated = Callable[[jax.Array, jax.Array], jax.Array]


def gated(activation: Callable[[jax.Array], jax.Array]) -> Gated:
    """The gated form of an element-wise activation: (gate, up), alike in shape, -> activation(gate) * up."""
    return lean(lambda gate, up: activation(gate) * up)


def clamped_swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """GPT-OSS: gate * sigmoid(1.702 gate) * (up + 1), the gate cut off above 7 and up beyond +-7."""
    gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
    return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)


def lean(plain: Gated) -> Gated:
    """An element-wise function of gate and up whose gradient keeps only the two."""

    @jax.custom_vjp
    def function(gate: jax.Array, up: jax.Array) -> jax.Array:
        return settle(plain(gate, up))

    def forward(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return function(gate, up), (gate, up)

    def backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        return settle(jax.vjp(plain, *saved)[1](settle(dy)))

    function.defvjp(forward, backward)
    return function


GATED = {
    "silu": gated(jax.nn.silu),
    "gelu": gated(partial(jax.nn.gelu, approximate=False)),
    "gelu_tanh": gated(partial(jax.nn.gelu, approximate=True)),
    "clamped_swiglu": lean(clamped_swiglu),
}
