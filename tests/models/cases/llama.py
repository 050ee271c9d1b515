"""Tiny configs that switch every mechanism of the Llama family on and off, and the published configs of its presets."""

SIZES = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 97,
    "intermediate_size": 80,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

CASES = {
    "llama": {
        "tied": SIZES | {"tie_word_embeddings": True, "rms_norm_eps": 1e-5},
        "untied": SIZES | {"tie_word_embeddings": False, "num_key_value_heads": 6},
        "llama 3 rope": SIZES | {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-5},
        "dynamic rope": SIZES | {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0}, "max_position_embeddings": 40},
        "biases": SIZES | {"attention_bias": True, "mlp_bias": True},
        "wide heads": SIZES | {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
    },
    "mistral": {
        "window": SIZES | {"sliding_window": 16},
        "no window": SIZES | {"sliding_window": None, "head_dim": 16},
    },
}

L31 = {"rope_theta": 500000.0, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192}, "max_position_embeddings": 131072}
L31["rope_scaling"] = {key: value for key, value in L31["rope_scaling"].items() if key != "rope_theta"}
L32 = L31 | {"rope_scaling": L31["rope_scaling"] | {"factor": 32.0}, "tie_word_embeddings": True}


def sizes(model_type, embed, mlp, layers, heads, kv_heads, vocab, **more):
    return {
        "model_type": model_type,
        "hidden_size": embed,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "rms_norm_eps": 1e-5,
    } | more


L2 = {"max_position_embeddings": 4096, "tie_word_embeddings": False, "pretraining_tp": 1}
MISTRAL = {"max_position_embeddings": 32768, "tie_word_embeddings": False}
NEMO = MISTRAL | {"head_dim": 128, "rope_theta": 1000000.0, "sliding_window": None, "max_position_embeddings": 1024000}
PRESETS = {  # preset: (config.json as published, published number of parameters)
    "llama2-7b": (sizes("llama", 4096, 11008, 32, 32, 32, 32000, **L2), 6_738_415_616),
    "llama2-13b": (sizes("llama", 5120, 13824, 40, 40, 40, 32000, **L2), 13_015_864_320),
    "llama2-70b": (sizes("llama", 8192, 28672, 80, 64, 8, 32000, **L2), 68_976_648_192),
    "llama3.1-8b": (sizes("llama", 4096, 14336, 32, 32, 8, 128256, **L31), 8_030_261_248),
    "llama3.1-70b": (sizes("llama", 8192, 28672, 80, 64, 8, 128256, **L31), 70_553_706_496),
    "llama3.1-405b": (sizes("llama", 16384, 53248, 126, 128, 8, 128256, **L31), 405_853_388_800),
    "llama3.2-1b": (sizes("llama", 2048, 8192, 16, 32, 8, 128256, head_dim=64, **L32), 1_235_814_400),
    "llama3.2-3b": (sizes("llama", 3072, 8192, 28, 24, 8, 128256, head_dim=128, **L32), 3_212_749_824),
    "mistral-7b-v0.1": (
        sizes("mistral", 4096, 14336, 32, 32, 8, 32000, rope_theta=10000.0, sliding_window=4096, **MISTRAL),
        7_241_732_096,
    ),
    "mistral-7b-v0.3": (
        sizes("mistral", 4096, 14336, 32, 32, 8, 32768, rope_theta=1000000.0, sliding_window=None, **MISTRAL),
        7_248_023_552,
    ),
    "mistral-nemo-12b": (sizes("mistral", 5120, 14336, 40, 32, 8, 131072, **NEMO), 12_247_782_400),
}
SMOL = {"max_position_embeddings": 8192, "tie_word_embeddings": True, "rope_interleaved": False, "is_llama_config": True}
PRESETS |= {
    "smollm2-135m": (sizes("llama", 576, 1536, 30, 9, 3, 49152, rope_theta=100000, **SMOL), 134_515_008),
    "smollm2-360m": (sizes("llama", 960, 2560, 32, 15, 5, 49152, rope_theta=100000, **SMOL), 361_821_120),
    "smollm2-1.7b": (sizes("llama", 2048, 8192, 24, 32, 32, 49152, rope_theta=130000, **SMOL), 1_711_376_384),
}
