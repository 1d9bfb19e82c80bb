"""What there is to learn and to be measured on: a task is a table entry that yields examples and a metric."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from absl import logging

from specjax.data import corpora, layouts, short_sums, word_problems
from specjax.data.docstrings import stdlib_docstrings
from specjax.data.layouts import Example, Parser
from specjax.data.quality import METRICS, Quality
from specjax.data.tfds_source import read_split
from specjax.data.word_problems import generate_split
from specjax.runtime.errors import UserError, nearest


@dataclass(frozen=True)
class Task:
    """Examples by split, and the name of the quality metric (None: there is none).

    Attributes:
      train: empty where a task is for evaluation only.
      validation: never empty; shares no file, and no prompt, with `train`. Data sets that come split are taken as
        they come.
      cuts_prompts: whether a prompt that is too long loses its end, as T5's texts to summarise do, rather than be
        dropped or refused.
    """

    name: str
    train: Sequence[Example]
    validation: Sequence[Example]
    metric: str | None
    cuts_prompts: bool = False

    @property
    def is_language_modelling(self) -> bool:
        """Whether examples are documents rather than pairs of prompt and completion."""
        return not self.validation[0].prompt


Splits = tuple[Sequence[Example], Sequence[Example]]


@dataclass(frozen=True)
class _Entry:
    """A task of the table: its loader, its metric, whether it needs `task.path` or may have one, cut prompts."""

    load: Callable[[Any], Splits]
    metric: str | None = None
    needs_path: bool = False
    may_have_path: bool = False
    cuts_prompts: bool = False


def load_task(config: Any) -> Task:
    """Loads the task that `config` describes.

    Config keys: `name`; `path`, "" where the task reads no file, and for a data set of TFDS where TFDS keeps them by
    default; `seed`, of generated tasks; `size`, the most training data to use, in bytes of text for language modelling
    and in examples otherwise (0: all; generated tasks need a number). Validation data does not depend on `size`.

    Raises UserError for an unknown task, for a file that is missing, empty or malformed (with its line number) or
    lacks the references that the metric needs, and for a data set that is not prepared (with the command that does it).
    """
    if config.name not in _TASKS:
        raise UserError(f'unknown task "{config.name}"{nearest(config.name, _TASKS)}')
    entry = _TASKS[config.name]
    if config.size < 0:
        raise UserError(f"task.size is {config.size}; it must be positive, or 0 for all the training data")
    if entry.needs_path and not config.path:
        raise UserError(f'task "{config.name}" reads a file: set task.path')
    if config.path and not (entry.needs_path or entry.may_have_path):
        raise UserError(f'task "{config.name}" reads no file: set task.path to ""')
    train, validation = entry.load(config)
    if not validation:
        raise UserError(f'the data of task "{config.name}" has no examples to validate on; give it some')
    return Task(config.name, tuple(train), tuple(validation), entry.metric, entry.cuts_prompts)


def quality(task: Task, predictions: Sequence[str], references: Sequence[str]) -> Quality:
    """Returns how good predicted completions are by the task's metric; its values are {} where the task has none.

    Raises ValueError where there are not as many predictions as references.
    """
    if task.metric is None:
        return Quality(np.zeros((len(predictions), 0)), lambda sums: {})
    return METRICS[task.metric](predictions, references)


def _documents(files: corpora.Files) -> list[Example]:
    return [Example("", text) for _, text in files]


def _load_stdlib_code(config: Any) -> Splits:
    train, validation = corpora.stdlib_files()
    return _documents(corpora.limit_bytes(train, config.size)), _documents(validation)


def _load_stdlib_docstrings(config: Any) -> Splits:
    train, validation = ([layouts.summary(*pair) for pair in pairs] for pairs in stdlib_docstrings())
    return train[: config.size or None], validation


def _load_text(config: Any) -> Splits:
    train, validation = corpora.text_files(config.path)
    return _documents(corpora.limit_bytes(train, config.size)), _documents(validation)


@dataclass(frozen=True)
class _Generated:
    """Questions with worked answers, drawn from a seed without end by the module's `generate`."""

    module: ModuleType

    def __call__(self, config: Any) -> Splits:
        if config.size == 0:
            raise UserError(f"task.size is 0; `{config.name}` needs the number of training examples to generate")
        problems = generate_split(config.seed, config.size, self.module.generate)
        train, validation = ([layouts.question(*problem) for problem in split] for split in problems)
        return train, validation


def _load_prompt_completion(config: Any) -> Splits:
    train, validation = layouts.read_splits(Path(config.path), layouts.parse_prompt_completion)
    return train[: config.size or None], validation


def _load_spec_bench(config: Any) -> Splits:
    path = Path(config.path)
    return (), layouts.read_jsonl(path / "question.jsonl" if path.is_dir() else path, layouts.parse_spec_bench)


def _load_prompts(config: Any) -> Splits:
    path = Path(config.path)
    if path.suffix in (".jsonl", ".json"):
        return (), layouts.read_jsonl(path, layouts.parse_any)
    return (), [Example(line, "") for line in corpora.read_text(path).split("\n") if line.strip()]


@dataclass(frozen=True)
class _Dataset:
    """A data set of TFDS, or JSON lines of the same layout.

    Attributes:
      name: as TFDS has it.
      validation: the split that is evaluated on: "validation", or "test" where the data set has no other.
      fields: those that `parse` reads.
    """

    name: str
    validation: str
    fields: tuple[str, ...]
    parse: Parser

    def __call__(self, config: Any) -> Splits:
        """Reads files of JSON lines where `task.path` names one or a folder of them, else what TFDS prepared."""
        if config.path and layouts.is_jsonl(Path(config.path)):
            train, validation = layouts.read_splits(Path(config.path), self.parse)
        else:
            train, validation = (self._examples(split, config.path) for split in ("train", self.validation))
        return _limited(train, config.size), list(validation)

    def _examples(self, split: str, data_dir: str) -> Iterator[Example]:
        """Generates the examples; the split is opened at once, so that what is missing is said before the first."""
        where, records = read_split(self.name, split, data_dir)
        return self._parsed(where, records)

    def _parsed(self, where: str, records: Iterable[layouts.Record]) -> Iterator[Example]:
        left_out = 0
        for number, record in enumerate(records):
            # XSum and CNN/DailyMail hold a few articles without text.
            if all(str(record[name]).strip() for name in self.fields if name in record):
                yield self.parse(record, f"{where}, example {number}")
            else:
                left_out += 1
        if left_out:
            logging.warning("%s: %d examples left out, a text of theirs is empty", where, left_out)


def _limited(examples: Iterable[Example], size: int) -> list[Example]:
    """The first `size` examples, or the first whole documents of at most `size` bytes together; 0: all."""
    kept, left = [], size
    for example in examples:
        left -= 1 if example.prompt else len(example.completion.encode())
        if size and left < 0:
            break
        kept.append(example)
    if not kept:
        raise UserError(f"task.size is {size}, which leaves nothing to train on; make it larger, or 0 for all")
    return kept


_TASKS: dict[str, _Entry] = {
    # On every machine.
    "stdlib_code": _Entry(_load_stdlib_code),
    "stdlib_docstrings": _Entry(_load_stdlib_docstrings, "rouge", cuts_prompts=True),
    "arithmetic": _Entry(_Generated(word_problems), "exact_match"),
    "short_sums": _Entry(_Generated(short_sums), "exact_match"),
    # Files.
    "text": _Entry(_load_text, needs_path=True),
    "prompt_completion": _Entry(_load_prompt_completion, needs_path=True),
    "spec_bench": _Entry(_load_spec_bench, needs_path=True),
    "prompts": _Entry(_load_prompts, needs_path=True),
    # TFDS, or files.
    "xsum": _Entry(
        _Dataset("xsum", "validation", ("document", "summary"), layouts.parse_xsum),
        "rouge",
        may_have_path=True,
        cuts_prompts=True,
    ),
    "cnn_dailymail": _Entry(
        _Dataset("cnn_dailymail", "validation", ("article", "highlights"), layouts.parse_cnn_dailymail),
        "rouge",
        may_have_path=True,
        cuts_prompts=True,
    ),
    "wmt14_en_de": _Entry(
        _Dataset("wmt14_translate/de-en", "validation", ("en", "de"), layouts.parse_wmt_en_de),
        "bleu",
        may_have_path=True,
    ),
    "gsm8k": _Entry(
        _Dataset("gsm8k", "test", ("question", "answer"), layouts.parse_gsm8k),
        "exact_match",
        may_have_path=True,
    ),
    "lm1b": _Entry(_Dataset("lm1b", "test", ("text",), layouts.parse_text), may_have_path=True),
}
