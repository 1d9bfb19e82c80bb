"""Tokenizers that use the `sentencepiece` library: from the `.model` files of Llama 1 and 2, and of T5."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from specjax.hub import tokenizer_files
from specjax.hub.json_files import reading
from specjax.hub.tokenizer_files import Token, TokenizerFiles
from specjax.runtime.errors import UserError

_SPACE = "▁"  # the character that represents a space in pieces
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # ModelProto.SentencePiece.Type
_T5_SENTINELS = 100  # by default
_MOST_SENTINELS = 10_000
# Unicode's White_Space, as in transformers; Python's \\s also matches four control characters.
_WHITESPACE = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"


@dataclasses.dataclass(frozen=True)
class _Rules:
    """How a tokenizer class of transformers applies its SentencePiece model.

    Attributes:
      model_type: the segmentation algorithm of the class.
      strips: whether whitespace is stripped at the ends and collapsed elsewhere; the `.model` must agree.
      prefix: "always" adds a space before each segment of text between added tokens, "first" only before a segment at
        the start of the text, "never" before none; a segment that begins with a space gets no second one.
      bos, eos: whether a prompt starts with BOS, and ends with EOS.
    """

    model_type: int
    strips: bool
    prefix: str
    bos: bool
    eos: bool


def _rules(files: TokenizerFiles) -> _Rules:
    settings, kind = files.settings, files.tokenizer_class
    if kind == "T5Tokenizer":
        return _Rules(_UNIGRAM, strips=True, prefix="always", bos=False, eos=True)
    if kind == "LlamaTokenizer":
        prefix = "always" if settings.get("legacy") else "first"
        return _Rules(
            _BPE,
            strips=False,
            prefix="never" if settings.get("add_prefix_space") is False else prefix,
            bos=bool(settings.get("add_bos_token", True)),
            eos=bool(settings.get("add_eos_token", False)),
        )
    raise UserError(
        f"{files.origin}: a SentencePiece model of a {kind or 'nameless tokenizer'} is not supported, only those of "
        f"LlamaTokenizer and T5Tokenizer; save it as {tokenizer_files.JSON_FILE} with transformers"
    )


class SentencePieceBackend:
    """A SentencePiece model with the added tokens and the handling of spaces of transformers' classes.

    Ids and texts equal those of transformers 5, which differ from the SentencePiece library alone: added tokens in a
    text are parsed, a Llama text that begins with a space gets no second one, and the `tokenizers` library normalises
    T5 text with combining marks. The only difference from transformers: if a Llama's config lacks `add_bos_token`,
    prompts get the BOS with which the model was trained.

    Attributes:
      tokens: the content of each id, added tokens included.
      special: ids that decoding skips.
      before, after: ids around a prompt.
      is_bpe: whether the model's algorithm is BPE.
    """

    def __init__(self, proto: Any, files: TokenizerFiles):
        """Wraps a `ModelProto`. Raises UserError if the model or the added tokens are not supported."""
        import sentencepiece

        self._rules = _rules(files)
        _check(proto, self._rules, files)
        self._proto = proto
        self._normalize = _normalizer(proto.normalizer_spec.precompiled_charsmap)
        bare = type(proto)()
        bare.CopyFrom(proto)
        bare.normalizer_spec.precompiled_charsmap = b""
        # For Llama we add the space before a segment ourselves, because it depends on the preceding token.
        bare.normalizer_spec.add_dummy_prefix = self._rules.strips
        self._library = sentencepiece.SentencePieceProcessor(model_proto=bare.SerializeToString())
        self._pieces = [piece.piece for piece in proto.pieces]
        self._ids = {piece: index for index, piece in enumerate(self._pieces)}
        self._added = _added_tokens(proto, self._ids, files)
        self._ids |= {token.content: token.id for token in self._added}
        self.tokens = dict(enumerate(self._pieces)) | {token.id: token.content for token in self._added}
        self.special = frozenset(token.id for token in self._added if token.special)
        self.is_bpe: bool = self._rules.model_type == _BPE
        self.before = [files.role("bos_token", self.token_id)] if self._rules.bos else []
        self.after = [files.role("eos_token", self.token_id)] if self._rules.eos else []
        if None in (*self.before, *self.after):
            raise UserError(
                f"{files.origin}: the token to put around a prompt is not in the vocabulary; correct "
                f"bos_token and eos_token in {tokenizer_files.CONFIG_FILE}"
            )
        split = bool(files.settings.get("split_special_tokens", False))
        self._pattern = _pattern([token for token in self._added if not (split and token.special)])
        self._decode: Callable[[list[str]], str] = _decoder(self._rules)

    def token_id(self, content: str) -> int | None:
        """Returns the id of a token by its content, or None."""
        return self._ids.get(content)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text, without special tokens around it."""
        return [list(self._encode(text)) for text in texts]

    def _encode(self, text: str) -> Iterator[int]:
        end = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            yield from self._encode_stretch(text[end : match.start()], opens=end == 0)
            yield self._ids[match.group(match.lastindex)]
            end = match.end()
        yield from self._encode_stretch(text[end:], opens=end == 0)

    def _encode_stretch(self, text: str, *, opens: bool) -> list[int]:
        if self._rules.strips:
            return self._library.encode(re.sub(_WHITESPACE, " ", self._normalize(text)))
        text = text.replace(" ", _SPACE)
        wanted = self._rules.prefix == "always" or (self._rules.prefix == "first" and opens)
        return self._library.encode(_SPACE + text if text and wanted and text[0] != _SPACE else text)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids; those outside the vocabulary have none."""
        return self._decode([self.tokens[index] for index in ids if index in self.tokens])

    def content(self) -> Any:
        """Everything that determines the ids of a text: pieces, scores, added tokens, normalisation, splitting."""
        spec, trained = self._proto.normalizer_spec, self._proto.trainer_spec
        pieces = [[piece.piece, piece.score, piece.type] for piece in self._proto.pieces]
        flags = [spec.precompiled_charsmap.hex(), trained.byte_fallback, trained.model_type, self._rules.prefix]
        added = [token._replace(special=True) for token in self._added]
        return [pieces, flags, sorted((token._asdict() for token in added), key=lambda token: token["id"])]


def from_model(files: TokenizerFiles) -> SentencePieceBackend:
    """Reads `tokenizer.model` or `spiece.model`. Raises UserError if it is damaged or not supported."""
    from sentencepiece import sentencepiece_model_pb2

    name = next(name for name in tokenizer_files.SENTENCEPIECE_FILES if name in files.contents)
    with reading(f"{files.origin}/{name}", "is not a SentencePiece model"):
        proto = sentencepiece_model_pb2.ModelProto.FromString(files.contents[name])
        if not proto.pieces:
            raise ValueError("it has no pieces")
    return SentencePieceBackend(proto, files)


def _check(proto: Any, rules: _Rules, files: TokenizerFiles) -> None:
    """Raises UserError if the model has a feature that its tokenizer class does not support."""
    spec, trained = proto.normalizer_spec, proto.trainer_spec
    unsupported = {
        "another segmentation than its class": trained.model_type != rules.model_type,
        "another treatment of whitespace than its class": spec.remove_extra_whitespaces != rules.strips
        or not (spec.add_dummy_prefix and spec.escape_whitespaces)
        or trained.treat_whitespace_as_suffix,
        "a normalisation, which a Llama does not have": bool(spec.precompiled_charsmap) and not rules.strips,
        "bytes for unknown characters, which a T5 does not have": trained.byte_fallback and rules.strips,
        "user-defined symbols": any(piece.type == _USER_DEFINED for piece in proto.pieces),
    }
    for what, present in unsupported.items():
        if present:
            raise UserError(
                f"{files.origin}: the SentencePiece model of this {files.tokenizer_class} has {what}, which is not "
                f"supported; save it as {tokenizer_files.JSON_FILE} with transformers"
            )


def _added_tokens(proto: Any, ids: dict[str, int], files: TokenizerFiles) -> list[Token]:
    """The added tokens, which are matched before text is split into pieces; of duplicates the first one is used."""
    ids = dict(ids)
    if files.tokenizer_class == "T5Tokenizer":
        count = int(files.settings.get("extra_ids", files.model.get("extra_ids", _T5_SENTINELS)))
        if not 0 <= count <= _MOST_SENTINELS:
            raise UserError(f"{files.origin}: extra_ids must be 0 to {_MOST_SENTINELS}, not {count}; correct it")
        # In descending order: <extra_id_0> has the largest id.
        ids |= {f"<extra_id_{i}>": len(proto.pieces) + count - 1 - i for i in range(count)}
    control = [piece.piece for piece in proto.pieces if piece.type in (_UNKNOWN, _CONTROL)]
    assumed = [content for content in files.assumed().values() if content in ids]
    sentinels = list(ids)[len(proto.pieces) :]
    owners = {index: content for content, index in ids.items()}
    tokens: dict[str, Token] = {}
    for token in (*files.added(), *map(Token, (*assumed, *control, *sentinels))):
        if token.content in tokens:
            continue
        if token.id is None:
            token = token._replace(id=ids.get(token.content, 1 + max(owners)))
        if owners.get(token.id, token.content) != token.content or ids.get(token.content, token.id) != token.id:
            raise UserError(
                f'{files.origin}: token "{token.content}" has the id {token.id} in the configs and another in the '
                f"SentencePiece model; copy the tokenizer's files again"
            )
        if token.normalized and not token.special and files.tokenizer_class == "T5Tokenizer":
            raise UserError(
                f'{files.origin}: token "{token.content}" is matched after normalisation, which is not supported '
                f"for a SentencePiece model; save it as {tokenizer_files.JSON_FILE} with transformers"
            )
        ids[token.content], owners[token.id] = token.id, token.content
        tokens[token.content] = token
    return list(tokens.values())


def _pattern(tokens: list[Token]) -> re.Pattern | None:
    """A pattern that matches any added token, longer ones first; the matching group is the token's content."""
    parts = []
    for token in sorted(tokens, key=lambda token: -len(token.content)):
        core = f"({re.escape(token.content)})"
        if token.single_word:
            core = rf"(?<!\w){core}(?!\w)"
        parts.append(rf"{_WHITESPACE}*{core}" if token.lstrip else core)
        parts[-1] += f"{_WHITESPACE}*" if token.rstrip else ""
    return re.compile("|".join(parts)) if parts else None


def _normalizer(charsmap: bytes) -> Callable[[str], str]:
    from tokenizers import normalizers

    return normalizers.Precompiled(charsmap).normalize_str if charsmap else str


def _decoder(rules: _Rules) -> Callable[[list[str]], str]:
    """A function that joins pieces to text; byte pieces become characters, an incomplete character U+FFFD."""
    from tokenizers import decoders

    if rules.strips:
        return decoders.Metaspace(replacement=_SPACE, prepend_scheme="always", split=True).decode
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.prefix != "never":
        steps.append(decoders.Strip(content=" ", left=1))
    return decoders.Sequence(steps).decode
