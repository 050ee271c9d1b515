"""Tiny configs of GPT-OSS, and the published configs of its presets."""

SIZES = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 3,
    "vocab_size": 97,
    "intermediate_size": 40,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "sliding_window": 16,
    "max_position_embeddings": 128,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 32,
}
CASES = {
    "gpt_oss": {
        "plain rope": SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        "whole pairs": SIZES | {"rope_parameters": YARN | {"truncate": True, "attention_factor": 1.3}, "attention_bias": False},
        "other layers": SIZES | {"rope_parameters": YARN, "layer_types": ["full_attention"] * 2 + ["sliding_attention"]},
        "as published": SIZES | {"rope_parameters": YARN, "num_hidden_layers": 5, "num_experts_per_tok": 4},
    }
}


def sizes(layers, experts):
    return {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": layers,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": experts,
        "num_experts_per_tok": 4,
        "vocab_size": 201088,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000,
        "rope_scaling": {name: value for name, value in YARN.items() if name != "rope_theta"}
        | {"factor": 32.0, "original_max_position_embeddings": 4096},
        "max_position_embeddings": 131072,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "attention_bias": True,
        "tie_word_embeddings": False,
        "swiglu_limit": 7.0,
        "router_aux_loss_coef": 0.9,
    }


PRESETS = {"gpt-oss-20b": (sizes(24, 32), 20_914_757_184), "gpt-oss-120b": (sizes(36, 128), 116_829_156_672)}
