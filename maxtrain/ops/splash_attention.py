"""Attention by the kernel `splash_attention` of JAX for TPU, which skips masked blocks and keeps no scores, forward and backward."""

import jax

from maxtrain.ops.causal_attention import Options

BLOCK, LARGEST = 128, 512  # a block of queries or keys: a multiple of the lanes of a TPU, and what fits its vector memory


def splash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, sinks: jax.Array | None, options: Options, interpret: bool = False
) -> jax.Array:
    """`causal_attention` of sequences whose length is a multiple of 128; interpret: run the kernel's operations one by one, for tests."""
    # Pallas takes a while to import, and most runs never need it
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads = q.shape[1:3]
    size = max(size for size in range(BLOCK, LARGEST + 1, BLOCK) if length % size == 0)
    sizes = kernels.BlockSizes(
        block_q=size,
        block_kv=size,
        block_kv_compute=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_kv_dkv_compute=size,
        block_q_dq=size,
        block_kv_dq=size,
    )
    shape = (length, length)
    mask = masks.CausalMask(shape) if options.window is None else masks.LocalMask(shape, (options.window - 1, 0), 0)
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=options.softcap,
        interpret=interpret,
    )

    def of_sequence(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        return kernel(q, k, v, kernels.SegmentIds(segments, segments), sinks)

    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.vmap(of_sequence)(q, k, v, segments).swapaxes(1, 2)
