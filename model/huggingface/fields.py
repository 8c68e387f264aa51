"""List every field of a Qwen3-VL config.json that is not read: without effect here, or bound to a value. No torch here.

Source: transformers 5.23's Qwen3VLConfig and Qwen3VLMoeConfig with their parts, the fields that transformers 4.57 wrote, and the
two models' code, which says what each field does.
"""

from typing import Any, Final

GENERATION: Final = frozenset({
    "assistant_confidence_threshold", "assistant_lookbehind", "bad_words_ids", "begin_suppress_tokens", "diversity_penalty",
    "do_sample", "early_stopping", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff",
    "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length",
    "min_length", "no_repeat_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule", "num_beam_groups",
    "num_beams", "num_return_sequences", "output_scores", "remove_invalid_values", "repetition_penalty",
    "return_dict_in_generate", "suppress_tokens", "target_lookbehind", "temperature", "top_k", "top_p", "typical_p",
    "use_cache",
})  # fmt: skip
"""Settings of generation, which transformers 4 wrote into config.json too."""
EVERYWHERE: Final = GENERATION | {
    "transformers_version", "architectures", "dtype", "torch_dtype", "_name_or_path", "name_or_path", "_commit_hash",
    "output_hidden_states", "output_attentions", "return_dict", "id2label", "label2id", "num_labels", "problem_type",
    "attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "experts_implementation",
    "_experts_implementation", "torchscript", "use_bfloat16", "tokenizer_class", "prefix", "finetuning_task",
    "task_specific_params", "bos_token_id", "eos_token_id", "sep_token_id", "pad_token_id", "decoder_start_token_id",
    "keys_to_ignore_at_inference", "unsloth_version", "unsloth_fixed", "model_name",  # the last is unsloth's too
}  # fmt: skip
"""Without effect in any part: labels of classifiers, forms of outputs, kernels, the program that wrote the file. Tensors have
types of their own, and ids of text tokens are the tokenizer's."""
OUTER: Final = frozenset({
    "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id",  # the tokenizer says them here
    "output_router_logits", "router_aux_loss_coef",  # trainers set them here too; of a mixture text_config's alone count
})  # fmt: skip
TEXT: Final = frozenset({
    "output_router_logits",  # whether transformers adds the load-balancing loss; model.text.balance_coefficient does here
    "max_window_layers",  # counts with use_sliding_window only
})  # fmt: skip
BASE: Final[dict[str, Any]] = {
    "is_encoder_decoder": (False, None),
    "is_decoder": (False, None),
    "chunk_size_feed_forward": (0, None),
    "pruned_heads": ({}, None),
    "tie_encoder_decoder": (False, None),
}
"""Fields of all configurations of transformers that would change a model."""


AXIAL: Final = {"rope_theta": 10_000.0, "rope_type": "axial"}
"""The rotation of the vision tower, which transformers 5 writes and transformers 4 does not."""


def _is_full_attention(value: Any) -> bool:
    """Return whether all layers of `layer_types`, where it is given, see all earlier tokens."""
    if value is None:
        return True
    return isinstance(value, list) and set(map(str, value)) <= {"full_attention"}


def _is_axial(value: Any) -> bool:
    """Return whether the vision tower's rotation, where it is given, is the one that model/rope.py has."""
    if value is None:
        return True
    if not isinstance(value, dict):
        return False
    return all(name in AXIAL and AXIAL[name] == given for name, given in value.items())


TEXT_ONLY: Final[dict[str, Any]] = BASE | {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "layer_types": _is_full_attention,
    "partial_rotary_factor": (1.0, None),
    "norm_topk_prob": (True,),
}
VISION_ONLY: Final[dict[str, Any]] = BASE | {
    "hidden_act": ("gelu_pytorch_tanh",),
    "rope_parameters": _is_axial,
}
ROPE_ONLY: Final[dict[str, Any]] = {
    "rope_type": ("default", "mrope", None),
    "type": ("default", "mrope", None),
    "mrope_interleaved": (True,),
    "partial_rotary_factor": (1.0, None),
}
