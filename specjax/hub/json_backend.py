"""Tokenizers that use the `tokenizers` library, read from `tokenizer.json` or GPT-2's `vocab.json` and `merges.txt`."""

import json
from collections.abc import Sequence
from typing import Any

from specjax.hub import tokenizer_files
from specjax.hub.json_files import text
from specjax.hub.tokenizer_files import TokenizerFiles
from specjax.runtime.errors import UserError


class JsonBackend:
    """A `tokenizers.Tokenizer` with the added tokens listed in its directory.

    Text is split as `tokenizer.json` specifies. Transformers 5 instead rebuilds the rules of `LlamaTokenizer` from the
    vocabulary, with another result if the file (as Llama 2's) adds a space before every piece of text between special
    tokens: transformers 5 adds none if the text begins with a space, nor (unless `legacy`) after a special token. As in
    transformers, `add_bos_token` and `add_eos_token` are ignored if there is a `tokenizer.json`.

    Attributes:
      vocab_size: one more than the largest id.
      special: ids that decoding skips.
      is_bpe: whether the vocabulary's algorithm is BPE.
    """

    def __init__(self, library: Any, files: TokenizerFiles):
        """Wraps a `tokenizers.Tokenizer`, which it modifies. Raises UserError if added tokens have conflicting ids."""
        # Files may store truncation and padding, which would silently change the ids of texts.
        library.no_truncation()
        library.no_padding()
        library.encode_special_tokens = bool(files.settings.get("split_special_tokens", False))
        self._library = library
        self._add(files)
        self.vocab_size: int = 1 + max(library.get_vocab().values(), default=-1)
        added = library.get_added_tokens_decoder()
        self.special: frozenset[int] = frozenset(index for index, token in added.items() if token.special)
        self.is_bpe: bool = type(library.model).__name__ == "BPE"

    def _add(self, files: TokenizerFiles) -> None:
        from tokenizers import AddedToken

        present = {token.content for token in self._library.get_added_tokens_decoder().values()}
        assumed = [content for content in files.assumed().values() if self.token_id(content) is not None]
        for token in (*files.added(), *map(tokenizer_files.Token, assumed)):
            if token.content not in present:
                flags = dict(lstrip=token.lstrip, rstrip=token.rstrip, single_word=token.single_word)
                added = AddedToken(token.content, normalized=token.normalized, special=token.special, **flags)
                self._library.add_tokens([added])
                present.add(token.content)
            actual = self._library.token_to_id(token.content)
            if token.id is not None and actual != token.id:
                raise UserError(
                    f'{files.origin}: token "{token.content}" has the id {token.id} in the configs and {actual} in '
                    f"the vocabulary; copy the tokenizer's files again"
                )

    def token_id(self, content: str) -> int | None:
        """Returns the id of a token by its content, or None."""
        return self._library.token_to_id(content)

    def encode_batch(self, texts: Sequence[str], *, surrounded: bool) -> list[list[int]]:
        """Returns the ids of each text; with `surrounded`, also the special tokens before and after a prompt."""
        return [item.ids for item in self._library.encode_batch_fast(list(texts), add_special_tokens=surrounded)]

    def decode_batch(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Returns the text of each row of ids, without special tokens."""
        return self._library.decode_batch([list(row) for row in rows], skip_special_tokens=True)

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
    try:
        library = tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # the library raises Exception itself for any invalid content
        raise UserError(f"{name} is not a valid tokenizer file ({error}); save it again") from None
    return JsonBackend(library, files)


def from_merges(files: TokenizerFiles) -> JsonBackend:
    """Reads `vocab.json` and `merges.txt` of a GPT-2 or OPT. Raises UserError for other classes and damaged files."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    if files.tokenizer_class != "GPT2Tokenizer":
        raise UserError(
            f"{files.origin} has {tokenizer_files.MERGES_FILE} of a {files.tokenizer_class or 'nameless tokenizer'}, "
            f"which is only complete for a GPT2Tokenizer; save it as {tokenizer_files.JSON_FILE} with transformers"
        )
    try:
        vocabulary = json.loads(files.contents[tokenizer_files.VOCABULARY_FILE])
        lines = files.contents[tokenizer_files.MERGES_FILE].decode("utf-8").split("\n")
        merges = [tuple(line.split(" ")) for line in lines if line.strip() and not line.startswith("#version")]
        library = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"the vocabulary in {files.origin} cannot be read ({error}); copy it again") from None
    space = bool(files.settings.get("add_prefix_space", False))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    library.decoder = decoders.ByteLevel()
    backend = JsonBackend(library, files)
    around = {"add_bos_token": "bos_token", "add_eos_token": "eos_token"}
    ids = [files.role(role, backend.token_id) if files.settings.get(key) else None for key, role in around.items()]
    before, after = ([] if index is None else [library.id_to_token(index)] for index in ids)
    library.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        special_tokens=[(library.id_to_token(index), index) for index in ids if index is not None],
    )
    return backend
