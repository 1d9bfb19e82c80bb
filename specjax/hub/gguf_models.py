"""The model in a GGUF file: its metadata as the fields of a `config.json`, and its tensors under the file's names.

Keys and tensor names are llama.cpp's (https://github.com/ggml-org/llama.cpp, `gguf-py/gguf/constants.py`). Its
converter (`convert_hf_to_gguf.py`) changes some values: it reorders the rows of Llama's query and key projections, adds
1 to Gemma's norms, transposes GPT-2's kernels, and stores scaled rotary frequencies as tensors.
"""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from specjax.hub import file_layout
from specjax.hub.families import base, gemma, gpt2, llama, phi3, qwen, rotary_fields, window_fields
from specjax.hub.gguf_file import GgufFile, GgufTensor
from specjax.models.rotary import Rotary
from specjax.runtime.errors import UserError

FAMILIES = {
    "llama": llama.FAMILY,
    "qwen2": qwen.QWEN2,
    "qwen3": qwen.QWEN3,
    "phi3": phi3.FAMILY,
    "gpt2": gpt2.FAMILY,
    "gemma": gemma.GEMMA,
    "gemma2": gemma.GEMMA2,
    "gemma3": gemma.GEMMA3,
}

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_FREQUENCIES, _SHORT, _LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
# Modules of our parameter tree -> modules in the file.
_MODULES = {
    "attention_norm": "attn_norm",
    "attention.query": "attn_q",
    "attention.key": "attn_k",
    "attention.value": "attn_v",
    "attention.output": "attn_output",
    "attention.query_norm": "attn_q_norm",
    "attention.key_norm": "attn_k_norm",
    "attention_output_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "mlp_output_norm": "post_ffw_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}
_FUSED = {"attention": "attn_qkv", "mlp": "ffn_up"}

# Metadata keys, without the architecture -> attributes of our config, whose fields the family knows.
_INTEGERS = {
    "embedding_length": "width",
    "block_count": "layers",
    "feed_forward_length": "mlp_width",
    "attention.head_count": "heads",
    "context_length": "max_positions",
}
# Metadata keys, without the architecture -> fields of a `config.json`.
_OPTIONAL = {
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base_swa": "rope_local_base_freq",
}
# Keys that are read elsewhere in this file, and keys that have only one supported value (None: any).
_SCALE = "rope.scaling.attn_factor"
_BETAS = {f"rope.scaling.yarn_{name}": name for name in ("beta_fast", "beta_slow")}
_PATTERN = "attention.sliding_window_pattern"
_READ = (
    *(_SCALE, *_BETAS, _PATTERN),
    *("attention.head_count_kv", "attention.key_length", "rope.freq_base", "rope.dimension_count"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"),
)
_ONLY = {
    **dict.fromkeys(("vocab_size", "attention.value_length", "rope.scaling.finetuned"), None),
    "tensor_data_layout": None,
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
}
# Llama 3's scaling, of which the file has only the resulting frequencies: all its checkpoints have these values.
_LLAMA3 = {"low_frequency": 1.0, "high_frequency": 4.0, "original_positions": 8192}
_LONGROPE = {"short_factor": _SHORT, "long_factor": _LONG}
# Layers of the Gemma models (27B) that scale queries by the width per head. llama.cpp too knows them by this number.
_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}


def family_and_fields(file: GgufFile) -> tuple[base.Family, dict[str, Any]]:
    """The family of a file's model, with the names of its tensors in the file, and the fields of a `config.json`.

    Raises:
      UserError: naming the key, for an architecture, a key or a value that is not supported.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture not in FAMILIES:
        raise UserError(
            f'"general.architecture" is {architecture!r}, which is not supported; {", ".join(FAMILIES)} are'
        )
    for key, value in file.metadata.items():
        name = key.removeprefix(f"{architecture}.")
        if name == key or name in (*_INTEGERS, *_OPTIONAL, *_READ):
            continue
        if name not in _ONLY or _ONLY[name] not in (None, value):
            raise UserError(
                f'"{key}" is {_short(value)}, which is not supported; take another checkpoint of this model'
            )
    family = FAMILIES[architecture]
    return _with_names(family), _Metadata(file, architecture).fields(family)


def tensors(file: GgufFile) -> dict[str, GgufTensor]:
    """The tensors by name; their slices have the rows and values of Hugging Face's files."""
    architecture, listed = file.metadata["general.architecture"], dict(file.tensors)
    heads = _Metadata(file, architecture).heads() if architecture == "llama" else {}
    for name, tensor in file.tensors.items():
        kind = name.split(".")[2:3]
        if kind and kind[0] in heads:
            listed[name] = tensor._replace(heads=heads[kind[0]])
        if "norm" in name and architecture.startswith("gemma"):
            listed[name] = tensor._replace(shift=-1.0)
    return listed


def _short(value: Any) -> str:
    """A metadata value in an error message."""
    text = repr(value.tolist() if isinstance(value, np.ndarray) else value)
    return text if len(text) <= 60 else f"{text[:60]} ..."


def _with_names(family: base.Family) -> base.Family:
    """The family with the names that its tensors have in GGUF files."""
    counts = collections.Counter(family.names.values())
    fused = {path for path in _MODULES if counts[family.names.get(f"blocks.{{}}.{path}.kernel")] > 1}
    modules = _MODULES | {path: _FUSED[path.partition(".")[0]] for path in fused}
    names = file_layout.tensor_names("token_embd", "blk", modules, "output_norm", "output")
    names = {"positions": "position_embd.weight", **names}
    return dataclasses.replace(family, names=names, transposed=False, ignored=(_FREQUENCIES, _SHORT, _LONG))


@dataclasses.dataclass(frozen=True)
class _Metadata:
    """The metadata of a file's model, read with checks."""

    file: GgufFile
    architecture: str

    def number(self, name: str, kind: type, absent: Any = None) -> Any:
        """A positive number. Raises UserError, naming the key, if it is another value, or missing without default."""
        key = f"{self.architecture}.{name}"
        if key not in self.file.metadata and absent is None:
            raise UserError(f'"{key}" is missing; convert the model again')
        if isinstance(value := self.file.metadata.get(key), np.ndarray | list):
            raise UserError(f'"{key}" must be a number, not {_short(value)}; layers that differ are not supported')
        return base.value_of(self.file.metadata, key, kind, absent=absent)

    def get(self, name: str, absent: Any = None) -> Any:
        return self.file.metadata.get(f"{self.architecture}.{name}", absent)

    def optional(self, names: Mapping[str, str]) -> dict[str, int | float]:
        """The positive numbers that the file has, by field; `names` are fields by key."""
        kinds = {key: int if isinstance(self.get(key), int) else float for key in names if self.get(key) is not None}
        return {names[key]: self.number(key, kind) for key, kind in kinds.items()}

    def heads(self) -> dict[str, int]:
        """The number of heads in each projection whose rows the file has in another order."""
        heads = self.number("attention.head_count", int)
        return {"attn_q": heads, "attn_k": self.number("attention.head_count_kv", int, heads)}

    def fields(self, family: base.Family) -> dict[str, Any]:
        sizes = {attribute: self.number(key, int) for key, attribute in _INTEGERS.items()}
        names = {field.attribute: field.name for field in family.fields if isinstance(field, base.Field)}
        fields = {names[attribute]: size for attribute, size in sizes.items()} | self.optional(_OPTIONAL)
        pattern = self.get(_PATTERN)
        if isinstance(pattern, np.ndarray):  # whether each layer has a window, else every how many have none
            fields["layer_types"] = [window_fields.KINDS[bool(windowed)] for windowed in pattern]
        elif pattern is not None:
            fields["sliding_window_pattern"] = self.number(_PATTERN, int)
        divided = max(sizes["width"] // sizes["heads"], 1)
        size = self.number("attention.key_length", int, divided)
        if self.number("attention.value_length", int, size) != size:
            raise UserError(
                f'"{self.architecture}.attention.value_length" differs from "attention.key_length", which is not '
                "supported; take another checkpoint of this model"
            )
        by_width = sizes["layers"] == _SCALED_BY_WIDTH.get(self.architecture)
        if self.architecture != "gpt2":
            fields |= {
                "num_key_value_heads": self.heads()["attn_k"],
                "head_dim": size,
                "query_pre_attn_scalar": divided if by_width else size,
                "attention_bias": "blk.0.attn_q.bias" in self.file.tensors,
                "mlp_bias": "blk.0.ffn_up.bias" in self.file.tensors,
                **self._rotary(size, sizes["max_positions"]),
            }
        vocabulary = self.file.tensors.get(_EMBEDDING)
        if vocabulary is None:
            raise UserError(f"{_EMBEDDING} is missing; copy the file again")
        stored = {tensor.dtype for tensor in self.file.tensors.values() if len(tensor.shape) > 1}
        return fields | {
            "model_type": family.model_type,
            "vocab_size": vocabulary.shape[0],
            "tie_word_embeddings": self._tied(vocabulary),
            "torch_dtype": {("F32",): "float32", ("F16",): "float16"}.get(tuple(stored), "bfloat16"),
        }

    def _tied(self, embedding: GgufTensor) -> bool:
        """Whether the head is the embedding; old files of GPT-2 store it twice."""
        head = self.file.tensors.get(_HEAD)
        same = head is not None and (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
        return head is None or (same and np.array_equal(head.raw(), embedding.raw()))

    def _rotary(self, size: int, max_positions: int) -> dict[str, Any]:
        """The fields of the rotary positions."""
        rotated = self.number("rope.dimension_count", int, size)
        original = self.number("rope.scaling.original_context_length", int, max_positions)
        partial = {} if rotated == size else {"partial_rotary_factor": np.nextafter(rotated / size, 1).item()}
        return {
            "rope_theta": self.number("rope.freq_base", float, 10000.0),
            "rope_scaling": self._scaling(rotated, original),
            **({"original_max_position_embeddings": original} if self.architecture == "phi3" else {}),
            **partial,
        }

    def _scaling(self, rotated: int, original: int) -> dict[str, Any] | None:
        kind = self.get("rope.scaling.type", "none")
        if _LONG in self.file.tensors:
            factors = {name: self._vector(tensor).tolist() for name, tensor in _LONGROPE.items()}
            return {"rope_type": "longrope", **factors, **self.optional({_SCALE: "attention_factor"})}
        if _FREQUENCIES in self.file.tensors:
            return self._llama3(rotated)
        if kind == "none":
            return None
        if kind not in ("linear", "yarn"):
            raise UserError(
                f'"{self.architecture}.rope.scaling.type" is {kind!r}, which is not supported; linear and yarn are'
            )
        scaling = {"rope_type": kind, "factor": self.number("rope.scaling.factor", float)}
        yarn = {"original_max_position_embeddings": original, **self.optional(_BETAS)} if kind == "yarn" else {}
        return scaling | yarn

    def _llama3(self, rotated: int) -> dict[str, Any] | None:
        """The scaling whose frequencies are those of the file; None if they are not scaled."""
        factors, theta = self._vector(_FREQUENCIES), self.number("rope.freq_base", float, 10000.0)
        if np.array_equal(factors, np.ones(rotated // 2)):
            return None
        scaled = Rotary(theta, rotated, "llama3", float(factors.max()), **_LLAMA3)
        lengths = jnp.zeros(0, jnp.int32)  # these kinds do not depend on them
        ratio = np.asarray(Rotary(theta, rotated).frequencies(lengths)) / np.asarray(scaled.frequencies(lengths))
        if factors.shape != ratio.shape or not np.allclose(factors, ratio, rtol=1e-4):
            raise UserError(f"{_FREQUENCIES} has other rotary frequencies than Llama 3, which are not supported")
        return rotary_fields.written_rotary(scaled, rotated)["rope_scaling"]

    def _vector(self, name: str) -> np.ndarray:
        if name not in self.file.tensors:
            raise UserError(f"{name} is missing; copy the file again")
        tensor = self.file.tensors[name]
        return tensor.read(tuple(slice(0, length) for length in tensor.shape))
