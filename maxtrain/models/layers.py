"""The parts every layer is made of: norm, gated feed-forward, and the matrix product they share."""

from __future__ import annotations

import jax
from flax import nnx

from maxtrain.config import schema
from maxtrain.ops.gated import GATED
from maxtrain.ops.linear import linear
from maxtrain.ops.norm import rms_norm
from maxtrain.parallel.sharding import constrain, param


def matmul(x: jax.Array, weight: nnx.Param) -> jax.Array:
    """x [..., in] times weight [in, out] -> [..., out], in the format of x."""
    return linear(x, weight.get_value().astype(x.dtype))


class RmsNorm(nnx.Module):
    """Root-mean-square norm with a learned scale (Zhang and Sennrich, 2019), computed in float32."""

    def __init__(self, cfg: schema.Model, width: int, dtype: str):
        self.eps = cfg.norm_eps
        self.scale = param((width,), ("norm",), dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale.get_value(), self.eps)


class Mlp(nnx.Module):
    """Gated feed-forward: down(act(gate(x)) * up(x)). Shapes: x [batch, length, embed]."""

    def __init__(self, cfg: schema.Model, dtype: str):
        self.activation = cfg.activation
        scale = cfg.init_scale
        self.gate = param((cfg.embed, cfg.mlp), ("embed", "mlp"), std=scale * cfg.embed**-0.5, dtype=dtype)
        self.up = param((cfg.embed, cfg.mlp), ("embed", "mlp"), std=scale * cfg.embed**-0.5, dtype=dtype)
        self.down = param((cfg.mlp, cfg.embed), ("mlp", "embed"), std=scale * (cfg.mlp * 2 * cfg.num_layers) ** -0.5, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = GATED[self.activation](matmul(x, self.gate), matmul(x, self.up))
        return matmul(constrain(hidden, ("batch", "length", "mlp")), self.down)
