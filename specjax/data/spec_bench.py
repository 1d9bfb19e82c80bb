"""Spec-Bench (github.com/hemingkx/Spec-Bench): its questions, which have one or two turns, and their prompts."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from specjax.data import layouts
from specjax.hub.tokenizer import Tokenizer
from specjax.runtime.errors import UserError

# MT-bench's categories, which have two turns, form one subtask; every other category is a subtask.
MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")

# Separates turns if there is no chat template.
_GAP = "\n\n"


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

    Raises:
      UserError: with the line number, for a record that is not a question, or whose number of turns differs from its
        category's (two in MT-bench's categories, in others that of the category's first question).
    """
    path = Path(path)
    path = path / "question.jsonl" if path.is_dir() else path
    usual = dict.fromkeys(MT_BENCH, 2)

    def parse(record: layouts.Record, where: str) -> Question:
        layouts.parse_spec_bench(record, where)
        turns = tuple(layouts.field({"turns": turn}, "turns", where) for turn in record["turns"])
        category = record["category"]
        expected = usual.setdefault(category, len(turns))
        if len(turns) != expected or not all(turn.strip() for turn in turns):
            filled = sum(bool(turn.strip()) for turn in turns)
            raise UserError(
                f'{where}: question {record["question_id"]} of category "{category}" has {filled} '
                f"turn{'s' * (filled != 1)} with text, not {expected}; add the missing ones"
            )
        return Question(record["question_id"], category, turns)

    return layouts.read_jsonl(path, parse)


def prompt_ids(tokenizer: Tokenizer, turns: Sequence[str], answers: Sequence[str], *, chat: bool) -> tuple[int, ...]:
    """The token ids of a conversation up to the first turn without an answer.

    With `chat` it has the format of the tokenizer's chat template, otherwise texts are separated by an empty line.
    """
    asked = turns[: len(answers) + 1]
    texts = [text for pair in zip(asked, answers, strict=False) for text in pair] + [asked[-1]]
    if not chat:
        return tuple(tokenizer.encode_prompt(_GAP.join(texts)))
    roles = ("user", "assistant")
    return tuple(tokenizer.apply_chat([{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]))
