"""Tiny configs of OLMo 2 and 3, and the published configs of their presets."""

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
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
CASES = {
    "olmo2": {"plain": SIZES, "bias": SIZES | {"attention_bias": True, "rope_parameters": YARN}},
    "olmo3": {
        "plain": SIZES | {"num_hidden_layers": 6, "sliding_window": 16},
        "yarn": SIZES
        | {
            "num_hidden_layers": 5,
            "sliding_window": 16,
            "rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
        },
    },
}


def sizes(model_type, embed, mlp, layers, heads, kv_heads, vocab, **more):
    return {
        "model_type": model_type,
        "hidden_size": embed,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000,
        "attention_bias": False,
        "tie_word_embeddings": False,
    } | more


def olmo2(*shape):
    return sizes("olmo2", *shape, 100352, max_position_embeddings=4096, rope_scaling=None)


def olmo3(embed, mlp, layers, heads, kv_heads):
    scaling = {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }
    types = (["sliding_attention"] * 3 + ["full_attention"]) * (layers // 4)
    more = {"max_position_embeddings": 65536, "rope_scaling": scaling, "sliding_window": 4096, "layer_types": types}
    return sizes("olmo3", embed, mlp, layers, heads, kv_heads, 100278, **more)


PRESETS = {
    "olmo2-1b": (olmo2(2048, 8192, 16, 16, 16), 1_484_916_736),
    "olmo2-7b": (olmo2(4096, 11008, 32, 32, 32), 7_298_617_344),
    "olmo2-13b": (olmo2(5120, 13824, 40, 40, 40), 13_716_198_400),
    "olmo2-32b": (olmo2(5120, 27648, 64, 40, 8), 32_234_279_936),
    "olmo3-7b": (olmo3(4096, 11008, 32, 32, 32), 7_298_011_136),
    "olmo3-32b": (olmo3(5120, 27648, 64, 40, 8), 32_233_522_176),
}
