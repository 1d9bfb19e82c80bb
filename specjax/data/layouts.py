"""Converts records of known data sets to examples, and reads files of such records in JSON lines.

A parser takes a record and its location, for error messages, and returns an example. Prompts of summaries and
translations are those of T5 (Raffel et al. 2020, arXiv 1910.10683, appendix D). The space or line break between prompt
and answer is part of the answer, because byte-level vocabularies join a space to the next word, and because it shows
decoder-only models where a prompt that was cut ends. T5's tokenizer ignores it.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from specjax.data import corpora
from specjax.data.quality import final_number
from specjax.runtime.errors import UserError


@dataclass(frozen=True)
class Example:
    """A prompt and its expected continuation, or a document for language modelling.

    Attributes:
      prompt: the prompt; "" only in language modelling.
      completion: the expected continuation ("" if there is no reference), or the document.
      category: category of the example; "" if the task has none.
    """

    prompt: str
    completion: str
    category: str = ""


# The files of a directory of JSON lines.
SPLIT_FILES = ("train.jsonl", "test.jsonl")

Record = dict[str, Any]
Parser = Callable[[Record, str], Example]
Read = TypeVar("Read")


def question(text: str, answer: str) -> Example:
    """The example of a question and its worked answer."""
    return Example(f"Question: {text}\nAnswer:", f" {answer}")


def summary(text: str, reference: str) -> Example:
    """The example of a text and its summary, with T5's prompt prefix."""
    return Example(f"summarize: {text}", f"\n{reference}")


def parse_prompt_completion(record: Record, where: str) -> Example:
    """Parses {"prompt", "completion"}."""
    prompt, completion = (field(record, name, where) for name in ("prompt", "completion"))
    if not prompt:
        raise UserError(f'{where}: the field "prompt" is empty; give it text or use the task `text`')
    return Example(prompt, completion)


def parse_gsm8k(record: Record, where: str) -> Example:
    """Parses {"question", "answer"}; the answer must contain "#### <number>"."""
    text, answer = field(record, "question", where), _reference(record, "answer", where)
    if "####" not in answer or final_number(answer) is None:
        raise UserError(f'{where}: the field "answer" does not end in "#### <number>"; correct or remove the line')
    return question(text, answer)


def parse_xsum(record: Record, where: str) -> Example:
    """Parses {"document", "summary"}."""
    return summary(_filled(record, "document", where), _reference(record, "summary", where))


def parse_cnn_dailymail(record: Record, where: str) -> Example:
    """Parses {"article", "highlights"}."""
    return summary(_filled(record, "article", where), _reference(record, "highlights", where))


def parse_wmt_en_de(record: Record, where: str) -> Example:
    """Parses {"en", "de"}: English text and its German translation."""
    english, german = _filled(record, "en", where), _reference(record, "de", where)
    return Example(f"translate English to German: {english}", f"\n{german}")


def parse_text(record: Record, where: str) -> Example:
    """Parses {"text"}: a document for language modelling."""
    return Example("", _filled(record, "text", where))


def parse_spec_bench(record: Record, where: str) -> Example:
    """Parses {"question_id", "category", "turns"}; the first turn is the prompt."""
    category = field(record, "category", where)
    if "question_id" not in record:
        raise UserError(f'{where} lacks the field "question_id"')
    turns = record.get("turns")
    if not isinstance(turns, list) or not turns:
        raise UserError(f'{where} lacks the field "turns", a list of texts')
    prompt = field({"turns": turns[0]}, "turns", where)
    if not prompt:
        raise UserError(f"{where}: the first turn is empty; correct or remove the line")
    return Example(prompt, "", category)


def parse_any(record: Record, where: str) -> Example:
    """Parses a record of Spec-Bench, of GSM8K or with "prompt", depending on its fields."""
    if "turns" in record:
        return parse_spec_bench({"category": "", "question_id": 0, **record}, where)
    if "question" in record and "answer" in record:
        return parse_gsm8k(record, where)
    return parse_prompt_completion({"completion": "", **record}, where)


def is_jsonl(path: Path) -> bool:
    """Whether `path` is a file, or a folder with train.jsonl or test.jsonl, rather than a folder of TFDS."""
    return path.suffix == ".jsonl" or path.is_file() or any((path / name).is_file() for name in SPLIT_FILES)


def read_splits(path: Path, parse: Parser) -> tuple[list[Example], list[Example]]:
    """Reads train.jsonl and test.jsonl of a directory; a single file is split by a hash of each prompt (or text).

    Raises UserError as `read_jsonl` does, and for a file that cannot be split.
    """
    if path.is_dir():
        train, validation = (read_jsonl(path / name, parse) for name in SPLIT_FILES)
        return train, validation
    examples = read_jsonl(path, parse)
    return corpora.split(examples, [example.prompt or example.completion for example in examples])


def read_jsonl(path: Path, parse: Callable[[Record, str], Read]) -> list[Read]:
    """Parses each line that is not blank. Raises UserError, with the line's number, for any other content."""
    examples = []
    # Not splitlines(): it also breaks at characters that JSON strings may contain, such as U+2028.
    for number, line in enumerate(corpora.read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON ({error}); correct or remove the line") from None
        if not isinstance(record, dict):
            raise UserError(f"{where} is not a JSON object; correct or remove the line")
        examples.append(parse(record, where))
    return examples


def _reference(record: Record, name: str, where: str) -> str:
    """The text of a field that holds the reference for the quality metric. Raises UserError if missing or empty."""
    if name not in record:
        raise UserError(
            f'{where} lacks the field "{name}", the reference that the quality metric needs; add it, or give the '
            'prompts alone as {"prompt": ...} to the task `prompts`, which measures no quality'
        )
    return _filled(record, name, where)


def _filled(record: Record, name: str, where: str) -> str:
    text = field(record, name, where)
    if not text.strip():
        raise UserError(f'{where}: the field "{name}" is empty; fill it or remove the record')
    return text


def field(record: Record, name: str, where: str) -> str:
    """The text in a field. Raises UserError if it is missing, no text, or cannot be encoded as UTF-8."""
    if name not in record:
        raise UserError(f'{where} lacks the field "{name}"')
    value = record[name]
    if not isinstance(value, str):
        raise UserError(f'{where}: the field "{name}" is {type(value).__name__}, not text')
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f'{where}: the field "{name}" has half a surrogate pair, which is no character') from None
    return value
