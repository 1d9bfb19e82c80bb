"""What the files of a directory say about its tokenizer: special tokens, ends of a sequence, the chat template."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from specjax.runtime.errors import UserError

JSON_FILE = "tokenizer.json"
SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model")
VOCABULARY_FILE = "vocab.json"
MERGES_FILE = "merges.txt"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
TEMPLATE_FILE = "chat_template.jinja"
# All that may belong to a tokenizer; an export carries whichever there are, byte for byte.
FILES = (
    *(JSON_FILE, *SENTENCEPIECE_FILES, VOCABULARY_FILE, MERGES_FILE),
    *(CONFIG_FILE, SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE, TEMPLATE_FILE),
)
_MODEL_FILE = "config.json"
_GENERATION_FILE = "generation_config.json"

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# What the reference's classes assume where a directory says nothing.
_CLASS_TOKENS = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "T5Tokenizer": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
}
_CLASS_OF_MODEL_TYPE = {
    "llama": "LlamaTokenizer",
    "t5": "T5Tokenizer",
    "gpt2": "GPT2Tokenizer",
    "opt": "GPT2Tokenizer",
}
_CLASS_OF_FILE = {
    "tokenizer.model": "LlamaTokenizer",
    "spiece.model": "T5Tokenizer",
    MERGES_FILE: "GPT2Tokenizer",
}


@dataclasses.dataclass(frozen=True)
class Token:
    """An added token: text that is found before the model of the vocabulary sees the rest.

    Attributes:
      content: its text.
      id: its id, or None where it gets the next free one.
      lstrip, rstrip: whether it swallows the whitespace to its left or right.
      single_word: whether it counts only where no letter, digit or underscore touches it.
      normalized: whether it is looked for after normalisation.
      special: whether decoding leaves it out.
    """

    content: str
    id: int | None = None
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False
    special: bool = True


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer's files as they are, and what they and the model's configs state.

    Attributes:
      origin: the directory, for messages.
      contents: the tokenizer's files by name, byte for byte.
      settings: `tokenizer_config.json`, with `special_tokens_map.json` where that counts.
      model: `config.json`; empty where there is none.
      generation: `generation_config.json`; empty where there is none.
    """

    origin: str
    contents: Mapping[str, bytes]
    settings: Mapping[str, Any]
    model: Mapping[str, Any]
    generation: Mapping[str, Any]

    @property
    def tokenizer_class(self) -> str:
        """The reference's class, without the ending "Fast"; "" where neither a config nor a file name tells it."""
        stated = self.settings.get("tokenizer_class") or self.model.get("tokenizer_class")
        if stated:
            return str(stated).removesuffix("Fast")
        if self.model.get("model_type") in _CLASS_OF_MODEL_TYPE:
            return _CLASS_OF_MODEL_TYPE[self.model["model_type"]]
        present = (kind for name, kind in _CLASS_OF_FILE.items() if name in self.contents)
        return "" if JSON_FILE in self.contents else next(present, "")

    def named(self) -> dict[str, Token]:
        """The special tokens with a role, by role ("eos_token", ...), that the files state."""
        found = {name: _token(self.settings.get(name), f"{self.origin}: {name}") for name in NAMES}
        return {name: token for name, token in found.items() if token is not None}

    def assumed(self) -> dict[str, str]:
        """The contents of special tokens that the class has where the files state none."""
        defaults = _CLASS_TOKENS.get(self.tokenizer_class, {})
        return {name: content for name, content in defaults.items() if name not in self.settings}

    def added(self) -> Iterator[Token]:
        """Every added token that the configs state, those with an id first and in its order."""
        listed = self.settings.get("added_tokens_decoder")
        if listed:
            where = f"{self.origin}/{CONFIG_FILE}: added_tokens_decoder"
            if not isinstance(listed, dict):
                raise UserError(f"{where} is no table of tokens with their ids; copy it again")
            for key in _by_id(listed, where, keyed=True):
                yield dataclasses.replace(_token(listed[key], f"{self.origin}: token {key}"), id=int(key))
        elif ADDED_TOKENS_FILE in self.contents:
            special = {token.content for token in (*self.named().values(), *self.extra())}
            table = _json(f"{self.origin}/{ADDED_TOKENS_FILE}", self.contents[ADDED_TOKENS_FILE])
            for content in _by_id(table, f"{self.origin}/{ADDED_TOKENS_FILE}", keyed=False):
                known = content in special
                yield Token(content, int(table[content]), normalized=not known, special=known)
        yield from self.named().values()
        yield from self.extra()

    def extra(self) -> list[Token]:
        """The special tokens without a role."""
        listed: list[Any] = []
        for key in ("additional_special_tokens", "extra_special_tokens"):
            value = self.settings.get(key) or []
            listed += value.values() if isinstance(value, dict) else value
        return [token for value in listed if (token := _token(value, f"{self.origin}: {value}")) is not None]

    def eos_ids(self, token_id: Callable[[str], int | None], vocab_size: int) -> tuple[int, ...]:
        """The ids that end a sequence: of `generation_config.json`, else `config.json`, else the EOS token's.

        Raises UserError where none is stated, or one is no id of the vocabulary.
        """
        padded = self.model.get("vocab_size")
        largest = max(vocab_size, padded if isinstance(padded, int) else 0)
        for name, fields in ((_GENERATION_FILE, self.generation), (_MODEL_FILE, self.model)):
            text = fields.get("text_config")  # where a model of more than text describes its decoder
            value = fields.get("eos_token_id", text.get("eos_token_id") if isinstance(text, dict) else None)
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if any(isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < largest for item in ids):
                raise UserError(
                    f"{self.origin}/{name}: eos_token_id {value} is not within the vocabulary, 0 .. {largest - 1}; "
                    "correct it"
                )
            if ids:
                return tuple(dict.fromkeys(ids))
        end = self.role("eos_token", token_id)
        if end is None:
            raise UserError(
                f"the tokenizer in {self.origin} has no end-of-sequence token; "
                f'name one as "eos_token" in {CONFIG_FILE} or as "eos_token_id" in {_GENERATION_FILE}'
            )
        return (end,)

    def role(self, name: str, token_id: Callable[[str], int | None]) -> int | None:
        """The id of the special token with this role, or None."""
        token = self.named().get(name)
        content = token.content if token is not None else self.assumed().get(name)
        return None if content is None else token_id(content)

    def chat_template(self) -> str | None:
        """The Jinja template of a conversation: the file's, else the config's (of several, "default"), or None."""
        if TEMPLATE_FILE in self.contents:
            return self.contents[TEMPLATE_FILE].decode("utf-8")
        template = self.settings.get("chat_template")
        if isinstance(template, list):
            named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
            template = named.get("default")
        return template if isinstance(template, str) else None

    def template_variables(self) -> dict[str, str]:
        """What a chat template may read besides the messages: the contents of the special tokens by role."""
        return {**self.assumed(), **{name: token.content for name, token in self.named().items()}}


def read(directory: str | Path) -> TokenizerFiles:
    """Reads whichever files of a tokenizer there are. Raises UserError where one is damaged."""
    directory = Path(directory)
    contents = {name: data for name in FILES if (data := _bytes(directory / name)) is not None}
    if TEMPLATE_FILE in contents:
        _text(f"{directory / TEMPLATE_FILE}", contents[TEMPLATE_FILE])
    others = {}
    for name in (_MODEL_FILE, _GENERATION_FILE):
        data = _bytes(directory / name)
        others[name] = {} if data is None else _json(f"{directory / name}", data)
    return of(contents, origin=str(directory), model=others[_MODEL_FILE], generation=others[_GENERATION_FILE])


def of(
    contents: Mapping[str, bytes],
    *,
    origin: str,
    model: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
) -> TokenizerFiles:
    """What these files of a tokenizer state. Raises UserError where one is damaged."""
    stated = {
        name: _json(f"{origin}/{name}", contents[name]) if name in contents else {}
        for name in (CONFIG_FILE, SPECIAL_TOKENS_FILE)
    }
    settings = dict(stated[CONFIG_FILE])
    for key, value in stated[SPECIAL_TOKENS_FILE].items():
        # As the reference has it: with a list of added tokens the config is complete, before that the map ruled.
        if "added_tokens_decoder" not in settings or settings.get(key) is None:
            settings[key] = value
    return TokenizerFiles(origin, contents, settings, model or {}, generation or {})


def _by_id(table: Any, where: str, *, keyed: bool) -> list[str]:
    """The keys of a table of added tokens in the order of their ids, which are its keys (`keyed`) or its values."""
    try:
        return sorted(table, key=lambda key: int(key if keyed else table[key]))
    except (TypeError, ValueError):
        raise UserError(f"{where} is no table of tokens with their ids; copy it again") from None


def _token(value: Any, where: str) -> Token | None:
    if value is None:
        return None
    if isinstance(value, str):
        return Token(value)
    fields = {field.name for field in dataclasses.fields(Token)} - {"id"}
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise UserError(f"{where} is neither a text nor a token with its content; correct {CONFIG_FILE}")
    return Token(**{key: item for key, item in value.items() if key in fields})


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}); copy it again") from None


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} cannot be read ({error}); copy it again") from None


def _json(name: str, data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(_text(name, data))
    except ValueError as error:
        raise UserError(f"{name} cannot be read ({error}); copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{name} holds no JSON object; copy it again")
    return content
