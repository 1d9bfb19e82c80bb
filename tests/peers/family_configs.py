"""Tiny configs of every family for the comparison with transformers: one table, at least five a family.

Each entry is what transformers' config class of that `model_type` is given; `test_family_parity.py` does the rest. They
differ where families differ: head sizes (odd numbers of channel pairs), groups of key heads, biases, scalings, windows
shorter than the texts, tied and untied heads. Texts have up to 40 tokens and caches 48 or 56 slots.
"""

# Room for the bytes and a few merges: an export has a tokenizer.
VOCAB = 272

# No special tokens: nothing may end a text.
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}

LLAMA = {
    **NO_TOKENS,
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


SPARSE = {
    **LLAMA,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 28,
}

GEMMA = {
    **NO_TOKENS,
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 128,
}
GPT_OSS = {
    **LLAMA,
    "num_hidden_layers": 3,
    "head_dim": 8,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "sliding_window": 7,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1.5e5,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "truncate": False,
    },
}
OPT = {
    **NO_TOKENS,
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "ffn_dim": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GPT2 = {**NO_TOKENS, "vocab_size": VOCAB, "n_embd": 36, "n_layer": 2, "n_head": 4, "n_positions": 64}
NEOX = {
    **NO_TOKENS,
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}

FULL, SLIDING = "full_attention", "sliding_attention"


def _rope(kind, theta=1e4, **fields):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **fields}}


def _yarn(**fields):
    return _rope("yarn", **{"factor": 4.0, "original_max_position_embeddings": 32, **fields})


def _longrope(original, pairs, **fields):
    """Phi-3 has the original number of positions next to the scaling."""
    factors = {
        "short_factor": [1 + 0.1 * pair for pair in range(pairs)],
        "long_factor": [1.5 + 0.75 * pair for pair in range(pairs)],
    }
    return {"original_max_position_embeddings": original, **_rope("longrope", **factors, **fields)}


def _ropes(local, **full):
    """Gemma 3 has a scaling for each type of layer."""
    return {"rope_parameters": {FULL: full, SLIDING: {"rope_type": "default", "rope_theta": local}}}


def _granite(embedding, attention, residual, logits):
    return {
        "embedding_multiplier": embedding,
        "attention_multiplier": attention,
        "residual_multiplier": residual,
        "logits_scaling": logits,
    }


FAMILIES: dict[str, list[dict]] = {
    "llama": [
        {**LLAMA, "tie_word_embeddings": True},
        {**LLAMA, "head_dim": 10, "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
        {**LLAMA, "num_key_value_heads": 1, **_rope("linear", factor=2.5)},
        {**LLAMA, "max_position_embeddings": 20, **_rope("dynamic", factor=3.0)},
        {
            **LLAMA,
            "head_dim": 22,
            **_rope(
                "llama3",
                5e5,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            ),
        },
        {**LLAMA, "head_dim": 14, **_yarn()},
        {**LLAMA, "head_dim": 24, **_yarn(attention_factor=1.3, beta_fast=8.0, beta_slow=2.0, truncate=False)},
        {**LLAMA, "tie_word_embeddings": True, **_yarn(mscale=1.5, mscale_all_dim=0.8)},
    ],
    "mistral": [
        {**LLAMA, "sliding_window": 5, "num_key_value_heads": 1},
        {**LLAMA, "sliding_window": None, "head_dim": 12, "tie_word_embeddings": True},
        {**LLAMA, "sliding_window": 9, "head_dim": 18, "num_key_value_heads": 4, **_rope("default", 1e6)},
        {**LLAMA, "sliding_window": 64, "hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 3},
        {**LLAMA, "sliding_window": 2, "num_hidden_layers": 3, **_rope("linear", factor=1.5)},
    ],
    "qwen2": [
        {**LLAMA, "tie_word_embeddings": True, **_rope("default", 1e6)},
        {**LLAMA, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        {**LLAMA, "use_sliding_window": True, "sliding_window": 11, "max_window_layers": 0, "num_key_value_heads": 1},
        {**LLAMA, "use_sliding_window": True, "sliding_window": 7, "layer_types": [SLIDING, FULL]},
        {**LLAMA, "num_key_value_heads": 4, "tie_word_embeddings": True, **_yarn()},
        {**LLAMA, "use_sliding_window": False, "sliding_window": 5, "max_window_layers": 0, "head_dim": 14},
    ],
    "qwen3": [
        {**LLAMA, "head_dim": 16, "tie_word_embeddings": True, **_rope("default", 1e6)},
        {**LLAMA, "head_dim": 10, "num_key_value_heads": 1, "attention_bias": True},
        {**LLAMA, "head_dim": 8, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        {
            **LLAMA,
            "head_dim": 14,
            "num_key_value_heads": 4,
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": [SLIDING, FULL],
        },
        {**LLAMA, "head_dim": 22, "rms_norm_eps": 1e-5, **_yarn(factor=3.0)},
    ],
    "phi3": [
        {**LLAMA, "sliding_window": 6},
        {**LLAMA, "hidden_size": 64, "tie_word_embeddings": True, **_rope("default", partial_rotary_factor=0.5)},
        # The texts alone are within the original length, with their caches they are not.
        {**LLAMA, "num_key_value_heads": 4, **_longrope(44, 4)},
        {**LLAMA, "hidden_size": 64, "num_key_value_heads": 1, **_longrope(64, 6, partial_rotary_factor=0.75)},
        {**LLAMA, "hidden_size": 40, "sliding_window": 9, **_longrope(24, 5, attention_factor=1.4)},
    ],
    "smollm3": [
        {**LLAMA, "no_rope_layer_interval": 2},
        {**LLAMA, "no_rope_layers": [0, 1], "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
        {**LLAMA, "no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 6, "num_key_value_heads": 1},
        {
            **LLAMA,
            "no_rope_layers": [1, 0],
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": [SLIDING, FULL],
            "head_dim": 10,
        },
        {**LLAMA, "num_key_value_heads": 4, "no_rope_layer_interval": 2, **_yarn()},
    ],
    "olmo2": [
        {**LLAMA, "tie_word_embeddings": True},
        {**LLAMA, "head_dim": 10, "num_key_value_heads": 4, "attention_bias": True},
        {**LLAMA, "num_key_value_heads": 1, "rms_norm_eps": 1e-3, **_rope("linear", 5e5, factor=2.5)},
        {**LLAMA, "hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 3},
        {**LLAMA, "head_dim": 14, "num_hidden_layers": 3, **_yarn()},
    ],
    "granite": [
        {**LLAMA, **_granite(12.0, 0.0156, 0.22, 8.0), "tie_word_embeddings": True},
        {**LLAMA, **_granite(0.5, 0.7, 1.5, 0.3), "attention_bias": True, "mlp_bias": True},
        {**LLAMA, **_granite(1.0, 0.35, 0.4, 1.0), "head_dim": 10, "num_key_value_heads": 1},
        {
            **LLAMA,
            **_granite(3.0, 1.0, 1.0, 2.0),
            "hidden_size": 30,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
        },
        {**LLAMA, "num_key_value_heads": 4, **_yarn()},
    ],
    "mixtral": [
        {**LLAMA, "num_local_experts": 4},
        {**LLAMA, "num_local_experts": 7, "num_experts_per_tok": 3, "sliding_window": 6, "head_dim": 10},
        {**LLAMA, "num_local_experts": 3, "num_experts_per_tok": 1, "tie_word_embeddings": True},
        {**LLAMA, "num_local_experts": 5, "num_experts_per_tok": 5, "num_key_value_heads": 1},
        {**LLAMA, "num_local_experts": 6, "num_hidden_layers": 3, **_rope("linear", factor=2.0)},
    ],
    "qwen2_moe": [
        SPARSE,
        {**SPARSE, "num_experts": 5, "norm_topk_prob": True, "qkv_bias": False, "num_key_value_heads": 4},
        {**SPARSE, "num_hidden_layers": 4, "decoder_sparse_step": 2, "tie_word_embeddings": True},
        {**SPARSE, "num_hidden_layers": 3, "mlp_only_layers": [0, 2], "num_experts_per_tok": 1},
        {**SPARSE, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 7, "num_experts_per_tok": 4},
    ],
    "qwen3_moe": [
        {**SPARSE, "head_dim": 16},
        {**SPARSE, "head_dim": 10, "norm_topk_prob": True, "num_experts": 7, "num_key_value_heads": 1},
        {**SPARSE, "head_dim": 8, "num_hidden_layers": 4, "decoder_sparse_step": 2, "attention_bias": True},
        {
            **SPARSE,
            "head_dim": 14,
            "num_hidden_layers": 3,
            "mlp_only_layers": [1],
            "use_sliding_window": True,
            "sliding_window": 5,
        },
        {**SPARSE, "head_dim": 22, "num_experts_per_tok": 6, "tie_word_embeddings": True, **_yarn(factor=3.0)},
    ],
    # The third clamps gates and ups; all but the last use YaRN without truncation.
    "gpt_oss": [
        {**GPT_OSS, "head_dim": 10},
        {**GPT_OSS, "num_experts_per_tok": 1, "num_key_value_heads": 1, "head_dim": 14, "attention_bias": False},
        {**GPT_OSS, "swiglu_limit": 0.4, "swiglu_alpha": 1.1, "num_local_experts": 7, "num_experts_per_tok": 4},
        {**GPT_OSS, "layer_types": [FULL, SLIDING, SLIDING], "sliding_window": 2, "tie_word_embeddings": True},
        {**GPT_OSS, "num_experts_per_tok": 5, "num_key_value_heads": 4, **_rope("default", 1e4)},
    ],
    "gemma": [
        GEMMA,
        {**GEMMA, "head_dim": 16, "num_key_value_heads": 1, "hidden_act": "gelu"},
        {**GEMMA, "num_key_value_heads": 4, "attention_bias": True, "tie_word_embeddings": False},
        {**GEMMA, "hidden_size": 24, "head_dim": 6, "rms_norm_eps": 1e-3, **_rope("default", 5e5)},
        {**GEMMA, **_rope("linear", factor=3.0)},
    ],
    # Windows of 1 agree too, but for transformers' own cache, which then keeps all instead of nothing.
    "gemma2": [
        {**GEMMA, "sliding_window": 7, "query_pre_attn_scalar": 10},
        {**GEMMA, "sliding_window": 2, "query_pre_attn_scalar": 144, "attn_logit_softcapping": 0.5},
        {**GEMMA, "sliding_window": 12, "final_logit_softcapping": None, "attention_bias": True},
        {**GEMMA, "num_key_value_heads": 1, "attn_logit_softcapping": None, "final_logit_softcapping": 2.0},
        {**GEMMA, "sliding_window": 5, "layer_types": [FULL, SLIDING, SLIDING], "tie_word_embeddings": False},
        {**GEMMA, "head_dim": 22, "num_key_value_heads": 4, "sliding_window": 9, **_rope("linear", factor=2.0)},
    ],
    "gemma3_text": [
        {**GEMMA, "num_hidden_layers": 7, "sliding_window": 6, "query_pre_attn_scalar": 10},
        {
            **GEMMA,
            "sliding_window": 9,
            "layer_types": [SLIDING, FULL, SLIDING],
            **_ropes(3e3, rope_type="linear", rope_theta=5e5, factor=8.0),
        },
        {**GEMMA, "num_key_value_heads": 1, "sliding_window": 2, "sliding_window_pattern": 2, "attention_bias": True},
        {
            **GEMMA,
            "head_dim": 14,
            "layer_types": [FULL] * 3,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 168,
        },
        {
            **GEMMA,
            "num_key_value_heads": 4,
            "sliding_window": 3,
            "layer_types": [SLIDING] * 3,
            "tie_word_embeddings": False,
        },
    ],
    "opt": [
        OPT,
        {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 20},
        {**OPT, "tie_word_embeddings": False, "word_embed_proj_dim": 52},
        {**OPT, "enable_bias": False, "activation_function": "gelu"},
        {**OPT, "num_attention_heads": 12, "_remove_final_layer_norm": True},
        {**OPT, "num_attention_heads": 1, "do_layer_norm_before": False, "num_hidden_layers": 3},
    ],
    "gpt2": [
        GPT2,
        {**GPT2, "n_inner": 20, "n_head": 12},
        {**GPT2, "activation_function": "gelu", "tie_word_embeddings": False},
        {**GPT2, "n_head": 1, "layer_norm_epsilon": 1e-3, "activation_function": "relu"},
        {**GPT2, "n_layer": 4, "n_embd": 20, "reorder_and_upcast_attn": True},
    ],
    "gpt_neox": [
        NEOX,
        {**NEOX, "use_parallel_residual": False, "rotary_pct": 1.0},
        {**NEOX, "attention_bias": False, "tie_word_embeddings": True, "rotary_pct": 0.5, "rotary_emb_base": 5e4},
        {**NEOX, "hidden_size": 44, "rotary_pct": 0.6, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-3},
        {
            **NEOX,
            "hidden_size": 20,
            "num_attention_heads": 2,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "partial_rotary_factor": 0.4},
        },
    ],
}

# The name of a case is "llama-0".
CASES = {
    f"{family}-{number}": (family, fields) for family, row in FAMILIES.items() for number, fields in enumerate(row)
}
