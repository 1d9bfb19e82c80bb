"""Text to token ids and back: one small door around the `tokenizers` library and its `tokenizer.json`."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from specjax.runtime.errors import UserError

END = "<|end|>"
FILE_NAME = "tokenizer.json"


class Tokenizer:
    """A vocabulary whose end-of-sequence token is the special token named `<|end|>`.

    Attributes:
      vocab_size: number of token ids, the special token included.
      eos_ids: the ids that end a sequence.
      pad_id: what fills the right of a row. It is the EOS id: rows carry their lengths, so nothing reads it.
    """

    def __init__(self, backend: Any):
        """Wraps a `tokenizers.Tokenizer`. Raises UserError if it has no special token `<|end|>`."""
        end_id = backend.token_to_id(END)
        special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        if end_id is None or END not in special:
            raise UserError(
                f'the tokenizer has no special token "{END}", which ends a sequence; '
                "train one with train_byte_bpe or add that token"
            )
        # A text that happens to spell "<|end|>" is text: without this it would end the sequence it stands in.
        backend.encode_special_tokens = True
        self._backend = backend
        self.vocab_size: int = backend.get_vocab_size()
        self.eos_ids: tuple[int, ...] = (end_id,)
        self.pad_id: int = end_id

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, with no token added before or after."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns `encode` of each text, computed in parallel."""
        return [item.ids for item in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`; special tokens have none. An incomplete character reads as U+FFFD."""
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=True)

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Returns the text of each id; joined they are `decode(ids)` unless a token splits a character."""
        return self._backend.decode_batch([[int(token)] for token in ids], skip_special_tokens=True)

    def fingerprint(self) -> str:
        """Returns a hash of the vocabulary, the merges and the rules around them; file names play no part."""
        content = json.dumps(json.loads(self._backend.to_str()), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def save(self, directory: str | Path) -> None:
        """Writes `directory/tokenizer.json`, creating the directory."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(directory / FILE_NAME))

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Reads `directory/tokenizer.json`; UserError if it is missing, damaged or has no `<|end|>`."""
        import tokenizers

        path = Path(directory) / FILE_NAME
        try:
            content = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UserError(f"there is no {path}; name the directory that holds {FILE_NAME}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read ({error}); save the tokenizer again") from None
        try:
            backend = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises bare Exception for whatever is wrong with the content
            raise UserError(f"{path} is not a valid tokenizer file ({error}); save it again") from None
        try:
            return cls(backend)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None


def train_byte_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE: every text round-trips exactly.

    Source: Sennrich et al. 2016 (arXiv 1508.07909), with bytes as the first symbols.
    All 256 bytes are in the vocabulary, so there is no unknown token. The same texts give the same tokenizer.
    It has fewer than `vocab_size` ids where the texts offer no more merges.

    Raises UserError if `vocab_size` leaves no room for the bytes and `<|end|>`, or if there is no text.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(alphabet) + 1
    if vocab_size < smallest:
        raise UserError(f"vocab_size {vocab_size} is too small: bytes and {END} alone are {smallest}")
    texts = list(texts)
    if not any(texts):
        raise UserError("there is no text to train a tokenizer on; check the task's training data")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)
