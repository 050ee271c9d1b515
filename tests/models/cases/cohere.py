"""Tiny configs of Command R and R7B, and the published configs of their presets."""

SIZES = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 97,
    "intermediate_size": 80,
    "max_position_embeddings": 128,
    "pad_token_id": 96,  # not among the tokens compared: its embedding gets no gradient there
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CASES = {
    "cohere": {
        "plain": SIZES,
        "bias": SIZES | {"attention_bias": True, "logit_scale": 0.25, "tie_word_embeddings": True},
        "norms of queries and keys": SIZES | {"use_qk_norm": True},
    },
    "cohere2": {
        "plain": SIZES | {"num_hidden_layers": 6, "sliding_window": 16},
        "window only": SIZES | {"sliding_window": 16, "layer_types": ["sliding_attention"] * 3},
    },
}


def sizes(model_type, embed, mlp, layers, heads, kv_heads, **more):
    return {
        "model_type": model_type,
        "hidden_size": embed,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 256000,
        "hidden_act": "silu",
        "layer_norm_eps": 1e-5,
        "attention_bias": False,
    } | more


PLUS = {"rope_theta": 75000000.0, "logit_scale": 0.8333333333333334, "use_qk_norm": True}
LENGTHS = {"max_position_embeddings": 8192, "model_max_length": 131072}
R7B = {
    "head_dim": 128,
    "rope_theta": 50000,
    "logit_scale": 0.25,
    "max_position_embeddings": 132096,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
    "order_of_interleaved_layers": "local_attn_first",
    "position_embedding_type": "rope_gptj",
    "rotary_pct": 1.0,
    "use_embedding_sharing": True,
    "use_gated_activation": True,
    "use_parallel_block": True,
    "use_parallel_embedding": False,
}
PRESETS = {
    "command-r": (sizes("cohere", 8192, 22528, 40, 64, 64, **LENGTHS, rope_theta=8000000.0, logit_scale=0.0625), 34_980_831_232),
    "command-r-plus": (sizes("cohere", 12288, 33792, 64, 96, 8, **LENGTHS, **PLUS), 103_810_674_688),
    "command-r7b": (sizes("cohere2", 4096, 14336, 32, 32, 8, **R7B), 8_028_033_024),
}
