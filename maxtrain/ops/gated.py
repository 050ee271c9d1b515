"""Gated activations: act(gate) * up, with a gradient that keeps only its inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax

from maxtrain.ops.linear import settle


def gated(activation: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The gated form of an element-wise activation: (gate, up), alike in shape, -> activation(gate) * up."""

    def plain(gate: jax.Array, up: jax.Array) -> jax.Array:
        return activation(gate) * up

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
}
