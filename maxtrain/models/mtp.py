"""Multi-token prediction (DeepSeek-V3, section 2.2): a module that predicts the token after the next from the one before it."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maxtrain.config import schema
from maxtrain.models.block import Layer
from maxtrain.models.layers import Norm, matmul
from maxtrain.ops.attention import Context
from maxtrain.ops.routing import Balance
from maxtrain.parallel.sharding import param


class Predictor(nnx.Module):
    """One module. Shapes: embedded and hidden [batch, length, embed]; the result is what the head multiplies."""

    def __init__(self, cfg: schema.Model, dtype: str):
        self.embedding_norm, self.hidden_norm = Norm(cfg, cfg.embed, dtype), Norm(cfg, cfg.embed, dtype)
        std = cfg.init_scale * (2 * cfg.embed) ** -0.5
        self.projection = param((2 * cfg.embed, cfg.embed), (None, "embed"), std=std, dtype=dtype)
        self.layer = Layer(cfg, cfg.slots[cfg.kinds[-1]], dtype)
        self.norm = Norm(cfg, cfg.embed, dtype)

    def __call__(self, embedded: jax.Array, hidden: jax.Array, context: Context, cache: Any) -> tuple[jax.Array, Any, Balance]:
        joined = jnp.concatenate([self.embedding_norm(embedded), self.hidden_norm(hidden)], axis=-1)
        x, cache, balance = self.layer(matmul(joined, self.projection), context, cache)
        return self.norm(x), cache, balance
