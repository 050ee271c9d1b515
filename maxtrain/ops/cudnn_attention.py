"""Attention by cuDNN's flash attention, which gets the documents of a sequence as offsets and lengths and never as a mask.

JAX offers the packed layout of cuDNN below `jax.nn.dot_product_attention`, whose only way to keep documents apart is a mask
[batch, 1, length, length]. A packed call has room for a fixed number of documents in a sequence.
"""

from functools import partial

import jax
import jax.numpy as jnp

from maxtrain.ops.causal_attention import Options, causal_attention

MOST = 32  # documents of a sequence: the statistics of cuDNN take heads * length * MOST * 4 bytes of it


def documents(segments: jax.Array, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where the documents of each sequence begin and how long they are, both int32 [batch, most] and -1 past the last; if all have room.

    segments: int32 [batch, length]; padding is a document like others, so that every token belongs to one.
    """
    length = segments.shape[1]
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    starts = jax.vmap(lambda row: jnp.nonzero(row, size=most, fill_value=length)[0])(begins).astype(jnp.int32)
    ends = jnp.pad(starts[:, 1:], ((0, 0), (0, 1)), constant_values=length)
    there = starts < length
    return jnp.where(there, starts, -1), jnp.where(there, ends - starts, -1), begins.sum(axis=1).max() <= most


def cudnn_attention(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, sinks: jax.Array | None, options: Options) -> jax.Array:
    """`causal_attention` by cuDNN; where a sequence of the batch has more than `MOST` documents, by `causal_attention` itself."""
    assert sinks is None, "refused by the table of backends"
    assert options.softcap is None, "refused by the table of backends"
    starts, lengths, fit = documents(segments, MOST)
    blocks = jax.checkpoint(lambda q, k, v: causal_attention(q, k, v, segments, None, options))  # keeps nothing while it is not needed
    return jax.lax.cond(fit, partial(_packed, starts, lengths, options.window), blocks, q, k, v)


def _packed(starts: jax.Array, lengths: jax.Array, window: int | None, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention within documents; starts and lengths as `documents` gives them."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn  # not public: jax.nn.dot_product_attention knows no packed layout

    if jax.__version_info__ < (0, 11):  # because it counts the offsets of keys in heads of queries
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    offsets = jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1)
    return cudnn.dot_product_attention(
        q,
        k,
        v,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=1.0,
        mask_type=cudnn.MaskType.CAUSAL,
        sliding_window_length=window,
    )
