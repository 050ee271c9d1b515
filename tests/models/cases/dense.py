"""Tiny configs of the dense families besides Llama's; layer counts are no multiples of the periods, 71 tokens cross the windows."""

SIZES = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 97,
    "intermediate_size": 80,
    "max_position_embeddings": 128,
    "pad_token_id": 96,  # not among the tokens compared: its embedding gets no gradient there
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
GEMMA = SIZES | {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 20}
TWO_THETAS = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
CASES = {
    "qwen2": {
        "untied": SIZES,
        "yarn": SIZES | {"rope_parameters": YARN, "tie_word_embeddings": True},
        "window": SIZES | {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
    },
    "qwen3": {
        "plain": SIZES | {"head_dim": 16},
        "bias, yarn": SIZES | {"head_dim": 8, "attention_bias": True, "rope_parameters": YARN | {"attention_factor": 1.3}},
        "tied": SIZES | {"head_dim": 16, "tie_word_embeddings": True, "rope_parameters": LINEAR},
    },
    "gemma": {"plain": SIZES | {"head_dim": 16}, "one kv head": SIZES | {"head_dim": 8, "num_key_value_heads": 1}},
    "gemma2": {
        "no caps": GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        "caps": GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    },
    "gemma3_text": {
        "two thetas": GEMMA | {"num_hidden_layers": 8},
        "local only": GEMMA | {"layer_types": ["sliding_attention"] * 3},
        "scaled": GEMMA | {"num_hidden_layers": 7, "rope_parameters": TWO_THETAS, "final_logit_softcapping": 3.0},
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
    } | more


def qwen2(embed, mlp, layers, heads, kv_heads, vocab=152064, tied=False, length=32768, eps=1e-6):
    more = {"rms_norm_eps": eps, "rope_theta": 1000000.0, "tie_word_embeddings": tied, "use_sliding_window": False}
    return sizes("qwen2", embed, mlp, layers, heads, kv_heads, vocab, max_position_embeddings=length, **more)


def qwen3(embed, mlp, layers, heads, tied=False):
    more = {"head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 1000000, "tie_word_embeddings": tied, "attention_bias": False}
    return sizes("qwen3", embed, mlp, layers, heads, 8, 151936, max_position_embeddings=40960, **more)


def gemma2(embed, mlp, layers, heads, kv_heads, head_dim, scalar):
    more = {"head_dim": head_dim, "query_pre_attn_scalar": scalar, "sliding_window": 4096, "hidden_activation": "gelu_pytorch_tanh"}
    more |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
    return sizes("gemma2", embed, mlp, layers, heads, kv_heads, 256000, max_position_embeddings=8192, **more)


def gemma3(embed, mlp, layers, heads, kv_heads, head_dim, scalar, window, vocab, length=131072, **more):
    more |= {"head_dim": head_dim, "query_pre_attn_scalar": scalar, "sliding_window": window, "hidden_activation": "gelu_pytorch_tanh"}
    more |= {"rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "sliding_window_pattern": 6}
    return sizes("gemma3_text", embed, mlp, layers, heads, kv_heads, vocab, max_position_embeddings=length, **more)


GEMMA1 = {"head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 8192}
STRETCHED = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
PRESETS = {  # preset: (config.json as published, published number of parameters)
    "qwen2.5-0.5b": (qwen2(896, 4864, 24, 14, 2, 151936, True), 494_032_768),
    "qwen2.5-1.5b": (qwen2(1536, 8960, 28, 12, 2, 151936, True), 1_543_714_304),
    "qwen2.5-3b": (qwen2(2048, 11008, 36, 16, 2, 151936, True), 3_085_938_688),
    "qwen2.5-7b": (qwen2(3584, 18944, 28, 28, 4), 7_615_616_512),
    "qwen2.5-14b": (qwen2(5120, 13824, 48, 40, 8, length=131072, eps=1e-5), 14_770_033_664),
    "qwen2.5-32b": (qwen2(5120, 27648, 64, 40, 8, length=131072, eps=1e-5), 32_763_876_352),
    "qwen2.5-72b": (qwen2(8192, 29568, 80, 64, 8), 72_706_203_648),
    "qwen3-0.6b": (qwen3(1024, 3072, 28, 16, True), 596_049_920),
    "qwen3-1.7b": (qwen3(2048, 6144, 28, 16, True), 1_720_574_976),
    "qwen3-4b": (qwen3(2560, 9728, 36, 32, True), 4_022_468_096),
    "qwen3-8b": (qwen3(4096, 12288, 36, 32), 8_190_735_360),
    "qwen3-14b": (qwen3(5120, 17408, 40, 40), 14_768_307_200),
    "qwen3-32b": (qwen3(5120, 25600, 64, 64), 32_762_123_264),
    "gemma-2b": (sizes("gemma", 2048, 16384, 18, 8, 1, 256000, **GEMMA1), 2_506_172_416),
    "gemma-7b": (sizes("gemma", 3072, 24576, 28, 16, 16, 256000, **GEMMA1), 8_537_680_896),
    "gemma2-2b": (gemma2(2304, 9216, 26, 8, 4, 256, 256), 2_614_341_888),
    "gemma2-9b": (gemma2(3584, 14336, 42, 16, 8, 256, 256), 9_241_705_984),
    "gemma2-27b": (gemma2(4608, 36864, 46, 32, 16, 128, 144), 27_227_128_320),
    "gemma3-1b": (gemma3(1152, 6912, 26, 4, 1, 256, 256, 512, 262144, 32768), 999_885_952),
    "gemma3-4b": (gemma3(2560, 10240, 34, 8, 4, 256, 256, 1024, 262208, **STRETCHED), 3_880_263_168),
    "gemma3-12b": (gemma3(3840, 15360, 48, 16, 8, 256, 256, 1024, 262208, **STRETCHED), 11_766_034_176),
    "gemma3-27b": (gemma3(5376, 21504, 62, 32, 16, 128, 168, 1024, 262208, **STRETCHED), 27_009_346_304),
}
