"""Tiny configs of Mixtral, and the published configs of its presets."""

SIZES = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 97,
    "intermediate_size": 40,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
}
CASES = {"mixtral": {"plain": SIZES, "window and three experts": SIZES | {"sliding_window": 16, "num_experts_per_tok": 3}}}


def sizes(embed, mlp, layers, heads, **more):
    return {
        "model_type": "mixtral",
        "hidden_size": embed,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "output_router_logits": False,
    } | more


PRESETS = {
    "mixtral-8x7b": (sizes(4096, 14336, 32, 32, max_position_embeddings=32768, router_aux_loss_coef=0.02), 46_702_792_704),
    "mixtral-8x22b": (sizes(6144, 16384, 56, 48, max_position_embeddings=65536, router_aux_loss_coef=0.001), 140_620_634_112),
}
