"""The one decoder: embedding, a pattern of layers (prefix, body of whole periods, remainder), norm and head.

The body is stacked and scanned over, so that compile time does not depend on depth, or unrolled, which is faster on CPU.
Both have the same initial values and the same names in a checkpoint.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from maxtrain.config import schema
from maxtrain.models.block import ACTIVATION, Block
from maxtrain.models.layers import PRODUCT, Norm
from maxtrain.models.mtp import Predictor
from maxtrain.ops.attention import Context, softcapped
from maxtrain.ops.linear import Weight, rows_at, rows_product
from maxtrain.ops.pages import size_of
from maxtrain.ops.routing import Balance
from maxtrain.parallel.pipeline import run_stages
from maxtrain.parallel.sharding import constrain, param, parts

_keep = jax.checkpoint_policies
REMAT = {
    "none": None,
    "dots": _keep.save_from_both_policies(_keep.dots_with_no_batch_dims_saveable, _keep.save_only_these_names(PRODUCT)),
    "full": _keep.nothing_saveable,
}  # what a layer keeps for the backward pass; None is everything
Cached = Callable[[Block, jax.Array, Context, Any], tuple[jax.Array, Any, Balance]]


def _traced_once() -> Cached:
    """A function that runs a block with its caches, and traces equal blocks once.

    It is made anew for each trace of a decoder, because `jax.jit` keeps traces by shapes alone: the layout in use, which blocks
    read while they are traced, is another one for the next engine.
    """

    def run(block: Block, x: jax.Array, context: Context, caches: Any) -> tuple[jax.Array, Any, Balance]:
        return block(x, context, caches)

    return jax.jit(run)


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
    num_pages, page_size = size_of(caches)
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
        self.mtp = nnx.List([Predictor(cfg, dtype) for _ in range(cfg.mtp.num_layers if cfg.mtp else 0)])

    def __call__(self, tokens: jax.Array, context: Context, caches: Any = None) -> Output:
        """Hidden states for tokens int32 [batch, length]; with caches (`cache_spec`), attention writes and reads their pages."""
        x = self._embed(tokens)
        prefix, body, remainder = caches or (None, None, None)
        run = self._run if caches is None else _traced_once()
        x, prefix, balance = run(self.prefix, x, context, prefix)
        if parts("layers") > 1 and caches is None:

            def period(block: Block, x: jax.Array, rows: Context) -> tuple[jax.Array, Balance]:
                x, _, extra = self._run(block, x, rows._replace(indices=context.indices), None)
                return x, extra

            x, extra = run_stages(period, self.body, x, ACTIVATION, context._replace(indices=None), REMAT[self.remat])
            balance += extra
        elif isinstance(self.body, Block):

            def step(carry: tuple[jax.Array, Any], inputs: tuple[Block, jax.Array]) -> tuple[tuple[jax.Array, Any], Any]:
                x, caches, extra = run(inputs[0], carry[0], _of_period(context, carry[1], inputs[1], self.cfg.num_periods), carry[1])
                return (x, caches), extra

            (x, body), extras = jax.lax.scan(step, (x, body), (self.body, jnp.arange(self.cfg.num_periods)))
            balance += jax.tree.map(lambda per_block: per_block.sum(axis=0), extras)
        else:
            new = list[Any]()
            for block, cache in zip(self.body, body or [None] * len(self.body), strict=True):
                x, cache, extra = run(block, x, context, cache)
                balance, new = balance + extra, [*new, cache]
            body = new
        x, remainder, extra = run(self.remainder, x, context, remainder)
        return Output(self._scaled(self.norm(x)), (prefix, body, remainder), balance + extra)

    def ahead(self, depth: int, tokens: jax.Array, hidden: jax.Array, context: Context, cache: Any = None) -> Output:
        """What module `depth` of multi-token prediction makes of the hidden states [batch, length, embed] of the one before it.

        Args:
            depth: 0 for the first, which goes on from `Output.hidden` of the decoder.
            tokens: int32 [batch, length], at each position the token `depth + 1` further on.
            hidden: of the module before.
            context: that of the decoder.
            cache: of the module's attention (`ahead_cache_spec`).
        """

        def run(module: Predictor, embedded: jax.Array, hidden: jax.Array, cache: Any) -> tuple[jax.Array, Any, Balance]:
            return module(embedded, hidden, context, cache)

        hidden, cache, balance = (self._sparing(run) if cache is None else run)(self.mtp[depth], self._embed(tokens), hidden, cache)
        return Output(self._scaled(hidden), cache, balance)

    def _embed(self, tokens: jax.Array) -> jax.Array:
        table = jax.tree.map(lambda t: constrain(t, ("vocab", None)), Weight.of(self.embedding.get_value(), self.compute))
        x = constrain(rows_at(table, tokens), ACTIVATION)  # the table is gathered before it is read
        return x if self.cfg.embedding_multiplier == 1.0 else x * jnp.asarray(self.cfg.embedding_multiplier, x.dtype)

    def _scaled(self, hidden: jax.Array) -> jax.Array:
        return hidden if self.cfg.logit_multiplier == 1.0 else hidden * self.cfg.logit_multiplier

    def _run(self, block: Block, x: jax.Array, context: Context, caches: None) -> tuple[jax.Array, Any, Balance]:
        return block(x, context, caches, self._sparing)

    def _sparing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function if self.remat == "none" else jax.checkpoint(function, policy=REMAT[self.remat])

    @property
    def head_weights(self) -> jax.Array:
        """The output head [vocab, embed], in the format of the parameters."""
        return (self.embedding if self.head is None else self.head).get_value()

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits, float32 [batch, length, vocab], of hidden states [batch, length, embed]."""
        return softcapped(rows_product(hidden, self.head_weights.astype(hidden.dtype), jnp.float32), self.cfg.final_softcap)

    def cache_spec(self, num_pages: int, page_size: int) -> Any:
        """Abstract pools of pages for the layers; all periods of a scanned body share one, in which each has its part."""
        dtype = jnp.dtype(self.compute)
        if isinstance(self.body, Block):
            body: Any = self.body.cache_spec(num_pages * self.cfg.num_periods, page_size, dtype)
        else:
            body = [block.cache_spec(num_pages, page_size, dtype) for block in self.body]
        return self.prefix.cache_spec(num_pages, page_size, dtype), body, self.remainder.cache_spec(num_pages, page_size, dtype)

    def ahead_cache_spec(self, num_pages: int, page_size: int) -> Any:
        """The pool of the first module of multi-token prediction."""
        return self.mtp[0].layer.attention.cache_spec(num_pages, page_size, jnp.dtype(self.compute))
