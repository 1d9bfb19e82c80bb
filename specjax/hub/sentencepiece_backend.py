"""Converts SentencePiece models, the `.model` files of Llama 1 and 2 and of T5, to the `tokenizers` library."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from specjax.hub import tokenizer_files
from specjax.hub.json_backend import JsonBackend
from specjax.hub.json_files import reading
from specjax.hub.tokenizer_files import Token, TokenizerFiles
from specjax.runtime.errors import UserError

SPACE = "▁"  # the character that represents a space in pieces
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # ModelProto.SentencePiece.Type
_T5_SENTINELS = 100  # by default
_MOST_SENTINELS = 10_000


class Piece(NamedTuple):
    """A piece of a SentencePiece model."""

    piece: str
    score: float
    type: int


def from_model(files: TokenizerFiles) -> JsonBackend:
    """Reads `tokenizer.model` or `spiece.model`.

    Ids and texts equal those of transformers 5, which differ from the SentencePiece library alone: added tokens in a
    text are parsed, a Llama text that begins with a space gets no second one, and the `tokenizers` library normalises
    T5 text with combining marks. The only difference from transformers: if a Llama's config lacks `add_bos_token`,
    prompts get the BOS with which the model was trained.

    Raises:
      UserError: if the file is damaged, or its model or its added tokens are not supported.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Tokenizer

    name = next(name for name in tokenizer_files.SENTENCEPIECE_FILES if name in files.contents)
    with reading(f"{files.origin}/{name}", "is not a SentencePiece model"):
        proto = sentencepiece_model_pb2.ModelProto.FromString(files.contents[name])
        if not proto.pieces:
            raise ValueError("it has no pieces")
    settings, kind = files.settings, files.tokenizer_class
    if kind not in ("T5Tokenizer", "LlamaTokenizer"):
        raise UserError(
            f"{files.origin}: a SentencePiece model of a {kind or 'nameless tokenizer'} is not supported, only those "
            f"of LlamaTokenizer and T5Tokenizer; save it as {tokenizer_files.JSON_FILE} with transformers"
        )
    _check(proto, files)
    if kind == "T5Tokenizer":
        library, around = _t5(proto), (False, True)
    else:
        prefixed = settings.get("add_prefix_space") is not False
        scheme = "never" if not prefixed else "always" if settings.get("legacy") else "first"
        library = Tokenizer.from_str(json.dumps(bpe(proto.pieces, scheme=scheme)))
        around = bool(settings.get("add_bos_token", True)), bool(settings.get("add_eos_token", False))
    backend = JsonBackend(library, files, _added_tokens(proto, files))
    backend.surround(files, *around)
    return backend


def bpe(pieces: Sequence[Any], *, scheme: str) -> dict[str, Any]:
    """A BPE as the fields of a `tokenizer.json`: of the pieces of a text, those with the best score are merged first.

    Args:
      pieces: a SentencePiece model's pieces by id; unknown characters are split into bytes if there are such pieces.
      scheme: where a space is put before a text: "never", "first" (at its start), "always" (after special tokens too).
    """
    ids = {piece.piece: index for index, piece in reversed(list(enumerate(pieces)))}
    merges = []
    for piece in sorted(pieces, key=lambda piece: -piece.score):
        if piece.type not in (_UNKNOWN, _CONTROL, _BYTE):
            text = piece.piece
            cuts = (cut for cut in range(1, len(text)) if text[:cut] in ids and text[cut:] in ids)
            merges += sorted(((text[:cut], text[cut:]) for cut in cuts), key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    steps = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    steps += [{"type": "Fuse"}, *(strip if scheme != "never" else ())]
    return {
        "model": {
            "type": "BPE",
            "vocab": ids,
            "merges": merges,
            "fuse_unk": True,
            "unk_token": next((piece.piece for piece in pieces if piece.type == _UNKNOWN), None),
            "byte_fallback": any(piece.type == _BYTE for piece in pieces),
        },
        "pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False},
        "decoder": {"type": "Sequence", "decoders": steps},
    }


def _t5(proto: Any) -> Any:
    """A normalising unigram model of the words of a text, each with a space before it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    unknown = next((index for index, piece in enumerate(proto.pieces) if piece.type == _UNKNOWN), None)
    library = Tokenizer(models.Unigram([(piece.piece, piece.score) for piece in proto.pieces], unk_id=unknown))
    if proto.normalizer_spec.precompiled_charsmap:
        library.normalizer = normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap)
    rules = {"replacement": SPACE, "prepend_scheme": "always", "split": True}
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**rules)]
    )
    library.decoder = decoders.Metaspace(**rules)
    return library


def _check(proto: Any, files: TokenizerFiles) -> None:
    """Raises UserError if the model has a feature that its tokenizer class does not support."""
    spec, trained, is_t5 = proto.normalizer_spec, proto.trainer_spec, files.tokenizer_class == "T5Tokenizer"
    unsupported = {
        "another segmentation than its class": trained.model_type != (_UNIGRAM if is_t5 else _BPE),
        "another treatment of whitespace than its class": spec.remove_extra_whitespaces != is_t5
        or not (spec.add_dummy_prefix and spec.escape_whitespaces)
        or trained.treat_whitespace_as_suffix,
        "a normalisation, which a Llama does not have": bool(spec.precompiled_charsmap) and not is_t5,
        "bytes for unknown characters, which a T5 does not have": trained.byte_fallback and is_t5,
        "user-defined symbols": any(piece.type == _USER_DEFINED for piece in proto.pieces),
        "added tokens that are matched after normalisation": is_t5
        and any(token.normalized and not token.special for token in files.added()),
    }
    for what, present in unsupported.items():
        if present:
            raise UserError(
                f"{files.origin}: the SentencePiece model of this {files.tokenizer_class} has {what}, which is not "
                f"supported; save it as {tokenizer_files.JSON_FILE} with transformers"
            )


def _added_tokens(proto: Any, files: TokenizerFiles) -> list[Token]:
    """The tokens that are matched before a text is split, besides those of the config files."""
    tokens = [Token(piece.piece) for piece in proto.pieces if piece.type in (_UNKNOWN, _CONTROL)]
    if files.tokenizer_class != "T5Tokenizer":
        return tokens
    count = int(files.settings.get("extra_ids", files.model.get("extra_ids", _T5_SENTINELS)))
    if not 0 <= count <= _MOST_SENTINELS:
        raise UserError(f"{files.origin}: extra_ids must be 0 to {_MOST_SENTINELS}, not {count}; correct it")
    # In descending order: <extra_id_0> has the largest id.
    return tokens + [Token(f"<extra_id_{i}>", len(proto.pieces) + count - 1 - i) for i in range(count)]
