"""Text to token ids and back, for `tokenizer.json` and SentencePiece models, and training of a byte-level BPE."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from specjax.hub import chat, json_backend, sentencepiece_backend, tokenizer_files
from specjax.hub.tokenizer_files import TokenizerFiles
from specjax.runtime.errors import UserError

END = "<|end|>"

# Spaces that transformers removes from decoded texts if `clean_up_tokenization_spaces` is set.
_SPACES = (*(f" {mark}" for mark in ".?!,"), " ' ", " n't", " 'm", " 's", " 've", " 're")

_LONGEST_WAIT = 32  # tokens; far more than one character has


class Tokenizer:
    """The tokenizer of a model directory: its vocabulary, special tokens and chat template.

    Special tokens that are spelled out in a text are parsed, as in transformers, unless `tokenizer_config.json` says
    `split_special_tokens`: there, as with tokenizers trained here, they are text.

    Attributes:
      vocab_size: one more than the largest token id, special tokens included; a model's may be padded beyond it.
      eos_ids: the ids that end a sequence; the first is put after texts in training.
      bos_id: the id that begins a sequence, None if there is none.
      pad_id: fills the right of a row: the pad token, else the first EOS. It is never read, as rows have lengths.
    """

    def __init__(self, backend: Any, files: TokenizerFiles):
        """Wraps a backend of this package. Raises UserError if the files state no end of a sequence."""
        self._backend = backend
        self._files = files
        self.vocab_size: int = backend.vocab_size
        self.eos_ids: tuple[int, ...] = files.eos_ids(backend.token_id, backend.vocab_size)
        self.bos_id: int | None = files.role("bos_token", backend.token_id)
        pad = files.role("pad_token", backend.token_id)
        self.pad_id: int = self.eos_ids[0] if pad is None else pad
        # Ignored for a BPE, as in transformers: it would corrupt its texts.
        self._cleans = bool(files.settings.get("clean_up_tokenization_spaces")) and not backend.is_bpe

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text` alone, without special tokens before or after it, as in training rows."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns `encode` of each text."""
        return self._backend.encode_batch(texts, surrounded=False)

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the ids of a prompt: `text` with the special tokens around it that the model expects.

        A Llama's prompt begins with BOS, a T5's ends with EOS; other models expect none.
        """
        return self.encode_prompt_batch([text])[0]

    def encode_prompt_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns `encode_prompt` of each text."""
        return self._backend.encode_batch(texts, surrounded=True)

    def apply_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """Returns the ids of a conversation, written as the model's chat template says.

        Args:
          messages: in order, each with "role" and "content".
          add_generation_prompt: whether to end where the assistant's turn begins.

        Raises:
          UserError: for a model without a template, or messages that it refuses.
        """
        template = self._files.chat_template()
        if template is None:
            raise UserError(
                f"a chat prompt for a model without a template: {self._files.origin} has no chat template; "
                "give the prompt as plain text"
            )
        text = chat.render(
            template,
            messages,
            add_generation_prompt=add_generation_prompt,
            variables=self._files.template_variables(),
        )
        return self.encode(text)  # the template writes the special tokens itself

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`; special tokens have none. An incomplete character reads as U+FFFD."""
        (text,) = self._backend.decode_batch([[int(token) for token in ids]])
        for spaced in _SPACES if self._cleans else ():
            text = text.replace(spaced, spaced.strip())
        return text

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Returns the text that each id adds at its position; special tokens add none.

        A character of several tokens belongs to the last of them. Joined, the pieces are `decode(ids)`, unless decoding
        cleans up spaces or some bytes form no character.
        """
        all_ids = [int(token) for token in ids]
        ids = [token for token in all_ids if token not in self._backend.special]
        added: list[str] = []
        # Each step decodes from the last ids that added text: a token's space depends on whether it opens the text.
        # `old` is the part of the decoded text that was added before. An incomplete character waits for its rest.
        start, end_of_old, old = 0, 0, ""
        for end in range(1, len(ids) + 1):
            (text,) = self._backend.decode_batch([ids[start:end]])
            waits = end < len(ids) and end - start < _LONGEST_WAIT
            complete = text.rstrip("\ufffd") if waits else text
            added.append(complete[len(old) :] if complete.startswith(old) else "")
            old += added[-1]
            if added[-1] and complete == text:
                start, end_of_old = end_of_old, end
                (old,) = self._backend.decode_batch([ids[start:end]])
        rest = iter(added)
        return ["" if token in self._backend.special else next(rest) for token in all_ids]

    def fingerprint(self) -> str:
        """Returns a hash of all that determines the ids of a text: vocabulary, merges, added tokens, normalisation.

        File names, padding, truncation, templates and the tokens around a prompt do not count. The same vocabulary as
        `tokenizer.json` and as a SentencePiece model has two fingerprints: their rules are not proven equal.
        """
        content = json.dumps(self._backend.content(), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def save(self, directory: str | Path) -> None:
        """Writes the tokenizer's files as they were loaded, creating the directory.

        EOS ids that come from a model's configs are not written here; `hub.save` writes them with the model.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.contents.items():
            (directory / name).write_bytes(content)

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Reads the tokenizer of a Hugging Face directory.

        In this order: `tokenizer.json`, a SentencePiece `tokenizer.model` or `spiece.model` (Llama 1 and 2, T5),
        `vocab.json` with `merges.txt` (GPT-2, OPT). EOS ids: `generation_config.json`, else `config.json`, else
        "eos_token" of `tokenizer_config.json`.

        Raises:
          UserError: if there is none of them, it is damaged or not supported, or no id ends a sequence.
        """
        return _tokenizer(tokenizer_files.read(directory))


def _tokenizer(files: TokenizerFiles) -> Tokenizer:
    if tokenizer_files.JSON_FILE in files.contents:
        backend: Any = json_backend.from_json(files)
    elif set(tokenizer_files.SENTENCEPIECE_FILES) & set(files.contents):
        backend = sentencepiece_backend.from_model(files)
    elif {tokenizer_files.VOCABULARY_FILE, tokenizer_files.MERGES_FILE} <= set(files.contents):
        backend = json_backend.from_merges(files)
    else:
        raise UserError(
            f"there is no {files.origin}/{tokenizer_files.JSON_FILE}; name the directory that holds it, or "
            f"{' or '.join(tokenizer_files.SENTENCEPIECE_FILES)}"
        )
    return Tokenizer(backend, files)


def train_byte_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE: every text round-trips exactly.

    Source: Sennrich et al. 2016 (arXiv 1508.07909), with bytes as the first symbols.
    All 256 bytes are in the vocabulary, so there is no unknown token. The same texts give the same tokenizer.
    It has fewer than `vocab_size` ids if the texts offer no more merges.

    Raises UserError if `vocab_size` is too small for the bytes and `<|end|>`, or if there is no text.
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
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END,
        "clean_up_tokenization_spaces": False,
        # The end token spelled out in a text is text, also for transformers.
        "split_special_tokens": True,
    }
    contents = {
        tokenizer_files.JSON_FILE: backend.to_str(pretty=True),
        tokenizer_files.CONFIG_FILE: json.dumps(settings, indent=2) + "\n",
        tokenizer_files.SPECIAL_TOKENS_FILE: json.dumps({"eos_token": END, "pad_token": END}, indent=2) + "\n",
    }
    encoded = {name: content.encode() for name, content in contents.items()}
    return _tokenizer(tokenizer_files.from_contents(encoded, origin="the trained tokenizer"))
