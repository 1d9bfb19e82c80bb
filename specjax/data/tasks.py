"""Tasks: examples for training, examples for validation, and a quality metric.

`load_task` makes a task from a config's `task` section. `task.name` is a key of the table at the end of this file, or
names a task of your own: "path/to/file.py:Name" or "package.module:Name", where `Name` is a `Task` or a function from
the config's `task` section to a `Task`. A metric of your own is a function from predictions and references to
`quality.Quality`, most easily made with `quality.mean`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from specjax.data import corpora, files, layouts, spec_bench, word_problems
from specjax.data.docstrings import stdlib_docstrings
from specjax.data.layouts import Example, Pair, Parser
from specjax.data.quality import METRICS, Metric, Quality
from specjax.data.tfds_source import read_split
from specjax.runtime import extensions
from specjax.runtime.errors import UserError, nearest


@dataclass(frozen=True)
class Task:
    """Examples by split, and a quality metric.

    Attributes:
      name: name for errors and logs.
      train: training examples; empty if the task is for evaluation only.
      validation: validation examples; never empty. If specjax splits the data, they share no file and no prompt with
        `train`; data sets with splits of their own keep them.
      metric: a key of `quality.METRICS`, a function like those there, or None if quality is not measured.
      cuts_prompts: whether a prompt that is too long is cut at its end, as T5 does in summarisation. Otherwise it is
        dropped in training, and an error in evaluation.
    """

    name: str
    train: Sequence[Example]
    validation: Sequence[Example]
    metric: str | Metric | None = None
    cuts_prompts: bool = False

    @property
    def is_language_modelling(self) -> bool:
        """Whether examples are documents instead of pairs of prompt and completion."""
        return not self.validation[0].prompt


Splits = tuple[Sequence[Example], Sequence[Example]]


@dataclass(frozen=True)
class _Builtin:
    """A task of specjax: called with a config's `task` section it returns the `Task`.

    Attributes:
      load: function from the section to (training, validation) examples.
      path: whether `task.path` must be empty ("none"), must be set ("needed") or may be set ("optional").
    """

    load: Callable[[Any], Splits]
    metric: str | None = None
    path: str = "none"
    cuts_prompts: bool = False

    def __call__(self, config: Any) -> Task:
        if config.size < 0:
            raise UserError(f"task.size is {config.size}; it must be positive, or 0 for all the training data")
        if self.path == "needed" and not config.path:
            raise UserError(f'task "{config.name}" reads a file: set task.path')
        if self.path == "none" and config.path:
            raise UserError(f'task "{config.name}" reads no file: set task.path to ""')
        train, validation = self.load(config)
        return Task(config.name, tuple(train), tuple(validation), self.metric, self.cuts_prompts)


def load_task(config: Any) -> Task:
    """Loads the task that `config` describes.

    Config keys: `name`; `path`, the file or folder to read ("" if the task reads none, or for TFDS's default folder);
    `seed` of generated tasks; `size`, the maximum amount of training data, in bytes of text for language modelling and
    in examples otherwise (0: all; generated tasks need a number). Validation data does not depend on `size`. A task of
    your own may use these keys in any way.

    Raises UserError for an unknown task, for a file that is missing, empty, malformed (with its line number) or without
    the references that the metric needs, for a TFDS data set that is not prepared (with the command to prepare it), and
    for a task of your own that is not a `Task`, has no validation examples or has an unknown metric.
    """
    task = extensions.named(config.name, _TASKS, "task")
    if not isinstance(task, Task) and callable(task):
        task = task(config)
    if not isinstance(task, Task):
        raise UserError(f'"{config.name}" is {type(task).__name__}, not a specjax.data.tasks.Task or a function to one')
    if not task.validation:
        raise UserError(f'the data of task "{config.name}" has no examples to validate on; give it some')
    for example in (*task.train, *task.validation):
        if not isinstance(example, Example):
            raise UserError(f'task "{config.name}" has an example of type {type(example).__name__}; make it an Example')
    if isinstance(task.metric, str) and task.metric not in METRICS:
        raise UserError(f'task "{config.name}" has the metric "{task.metric}"{nearest(task.metric, METRICS)}')
    return task


def quality(task: Task, predictions: Sequence[str], references: Sequence[str]) -> Quality:
    """Returns the task's metric on predicted completions; a metric without values if the task has none.

    Raises ValueError unless there are as many predictions as references.
    """
    if task.metric is None:
        return Quality(np.zeros((len(predictions), 0)), lambda sums: {})
    metric = METRICS[task.metric] if isinstance(task.metric, str) else task.metric
    return metric(predictions, references)


def _documents(files: corpora.Files, size: int = 0) -> list[Example]:
    return [Example("", text) for _, text in corpora.limit_bytes(files, size)]


def _load_stdlib_code(config: Any) -> Splits:
    train, validation = corpora.stdlib_files()
    return _documents(train, config.size), _documents(validation)


def _load_stdlib_docstrings(config: Any) -> Splits:
    train, validation = ([layouts.summary(*pair) for pair in pairs] for pairs in stdlib_docstrings())
    return _first(train, config.size), validation


def _load_text(config: Any) -> Splits:
    if all(layouts.split_files(Path(config.path))):
        parse = lambda record, where: [Example("", text)] if (text := corpora.document(record, where)).strip() else []
        train, validation = layouts.read_splits(Path(config.path), parse)
        return _first(train, config.size), validation
    train, validation = corpora.text_files(config.path)
    return _documents(train, config.size), _documents(validation)


def _load_generated(config: Any) -> Splits:
    if config.size == 0:
        raise UserError(f"task.size is 0; `{config.name}` needs the number of training examples to generate")
    problems = word_problems.generate_split(config.seed, config.size, word_problems.GENERATORS[config.name])
    train, validation = ([layouts.question(*problem) for problem in split] for split in problems)
    return train, validation


def _load_prompt_completion(config: Any) -> Splits:
    path = Path(config.path)
    if path.is_dir() or not isinstance(content := files.read(path), str):
        train, validation = layouts.read_splits(path, layouts.parse_any)
    else:
        lines = _lines(content)
        train, validation = corpora.split(lines, [example.prompt for example in lines])
    return _first(train, config.size), validation


def _load_spec_bench(config: Any) -> Splits:
    return (), [Example(of.turns[0], "", of.category) for of in spec_bench.read_questions(config.path)]


def _load_prompts(config: Any) -> Splits:
    path = Path(config.path)
    if path.is_dir():
        return (), layouts.read_splits(path, layouts.parse_any)[1]
    content = files.read(path)
    return (), _lines(content) if isinstance(content, str) else layouts.parse_all(content, layouts.parse_any)


def _lines(text: str) -> list[Example]:
    """A prompt for each line that is not blank."""
    return [Example(line, "") for line in text.split("\n") if line.strip()]


@dataclass(frozen=True)
class _Dataset:
    """Loads a data set from TFDS, or from JSON lines with the same fields.

    Attributes:
      name: its name in TFDS.
      validation: the split used for validation: "validation", or "test" if the data set has no validation split.
      fields: the fields that `parse` reads.
    """

    name: str
    validation: str
    fields: tuple[str, ...]
    parse: Parser

    def __call__(self, config: Any) -> Splits:
        """Reads records if `task.path` is a file or a folder of them, and otherwise the prepared TFDS data."""
        path = Path(config.path)
        if config.path and (path.is_file() or files.suffix(path) or any(layouts.split_files(path))):
            train, validation = layouts.read_splits(path, self.parse)
        else:
            # Open both splits before reading examples, so that a missing one is reported at once.
            train, validation = (
                self._parsed(*read_split(self.name, split, config.path)) for split in ("train", self.validation)
            )
        return _first(train, config.size), list(validation)

    def _parsed(self, where: str, records: Iterable[layouts.Record]) -> Iterator[Example]:
        skipped = 0
        for number, record in enumerate(records):
            # XSum and CNN/DailyMail have a few articles without text.
            if all(str(record[name]).strip() for name in self.fields if name in record):
                yield from self.parse(record, f"{where}, example {number}")
            else:
                skipped += 1
        if skipped:
            logging.warning("%s: %d examples left out, one of their texts is empty", where, skipped)


def _pairs(name: str, validation: str, parse: Pair, metric: str) -> _Builtin:
    data_set = _Dataset(name, validation, (parse.source, parse.reference), parse)
    return _Builtin(data_set, metric, "optional", cuts_prompts=metric == "rouge")


def _first(examples: Iterable[Example], size: int) -> list[Example]:
    """The first `size` examples, or the first documents with at most `size` bytes in total; 0: all."""
    first, left = [], size
    for example in examples:
        left -= 1 if example.prompt else len(example.completion.encode())
        if size and left < 0:
            break
        first.append(example)
    if not first:
        raise UserError(f"task.size is {size}, which leaves nothing to train on; make it larger, or 0 for all")
    return first


_TASKS: dict[str, Callable[[Any], Task]] = {
    # Available on every machine.
    "stdlib_code": _Builtin(_load_stdlib_code),
    "stdlib_docstrings": _Builtin(_load_stdlib_docstrings, "rouge", cuts_prompts=True),
    "arithmetic": _Builtin(_load_generated, "exact_match"),
    "short_sums": _Builtin(_load_generated, "exact_match"),
    # Read from files.
    "text": _Builtin(_load_text, path="needed"),
    "prompt_completion": _Builtin(_load_prompt_completion, path="needed"),
    "spec_bench": _Builtin(_load_spec_bench, path="needed"),
    "prompts": _Builtin(_load_prompts, path="needed"),
    # Read from TFDS or from files.
    "xsum": _pairs("xsum", "validation", Pair("document", "summary", layouts.summary), "rouge"),
    "cnn_dailymail": _pairs("cnn_dailymail", "validation", Pair("article", "highlights", layouts.summary), "rouge"),
    "wmt14_en_de": _pairs("wmt14_translate/de-en", "validation", Pair("en", "de", layouts.translation), "bleu"),
    "gsm8k": _Builtin(
        _Dataset("gsm8k", "test", ("question", "answer"), layouts.parse_gsm8k), "exact_match", "optional"
    ),
    "lm1b": _Builtin(_Dataset("lm1b", "test", ("text",), layouts.parse_text), None, "optional"),
}
