"""The seam through which attention enters the model: over the sequence itself in training, over a cache in serving.

Training passes no cache: keys and values are the sequence itself (`ops.causal_attention`), and how devices that share its
tokens meet is settled in `ops.split_attention`. Serving passes a cache in pages (`ops.paged_attention`). A query sees a key of
its own segment that is not later than itself and not further back than the window.

Keys may be wider than values (multi-head latent attention). A sink is a learned logit per head that takes part in the
softmax and has no value (GPT-OSS): weights then sum to less than one.
"""

from typing import NamedTuple

import jax

from maxtrain.ops.attention_block import softcapped
from maxtrain.ops.causal_attention import Options, causal_attention
from maxtrain.ops.paged_attention import paged_attention
from maxtrain.ops.pages import Cache, Combined, Pages
from maxtrain.ops.split_attention import split_attention

__all__ = ["Context", "Options", "attend", "causal_attention", "softcapped"]


class Context(NamedTuple):
    """Where the tokens of a call stand.

    positions: int32 [batch, length], counted from 0 in each document.
    segments: int32 [batch, length], the document each token belongs to; 0 is padding. A document's tokens are neighbours.
    pages: in a serving step, whose tokens are rows [tokens, 1], where their keys and values lie; None in training.
    indices: int32 [length], which token of the sequence stands where, if they are in the balanced order of
        `ops.ring_attention`; None in natural order.
    """

    positions: jax.Array
    segments: jax.Array
    pages: Pages | None = None
    indices: jax.Array | None = None


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    cache: Cache | Combined | None,
    context: Context,
    options: Options,
    sinks: jax.Array | None = None,
) -> tuple[jax.Array, Cache | Combined | None]:
    """Attention of q [batch, length, heads, width] over k, v [batch, length, kv_heads, width], or over the cache they are written to.

    v: None, with a cache only, if the keys are the values too. sinks: float [heads] or None.
    Returns: output [batch, length, heads, width of v] and the updated cache.
    """
    q = q * (q.shape[-1] ** -0.5 if options.scale is None else options.scale)
    if cache is None:
        assert v is not None
        return split_attention(q, k, v, context.segments, context.indices, sinks, options), None
    assert context.pages is not None, "a cache is read by tokens that say where their pages are"
    q, k, v = jax.tree.map(lambda x: x[:, 0], (q, k, v))  # a token is a row of its own
    y, cache = paged_attention(q, k, v, cache, context.positions[:, 0], context.pages, options.window, options.softcap, sinks)
    return y[:, None], cache
