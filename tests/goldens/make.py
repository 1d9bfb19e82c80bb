"""Writes the goldens: of every family a tiny random checkpoint and the logits that transformers computes with it.

    python tests/goldens/make.py [NAME ...]

needs `requirements-peers.txt`, and nothing of ours: what is committed here is the reference's word alone. For each name
of `CONFIGS`, or those given, it writes `NAME/config.json` and `NAME/model.safetensors` as transformers saves them, and
`NAME/expected.npz` with `tokens` [B, T] and `logits` [B, T, V], of an encoder-decoder also the `prompts` [B, P] that it
reads separately and their `lengths`. Weights are stored in bfloat16 and computed in float32.
"""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
VOCAB = 48
ROWS, LENGTH = 2, 24
PROMPT_LENGTHS = (9, 5)  # of an encoder-decoder

LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
GEMMA = {**LLAMA, "head_dim": 6, "tie_word_embeddings": True}
SPARSE = {
    **LLAMA,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 3,
    "mlp_only_layers": [1],
}
OPT = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "ffn_dim": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
T5 = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
# Heads of 8 channels, of which some turn.
WIDE = {"num_attention_heads": 2}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}

# Windows are shorter than the texts. Positions whose scaling depends on the length of the text are left to the live
# comparison, for there the reference needs the length.
CONFIGS = {
    "llama": ("llama", {**LLAMA, "rope_parameters": LLAMA3}),
    "mistral": ("mistral", {**LLAMA, "sliding_window": 7}),
    "qwen2": ("qwen2", {**LLAMA, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("qwen3", {**LLAMA, "head_dim": 6, "tie_word_embeddings": True}),
    "phi3": ("phi3", {**LLAMA, **WIDE, "num_key_value_heads": 1, "rope_parameters": PARTIAL}),
    "smollm3": ("smollm3", {**LLAMA, "no_rope_layers": [1, 0]}),
    "mixtral": ("mixtral", {**LLAMA, "num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2_moe", {**SPARSE, "shared_expert_intermediate_size": 20}),
    "qwen3_moe": ("qwen3_moe", {**SPARSE, "head_dim": 6, "norm_topk_prob": True}),
    "gemma": ("gemma", GEMMA),
    "gemma2": ("gemma2", {**GEMMA, "sliding_window": 7, "query_pre_attn_scalar": 12}),
    "gemma3_text": (
        "gemma3_text",
        {**GEMMA, "num_hidden_layers": 3, "sliding_window": 7, "sliding_window_pattern": 2, "query_pre_attn_scalar": 6},
    ),
    "opt": ("opt", OPT),
    "opt_350m": ("opt", {**OPT, "word_embed_proj_dim": 12, "do_layer_norm_before": False}),
    "gpt2": ("gpt2", {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24, "n_positions": 32}),
    "gpt_neox": ("gpt_neox", {**LLAMA, **WIDE, "rotary_pct": 0.25}),
    "t5": ("t5", {**T5, "feed_forward_proj": "relu"}),
    "t5_v1_1": ("t5", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    # Further ones at the end: a place is a seed.
    "olmo2": ("olmo2", LLAMA),
    "granite": (
        "granite",
        {
            **LLAMA,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.6,
            "logits_scaling": 2.0,
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            **LLAMA,
            "head_dim": 6,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "sliding_window": 7,
            "swiglu_limit": 0.5,
            "rope_parameters": {**YARN, "original_max_position_embeddings": 16, "truncate": False},
        },
    ),
}


def randomise(model):
    """Weights, gains and biases far enough from zeros and ones that a forgotten one shows."""
    import torch

    with torch.no_grad():
        for name, values in model.named_parameters():
            if values.ndim > 1 or name.endswith("bias"):
                values.normal_(0, 0.25)
            else:
                values.add_(torch.empty_like(values).uniform_(-0.5, 0.5))


def make(name: str) -> None:
    """Writes one golden."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    model_type, fields = CONFIGS[name]
    seed = list(CONFIGS).index(name)
    torch.manual_seed(seed)
    is_t5 = model_type == "t5"
    auto = AutoModelForSeq2SeqLM if is_t5 else AutoModelForCausalLM
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    special |= {"decoder_start_token_id": 0, "pad_token_id": 0} if is_t5 else {}
    model = auto.from_config(AutoConfig.for_model(model_type, **fields, **special))
    randomise(model)
    directory = HERE / name
    directory.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as saved:
        model.to(torch.bfloat16).save_pretrained(saved)
        for file in ("config.json", "model.safetensors"):
            (directory / file).write_bytes((Path(saved) / file).read_bytes())
    model = auto.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    random = np.random.default_rng(seed)
    expected = {"tokens": random.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)}
    inputs = {"input_ids": torch.tensor(expected["tokens"]).long()}
    if is_t5:
        prompts = random.integers(1, VOCAB, (ROWS, max(PROMPT_LENGTHS))).astype(np.int32)
        expected |= {"prompts": prompts, "lengths": np.asarray(PROMPT_LENGTHS, np.int32)}
        mask = np.arange(prompts.shape[1]) < expected["lengths"][:, None]
        inputs = {"decoder_input_ids": inputs["input_ids"]}
        inputs |= {"input_ids": torch.tensor(prompts).long(), "attention_mask": torch.tensor(mask).long()}
    with torch.no_grad():
        expected["logits"] = model(**inputs).logits.numpy()
    np.savez_compressed(directory / "expected.npz", **expected)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for chosen in sys.argv[1:] or CONFIGS:
        make(chosen)
