"""The one decoder: embedding, a pattern of layers (prefix, body of whole periods, remainder), norm and head.

The body is stacked and scanned over, so that compile time does not depend on depth, or unrolled, which is faster on CPU.
Both have the same initial values and the same names in a checkpoint.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from maxtrain.config import schema
from maxtrain.models.attention import Attention
from maxtrain.models.layers import Mlp, Norm
from maxtrain.models.mla import LatentAttention
from maxtrain.models.moe import MoeMlp
from maxtrain.ops.attention import Context, softcapped
from maxtrain.ops.linear import rows_product
from maxtrain.ops.routing import Balance
from maxtrain.parallel.sharding import constrain, param

REMAT = {
    "none": lambda f: f,
    "dots": lambda f: jax.checkpoint(f, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    "full": jax.checkpoint,
}
ACTIVATION = ("batch", "residual", None)


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
    """A run of unlike layers that is executed, repeated and rematerialised as one: a period of the pattern."""

    def __init__(self, cfg: schema.Model, kinds: tuple[str, ...], dtype: str):
        self.layers = nnx.List([Layer(cfg, cfg.slots[kind], dtype) for kind in kinds])

    def __call__(self, x: jax.Array, context: Context, caches: Any) -> tuple[jax.Array, Any, Balance]:
        balance, new = Balance.zero(), list[Any]()
        for layer, cache in zip(self.layers, caches or [None] * len(self.layers), strict=True):
            x, cache, extra = layer(x, context, cache)
            balance, new = balance + extra, [*new, cache]
        return x, None if caches is None else new, balance

    def cache_spec(self, *args: Any) -> list[Any]:
        """The cache of each layer."""
        return [layer.attention.cache_spec(*args) for layer in self.layers]


@jax.jit
def _traced_once(block: Block, x: jax.Array, context: Context, caches: Any) -> tuple[jax.Array, Any, Balance]:
    """A block with its caches: serving has several programs of unrolled blocks, and equal ones are traced once in each."""
    return block(x, context, caches)


class Output(NamedTuple):
    """hidden [batch, length, embed], what the head multiplies; caches as they came in, updated; the routers' balancing terms."""

    hidden: jax.Array
    caches: Any
    balance: Balance


def _stacked(spec: jax.ShapeDtypeStruct, periods: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((periods, *spec.shape), spec.dtype)


def _of_period(context: Context, caches: Any, period: jax.Array, periods: int) -> Context:
    """The context of a scanned period, whose pages lie behind those of the periods before it."""
    if context.pages is None:
        return context
    _, num_pages, page_size, _ = jax.tree.leaves(caches)[0].shape
    return context._replace(pages=context.pages.shifted(period * (num_pages // periods), page_size))


class Decoder(nnx.Module):
    """A decoder-only transformer, a pytree of its parameters: descriptions when built, arrays after `sharding.initialise`."""

    def __init__(self, cfg: schema.Model, precision: schema.Precision, remat: schema.Remat):
        assert "auto" not in (cfg.layers, precision.compute), "resolve the config for its devices first"
        self.cfg, self.compute, self.remat = cfg, precision.compute, remat.policy
        dtype = precision.params
        self.embedding = param((cfg.vocab_size, cfg.embed), ("vocab", "embed"), std=0.02 * cfg.init_scale, dtype=dtype)
        self.prefix = Block(cfg, cfg.prefix, dtype)
        periods = [Block(cfg, cfg.layer_pattern, dtype) for _ in range(cfg.num_periods)]
        stacked = cfg.layers == "scan" and periods
        self.body: Any = jax.tree.map(lambda s: _stacked(s, cfg.num_periods), periods[0]) if stacked else nnx.List(periods)
        self.remainder = Block(cfg, cfg.remainder, dtype)
        self.norm = Norm(cfg, cfg.embed, dtype)
        std = cfg.init_scale * cfg.embed**-0.5
        self.head = None if cfg.tie_embeddings else param((cfg.vocab_size, cfg.embed), ("vocab", "embed"), std=std, dtype=dtype)

    def __call__(self, tokens: jax.Array, context: Context, caches: Any = None) -> Output:
        """Hidden states for tokens int32 [batch, length]; with caches (`cache_spec`), attention writes and reads their pages."""
        table = constrain(self.embedding.get_value().astype(self.compute), ("vocab", None))  # gathered before it is read
        x = constrain(table[tokens], ACTIVATION)
        if self.cfg.embedding_multiplier != 1.0:
            x = x * jnp.asarray(self.cfg.embedding_multiplier, x.dtype)
        prefix, body, remainder = caches or (None, None, None)
        x, prefix, balance = self._run(self.prefix, x, context, prefix)
        if isinstance(self.body, Block):

            def step(carry: tuple[jax.Array, Any], inputs: tuple[Block, jax.Array]) -> tuple[tuple[jax.Array, Any], Any]:
                x, caches, extra = self._run(inputs[0], carry[0], _of_period(context, carry[1], inputs[1], self.cfg.num_periods), carry[1])
                return (x, caches), extra

            (x, body), extras = jax.lax.scan(step, (x, body), (self.body, jnp.arange(self.cfg.num_periods)))
            balance += jax.tree.map(lambda per_block: per_block.sum(axis=0), extras)
        else:
            new = list[Any]()
            for block, cache in zip(self.body, body or [None] * len(self.body), strict=True):
                x, cache, extra = self._run(block, x, context, cache)
                balance, new = balance + extra, [*new, cache]
            body = new
        x, remainder, extra = self._run(self.remainder, x, context, remainder)
        hidden = self.norm(x)
        if self.cfg.logit_multiplier != 1.0:
            hidden = hidden * self.cfg.logit_multiplier
        return Output(hidden, (prefix, body, remainder), balance + extra)

    def _run(self, block: Block, x: jax.Array, context: Context, caches: Any) -> tuple[jax.Array, Any, Balance]:
        if caches is not None:
            return _traced_once(block, x, context, caches)
        return REMAT[self.remat](lambda block, x, caches: block(x, context, caches))(block, x, caches)

    @property
    def head_weights(self) -> jax.Array:
        """The output head [vocab, embed] in the compute format."""
        return (self.embedding if self.head is None else self.head).get_value().astype(self.compute)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits, float32 [batch, length, vocab], of hidden states [batch, length, embed]."""
        return softcapped(rows_product(hidden, self.head_weights, jnp.float32), self.cfg.final_softcap)

    def cache_spec(self, num_pages: int, page_size: int) -> Any:
        """Abstract pools of pages for the layers; all periods of a scanned body share one, in which each has its part."""
        dtype = jnp.dtype(self.compute)
        if isinstance(self.body, Block):
            body: Any = self.body.cache_spec(num_pages * self.cfg.num_periods, page_size, dtype)
        else:
            body = [block.cache_spec(num_pages, page_size, dtype) for block in self.body]
        return self.prefix.cache_spec(num_pages, page_size, dtype), body, self.remainder.cache_spec(num_pages, page_size, dtype)
