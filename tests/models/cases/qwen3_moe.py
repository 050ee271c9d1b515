"""Tiny configs of Qwen3-MoE, and the published configs of its presets."""

SIZES = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 3,
    "vocab_size": 97,
    "intermediate_size": 80,
    "moe_intermediate_size": 40,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
}
CASES = {
    "qwen3_moe": {
        "weights as they are": SIZES | {"norm_topk_prob": False},
        "every second layer": SIZES | {"norm_topk_prob": True, "decoder_sparse_step": 2, "num_hidden_layers": 5},
        "dense layers": SIZES | {"norm_topk_prob": True, "mlp_only_layers": [1], "tie_word_embeddings": True},
        "window and biases": SIZES | {"norm_topk_prob": True, "use_sliding_window": True, "sliding_window": 16, "attention_bias": True},
    }
}


def sizes(embed, mlp, expert, layers, heads, **more):
    return {
        "model_type": "qwen3_moe",
        "hidden_size": embed,
        "intermediate_size": mlp,
        "moe_intermediate_size": expert,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": None,
        "max_position_embeddings": 40960,
        "sliding_window": None,
        "use_sliding_window": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
        "tie_word_embeddings": False,
        "router_aux_loss_coef": 0.001,
    } | more


PRESETS = {
    "qwen3-30b-a3b": (sizes(2048, 6144, 768, 48, 32, max_window_layers=48), 30_532_122_624),
    "qwen3-235b-a22b": (sizes(4096, 12288, 1536, 94, 64, max_window_layers=94), 235_093_634_560),
    "qwen3-coder-480b-a35b": (
        sizes(
            6144,
            8192,
            2560,
            62,
            96,
            num_key_value_heads=8,
            num_experts=160,
            rope_theta=10000000,
            max_position_embeddings=262144,
            max_window_layers=62,
            router_aux_loss_coef=0.0,
            qkv_bias=False,
            use_qk_norm=True,
            shared_expert_intermediate_size=0,
        ),
        480_154_875_392,
    ),
}
