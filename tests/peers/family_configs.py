"""Tiny configs of every family for the comparison with transformers: one table, at least five a family.

Each entry is what transformers' config class of that `model_type` is given; `test_families.py` does the rest. They
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


def _rope(kind, theta=1e4, **fields):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **fields}}


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
    ],
}

# The reference's name of a case, "llama-0".
CASES = {f"{family}-{number}": (family, fields) for family, row in FAMILIES.items() for number, fields in enumerate(row)}
