"""The tokenizer in a GGUF file's metadata, as the files of a Hugging Face tokenizer.

Two kinds are supported: "gpt2", a byte-level BPE that splits texts first by a rule that the file only names, and
"llama", a SentencePiece BPE. The rules are those of the models' own `tokenizer.json`.
"""

import json
from typing import Any, NamedTuple

import numpy as np

from specjax.hub import sentencepiece_backend, tokenizer_files
from specjax.hub.gguf_file import GgufFile
from specjax.runtime.errors import UserError

_PREFIX = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # values of "token_type"

_ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")  # of a text, a turn, a message

# The special tokens of Phi-3 that do not include the whitespace to their right.
_KEEP_SPACE = ("<unk>", "<s>", "<|endoftext|>")


def _split(digits: str) -> list[dict[str, Any]]:
    """The splitting of Llama 3 and Qwen 2, which differ in how many digits stay together."""
    pattern = (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, _bytes(False)]


def _bytes(use_regex: bool) -> dict[str, Any]:
    """Bytes as characters; `use_regex` splits as GPT-2 does."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


class _Splitting(NamedTuple):
    """A rule that `tokenizer.ggml.pre` names.

    Attributes:
      steps: pre-tokenizers of the `tokenizers` library.
      normalizer: the normalizer, or None.
      ignore_merges: whether a piece that is a token needs no merges.
      add_bos: whether a prompt begins with BOS if the file does not say.
    """

    steps: list[dict[str, Any]]
    normalizer: dict[str, Any] | None = None
    ignore_merges: bool = False
    add_bos: bool = False


_QWEN = _Splitting(_split(r"\p{N}"), normalizer={"type": "NFC"})
_LLAMA3 = _Splitting(_split(r"\p{N}{1,3}"), ignore_merges=True, add_bos=True)
_SPLITTINGS = {
    "gpt-2": _Splitting([_bytes(True)]),
    "smollm": _Splitting([{"type": "Digits", "individual_digits": True}, _bytes(True)]),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3),
    "dbrx": _LLAMA3._replace(ignore_merges=False, add_bos=False),  # Phi-4 has it
}


def contents(file: GgufFile) -> dict[str, bytes]:
    """The files of the tokenizer by name, with the end tokens as `generation_config.json`.

    Raises:
      UserError: if there is no tokenizer, or its kind or splitting is not supported, or its metadata are damaged.
    """
    read = _Reader(file)
    kind = read.value("model", str, "none")
    if kind in ("none", "no_vocab"):
        raise UserError(f"{file.path} has no tokenizer; convert the model with its tokenizer, or give a directory")
    if kind not in ("gpt2", "llama"):
        raise UserError(
            f'{file.path}: "{_PREFIX}model" is {kind!r}, which is not supported; gpt2 (byte-level BPE) and llama '
            "(SentencePiece) are"
        )
    tokens, types = read.tokens()
    if kind == "gpt2":
        fields, add_bos = _byte_level(read, tokens)
    else:
        fields, add_bos = _sentencepiece(read, tokens, types), True
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        twice = next(token for index, token in enumerate(tokens) if ids[token] != index)
        raise UserError(f"{file.path}: its tokenizer has the token {twice!r} twice; convert the model again")
    flags = dict.fromkeys(("single_word", "lstrip", "normalized"), False)
    fields["added_tokens"] = [
        {
            "id": index,
            "content": tokens[index],
            "special": bool(types[index] != _USER_DEFINED),
            **flags,
            "rstrip": kind == "llama" and _is_phi3(file) and tokens[index] not in _KEEP_SPACE,
        }
        for index in np.flatnonzero(np.isin(types, (_UNKNOWN, _CONTROL, _USER_DEFINED))).tolist()
        if types[index] != _USER_DEFINED or tokens[index].strip(sentencepiece_backend.SPACE)
    ]
    roles = {role: read.token_id(key, len(tokens)) for role, key in _ROLES.items()}
    around = [("bos_token", read.value("add_bos_token", bool, add_bos)), (None, True)]
    around.append(("eos_token", read.value("add_eos_token", bool, False)))
    fields["post_processor"] = _template(tokens, roles, [role for role, wanted in around if wanted])
    ends = [read.token_id(key, len(tokens)) for key in _ENDS]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{role: tokens[index] for role, index in roles.items() if index is not None},
    }
    files = {
        tokenizer_files.JSON_FILE: fields,
        tokenizer_files.CONFIG_FILE: settings,
        tokenizer_files.GENERATION_FILE: {"eos_token_id": list(dict.fromkeys(i for i in ends if i is not None))},
    }
    encoded = {name: json.dumps(content, ensure_ascii=False).encode() for name, content in files.items()}
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        encoded[tokenizer_files.TEMPLATE_FILE] = template.encode()
    return encoded


class _Reader:
    """Reads the tokenizer's metadata; wrong types raise UserError with the key."""

    def __init__(self, file: GgufFile):
        self.file = file

    def value(self, key: str, kind: type, absent: Any = None) -> Any:
        value = self.file.metadata.get(_PREFIX + key, absent)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            names = {str: "a text", bool: "true or false", int: "an integer", list: "a list of texts"}
            said = "missing" if value is None else f"not {names.get(kind, 'a list of numbers')}"
            raise UserError(f'{self.file.path}: "{_PREFIX}{key}" is {said}; convert the model again')
        return value

    def token_id(self, key: str, size: int) -> int | None:
        """A token's id; None if the file does not say it."""
        index = self.value(key, int, -1)
        if index >= size or index < -1:
            raise UserError(
                f'{self.file.path}: "{_PREFIX}{key}" {index} is outside the vocabulary, 0 .. {size - 1}; '
                "convert the model again"
            )
        return None if index == -1 else index

    def tokens(self) -> tuple[list[str], np.ndarray]:
        """The tokens and their types, without those that only pad the vocabulary."""
        tokens = self.value("tokens", list)
        types = self.value("token_type", np.ndarray, np.full(len(tokens), _NORMAL))
        embedding = self.file.tensors.get("token_embd.weight")
        if not tokens or not all(isinstance(token, str) for token in tokens) or len(types) != len(tokens):
            raise UserError(f"{self.file.path}: its tokens and their types do not match; convert the model again")
        if embedding is not None and len(tokens) > embedding.shape[0]:
            raise UserError(
                f"{self.file.path} has {len(tokens)} tokens and an embedding of {embedding.shape[0]} rows; convert the "
                "model again"
            )
        size = len(tokens)
        while size and tokens[size - 1] == f"[PAD{size - 1}]":
            size -= 1
        return tokens[:size], np.array(types[:size])


def _byte_level(read: _Reader, tokens: list[str]) -> tuple[dict[str, Any], bool]:
    """The `tokenizer.json` of a byte-level BPE, and whether prompts begin with BOS if the file does not say."""
    is_gpt2 = read.file.metadata.get("general.architecture") == "gpt2"
    name = read.value("pre", str, "gpt-2" if is_gpt2 else None)
    if name not in _SPLITTINGS:
        raise UserError(
            f'{read.file.path}: "{_PREFIX}pre" is {name!r}, a way to split texts that is not supported; '
            f"{', '.join(_SPLITTINGS)} are"
        )
    rule, ids = _SPLITTINGS[name], {token: index for index, token in enumerate(tokens)}
    merges = [merge.split(" ") if isinstance(merge, str) else [] for merge in read.value("merges", list)]
    for pair in merges:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= ids.keys():
            raise UserError(
                f'{read.file.path}: "{_PREFIX}merges" has {" ".join(pair)!r}, which are not two tokens that make a '
                "third; convert the model again"
            )
    model = {"type": "BPE", "vocab": ids, "merges": merges, "ignore_merges": rule.ignore_merges}
    return {
        "model": model,
        "normalizer": rule.normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": rule.steps},
        "decoder": _bytes(True),
    }, rule.add_bos


def _sentencepiece(read: _Reader, tokens: list[str], types: np.ndarray) -> dict[str, Any]:
    """The `tokenizer.json` of a SentencePiece BPE. Renames tokens of spaces, which the file has as spaces."""
    space = sentencepiece_backend.SPACE
    tokens[:] = [space * len(token) if token.isspace() and set(token) == {" "} else token for token in tokens]
    scores = read.value("scores", np.ndarray, np.zeros(0))
    if len(scores) < len(tokens):
        raise UserError(f'{read.file.path}: "{_PREFIX}scores" has {len(scores)} scores for {len(tokens)} tokens')
    # User-defined tokens are matched before any merge; those of spaces are instead merged first.
    first = np.where(types == _USER_DEFINED, np.inf, scores[: len(tokens)])
    unknown = read.token_id("unknown_token_id", len(tokens))
    if unknown is not None:
        types[unknown] = _UNKNOWN
    pieces = [sentencepiece_backend.Piece(*piece) for piece in zip(tokens, first.tolist(), types.tolist(), strict=True)]
    prefix = read.value("add_space_prefix", bool, True)
    fields = sentencepiece_backend.bpe(pieces, scheme="first" if prefix else "never")
    if prefix and _is_phi3(read.file):  # a space before every text between special tokens, whatever it begins with
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": space}
        steps = [{"type": "Prepend", "prepend": space}, replace]
        fields |= {"normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None}
    return fields


def _is_phi3(file: GgufFile) -> bool:
    return file.metadata.get("general.architecture") == "phi3"


def _template(tokens: list[str], roles: dict[str, int | None], around: list[str | None]) -> dict[str, Any] | None:
    """The post-processor that puts tokens around a prompt; None in `around` is the prompt."""
    parts, special = [], {}
    for role in around:
        index = None if role is None else roles[role]
        if role is None:
            parts.append({"Sequence": {"id": "A", "type_id": 0}})
        elif index is not None:
            parts.append({"SpecialToken": {"id": tokens[index], "type_id": 0}})
            special[tokens[index]] = {"id": tokens[index], "ids": [index], "tokens": [tokens[index]]}
    pair = [*parts, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": parts, "pair": pair, "special_tokens": special} if special else None
