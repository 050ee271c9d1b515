"""A decoder layer, and the block of layers that is executed and repeated as one."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from maxtrain.config import schema
from maxtrain.models.attention import Attention
from maxtrain.models.layers import Mlp, Norm
from maxtrain.models.mla import LatentAttention
from maxtrain.models.moe import MoeMlp
from maxtrain.ops.attention import Context
from maxtrain.ops.routing import Balance
from maxtrain.parallel.sharding import constrain

ACTIVATION = ("batch", "residual", None)
Sparing = Callable[[Callable[..., Any]], Callable[..., Any]]


class Layer(nnx.Module):
    """One decoder layer: attention and feed-forward, each added to the residual stream x [batch, length, embed].

    Norms stand where `model.norm_placement` says: x + part(norm(x)), x + norm(part(x)), x + norm(part(norm(x))), or for both
    parts at once x + attention(norm(x)) + feed_forward(norm(x)).
    """

    def __init__(self, cfg: schema.Model, slot: schema.Slot, dtype: str):
        self.parallel, self.multiplier = cfg.norm_placement == "parallel", cfg.residual_multiplier

        def norm(*placements: str) -> Norm | None:
            return Norm(cfg, cfg.embed, dtype) if cfg.norm_placement in placements else None

        self.attention_norm = norm("pre", "sandwich", "parallel")
        self.attention = (LatentAttention if cfg.mla else Attention)(cfg, slot, dtype)
        self.attention_post_norm = norm("post", "sandwich")
        self.feed_forward_norm = norm("pre", "sandwich")
        self.feed_forward = MoeMlp(cfg, dtype) if slot.feed_forward == "moe" else Mlp(cfg, dtype)
        self.feed_forward_post_norm = norm("post", "sandwich")

    def __call__(self, x: jax.Array, context: Context, cache: Any) -> tuple[jax.Array, Any, Balance]:
        normed = _normed(x, self.attention_norm)
        y, cache = self.attention(normed, context, cache)
        x = self._added(x, y, self.attention_post_norm)
        normed = normed if self.parallel else _normed(x, self.feed_forward_norm)
        if isinstance(self.feed_forward, MoeMlp):
            y, balance = self.feed_forward(normed, context.segments)
        else:
            y, balance = self.feed_forward(normed), Balance.zero()
        return self._added(x, y, self.feed_forward_post_norm), cache, balance

    def _added(self, x: jax.Array, y: jax.Array, norm: Norm | None) -> jax.Array:
        y = _normed(y, norm)
        return constrain(x + (y if self.multiplier == 1.0 else y * self.multiplier), ACTIVATION)


def _normed(x: jax.Array, norm: Norm | None) -> jax.Array:
    return x if norm is None else norm(x)


class Block(nnx.Module):
    """A run of unlike layers that is executed and repeated as one: a period of the pattern."""

    def __init__(self, cfg: schema.Model, kinds: tuple[str, ...], dtype: str):
        self.layers = nnx.List([Layer(cfg, cfg.slots[kind], dtype) for kind in kinds])

    def __call__(self, x: jax.Array, context: Context, caches: Any, sparing: Sparing = lambda run: run) -> tuple[jax.Array, Any, Balance]:
        """The layers one after the other; `sparing` makes each of them keep less for its backward pass."""
        run = sparing(lambda layer, x, cache: layer(x, context, cache))
        balance, new = Balance.zero(), list[Any]()
        for layer, cache in zip(self.layers, caches or [None] * len(self.layers), strict=True):
            x, cache, extra = run(layer, x, cache)
            balance, new = balance + extra, [*new, cache]
        return x, None if caches is None else new, balance

    def cache_spec(self, *args: Any) -> list[Any]:
        """The cache of each layer."""
        return [layer.attention.cache_spec(*args) for layer in self.layers]
