"""Tiny configs of Granite 3, and the published configs of its presets."""

SIZES = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 97,
    "intermediate_size": 80,
    "max_position_embeddings": 128,
    "pad_token_id": 96,  # not among the tokens compared: its embedding gets no gradient there
    "attention_bias": True,
}
MULTIPLIERS = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.3, "logits_scaling": 8.0}
CASES = {"granite": {"plain": SIZES, "multipliers": SIZES | MULTIPLIERS | {"mlp_bias": True}}}


def granite(embed, mlp, attention, logits):
    return {
        "model_type": "granite",
        "hidden_size": embed,
        "intermediate_size": mlp,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 49152,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 10000000.0,
        "max_position_embeddings": 131072,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": attention,
        "logits_scaling": logits,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
    }


PRESETS = {
    "granite3.3-2b": (granite(2048, 8192, 0.015625, 8.0), 2_533_525_504),
    "granite3.3-8b": (granite(4096, 12800, 0.0078125, 16.0), 8_170_835_968),
}
