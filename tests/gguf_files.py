"""Writes an exported model as a GGUF file, as llama.cpp's converter does, with the `gguf` package's own tables."""

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

ARCHITECTURES = {"gemma3_text": "gemma3"}  # where the name is not Hugging Face's
_CONTROL, _NORMAL = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
_KEYS = {
    "embedding_length": ("hidden_size", "n_embd"),
    "block_count": ("num_hidden_layers", "n_layer"),
    "feed_forward_length": ("intermediate_size", "n_inner"),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "context_length": ("max_position_embeddings", "n_positions"),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("head_dim",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon",),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "rope.freq_base": ("rope_theta",),
}


def convert(directory: Path, path: Path, *, kind: str = "F32", tokenizer: dict | None = None, **changed) -> None:
    """Writes the model in `directory`, with matrices of type `kind`.

    Args:
      tokenizer: metadata of the tokenizer; by default those of `byte_level(directory)`.
      changed: metadata to change, or to leave out if None; "__" is a dot.
    """
    fields = json.loads((directory / "config.json").read_text())
    architecture = ARCHITECTURES.get(fields["model_type"], fields["model_type"])
    metadata = {
        f"{architecture}.{key}": fields[name]
        for key, names in _KEYS.items()
        for name in names
        if fields.get(name) is not None
    }
    extra = _rotary(fields, architecture, metadata)
    metadata |= byte_level(directory) if tokenizer is None else tokenizer
    metadata |= {name.replace("__", "."): value for name, value in changed.items()}
    write(path, architecture, metadata, {**_tensors(directory, fields, architecture), **extra}, kind)


def write(path: Path, architecture: str, metadata: dict, tensors: dict[str, np.ndarray], kind: str = "F32") -> None:
    """Writes a file with these metadata and tensors; matrices get the type `kind` if their rows fit its blocks."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if value is None:
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    number = gguf.GGMLQuantizationType[kind]
    block, _ = gguf.GGML_QUANT_SIZES[number]
    for name, values in tensors.items():
        if values.ndim > 1 and values.shape[-1] % block == 0:
            writer.add_tensor(name, gguf.quants.quantize(values, number), raw_dtype=number)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def byte_level(directory: Path, pre: str = "gpt-2") -> dict:
    """The metadata of a byte-level BPE in a `tokenizer.json`, with one token that only pads the vocabulary."""
    fields = json.loads((directory / "tokenizer.json").read_text())
    ids = {**fields["model"]["vocab"], **{token["content"]: token["id"] for token in fields["added_tokens"]}}
    tokens = sorted(ids, key=ids.get)
    special = {token["content"] for token in fields["added_tokens"]}
    end = len(tokens) - 1 if not special else ids[sorted(special)[0]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*tokens, f"[PAD{len(tokens)}]"],
        "tokenizer.ggml.token_type": [
            *(int(_CONTROL if token in special else _NORMAL) for token in tokens),
            int(gguf.TokenType.UNUSED),
        ],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in fields["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": end,
    }


def sentencepiece(model: bytes) -> dict:
    """The metadata of a SentencePiece model."""
    from sentencepiece import sentencepiece_model_pb2

    pieces = sentencepiece_model_pb2.ModelProto.FromString(model).pieces
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.piece for piece in pieces],
        "tokenizer.ggml.scores": [piece.score for piece in pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in pieces],  # the same numbers
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def _tensors(directory: Path, fields: dict, architecture: str) -> dict[str, np.ndarray]:
    layers = fields.get("num_hidden_layers") or fields["n_layer"]
    names = gguf.get_tensor_name_map(
        {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[architecture], layers
    )
    tensors = {}
    for name, values in load_file(directory / "model.safetensors").items():
        if (architecture == "llama" and ".q_proj." in name) or (architecture == "llama" and ".k_proj." in name):
            heads = fields["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
            values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        if architecture == "gpt2" and values.ndim == 2 and ".h." in name:
            values = values.T
        tensors[names.get_name(name, (".weight", ".bias"))] = np.ascontiguousarray(values)
    return tensors


def _rotary(fields: dict, architecture: str, metadata: dict) -> dict[str, np.ndarray]:
    """Adds the metadata of the rotary scaling; returns its tensors."""
    scaling, prefix = fields.get("rope_scaling") or {}, f"{architecture}.rope"
    kind = scaling.get("rope_type", scaling.get("type"))
    if architecture == "gemma3":
        metadata[f"{prefix}.freq_base_swa"] = fields["rope_local_base_freq"]
    if "partial_rotary_factor" in fields:
        metadata[f"{prefix}.dimension_count"] = int(fields["head_dim"] * fields["partial_rotary_factor"])
    if kind in ("linear", "yarn"):
        metadata |= {f"{prefix}.scaling.type": kind, f"{prefix}.scaling.factor": scaling["factor"]}
    original = scaling.get("original_max_position_embeddings", fields.get("original_max_position_embeddings"))
    if kind in ("yarn", "longrope"):
        metadata[f"{prefix}.scaling.original_context_length"] = original
    if kind == "longrope":
        names = {"rope_factors_short.weight": "short_factor", "rope_factors_long.weight": "long_factor"}
        return {name: np.array(scaling[field], np.float32) for name, field in names.items()}
    if kind != "llama3":
        return {}
    size, factor = fields["head_dim"], scaling["factor"]
    factors = []
    for frequency in 1.0 / (fields["rope_theta"] ** (np.arange(0, size, 2, dtype=np.float32) / size)):
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        smooth = (original * frequency / (2 * np.pi) - low) / (high - low)
        factors.append(1 / ((1 - min(max(smooth, 0), 1)) / factor + min(max(smooth, 0), 1)))
    return {"rope_freqs.weight": np.array(factors, np.float32)}
