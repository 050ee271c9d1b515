"""Tiny configs of GLM-4, and the published configs of its presets."""

SIZES = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 97,
    "intermediate_size": 80,
    "max_position_embeddings": 128,
    "pad_token_id": 96,  # not among the tokens compared: its embedding gets no gradient there
}
CASES = {
    "glm": {"plain": SIZES | {"head_dim": 16}, "no bias": SIZES | {"head_dim": 8, "attention_bias": False}},
    "glm4": {"plain": SIZES | {"head_dim": 16}, "no bias": SIZES | {"head_dim": 8, "attention_bias": False}},
}


def glm4(embed, mlp, layers, heads, bias):
    return {
        "model_type": "glm4",
        "hidden_size": embed,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "vocab_size": 151552,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 32768,
        "attention_bias": bias,
        "tie_word_embeddings": False,
        "pad_token_id": 151329,
    }


PRESETS = {
    "glm4-9b": (glm4(4096, 13696, 40, 32, True), 9_400_279_040),
    "glm4-32b": (glm4(6144, 23040, 61, 48, False), 32_566_081_536),
}
