"""The parts every layer is made of: norm, gated feed-forward, and the matrix product they share."""

from collections.abc import Callable

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maxtrain.config import schema
from maxtrain.ops.gated import GATED
from maxtrain.ops.linear import add_bias, linear
from maxtrain.ops.norm import float32_rms_norm, layer_norm, one_plus_rms_norm, rms_norm
from maxtrain.parallel.sharding import constrain, param

PRODUCT = "product"  # what remat calls the products with weights


def matmul(x: jax.Array, weight: nnx.Param, bias: nnx.Param | None = None) -> jax.Array:
    """x [..., in] times weight [in, out], plus bias [out], -> [..., out], in the format of x."""
    y = checkpoint_name(linear(x, weight.get_value()), PRODUCT)
    return y if bias is None else add_bias(y, bias.get_value())


NORMS: dict[str, tuple[Callable[..., jax.Array], float | None]] = {
    "rms": (rms_norm, None),
    "rms_float32": (float32_rms_norm, None),
    "rms_one_plus": (one_plus_rms_norm, 0.0),
    "layer": (layer_norm, None),
}  # (norm, spread of the scale)


class Norm(nnx.Module):
    """The norm of `model.norm` with a learned scale, that begins as the identity; `cfg.norm_eps` unless told otherwise.

    Shapes: x [..., width], or [..., heads, width] with a scale for each head.
    """

    def __init__(self, cfg: schema.Model, width: int, dtype: str, eps: float | None = None, heads: int | None = None):
        self.kind, self.eps = cfg.norm, eps or cfg.norm_eps
        shape, axes = ((width,), ("norm",)) if heads is None else ((heads, width), (None, "norm"))
        self.scale = param(shape, axes, std=NORMS[cfg.norm][1], dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return NORMS[self.kind][0](x, self.scale.get_value(), self.eps)


class Mlp(nnx.Module):
    """Gated feed-forward: down(act(gate(x)) * up(x)); `cfg.mlp` wide, with `cfg.mlp_bias`, unless told otherwise.

    Shapes: x [batch, length, embed].
    """

    def __init__(self, cfg: schema.Model, dtype: str, width: int | None = None):
        self.activation = cfg.activation
        scale, biased, width = cfg.init_scale, cfg.mlp_bias and width is None, width or cfg.mlp
        self.gate = param((cfg.embed, width), ("embed", "mlp"), std=scale * cfg.embed**-0.5, dtype=dtype)
        self.up = param((cfg.embed, width), ("embed", "mlp"), std=scale * cfg.embed**-0.5, dtype=dtype)
        self.down = param((width, cfg.embed), ("mlp", "embed"), std=scale * (width * 2 * cfg.num_layers) ** -0.5, dtype=dtype)
        sizes = ((width, "mlp"), (width, "mlp"), (cfg.embed, "embed"))
        biases = (param((size,), (axis,), std=0.0, dtype=dtype) if biased else None for size, axis in sizes)
        self.gate_bias, self.up_bias, self.down_bias = biases

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = GATED[self.activation](matmul(x, self.gate, self.gate_bias), matmul(x, self.up, self.up_bias))
        return matmul(constrain(hidden, ("batch", "length", "mlp")), self.down, self.down_bias)
