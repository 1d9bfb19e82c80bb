"""Converts text to token ids and back with a model's tokenizer, and trains byte-level BPE tokenizers."""

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

_LONGEST_WAIT = 32  # maximum number of tokens of an incomplete character; real characters have far fewer


class Tokenizer:
    """The tokenizer of a model directory: its vocabulary, special tokens and chat template.

    If a text contains the content of a special token, it becomes that token, as in transformers. With
    `split_special_tokens` in `tokenizer_config.json`, as in tokenizers trained here, it stays ordinary text.

    Attributes:
      vocab_size: one more than the largest token id, special tokens included; a model may pad its vocabulary further.
      eos_ids: the ids that end a sequence; the first one is appended to texts in training.
      bos_id: the id that begins a sequence; None if there is none.
      pad_id: pads rows on the right: the pad token, else the first EOS. Its value has no effect, as rows have lengths.
    """

    def __init__(self, backend: Any, files: TokenizerFiles):
        """Wraps a JsonBackend or SentencePieceBackend. Raises UserError if the files define no EOS token."""
        self._backend = backend
        self._files = files
        self.vocab_size: int = backend.vocab_size
        self.eos_ids: tuple[int, ...] = files.eos_ids(backend.token_id, backend.vocab_size)
        self.bos_id: int | None = files.role("bos_token", backend.token_id)
        pad = files.role("pad_token", backend.token_id)
        self.pad_id: int = self.eos_ids[0] if pad is None else pad
        # Ignored for BPE, as in transformers, because it would corrupt decoded texts.
        self._cleans = bool(files.settings.get("clean_up_tokenization_spaces")) and not backend.is_bpe

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text` without special tokens before or after it, as in training rows."""
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
        """Returns the ids of a conversation in the format of the model's chat template.

        Args:
          messages: the messages in order, each with "role" and "content".
          add_generation_prompt: whether to append the beginning of an assistant's turn.

        Raises:
          UserError: if there is no template, or the template rejects the messages.
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
        """Returns the text of `ids` without special tokens. An incomplete character becomes U+FFFD."""
        (text,) = self._backend.decode_batch([[int(token) for token in ids]])
        for spaced in _SPACES if self._cleans else ():
            text = text.replace(spaced, spaced.strip())
        return text

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Returns the text that each id adds to the decoded text; special tokens add none.

        A character of several tokens is added by the last of them. The joined pieces equal `decode(ids)`, unless
        decoding cleans up spaces or some bytes are not valid UTF-8.
        """
        all_ids = [int(token) for token in ids]
        ids = [token for token in all_ids if token not in self._backend.special]
        added: list[str] = []
        # Each step also decodes the last ids that added text, because a token at the start of a text loses its space.
        # `old` is the decoded text that was added already. An incomplete character is added once it is complete.
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

        It does not depend on file names, padding, truncation, templates or the special tokens around a prompt. A
        `tokenizer.json` and a SentencePiece model of the same vocabulary have different fingerprints.
        """
        content = json.dumps(self._backend.content(), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def save(self, directory: str | Path) -> None:
        """Writes the tokenizer's files as they were loaded; creates the directory.

        EOS ids from a model's config files are not written here; `hub.save` writes them with the model.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.contents.items():
            (directory / name).write_bytes(content)

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Reads the tokenizer of a Hugging Face directory.

        It uses the first that exists of `tokenizer.json`, a SentencePiece `tokenizer.model` or `spiece.model` (Llama 1
        and 2, T5), and `vocab.json` with `merges.txt` (GPT-2, OPT). EOS ids come from `generation_config.json`, else
        `config.json`, else "eos_token" of `tokenizer_config.json`.

        Raises:
          UserError: if none of these files exists, a file is damaged or not supported, or there is no EOS id.
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
    """Trains a byte-level BPE tokenizer, with which every text round-trips exactly.

    Source: Sennrich et al. 2016 (arXiv 1508.07909), with the 256 bytes as initial symbols.
    So there is no unknown token. Training is deterministic.
    The vocabulary is smaller than `vocab_size` if the texts have too few distinct pairs to merge.

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
        # If a text contains the content of the end token, it stays ordinary text, also in transformers.
        "split_special_tokens": True,
    }
    contents = {
        tokenizer_files.JSON_FILE: backend.to_str(pretty=True),
        tokenizer_files.CONFIG_FILE: json.dumps(settings, indent=2) + "\n",
        tokenizer_files.SPECIAL_TOKENS_FILE: json.dumps({"eos_token": END, "pad_token": END}, indent=2) + "\n",
    }
    encoded = {name: content.encode() for name, content in contents.items()}
    return _tokenizer(tokenizer_files.from_contents(encoded, origin="the trained tokenizer"))
