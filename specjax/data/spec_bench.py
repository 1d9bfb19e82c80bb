"""Spec-Bench (github.com/hemingkx/Spec-Bench): its questions, which have one or two turns, and their prompts."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from absl import logging

from specjax.data import files, layouts
from specjax.hub.tokenizer import Tokenizer
from specjax.runtime.errors import UserError

# MT-bench's categories, which have two turns, form one subtask; every other category is a subtask.
MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")


@dataclasses.dataclass(frozen=True)
class Question:
    """One question of the benchmark.

    Attributes:
      number: its `question_id`.
      category: its category.
      turns: the user's texts, in order.
    """

    number: int | str
    category: str
    turns: tuple[str, ...]

    @property
    def subtask(self) -> str:
        return "mt_bench" if self.category in MT_BENCH else self.category


def read_questions(path: str | Path) -> list[Question]:
    """Reads the questions in `question.jsonl`; `path` is the file or its folder.

    Questions of MT-bench's categories with one turn are counted in the log.

    Raises UserError, with the line number, for a record that is not a question, and for turns without text.
    """
    questions = []
    path = Path(path)
    for where, record in files.read_records(path / "question.jsonl" if path.is_dir() else path):
        category = layouts.text_of(record, "category", where)
        if "question_id" not in record:
            raise UserError(f'{where} lacks the field "question_id"; add it')
        questions.append(Question(record["question_id"], category, tuple(layouts.turns_of(record, where))))
    short = sum(question.subtask == "mt_bench" and len(question.turns) < 2 for question in questions)
    if short:
        logging.warning("%s: %d questions of MT-bench's categories have one turn instead of two", path, short)
    return questions


def prompt_ids(tokenizer: Tokenizer, turns: Sequence[str], answers: Sequence[str], *, chat: bool) -> tuple[int, ...]:
    """The token ids of a conversation up to the first turn without an answer.

    With `chat` it has the format of the tokenizer's chat template, otherwise texts are separated by an empty line.
    """
    asked = turns[: len(answers) + 1]
    texts = [text for pair in zip(asked, answers, strict=False) for text in pair] + [asked[-1]]
    if not chat:
        return tuple(tokenizer.encode_prompt(layouts.GAP.join(texts)))
    roles = ("user", "assistant")
    return tuple(tokenizer.apply_chat([{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]))
