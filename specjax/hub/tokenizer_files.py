"""Reads the files of a tokenizer and what they define: special tokens, EOS ids and the chat template."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from specjax.hub.json_files import parse_json, text
from specjax.runtime.errors import UserError

JSON_FILE = "tokenizer.json"
SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model")
VOCABULARY_FILE = "vocab.json"
MERGES_FILE = "merges.txt"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
TEMPLATE_FILE = "chat_template.jinja"
# All files that may belong to a tokenizer; those that exist are copied to an export.
FILES = (
    *(JSON_FILE, *SENTENCEPIECE_FILES, VOCABULARY_FILE, MERGES_FILE),
    *(CONFIG_FILE, SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE, TEMPLATE_FILE),
)
_MODEL_FILE = "config.json"
GENERATION_FILE = "generation_config.json"

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# Default special tokens of transformers' classes, for directories that define none.
_CLASS_TOKENS = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "T5Tokenizer": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
}
_CLASS_OF_MODEL_TYPE = {"llama": "LlamaTokenizer", "t5": "T5Tokenizer", "gpt2": "GPT2Tokenizer", "opt": "GPT2Tokenizer"}
_CLASS_OF_FILE = {"tokenizer.model": "LlamaTokenizer", "spiece.model": "T5Tokenizer", MERGES_FILE: "GPT2Tokenizer"}


class Token(NamedTuple):
    """An added token: text that is matched before the rest of a text is tokenised.

    Attributes:
      content: its text.
      id: its id; None if it gets the next free one.
      lstrip, rstrip: whether a match includes whitespace to the left or right.
      single_word: whether it matches only if no letter, digit or underscore is next to it.
      normalized: whether it is matched in the normalised text.
      special: whether decoding skips it.
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
    """The contents of a tokenizer's files, and what these and the model's config files define.

    Attributes:
      origin: the directory, for error messages.
      contents: the tokenizer's files as bytes, by name.
      settings: `tokenizer_config.json`, updated with the entries of `special_tokens_map.json` that take precedence.
      model: `config.json`; empty if there is none.
      generation: `generation_config.json`; empty if there is none.
    """

    origin: str
    contents: Mapping[str, bytes]
    settings: Mapping[str, Any]
    model: Mapping[str, Any]
    generation: Mapping[str, Any]

    @property
    def tokenizer_class(self) -> str:
        """The class in transformers, without the ending "Fast"; "" if neither a config nor a file name implies it."""
        stated = self.settings.get("tokenizer_class") or self.model.get("tokenizer_class")
        if stated:
            return str(stated).removesuffix("Fast")
        if self.model.get("model_type") in _CLASS_OF_MODEL_TYPE:
            return _CLASS_OF_MODEL_TYPE[self.model["model_type"]]
        present = (kind for name, kind in _CLASS_OF_FILE.items() if name in self.contents)
        return "" if JSON_FILE in self.contents else next(present, "")

    def named(self) -> dict[str, Token]:
        """The special tokens that the files define, by role ("eos_token", ...)."""
        tokens = {name: _token(self.settings.get(name), f"{self.origin}: {name}") for name in NAMES}
        return {name: token for name, token in tokens.items() if token is not None}

    def assumed(self) -> dict[str, str]:
        """The contents of the class's default special tokens, by role, for roles that the files do not define."""
        defaults = _CLASS_TOKENS.get(self.tokenizer_class, {})
        return {name: content for name, content in defaults.items() if name not in self.settings}

    def added(self) -> Iterator[Token]:
        """Every added token in the config files; first those with an id, ordered by id."""
        listed = self.settings.get("added_tokens_decoder")
        if listed:
            where = f"{self.origin}/{CONFIG_FILE}: added_tokens_decoder"
            for key in _by_id(listed, where, keyed=True):
                yield _token(listed[key], f"{self.origin}: token {key}")._replace(id=int(key))
        elif ADDED_TOKENS_FILE in self.contents:
            special = {token.content for token in (*self.named().values(), *self.extra())}
            table = parse_json(f"{self.origin}/{ADDED_TOKENS_FILE}", self.contents[ADDED_TOKENS_FILE])
            for content in _by_id(table, f"{self.origin}/{ADDED_TOKENS_FILE}", keyed=False):
                known = content in special
                yield Token(content, int(table[content]), normalized=not known, special=known)
        yield from self.named().values()
        yield from self.extra()

    def extra(self) -> list[Token]:
        """The special tokens that have no role."""
        listed: list[Any] = []
        for key in ("additional_special_tokens", "extra_special_tokens"):
            value = self.settings.get(key) or []
            listed += value.values() if isinstance(value, dict) else value
        return [token for value in listed if (token := _token(value, f"{self.origin}: {value}")) is not None]

    def eos_ids(self, token_id: Callable[[str], int | None], vocab_size: int) -> tuple[int, ...]:
        """The ids that end a sequence: those of `generation_config.json`, else of `config.json`, else the EOS token.

        Raises UserError if there is none, or one is outside the vocabulary.
        """
        padded = self.model.get("vocab_size")
        largest = max(vocab_size, padded if isinstance(padded, int) else 0)
        for name, fields in ((GENERATION_FILE, self.generation), (_MODEL_FILE, self.model)):
            text = fields.get("text_config")  # the decoder's config in a multimodal model
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
                f'name one as "eos_token" in {CONFIG_FILE} or as "eos_token_id" in {GENERATION_FILE}'
            )
        return (end,)

    def roles(self) -> dict[str, str]:
        """The contents of the special tokens by role, as chat templates read them; defaults fill in absent ones."""
        return {**self.assumed(), **{name: token.content for name, token in self.named().items()}}

    def role(self, name: str, token_id: Callable[[str], int | None]) -> int | None:
        """The id of the special token with this role, or None."""
        content = self.roles().get(name)
        return None if content is None else token_id(content)

    def chat_template(self) -> str | None:
        """The chat template (Jinja): from its own file, else from the config (of several, "default"); None without."""
        if TEMPLATE_FILE in self.contents:
            return self.contents[TEMPLATE_FILE].decode("utf-8")
        template = self.settings.get("chat_template")
        if isinstance(template, list):
            named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
            template = named.get("default")
        return template if isinstance(template, str) else None


def read(directory: str | Path) -> TokenizerFiles:
    """Reads those files of a tokenizer that exist. Raises UserError if one is damaged."""
    directory, contents = Path(directory), {}
    for name in (*FILES, _MODEL_FILE, GENERATION_FILE):
        try:
            contents[name] = (directory / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise UserError(f"{directory / name} cannot be read ({error}); copy it again") from None
    return from_contents(contents, origin=str(directory))


def from_contents(contents: Mapping[str, bytes], *, origin: str) -> TokenizerFiles:
    """Parses the files of a tokenizer and its model's configs, given by name. Raises UserError if one is damaged."""
    names = (CONFIG_FILE, SPECIAL_TOKENS_FILE, _MODEL_FILE, GENERATION_FILE)
    parsed = {name: parse_json(f"{origin}/{name}", contents[name]) if name in contents else {} for name in names}
    if TEMPLATE_FILE in contents:
        text(f"{origin}/{TEMPLATE_FILE}", contents[TEMPLATE_FILE])
    settings = dict(parsed[CONFIG_FILE])
    for key, value in parsed[SPECIAL_TOKENS_FILE].items():
        # As in transformers, the map takes precedence unless the config has a list of added tokens.
        if "added_tokens_decoder" not in settings or settings.get(key) is None:
            settings[key] = value
    tokenizer = {name: data for name, data in contents.items() if name in FILES}
    return TokenizerFiles(origin, tokenizer, settings, parsed[_MODEL_FILE], parsed[GENERATION_FILE])


def _by_id(table: Any, where: str, *, keyed: bool) -> list[str]:
    """The keys of a table of added tokens, ordered by id; ids are its keys if `keyed`, otherwise its values."""
    try:
        return sorted(table.keys(), key=lambda key: int(key if keyed else table[key]))
    except (AttributeError, TypeError, ValueError):
        raise UserError(f"{where} is no table of tokens with their ids; copy it again") from None


def _token(value: Any, where: str) -> Token | None:
    if value is None:
        return None
    if isinstance(value, str):
        return Token(value)
    fields = set(Token._fields) - {"id"}
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise UserError(f"{where} is neither a text nor a token with its content; correct {CONFIG_FILE}")
    return Token(**{key: item for key, item in value.items() if key in fields})
