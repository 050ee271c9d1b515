"""Tiny configs of Qwen2-MoE, Qwen3-MoE and OLMoE, and the published configs of their presets."""

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
SHARED = {name: value for name, value in SIZES.items() if name != "head_dim"} | {"shared_expert_intermediate_size": 56}
WINDOW = {"use_sliding_window": True, "sliding_window": 16}
OLMOE = {name: SHARED[name] for name in SHARED if not name.endswith("expert_intermediate_size") and name != "moe_intermediate_size"}
OLMOE |= {"intermediate_size": 40, "pad_token_id": 96}  # a token that is not compared: its embedding gets no gradient there
CASES = {
    "qwen2_moe": {
        "weights as they are": SHARED,
        "no biases": SHARED | {"norm_topk_prob": True, "qkv_bias": False, "tie_word_embeddings": True},
        "windows": SHARED | WINDOW | {"max_window_layers": 3, "num_hidden_layers": 5, "mlp_only_layers": [1, 2]},
    },
    "olmoe": {
        "plain": OLMOE,
        "biases": OLMOE | {"attention_bias": True, "norm_topk_prob": True, "num_key_value_heads": 6, "tie_word_embeddings": True},
    },
    "qwen3_moe": {
        "weights as they are": SIZES | {"norm_topk_prob": False},
        "every second layer": SIZES | {"norm_topk_prob": True, "decoder_sparse_step": 2, "num_hidden_layers": 5},
        "dense layers": SIZES | {"norm_topk_prob": True, "mlp_only_layers": [1], "tie_word_embeddings": True},
        "window and biases": SIZES | {"norm_topk_prob": True, "use_sliding_window": True, "sliding_window": 16, "attention_bias": True},
    },
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


def qwen2(embed, mlp, expert, shared, layers, heads, kv_heads, experts, chosen, length, **more):
    sized = {
        "model_type": "qwen2_moe",
        "intermediate_size": mlp,
        "shared_expert_intermediate_size": shared,
        "num_key_value_heads": kv_heads,
        "num_experts": experts,
        "num_experts_per_tok": chosen,
        "norm_topk_prob": False,
        "max_position_embeddings": length,
    }
    found = sizes(embed, mlp, expert, layers, heads, **sized, **more)
    return {name: value for name, value in found.items() if name not in ("head_dim", "attention_bias")}


OLMOE_1B_7B = {
    "model_type": "olmoe",
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "vocab_size": 50304,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 4096,
    "attention_bias": False,
    "clip_qkv": None,
    "tie_word_embeddings": False,
    "router_aux_loss_coef": 0.01,
}
PRESETS = {
    "qwen1.5-moe-a2.7b": (qwen2(2048, 5632, 1408, 5632, 24, 16, 16, 60, 4, 8192, max_window_layers=21), 14_315_784_192),
    "qwen2-57b-a14b": (
        qwen2(3584, 18944, 2560, 20480, 28, 28, 4, 64, 8, 131072, max_window_layers=28) | {"sliding_window": 131072},
        57_408_658_944,
    ),
    "olmoe-1b-7b": (OLMOE_1B_7B, 6_919_161_856),
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
