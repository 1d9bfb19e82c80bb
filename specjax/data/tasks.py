"""What there is to learn and to be measured on: a task is a table entry that yields examples and a metric."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from specjax.data import corpora
from specjax.data.word_problems import generate_split
from specjax.runtime.errors import UserError, nearest


@dataclass(frozen=True)
class Example:
    """A prompt and the text that should follow it; for language modelling no prompt and a whole document.

    Attributes:
      prompt: what the model is given; never empty outside language modelling.
      completion: what should follow; empty where a task has no reference.
      category: the kind of prompt, where the task has kinds.
    """

    prompt: str
    completion: str
    category: str = ""


@dataclass(frozen=True)
class Task:
    """Examples by split, and the name of the quality metric (None: there is none).

    Attributes:
      train: empty where a task is for evaluation only.
      validation: never empty; shares no file, and no prompt, with `train`.
    """

    name: str
    train: Sequence[Example]
    validation: Sequence[Example]
    metric: str | None

    @property
    def is_language_modelling(self) -> bool:
        """Whether examples are documents rather than pairs of prompt and completion."""
        return not self.validation[0].prompt


Splits = tuple[Sequence[Example], Sequence[Example]]


def load_task(config: Any) -> Task:
    """Loads the task that `config` describes.

    Config keys: `name`; `path`, "" where the task reads no file; `seed`, read by `arithmetic`; `size`, the
    most training data to use, in bytes of text for language modelling and in examples otherwise (0: all;
    `arithmetic` needs a number). Validation data does not depend on `size`.

    Raises UserError for an unknown task and for a file that is missing, empty or malformed (with its line
    number).
    """
    if config.name not in _TASKS:
        raise UserError(f'unknown task "{config.name}"{nearest(config.name, _TASKS)}')
    load, metric, reads_path = _TASKS[config.name]
    if config.size < 0:
        raise UserError(f"task.size is {config.size}; it must be positive, or 0 for all the training data")
    if reads_path and not config.path:
        raise UserError(f'task "{config.name}" reads a file: set task.path')
    if config.path and not reads_path:
        raise UserError(f'task "{config.name}" reads no file: set task.path to ""')
    train, validation = load(config)
    return Task(config.name, tuple(train), tuple(validation), metric)


def score(task: Task, prediction: str, example: Example) -> dict[str, float]:
    """Returns the metrics of one predicted completion, each in 0..1; {} for a task without a metric.

    `exact_match`: the final number of the prediction equals the reference's in value ("1,200" is 1200 is
    "1200.0").
    """
    if task.metric is None:
        return {}
    answer = final_number(prediction)
    return {"exact_match": float(answer is not None and answer == final_number(example.completion))}


_NUMBER = re.compile(r"(?:(?<![\w.)])-)?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)")


def final_number(text: str) -> Decimal | None:
    """Returns the number after the first "####", or the last number where that mark is missing, or None.

    The first mark counts because a model that does not stop goes on to problems of its own.
    """
    _, mark, answer = text.partition("####")
    numbers = _NUMBER.findall(answer if mark else text)
    if not numbers:
        return None
    return Decimal(numbers[0 if mark else -1].replace(",", ""))


def _documents(files: corpora.Files) -> list[Example]:
    return [Example("", text) for _, text in files]


def _load_stdlib_code(config: Any) -> Splits:
    train, validation = corpora.stdlib_files()
    return _documents(corpora.limit_bytes(train, config.size)), _documents(validation)


def _load_text(config: Any) -> Splits:
    train, validation = corpora.text_files(config.path)
    return _documents(corpora.limit_bytes(train, config.size)), _documents(validation)


def _load_arithmetic(config: Any) -> Splits:
    if config.size == 0:
        raise UserError("task.size is 0; `arithmetic` needs the number of training examples to generate")
    problems = generate_split(config.seed, config.size)
    train, validation = ([_question(*problem) for problem in split] for split in problems)
    return train, validation


def _load_prompt_completion(config: Any) -> Splits:
    return _jsonl_splits(config, _parse_prompt_completion)


def _load_gsm8k(config: Any) -> Splits:
    return _jsonl_splits(config, _parse_gsm8k)


def _load_spec_bench(config: Any) -> Splits:
    path = Path(config.path)
    return (), _read_jsonl(path / "question.jsonl" if path.is_dir() else path, _parse_spec_bench)


def _load_prompts(config: Any) -> Splits:
    path = Path(config.path)
    if path.suffix in (".jsonl", ".json"):
        return (), _read_jsonl(path, _parse_any)
    return (), [Example(line, "") for line in corpora.read_text(path).split("\n") if line.strip()]


def _question(question: str, answer: str) -> Example:
    # The space belongs to the answer: byte-level vocabularies keep it with the word that follows.
    return Example(f"Question: {question}\nAnswer:", f" {answer}")


# name -> (loader, metric, whether it reads task.path)
_TASKS: dict[str, tuple[Callable[[Any], Splits], str | None, bool]] = {
    "stdlib_code": (_load_stdlib_code, None, False),
    "arithmetic": (_load_arithmetic, "exact_match", False),
    "text": (_load_text, None, True),
    "prompt_completion": (_load_prompt_completion, None, True),
    "gsm8k": (_load_gsm8k, "exact_match", True),
    "spec_bench": (_load_spec_bench, None, True),
    "prompts": (_load_prompts, None, True),
}


def _jsonl_splits(config: Any, parse: Callable[[dict, str], Example]) -> Splits:
    """Reads train.jsonl and test.jsonl of a directory; a single file is split by a hash of each prompt."""
    path = Path(config.path)
    if path.is_dir():
        train, validation = (_read_jsonl(path / name, parse) for name in ("train.jsonl", "test.jsonl"))
    else:
        examples = _read_jsonl(path, parse)
        held_out = corpora.validation_mask([example.prompt for example in examples])
        train = [example for example, held in zip(examples, held_out, strict=True) if not held]
        validation = [example for example, held in zip(examples, held_out, strict=True) if held]
    return train[: config.size or None], validation


def _read_jsonl(path: Path, parse: Callable[[dict, str], Example]) -> list[Example]:
    """Parses each line that is not blank; `parse` gets the record and the line's name for error messages."""
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


def _parse_prompt_completion(record: dict, where: str) -> Example:
    prompt, completion = (_field(record, name, where) for name in ("prompt", "completion"))
    if not prompt:
        raise UserError(f'{where}: the field "prompt" is empty; give it text or use the task `text`')
    return Example(prompt, completion)


def _parse_gsm8k(record: dict, where: str) -> Example:
    question, answer = (_field(record, name, where) for name in ("question", "answer"))
    if "####" not in answer or final_number(answer) is None:
        raise UserError(f'{where}: the field "answer" does not end in "#### <number>"; correct or remove the line')
    return _question(question, answer)


def _parse_spec_bench(record: dict, where: str) -> Example:
    category = _field(record, "category", where)
    if "question_id" not in record:
        raise UserError(f'{where} lacks the field "question_id"')
    turns = record.get("turns")
    if not isinstance(turns, list) or not turns:
        raise UserError(f'{where} lacks the field "turns", a list of texts')
    prompt = _field({"turns": turns[0]}, "turns", where)
    if not prompt:
        raise UserError(f"{where}: the first turn is empty; correct or remove the line")
    return Example(prompt, "", category)


def _parse_any(record: dict, where: str) -> Example:
    """A record of whichever layout its fields tell."""
    if "turns" in record:
        return _parse_spec_bench({"category": "", "question_id": 0, **record}, where)
    if "question" in record and "answer" in record:
        return _parse_gsm8k(record, where)
    return _parse_prompt_completion({"completion": "", **record}, where)


def _field(record: dict, name: str, where: str) -> str:
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
