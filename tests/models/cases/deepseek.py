"""Tiny configs of DeepSeek-V2, V3 and Kimi-K2, and the published configs of their presets."""

SIZES = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "num_hidden_layers": 3,
    "vocab_size": 97,
    "intermediate_size": 80,
    "moe_intermediate_size": 40,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "max_position_embeddings": 160,
}


def yarn(mscale, mscale_all_dim, **more):
    scaling = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    return {"rope_parameters": scaling | {"mscale": mscale, "mscale_all_dim": mscale_all_dim} | more}


GROUPS = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0}
SIGMOID = SIZES | {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True}
CASES = {
    "deepseek_v2": {
        "no latent of queries": SIZES | {"q_lora_rank": None, "first_k_dense_replace": 0, "n_shared_experts": 2},
        "biases, all dense": SIZES | {"attention_bias": True, "first_k_dense_replace": 3},
        "groups": SIZES | GROUPS | yarn(0.707, 0.707),
    },
    "deepseek_v3": {
        "halves, no groups": SIGMOID | {"rope_interleave": False, "n_group": 1, "topk_group": 1, "attention_bias": True},
        "weights as they are": SIGMOID | {"norm_topk_prob": False, "q_lora_rank": None, "num_hidden_layers": 2, "n_shared_experts": 2},
        "groups": SIGMOID | yarn(1.0, 1.0),
        "mscales": SIGMOID | yarn(0.8, 1.2),
    },
    "kimi_k2": {"one group": SIGMOID | {"n_group": 1, "topk_group": 1} | yarn(1.0, 1.0, beta_fast=1.0, beta_slow=1.0)},
}

LIKE = {"kimi_k2": "deepseek_v3"}  # known to transformers under this name


def published(model_type, scaling, **sizes):
    shared = {
        "model_type": model_type,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "num_key_value_heads": sizes["num_attention_heads"],
        "moe_layer_freq": 1,
        "seq_aux": True,
        "ep_size": 1,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "pretraining_tp": 1,
        "tie_word_embeddings": False,
        "rope_theta": 10000,
    }
    return shared | {"rope_scaling": {"beta_slow": 1, "original_max_position_embeddings": 4096, "type": "yarn"} | scaling} | sizes


V2 = {
    "vocab_size": 102400,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "aux_loss_alpha": 0.001,
    "max_position_embeddings": 163840,
}
V3 = {
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "q_lora_rank": 1536,
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
}
HALF = {"beta_fast": 32, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707}
PRESETS = {
    "deepseek-v2-lite": (
        published(
            "deepseek_v2",
            HALF,
            **V2,
            hidden_size=2048,
            intermediate_size=10944,
            moe_intermediate_size=1408,
            num_hidden_layers=27,
            num_attention_heads=16,
            n_routed_experts=64,
            q_lora_rank=None,
            routed_scaling_factor=1.0,
            topk_method="greedy",
            n_group=1,
            topk_group=1,
        ),
        15_706_484_224,
    ),
    "deepseek-v2": (
        published(
            "deepseek_v2",
            HALF,
            **V2,
            hidden_size=5120,
            intermediate_size=12288,
            moe_intermediate_size=1536,
            num_hidden_layers=60,
            num_attention_heads=128,
            n_routed_experts=160,
            q_lora_rank=1536,
            routed_scaling_factor=16.0,
            topk_method="group_limited_greedy",
            n_group=8,
            topk_group=3,
        ),
        235_741_434_880,
    ),
    "deepseek-v3": (
        published(
            "deepseek_v3",
            {"beta_fast": 32, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0},
            **V3,
            vocab_size=129280,
            num_attention_heads=128,
            n_routed_experts=256,
            first_k_dense_replace=3,
            routed_scaling_factor=2.5,
            n_group=8,
            topk_group=4,
            num_nextn_predict_layers=1,
            max_position_embeddings=163840,
        ),
        671_026_419_200,
    ),
    "kimi-k2": (
        published(
            "kimi_k2",
            {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0},
            **V3,
            vocab_size=163840,
            num_attention_heads=64,
            n_routed_experts=384,
            first_k_dense_replace=1,
            routed_scaling_factor=2.827,
            n_group=1,
            topk_group=1,
            num_nextn_predict_layers=0,
            aux_loss_alpha=0.001,
            max_position_embeddings=131072,
        )
        | {"rope_theta": 50000.0},
        1_026_408_232_448,
    ),
}
