"""Tiny configs of SmolLM3, and the published config of its preset."""

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
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
CASES = {
    "smollm3": {
        "plain": SIZES | {"num_hidden_layers": 6, "tie_word_embeddings": False, "attention_bias": True},
        "yarn": SIZES | {"no_rope_layers": [1, 0, 1], "rope_parameters": YARN, "mlp_bias": True},
    },
}
PRESETS = {
    "smollm3-3b": (
        {
            "model_type": "smollm3",
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "vocab_size": 128256,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 5000000.0,
            "rope_scaling": None,
            "max_position_embeddings": 65536,
            "no_rope_layer_interval": 4,
            "no_rope_layers": [1, 1, 1, 0] * 9,
            "layer_types": ["full_attention"] * 36,
            "sliding_window": None,
            "use_sliding_window": False,
            "max_window_layers": 28,
            "attention_bias": False,
            "mlp_bias": False,
            "pretraining_tp": 2,
            "tie_word_embeddings": True,
        },
        3_075_098_624,
    ),
}
