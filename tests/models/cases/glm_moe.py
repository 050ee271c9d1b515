"""Tiny configs of GLM-4.5 and GLM-4.7-Flash, and the published configs of their presets."""

SIZES = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 97,
    "intermediate_size": 80,
    "moe_intermediate_size": 40,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 160,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LATENT = SIZES | {
    "num_key_value_heads": 6,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
CASES = {
    "glm4_moe": {
        "no norms, weights as they are": SIZES | {"norm_topk_prob": False, "rope_parameters": YARN | {"partial_rotary_factor": 1.0}},
        "all dense": SIZES | {"first_k_dense_replace": 3, "num_nextn_predict_layers": 0, "tie_word_embeddings": True},
        "as published": SIZES
        | {"head_dim": 16, "use_qk_norm": True, "attention_bias": True, "routed_scaling_factor": 2.5, "first_k_dense_replace": 1},
        "groups, two shared": SIZES
        | {"head_dim": 16, "use_qk_norm": True, "n_group": 4, "topk_group": 2, "n_shared_experts": 2, "first_k_dense_replace": 0},
    },
    "glm4_moe_lite": {
        "halves, no latent of queries": LATENT | {"rope_interleave": False, "q_lora_rank": None, "attention_bias": True},
        "dense in between": LATENT | {"mlp_layer_types": ["sparse", "dense", "sparse"], "norm_topk_prob": False},
        "as published": LATENT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    },
}


def glm4_moe(embed, mlp, expert, layers, experts, dense, scale, qk_norm):
    return {
        "model_type": "glm4_moe",
        "hidden_size": embed,
        "intermediate_size": mlp,
        "moe_intermediate_size": expert,
        "num_hidden_layers": layers,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": dense,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": scale,
        "use_qk_norm": qk_norm,
        "num_nextn_predict_layers": 1,
        "vocab_size": 151552,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 131072,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "pad_token_id": 151329,
    }


FLASH = {
    "model_type": "glm4_moe_lite",
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 47,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.8,
    "num_nextn_predict_layers": 1,
    "vocab_size": 154880,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "partial_rotary_factor": 1.0,
    "max_position_embeddings": 202752,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
PRESETS = {
    "glm4.5": (glm4_moe(5120, 12288, 1536, 92, 160, 3, 2.5, True), 352_797_829_024),
    "glm4.5-air": (glm4_moe(4096, 10944, 1408, 46, 128, 1, 1.0, False), 106_852_251_264),
    "glm4.7-flash": (FLASH, 29_943_393_920),
}
