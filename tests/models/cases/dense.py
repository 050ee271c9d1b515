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
    "phi3": {
        "plain": SIZES,
        "partial": SIZES
        | {"sliding_window": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    },
    "glm": {"plain": SIZES | {"head_dim": 16}, "no bias": SIZES | {"head_dim": 8, "attention_bias": False}},
    "glm4": {"plain": SIZES | {"head_dim": 16}, "no bias": SIZES | {"head_dim": 8, "attention_bias": False}},
    "granite": {
        "plain": SIZES | {"attention_bias": True},
        "multipliers": SIZES
        | {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.3,
            "logits_scaling": 8.0,
            "attention_bias": True,
        },
    },
    "cohere": {"plain": SIZES, "bias": SIZES | {"attention_bias": True, "logit_scale": 0.25, "tie_word_embeddings": True}},
    "cohere2": {
        "plain": SIZES | {"num_hidden_layers": 6, "sliding_window": 16},
        "window only": SIZES | {"sliding_window": 16, "layer_types": ["sliding_attention"] * 3},
    },
    "smollm3": {
        "plain": SIZES | {"num_hidden_layers": 6, "tie_word_embeddings": False, "attention_bias": True},
        "yarn": SIZES | {"no_rope_layers": [1, 0, 1], "rope_parameters": YARN},
    },
}
