"""Fields of config.json that say nothing about what a model computes, by name: those of the base class of transformers' configs,
of its generation, and of how a model is run; and those that do so at one value."""

from collections.abc import Mapping
from typing import Any

# How text is generated: up to version 4 every config had them, whatever their values
GENERATION = """
    assistant_confidence_threshold assistant_early_exit assistant_lookbehind bad_words_ids begin_suppress_tokens cache_config
    cache_implementation compile_config constraints continuous_batching_config decoder_start_token_id disable_compile diversity_penalty
    do_sample dola_layers early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty force_words_ids forced_bos_token_id forced_decoder_ids forced_eos_token_id generation_config
    guidance_scale is_assistant length_penalty low_memory max_cache_len max_length max_matching_ngram_size max_new_tokens max_time
    min_length min_new_tokens min_p no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams
    num_return_sequences output_logits output_scores penalty_alpha prefill_chunk_size prompt_lookup_num_tokens remove_invalid_values
    renormalize_logits repetition_penalty return_dict_in_generate return_legacy_cache sequence_bias stop_strings suppress_tokens
    target_lookbehind temperature token_healing top_h top_k top_p typical_p use_cache use_mtp watermarking_config
"""
# Of the base class: names, token ids, labels, what is given back
BASE = """
    _commit_hash _name_or_path architectures auto_map bos_token_id chunk_size_feed_forward dtype eos_token_id finetuning_task id2label
    initializer_range is_decoder is_encoder_decoder label2id model_type name_or_path num_labels output_attentions output_hidden_states
    pad_token_id prefix problem_type quantization_config return_dict sep_token_id task_specific_params tf_legacy_loss
    tie_encoder_decoder tokenizer_class torch_dtype torchscript transformers_version use_bfloat16 unk_token_id
"""
# How a model is run, and marks of the tools that wrote the file
RUN = """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _experts_implementation _flash_attn_2_enabled
    attn_implementation experts_implementation gradient_checkpointing logits_to_keep max_sequence_length num_logits_to_keep
    transformers.js_config unsloth_fixed unsloth_version use_flash_attention use_flash_attention_2 use_flash_attn
"""
NEVER_MATTERS = frozenset(f"{GENERATION} {BASE} {RUN}".split())
# Of no effect at these values, which are the only ones supported
FIXED: Mapping[str, Any] = {"add_cross_attention": False, "cross_attention_hidden_size": None, "pruned_heads": {}}
# Second names that tools write beside the first, read where both say the same
ALSO_CALLED = {
    "num_routed_experts": "n_routed_experts",
    "num_shared_experts": "n_shared_experts",
    "sliding_window_size": "sliding_window",
}
# Only of effect in training, where nothing is dropped out here: told where it is not 0
DROPOUTS = """
    attention_dropout attention_probs_dropout_prob attn_dropout attn_pdrop classifier_dropout embd_pdrop embedding_dropout
    hidden_dropout hidden_dropout_prob resid_pdrop residual_dropout router_jitter_noise summary_first_dropout
"""
DROPOUT = frozenset(DROPOUTS.split())
