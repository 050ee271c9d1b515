"""Tiny configs of Phi-3, and the published configs of the presets of Phi-3 and Phi-4."""

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
    "phi3": {
        "plain": SIZES,
        "partial": SIZES
        | {"sliding_window": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    },
}


def sizes(embed, mlp, layers, heads, kv_heads, vocab, **more):
    return {
        "model_type": "phi3",
        "hidden_size": embed,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "rope_scaling": None,
        "pad_token_id": 0,
    } | more


def length(count):
    return {"max_position_embeddings": count, "original_max_position_embeddings": count}


PRESETS = {
    "phi3-mini-4k": (sizes(3072, 8192, 32, 32, 32, 32064, **length(4096), rope_theta=10000.0, sliding_window=2047), 3_821_079_552),
    "phi4": (sizes(5120, 17920, 40, 40, 10, 100352, **length(16384), rope_theta=250000, sliding_window=None), 14_659_507_200),
}
