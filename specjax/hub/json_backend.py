"""Tokenizers that use the `tokenizers` library, read from `tokenizer.json` or GPT-2's `vocab.json` and `merges.txt`."""

import json
from collections.abc import Sequence
from typing import Any

from specjax.hub import tokenizer_files
from specjax.hub.json_files import reading, text
from specjax.hub.tokenizer_files import Token, TokenizerFiles
from specjax.runtime.errors import UserError


class JsonBackend:
    """A `tokenizers.Tokenizer` with the added tokens listed in its directory.

    Text is split as `tokenizer.json` specifies. Transformers 5 instead rebuilds the rules of `LlamaTokenizer` from the
    vocabulary, with another result if the file (as Llama 2's) adds a space before every piece of text between special
    tokens: transformers 5 adds none if the text begins with a space, nor (unless `legacy`) after a special token. As in
    transformers, `add_bos_token` and `add_eos_token` are ignored if there is a `tokenizer.json`.

    Attributes:
      tokens: the content of each id, added tokens included.
      special: ids that decoding skips.
      added: ids of the added tokens, which are matched before the rest of a text is split.
      before, after: ids around a prompt.
      is_bpe: whether the vocabulary's algorithm is BPE.
    """

    def __init__(self, library: Any, files: TokenizerFiles, tokens: Sequence[Token] = ()):
        """Wraps a `tokenizers.Tokenizer`, which it modifies.

        Args:
          tokens: added tokens besides those in the files.

        Raises:
          UserError: if added tokens have conflicting ids.
        """
        # Files may store truncation and padding, which would silently change the ids of texts.
        library.no_truncation()
        library.no_padding()
        library.encode_special_tokens = bool(files.settings.get("split_special_tokens", False))
        self._library = library
        self._add(files, tokens)
        self.tokens: dict[int, str] = {index: content for content, index in library.get_vocab().items()}
        added = library.get_added_tokens_decoder()
        self.added = frozenset(added)
        roles = {files.role(name, self.token_id) for name in ("bos_token", "eos_token")} - {None}
        self.special = frozenset(roles | {index for index, token in added.items() if token.special})
        self.is_bpe: bool = type(library.model).__name__ == "BPE"
        plain, prompt = (library.encode("a", add_special_tokens=around).ids for around in (False, True))
        start = next((i for i in range(len(prompt)) if prompt[i : i + len(plain)] == plain), 0)
        self.before, self.after = prompt[:start], prompt[start + len(plain) :]

    def _add(self, files: TokenizerFiles, more: Sequence[Token]) -> None:
        from tokenizers import AddedToken

        assumed = [Token(content) for content in files.assumed().values() if self.token_id(content) is not None]
        ids = {token.content: token.id for token in more}
        listed = [
            token if token.id is not None else token._replace(id=ids.get(token.content))
            for token in (*files.added(), *assumed, *more)
        ]
        present = {token.content for token in self._library.get_added_tokens_decoder().values()}
        for token in sorted(listed, key=lambda token: (token.id is None, token.id)):  # new tokens get ascending ids
            if token.content not in present:
                flags = {name: value for name, value in token._asdict().items() if name not in ("content", "id")}
                flags["normalized"] = token.normalized and not _is_never_found(self._library, token)
                self._library.add_tokens([AddedToken(token.content, **flags)])
                present.add(token.content)
            actual = self.token_id(token.content)
            if token.id is not None and actual != token.id:
                raise UserError(
                    f'{files.origin}: token "{token.content}" has the id {token.id} in the configs and {actual} in '
                    f"the vocabulary; copy the tokenizer's files again"
                )

    def surround(self, files: TokenizerFiles, bos: bool, eos: bool) -> None:
        """Sets whether a prompt begins with BOS and ends with EOS. Raises UserError if that token does not exist."""
        ids = [files.role(role, self.token_id) for role in ("bos_token", "eos_token")]
        self.before, self.after = ([index] if wanted else [] for index, wanted in zip(ids, (bos, eos), strict=True))
        if [None] in (self.before, self.after):
            raise UserError(
                f"{files.origin}: the token to put around a prompt is not in the vocabulary; correct "
                f"bos_token and eos_token in {tokenizer_files.CONFIG_FILE}"
            )

    def token_id(self, content: str) -> int | None:
        """Returns the id of a token by its content, or None."""
        return self._library.token_to_id(content)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text, without special tokens around it."""
        return [item.ids for item in self._library.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids."""
        return self._library.decode(list(ids), skip_special_tokens=False)

    def content(self) -> Any:
        """Everything that determines the ids of a text: vocabulary, merges, added tokens, normalisation, splitting."""
        fields = json.loads(self._library.to_str())
        added = [{key: value for key, value in token.items() if key != "special"} for token in fields["added_tokens"]]
        return [fields["model"], fields["normalizer"], fields["pre_tokenizer"], added]


def from_json(files: TokenizerFiles) -> JsonBackend:
    """Reads `tokenizer.json`. Raises UserError if it is damaged."""
    import tokenizers

    name = f"{files.origin}/{tokenizer_files.JSON_FILE}"
    content = text(name, files.contents[tokenizer_files.JSON_FILE])
    with reading(name, "is not a valid tokenizer file"):
        library = tokenizers.Tokenizer.from_str(content)
        added = library.get_added_tokens_decoder().values()
        lost = [token.content for token in added if token.normalized and _is_never_found(library, token)]
        if lost:
            fields = json.loads(content)
            for token in fields["added_tokens"]:
                token["normalized"] = token["normalized"] and token["content"] not in lost
            library = tokenizers.Tokenizer.from_str(json.dumps(fields))
        return JsonBackend(library, files)


def _is_never_found(library: Any, token: Any) -> bool:
    """Whether a token with the flag "normalized" would stay ordinary text; it is then matched in the text as written.

    The library normalises the token too. If the normaliser puts a space before every text, as in old files of Llama,
    the result occurs only at the start of a text. Special tokens are always matched as written, as in transformers 5.
    """
    starts = {" ", "▁"} - {token.content[:1]}
    return token.special or (
        library.normalizer is not None and library.normalizer.normalize_str(token.content)[:1] in starts
    )


def from_merges(files: TokenizerFiles) -> JsonBackend:
    """Reads `vocab.json` and `merges.txt` of a GPT-2 or OPT. Raises UserError for other classes and damaged files."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    if files.tokenizer_class != "GPT2Tokenizer":
        raise UserError(
            f"{files.origin} has {tokenizer_files.MERGES_FILE} of a {files.tokenizer_class or 'nameless tokenizer'}, "
            f"which is only complete for a GPT2Tokenizer; save it as {tokenizer_files.JSON_FILE} with transformers"
        )
    with reading(f"{files.origin}/{tokenizer_files.VOCABULARY_FILE} with {tokenizer_files.MERGES_FILE}"):
        vocabulary = json.loads(files.contents[tokenizer_files.VOCABULARY_FILE])
        content = files.contents[tokenizer_files.MERGES_FILE].decode("utf-8")
        lines = content.replace("\r\n", "\n").split("\n")  # not splitlines(), which breaks at other characters too
        merges = [tuple(line.split(" ")) for line in lines if line.strip() and not line.startswith("#version")]
        library = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        space = bool(files.settings.get("add_prefix_space", False))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
        library.decoder = decoders.ByteLevel()
        backend = JsonBackend(library, files)
    backend.surround(files, *(bool(files.settings.get(f"add_{name}_token")) for name in ("bos", "eos")))
    return backend
