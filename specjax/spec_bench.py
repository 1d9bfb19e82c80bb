"""Runs Spec-Bench: every drafter on every question, turn by turn, with results by subtask and overall.

    python -m specjax.spec_bench --config=FILE --workdir=DIR [--config.section.key=value ...]

Questions are decoded one at a time, as the benchmark prescribes; plain decoding and all drafters decode each prompt in
turn. The prompt of a second turn contains plain decoding's answer to the first, so that all drafters continue the same
text (at temperature 0 it is also their own answer).
"""

import dataclasses
import functools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specjax.data import spec_bench
from specjax.data.spec_bench import Question
from specjax.evaluation import engine, rows
from specjax.evaluation.cases import Case, Job, Setting, load_job, make_cases, make_method, make_methods
from specjax.evaluation.engine import Method, Output
from specjax.reporting import metrics, records, spec_bench_page, tables
from specjax.reporting.spec_bench_page import OVERALL
from specjax.runtime import cli, processes
from specjax.runtime import config as configs
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError, prefixed


@dataclasses.dataclass(frozen=True)
class Answers:
    """The answers of all cases to some turns of questions.

    Attributes:
      turns: (index of the question, index of the turn) of each answer.
      outputs: for each case its answers, one batch each.
      identical: for each case and answer the result of `engine.compare_with_plain`.
    """

    turns: list[tuple[int, int]]
    outputs: list[Output]
    identical: list[list[dict | None]]

    @classmethod
    def of(cls, cases: int) -> "Answers":
        return cls([], [Output() for _ in range(cases)], [[] for _ in range(cases)])

    def append(
        self, turn: tuple[int, int], prompt: Sequence[int], methods: Sequence[Method], results: Sequence, seed: int
    ) -> None:
        """Adds the answers of all cases, of which the first is plain decoding, to one turn of a question."""
        self.turns.append(turn)
        plain = Output([results[0]])
        for method, result, output, identical in zip(methods, results, self.outputs, self.identical, strict=True):
            output.batches.append(result)
            identical.append(engine.compare_with_plain(method, [prompt], plain, Output([result]), seed))

    def select(self, questions: Sequence[int]) -> "Answers":
        """The answers to these questions, in their order."""
        places = sorted(
            (i for i, (question, _) in enumerate(self.turns) if question in questions), key=self.turns.__getitem__
        )
        take = lambda values: [values[place] for place in places]
        outputs = [Output(take(output.batches)) for output in self.outputs]
        return Answers(take(self.turns), outputs, list(map(take, self.identical)))


def run(config: Any, workdir: str | Path) -> dict:
    """Runs every case of the config; writes results.json, figures and report.html; returns the results.

    Raises:
      UserError: for a file with missing turns, and for every error of an evaluation.
      InexactText: as an evaluation.
    """
    workdir = Path(workdir)
    if tuple(config.batch_sizes) != (1,):
        raise UserError(f"Spec-Bench is run question by question: set batch_sizes to (1,), not {config.batch_sizes}")
    questions = _selected(spec_bench.read_questions(config.task.path), config.selection.per_category)
    job = load_job(config)
    settings = [Setting("lossless", temperature, 1) for temperature in config.temperatures]
    cases = [make_cases(job, setting) for setting in settings]  # raises before the first setting takes its hours
    lines, folder = [], job.batches_folder(workdir)
    for setting, of_setting in zip(settings, cases, strict=True):
        lines += _rows(job, setting, of_setting, questions, _answers(job, setting, of_setting, questions, folder))
    path = workdir / "results.json"
    results = records.write_results(path, binary="spec_bench", config=configs.to_plain(config), rows=lines)
    if processes.first():
        print(tables.summary_table([row for row in lines if row["subtask"] == OVERALL]))
        spec_bench_page.write(workdir, results)
        shutil.rmtree(workdir / "batches", ignore_errors=True)
    metrics.check_exact(results["rows"])
    return results


def _selected(questions: Sequence[Question], per_category: int) -> list[Question]:
    """The first `per_category` questions of each category; 0 takes all."""
    if per_category < 0:
        raise UserError(f"selection.per_category is {per_category}; it must be positive, or 0 for every question")
    counts: dict[str, int] = {}
    selected = []
    for question in questions:
        counts[question.category] = counts.get(question.category, 0) + 1
        if not per_category or counts[question.category] <= per_category:
            selected.append(question)
    return selected


def _answers(job: Job, setting: Setting, cases: list[Case], questions: Sequence[Question], folder: Path) -> Answers:
    """Decodes all questions turn by turn, grouped by capacity, so that long prompts do not slow down short ones."""
    answers, max_new_tokens = Answers.of(len(cases)), job.config.max_new_tokens
    for turn in range(max(len(question.turns) for question in questions)):
        groups: dict[int, dict[int, tuple[int, ...]]] = {}  # prompts by capacity and number of the question
        for number, question in enumerate(questions):
            if turn < len(question.turns):
                prompt = _prompt(job, question, answers.select([number]).outputs[0].tokens)
                capacity = make_method(cases[0], [prompt], max_new_tokens).plan.capacity
                groups.setdefault(capacity, {})[number] = prompt
        for capacity, prompts in sorted(groups.items()):
            numbers, ids = list(prompts), list(prompts.values())
            methods = make_methods(job, setting, cases, ids)
            turns = engine.decode_in_turns(
                methods,
                ids,
                batch_size=1,
                group=1,
                max_new_tokens=max_new_tokens,
                label=f"T={setting.temperature:g} turn {turn + 1}, texts up to {capacity} tokens",
                indices=[number + turn * len(questions) for number in numbers],
                end_of=job.end_of,
                folder=folder,
                **job.decoding,
            )
            with meshes.use(job.target.mesh):
                for place, results in turns:
                    answers.append((numbers[place], turn), ids[place], methods, results, job.config.seed)
    return answers


def _prompt(job: Job, question: Question, answered: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The prompt of the turn after those in `answered`. Raises UserError if it is too long for the target."""
    texts: list[str] = []
    prompt_of = functools.partial(spec_bench.prompt_ids, chat=job.config.selection.chat)
    for tokens in answered:
        texts.append(job.stops.text(prompt_of(job.target.tokenizer, question.turns, texts), tokens))
    prompt = prompt_of(job.target.tokenizer, question.turns, texts)
    with prefixed(f"question {question.number}, turn {len(texts) + 1}: "):
        job.check([prompt])
    return prompt


def _rows(job: Job, setting: Setting, cases: list[Case], questions: Sequence[Question], answers: Answers) -> list[dict]:
    """Result rows for every case: one per subtask, and one for all questions."""
    lines = []
    for subtask in (*dict.fromkeys(question.subtask for question in questions), OVERALL):
        chosen = [i for i, question in enumerate(questions) if subtask in (question.subtask, OVERALL)]
        part = answers.select(chosen)
        units = [chosen.index(question) for question, _ in part.turns]
        names = [(str(questions[question].number), turn + 1) for question, turn in part.turns]
        for case, output, identical in zip(cases, part.outputs, part.identical, strict=True):
            row = rows.SpecBenchRow(
                **rows.settings_of(job.config, setting, case, case.sampling, len(part.turns)),
                **rows.measured(output, part.outputs[0], case.target.decoder.layers, job.config.seed, units),
                identical_to_baseline=_identical(names, identical),
                subtask=subtask,
                questions=len(chosen),
            )
            lines.append(row.to_dict())
    return lines


def _identical(names: Sequence[tuple[str, int]], compared: Sequence[dict | None]) -> dict | None:
    """Number of turns whose tokens equal plain decoding's, and all differences with their question and turn."""
    if compared[0] is None:
        return None
    differences = [
        difference | {"prompt": question, "turn": turn}
        for (question, turn), identical in zip(names, compared, strict=True)
        for difference in identical["differences"]
    ]
    return {"equal": len(compared) - len(differences), "of": len(compared), "differences": differences}


if __name__ == "__main__":
    cli.leave(cli.launch(run, "specjax.spec_bench"))
