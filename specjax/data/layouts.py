"""Converts records to examples: records of known data sets, and the layouts of files that users bring.

A parser takes a record and its location, for error messages, and returns examples. Prompts of summaries and
translations are those of T5 (Raffel et al. 2020, arXiv 1910.10683, appendix D). The space or line break between prompt
and answer is part of the answer, because byte-level vocabularies join a space to the next word, and because it shows
decoder-only models where a prompt that was cut ends. T5's tokenizer ignores it.
"""

import functools
import json
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from specjax.data import corpora, files
from specjax.data.files import Record
from specjax.data.quality import final_number
from specjax.runtime.errors import UserError

# A message of a conversation, as a chat template takes it: "role", "content", and what else the record has.
Message = Mapping[str, Any]

# Separates the texts of a conversation if there is no chat template.
GAP = "\n\n"


@dataclass(frozen=True)
class Example:
    """A prompt and its expected continuation, or a document for language modelling.

    Attributes:
      prompt: the prompt; "" only in language modelling.
      completion: the expected continuation ("" if there is no reference), or the document.
      category: category of the example; "" if the task has none.
      messages: the conversation that the prompt is the text of; empty if the prompt is a text of its own. The first
        message has the tools for the chat template under the key "tools", if there are any.
      gap: the space at the start of `completion` that separates it from a prompt; an assistant's turn begins after it.
    """

    prompt: str
    completion: str
    category: str = ""
    messages: tuple[Message, ...] = ()
    gap: str = field(default="", compare=False)


Parser = Callable[[Record, str], list[Example]]


def question(text: str, answer: str) -> Example:
    """The example of a question and its worked answer ("" if there is none)."""
    return Example(f"Question: {text}\nAnswer:", answer and f" {answer}", gap=" ")


def summary(text: str, reference: str, prefix: str = "summarize: ") -> Example:
    """The example of a text and its summary, or with another of T5's prompt prefixes its translation."""
    return Example(f"{prefix}{text}", f"\n{reference}", gap="\n")


translation = functools.partial(summary, prefix="translate English to German: ")


@dataclass(frozen=True)
class Pair:
    """Parses a record with a field of source text and one with the reference that the quality metric needs."""

    source: str
    reference: str
    make: Callable[[str, str], Example]

    def __call__(self, record: Record, where: str) -> list[Example]:
        if self.reference not in record:
            raise UserError(
                f'{where} lacks the field "{self.reference}", the reference that the quality metric needs; add it, or '
                'give the prompts alone as {"prompt": ...} to the task `prompts`, which measures no quality'
            )
        return [self.make(_filled(record, self.source, where), _filled(record, self.reference, where))]


def parse_gsm8k(record: Record, where: str) -> list[Example]:
    """Parses {"question", "answer"}; the answer must contain "#### <number>"."""
    examples = Pair("question", "answer", question)(record, where)
    if "####" not in record["answer"] or final_number(record["answer"]) is None:
        raise UserError(f'{where}: the field "answer" does not end in "#### <number>"; correct or remove the line')
    return examples


def parse_text(record: Record, where: str) -> list[Example]:
    """Parses {"text"}: a document for language modelling."""
    return [Example("", _filled(record, "text", where))]


def turns_of(record: Record, where: str) -> list[str]:
    """The texts in the field "turns". Raises UserError if it is no list of texts, or one is empty."""
    turns = record.get("turns")
    if not isinstance(turns, list) or not turns:
        raise UserError(f'{where} lacks the field "turns", a list of texts; add it')
    texts = [text_of({"turns": turn}, "turns", where) for turn in turns]
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise UserError(f"{where}: turn {number} is empty; correct or remove the line")
    return texts


# Other names of a conversation's roles.
_ROLES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response"), "tool"),
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
}
# The roles of a conversation without a system message, in turn.
_SPEAKERS = ("user", "assistant")
# Fields that may hold a completion, the first one that a record has.
_COMPLETIONS = ("completion", "output", "response", "answer", "canonical_solution")


def parse_any(record: Record, where: str) -> list[Example]:
    """Parses a record of any layout in `LAYOUTS`; a record without a completion gives a prompt alone.

    A conversation gives an example for each answer of the assistant, with all messages before it as the prompt, and one
    for messages of the user at its end. An answer that calls tools gives a prompt alone.

    Raises:
      UserError: if it has none of these layouts, or one of the fields is empty or no text.
    """
    for name, parse in LAYOUTS.items():
        if name in record:
            category = record.get("category")
            category = category if isinstance(category, str) else ""
            return [replace(example, category=category) for example in parse(record, where)]
    if "text" in record:
        raise UserError(f'{where} is a document (its field is "text"), not a prompt; use the task `text`')
    raise UserError(
        f"{where} has the fields {files.fields_of(record)}, which is no known layout; "
        f"rename one to {', '.join(LAYOUTS)} (see the layouts in configs/distillspec/README.md)"
    )


def _completion(record: Record, where: str) -> str:
    name = next((name for name in _COMPLETIONS if name in record), None)
    if name is None:
        return ""
    value = record[name]
    if isinstance(value, list) and value:  # several correct answers
        return text_of({name: value[0]}, name, where)
    return text_of(record, name, where)


def _prompt(record: Record, where: str) -> list[Example]:
    prompt, completion = record["prompt"], record.get("completion")
    if isinstance(prompt, list):
        answer = completion if isinstance(completion, list) else []
        if not answer and (text := _completion(record, where)):
            answer = [{"role": "assistant", "content": text}]
        return _conversation([*prompt, *answer], record, where)
    if not text_of(record, "prompt", where):
        raise UserError(f'{where}: the field "prompt" is empty; give it text or use the task `text`')
    return [Example(prompt, _completion(record, where))]


def _instruction(record: Record, where: str) -> list[Example]:
    parts = [_filled(record, "instruction", where)]
    parts += [text for name in ("input", "context") if name in record and (text := text_of(record, name, where))]
    prompt, completion = GAP.join(parts), _completion(record, where)
    earlier = _history(record, where)
    if earlier or record.get("system"):
        turns = [*earlier, {"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return _conversation(turns if completion else turns[:-1], record, where)[-1:]
    return [Example(prompt, completion and GAP + completion, gap=GAP)]


def _history(record: Record, where: str) -> list[Message]:
    """The messages in the field "history", pairs of an instruction and its answer."""
    pairs = record.get("history", [])
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise UserError(f'{where}: the field "history" is no list of pairs of texts; correct it')
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(_SPEAKERS, pair, strict=True)]


def _question(record: Record, where: str) -> list[Example]:
    example = question(_filled(record, "question", where), _completion(record, where))
    context = text_of(record, "context", where) if "context" in record else ""
    return [replace(example, prompt=context + GAP + example.prompt) if context.strip() else example]


def _conversation(turns: Any, record: Record, where: str) -> list[Example]:
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: the conversation is no list of messages; correct or remove it")
    messages = [{"role": "system", "content": text_of(record, "system", where)}] if record.get("system") else []
    messages += [_message(turn, f"{where}, message {number}") for number, turn in enumerate(turns, start=1)]
    roles = [message["role"] for message in messages]
    if "user" not in roles:
        raise UserError(f"{where}: the conversation has no message of the user; remove it")
    first = roles.index("user")  # answers to a message that is not there are left out
    messages = [message for message in messages[:first] if message["role"] != "assistant"] + messages[first:]
    ends = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    ends += [len(messages)] if messages[-1]["role"] != "assistant" else []
    if tools := _tools(record, where):
        messages[0] = {**messages[0], "tools": tools}
    examples = []
    for end in ends:
        shown = [message["content"] or message.get("tool_calls") for message in messages[:end]]
        texts = [item if isinstance(item, str) else json.dumps(item) for item in shown if item]
        answer = messages[end] if end < len(messages) else {"content": ""}
        completion = "" if answer.get("tool_calls") else answer["content"]
        examples.append(Example(GAP.join(texts), completion and GAP + completion, "", tuple(messages[:end]), GAP))
    return examples


def _message(turn: Any, where: str) -> Message:
    """A message as chat templates take it, with one text as its content."""
    if not isinstance(turn, dict):
        raise UserError(f"{where} is {type(turn).__name__}, not an object with a role and a content; correct it")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or role.lower() not in _ROLES:
        raise UserError(f"{where} has the role {reprlib.repr(role)}; it must be one of {', '.join(_ROLES)}")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type", "text") != "text":
                raise UserError(f"{where} has a part that is not text; remove the line")
        content = "".join(text_of(part, "text", where) for part in content)
    if content is None and not turn.get("tool_calls"):
        raise UserError(f"{where} has no content; correct or remove it")
    text = text_of({"content": content or ""}, "content", where)
    if _ROLES[role.lower()] == "user" and not text.strip():
        raise UserError(f"{where}, of the user, is empty; correct or remove the line")
    other = {key: turn[key] for key in ("name", "tool_calls", "tool_call_id") if turn.get(key) is not None}
    return {"role": _ROLES[role.lower()], "content": text, **other}


def _tools(record: Record, where: str) -> list:
    tools = record.get("tools", [])
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools  # some data sets hold them as JSON
    except (ValueError, RecursionError):
        tools = None
    if not isinstance(tools, list):
        raise UserError(f'{where}: the field "tools" is no list of tools; correct it')
    return tools


# Layouts by the field that identifies them, in the order in which they are looked for.
LAYOUTS: dict[str, Parser] = {
    "messages": lambda record, where: _conversation(record["messages"], record, where),
    "conversations": lambda record, where: _conversation(record["conversations"], record, where),
    "conversation": lambda record, where: _conversation(record["conversation"], record, where),
    "turns": lambda record, where: [Example(turns_of(record, where)[0], "")],
    "instruction": _instruction,
    "prompt": _prompt,
    "question": _question,
}


def split_files(path: Path) -> tuple[list[Path], list[Path]]:
    """The files of a folder whose names begin with "train" and with "test" (or "validation", "dev"), as Parquet has."""
    names = sorted(path.iterdir()) if path.is_dir() else []
    train, *others = (
        [item for item in names if item.name.lower().replace("-", ".").split(".")[0] == name]
        for name in ("train", "test", "validation", "dev")
    )
    return train, next((other for other in others if other), [])


def read_splits(path: Path, parse: Parser) -> tuple[list[Example], list[Example]]:
    """Reads the training and test files of a folder; a single file is split by a hash of each record's first prompt.

    Raises UserError as `parse` and `files.read_records` do, and for a file that cannot be split.
    """
    if not path.is_dir():
        groups = [parse(record, where) for where, record in files.read_records(path)]
        train, validation = corpora.split(groups, [group[0].prompt or group[0].completion for group in groups])
        return list(chain.from_iterable(train)), list(chain.from_iterable(validation))
    for name, paths in zip(("train.jsonl", "test.jsonl"), splits := split_files(path), strict=True):
        if not paths:
            raise UserError(f"there is no file {path / name}; add it, or let task.path name a single file")
    train, validation = (
        list(chain.from_iterable(parse_all(files.read_records(file), parse) for file in paths)) for paths in splits
    )
    return train, validation


def parse_all(records: files.Located, parse: Parser) -> list[Example]:
    """The examples of all records."""
    return [example for where, record in records for example in parse(record, where)]


def _filled(record: Record, name: str, where: str) -> str:
    text = text_of(record, name, where)
    if not text.strip():
        raise UserError(f'{where}: the field "{name}" is empty; fill it or remove the record')
    return text


def text_of(record: Record, name: str, where: str) -> str:
    """The text in a field. Raises UserError if it is missing, no text, or cannot be encoded as UTF-8."""
    if name not in record:
        raise UserError(f'{where} lacks the field "{name}"; add it or remove the record')
    value = record[name]
    if not isinstance(value, str):
        raise UserError(f'{where}: the field "{name}" is {type(value).__name__}, not text; correct it')
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(
            f'{where}: the field "{name}" has half a surrogate pair, which is no character; remove it'
        ) from None
    return value
