"""Converts text to token ids and back with a model's tokenizer, and trains byte-level BPE tokenizers."""

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from specjax.hub import chat, gguf_file, gguf_tokenizer, json_backend, sentencepiece_backend, tokenizer_files
from specjax.hub.json_backend import JsonBackend
from specjax.hub.json_files import reading
from specjax.hub.location import is_gguf, locate
from specjax.hub.tokenizer_files import TokenizerFiles
from specjax.runtime.errors import UserError

END = "<|end|>"

# Spaces that transformers removes from decoded texts if `clean_up_tokenization_spaces` is set.
_SPACES = (*(f" {mark}" for mark in ".?!,"), " ' ", " n't", " 'm", " 's", " 've", " 're")

_LONGEST_WAIT = 32  # maximum number of tokens of an incomplete character; real characters have far fewer

# In the names of special tokens that a model does not use, such as Llama 3's.
_PLACEHOLDER = re.compile("reserved|unused|placeholder|dummy", re.IGNORECASE)

_PROBE = "specjax"  # a text that no tokenizer or template treats specially
# A byte that does not begin a character, in vocabularies with bytes as fallback.
_INSIDE = re.compile("<0x[89AB].>")
_CONTEXTS = ("\n", "x", ".")  # texts with whose last token the first token of another text rarely merges


class Tokenizer:
    """The tokenizer of a model directory: its vocabulary, special tokens and chat template.

    If a text contains the content of a special token, it becomes that token, as in transformers. With
    `split_special_tokens` in `tokenizer_config.json`, as in tokenizers trained here, it stays ordinary text.

    `encode_prompt` gives a prompt's ids, `encode_pairs` a prompt's and its completion's (training text), and
    `decode(ids, after=prompt_ids)` the text that ids add to a prompt.

    Attributes:
      vocab_size: one more than the largest token id, special tokens included; a model may pad its vocabulary further.
      eos_ids: the ids that end a sequence in generation.
      bos_id: the id that begins a sequence; None if there is none.
      pad_id: pads rows on the right: the pad token, else the first EOS. Its value has no effect, as rows have lengths.
    """

    def __init__(self, backend: JsonBackend, files: TokenizerFiles):
        """Wraps a backend. Raises UserError if the files define no EOS token."""
        self._backend = backend
        self._files = files
        self.vocab_size: int = 1 + max(backend.tokens, default=-1)
        self.eos_ids: tuple[int, ...] = files.eos_ids(backend.token_id, self.vocab_size)
        self.bos_id: int | None = files.role("bos_token", backend.token_id)
        pad = files.role("pad_token", backend.token_id)
        self.pad_id: int = self.eos_ids[0] if pad is None else pad
        # Ignored for BPE, as in transformers, because it would corrupt decoded texts.
        self._cleans = bool(files.settings.get("clean_up_tokenization_spaces")) and not backend.is_bpe

    @functools.cached_property
    def end_id(self) -> int:
        """The id that training appends to a text.

        It is the token that ends an assistant's turn in the chat template if there is one, else the tokenizer's
        EOS token, else the first of `eos_ids`.
        """
        end = self._files.role("eos_token", self._backend.token_id)
        turn = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}]
        ends: list[int] = []
        if self._files.chat_template() is not None:
            with contextlib.suppress(UserError):  # templates of base models may refuse these messages
                closing = self._render(turn, add_generation_prompt=False).rpartition(_PROBE)[2]
                ends = [token for token in self.encode(closing) if token == end or token in self.eos_ids]
        return [*ends, *([] if end is None else [end]), *self.eos_ids][0]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """`eos_ids`, and with a chat template the token that ends a turn, which config files need not list."""
        return tuple(dict.fromkeys((*self.eos_ids, *((self.end_id,) if self.has_chat_template else ()))))

    @property
    def has_chat_template(self) -> bool:
        return self._files.chat_template() is not None

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """The fields of `generation_config.json`; empty if there is none."""
        return self._files.generation

    def special_id(self, content: str) -> int | None:
        """Returns the id of the special token with this content, which is no part of decoded texts; None without."""
        token = self._backend.token_id(content)
        return token if token in self._backend.special else None

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text` without special tokens before or after it, as in training rows."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns `encode` of each text. Raises UserError for a text that cannot be encoded as UTF-8."""
        try:
            return self._backend.encode_batch(texts)
        except TypeError:  # of the library
            raise UserError(
                "a text has half a surrogate pair, or bytes that are not UTF-8, which are no characters; remove them"
            ) from None

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the ids of a prompt: `text` with the special tokens around it that the model expects.

        A Llama's prompt begins with BOS, a T5's ends with EOS; other models expect none. A text that begins with BOS,
        as many chat templates write it, gets no second one.
        """
        return self._surrounded(self.encode(text))

    def _surrounded(self, row: list[int]) -> list[int]:
        before, after = self._backend.before, self._backend.after
        return [*([] if row[: len(before)] == before else before), *row, *after]

    def apply_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """Returns the ids of a conversation in the format of the model's chat template.

        Args:
          messages: the messages in order, each with "role" and "content".
          add_generation_prompt: whether to append the beginning of an assistant's turn.

        Raises:
          UserError: if there is no template, or the template rejects the messages.
        """
        # The template writes the special tokens itself.
        return self.encode(self._render(messages, add_generation_prompt=add_generation_prompt))

    def user_opening(self) -> list[int]:
        """Returns the ids of a conversation up to the user's first word. Raises UserError if the template has none."""
        turn = self._render([{"role": "user", "content": _PROBE}], add_generation_prompt=False)
        if _PROBE not in turn:
            raise UserError(f"the chat template of {self._files.origin} does not write the user's text as it is")
        return self.encode(turn.partition(_PROBE)[0])

    def _render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        template = self._files.chat_template()
        if template is None:
            raise UserError(
                f"a chat prompt for a model without a template: {self._files.origin} has no chat template; "
                "give the prompt as plain text"
            )
        roles = self._files.roles()
        return chat.render(template, messages, add_generation_prompt=add_generation_prompt, variables=roles)

    def encode_pairs(
        self, prompts: Sequence[str | Sequence[Mapping[str, Any]]], completions: Sequence[str]
    ) -> list[tuple[list[int], list[int]]]:
        """Returns the ids of each prompt, and of its completion as it continues that prompt, with an end token.

        A completion is encoded in the context of its prompt: Llama 2's and Phi-3's tokenizers begin every text with a
        space, which a continuation must not have. An encoder-decoder's completion is a text of its own, so it needs
        `encode` instead.

        Args:
          prompts: texts, as for `encode_prompt`, or conversations, as for `apply_chat`; a conversation's completion
            is the assistant's next message, in the format of the chat template.
          completions: the text after each prompt; it ends with `end_id`.
        """
        heads, texts = [], []
        for prompt, completion in zip(prompts, completions, strict=True):
            if isinstance(prompt, str):
                head, text = prompt, completion
            else:
                head = self._render(prompt, add_generation_prompt=True)
                reply = {"role": "assistant", "content": completion}
                whole = self._render([*prompt, reply], add_generation_prompt=False)
                text = whole.removeprefix(head)
                if not whole.startswith(head) or completion.strip() not in text:  # a template that drops or cuts turns
                    text = completion
            heads.append(head)
            texts.append(text)
        alone = self.encode_batch(heads)
        joined = self.encode_batch([head + text for head, text in zip(heads, texts, strict=True)])
        pairs = []
        for index, (prompt, row, whole) in enumerate(zip(prompts, alone, joined, strict=True)):
            continued = whole[: len(row)] == row
            ids = whole[len(row) :] if continued else self._continue(texts[index])
            if not isinstance(prompt, str):  # what the template writes after the turn is no part of it
                inside = self.encode(completions[index]).count(self.end_id)
                ends = [place for place, token in enumerate(ids) if token == self.end_id][inside : inside + 1]
                ids = ids[: ends[0]] if ends else ids
            pairs.append((self._surrounded(row) if isinstance(prompt, str) else row, [*ids, self.end_id]))
        return pairs

    def _continue(self, text: str) -> list[int]:
        """The ids of a text after one with which its first token would merge: without a space that begins a text."""
        for context in _CONTEXTS:
            row, whole = self.encode_batch([context, context + text])
            if whole[: len(row)] == row:
                return whole[len(row) :]
        return self.encode(text)

    def decode(self, ids: Iterable[int], *, after: Iterable[int] = ()) -> str:
        """Returns the text of `ids` without special tokens. An incomplete character becomes U+FFFD.

        Args:
          ids: the token ids.
          after: ids of the preceding text, which is not part of the result. Many tokenizers drop the space of the first
            token of a text, which a continuation keeps.
        """
        ids, context = [int(token) for token in ids], self._context(after)
        text, head = self._text([*context, *ids]), self._text(context)
        if head.endswith("\ufffd") and not text.startswith(head):  # `ids` complete its last character
            head = head.rstrip("\ufffd")
        text = text.removeprefix(head)
        for spaced in _SPACES if self._cleans else ():
            text = text.replace(spaced, spaced.strip())
        return text

    def _text(self, ids: Sequence[int]) -> str:
        return self._backend.decode([token for token in ids if token not in self._backend.special])

    def _context(self, after: Iterable[int]) -> list[int]:
        """The last ids of the preceding text, as far as they affect how its continuation is decoded.

        They begin with a character: of bytes as fallback, part of one would make all that follow it U+FFFD.
        """
        context = [int(token) for token in after][-_LONGEST_WAIT:]
        while context and _INSIDE.fullmatch(self._backend.tokens.get(context[0], "")):
            del context[0]
        end = self._backend.after
        if end and context[-len(end) :] == end:
            context = context[: -len(end)]
        if context and context[-1] in self._backend.special and self._starts_anew:
            return []
        return context

    @functools.cached_property
    def _starts_anew(self) -> bool:
        """Whether text after a special token is encoded like text at the start."""
        special = next((self._backend.tokens[token] for token in sorted(self._backend.special)), "")
        return self.encode(special + _PROBE)[-len(self.encode(_PROBE)) :] == self.encode(_PROBE)

    def pieces(self, ids: Iterable[int], *, after: Iterable[int] = ()) -> list[str]:
        """Returns the text that each id adds to the decoded text; special tokens add none.

        A character of several tokens is added by the last of them. The joined pieces equal `decode(ids, after=after)`,
        unless decoding cleans up spaces or some bytes are not valid UTF-8.
        """
        context = self._context(after)
        all_ids = [*context, *(int(token) for token in ids)]
        ids = [token for token in all_ids if token not in self._backend.special]
        added: list[str] = []
        # Each step also decodes the last ids that added text, because a token at the start of a text loses its space.
        # `old` is the decoded text that was added already. An incomplete character is added once it is complete.
        start, end_of_old, old = 0, 0, ""
        for end in range(1, len(ids) + 1):
            text = self._backend.decode(ids[start:end])
            waits = end < len(ids) and end - start < _LONGEST_WAIT
            complete = text.rstrip("\ufffd") if waits else text
            added.append(complete[len(old) :] if complete.startswith(old) else "")
            old += added[-1]
            if added[-1] and complete == text:
                start, end_of_old = end_of_old, end
                old = self._backend.decode(ids[start:end])
        rest = iter(added)
        return ["" if token in self._backend.special else next(rest) for token in all_ids][len(context) :]

    def fingerprint(self) -> str:
        """Returns a hash of all that determines the ids of a text: vocabulary, merges, added tokens, normalisation.

        It does not depend on file names, padding, truncation, templates or the special tokens around a prompt.
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
        """Reads the tokenizer of a Hugging Face directory, a GGUF file, or a name on the Hugging Face hub.

        In a directory it uses the first that exists of `tokenizer.json`, a SentencePiece `tokenizer.model` or
        `spiece.model` (Llama 1 and 2, T5), and `vocab.json` with `merges.txt` (GPT-2, OPT). EOS ids come from
        `generation_config.json`, else `config.json`, else "eos_token" of `tokenizer_config.json`.

        Raises:
          UserError: if none of these files exists, a file is damaged or not supported, or there is no EOS id.
        """
        path = locate(directory)
        if is_gguf(path):
            files = tokenizer_files.from_contents(gguf_tokenizer.contents(gguf_file.read(path)), origin=str(path))
        else:
            files = tokenizer_files.read(path)
        with reading(f"the tokenizer in {files.origin}"):
            return _tokenizer(files)


def _tokenizer(files: TokenizerFiles) -> Tokenizer:
    if tokenizer_files.JSON_FILE in files.contents:
        backend = json_backend.from_json(files)
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


@functools.lru_cache(maxsize=4)
def check_same_tokens(target: Tokenizer, draft: Tokenizer) -> None:
    """Raises UserError if an id of text means another token to the draft than to the target; logs other differences.

    Only the target's tokenizer encodes texts, so normalisation and splitting may differ, and either may have more
    added tokens. A special token may have another name if one of the two names is a placeholder for tokens to come.
    """
    if target is draft or target._files.contents == draft._files.contents:
        return
    left, right = target._backend, draft._backend
    both = left.tokens.keys() & right.tokens.keys()
    others = {index for index in both if left.tokens[index] != right.tokens[index]}
    unused = {
        index
        for index in others & left.special & right.special
        if _PLACEHOLDER.search(left.tokens[index]) or _PLACEHOLDER.search(right.tokens[index])
    }
    alone = {"target": left.tokens.keys() - both, "draft": right.tokens.keys() - both}
    # Tokens of text that one of them lacks; added tokens occur only in texts that name them.
    wrong = sorted((others - unused) | (alone["target"] - left.added) | (alone["draft"] - right.added))
    if wrong:
        names = " and ".join(repr(backend.tokens.get(wrong[0], "nothing")) for backend in (left, right))
        raise UserError(
            "target and draft have different tokenizers; take a draft trained with the target's "
            f"(id {wrong[0]} means {names})"
        )
    notes = [f"{len(unused)} special tokens have other names"] if unused else []
    for (name, ids), backend in zip(alone.items(), (left, right), strict=True):
        examples = ", ".join(repr(backend.tokens[index]) for index in sorted(ids)[:3])
        notes += [f"only the {name} has {examples} ({len(ids)} tokens)"] if ids else []
    if not notes and target.fingerprint() != draft.fingerprint():
        notes = ["texts are normalised or split differently"]
    if notes:
        logging.warning("the draft's tokenizer differs: %s; the target's is used for both", "; ".join(notes))


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
