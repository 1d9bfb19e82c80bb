"""Runs Spec-Bench: every drafter on every question, turn by turn, with results by subtask and overall.

    python -m specjax.spec_bench --config=FILE --workdir=DIR [--config.section.key=value ...]

Questions are decoded one at a time, as the benchmark prescribes; plain decoding and all drafters decode each prompt in
turn. The prompt of a second turn contains plain decoding's answer to the first, so that all drafters continue the same
text (at temperature 0 it is also their own answer).
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from specjax.data import spec_bench
from specjax.data.spec_bench import Question
from specjax.decoding import batch
from specjax.evaluation import engine, rows
from specjax.evaluation.cases import Case, Job, Setting, load_job, make_cases, make_methods
from specjax.evaluation.engine import Output
from specjax.reporting import metrics, records, spec_bench_page, tables
from specjax.reporting.spec_bench_page import OVERALL
from specjax.runtime import cli, processes
from specjax.runtime import config as configs
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError

# Prompts are padded to a power of two, at least this, so that long prompts do not slow down short ones.
_SHORTEST = 64


@dataclasses.dataclass(frozen=True)
class Answers:
    """The answers of one case to one question.

    Attributes:
      output: results with one batch, of one prompt, for each turn.
      identical: result of `engine.compare_with_plain` for each turn.
    """

    output: Output = dataclasses.field(default_factory=Output)
    identical: list[dict | None] = dataclasses.field(default_factory=list)


def run(config: Any, workdir: str | Path) -> dict:
    """Runs every case of the config; writes results.json, figures and report.html; returns the results.

    Raises:
      UserError: for a file with missing turns, and for every error of an evaluation.
    """
    workdir = Path(workdir)
    if tuple(config.batch_sizes) != (1,):
        raise UserError(f"Spec-Bench is run question by question: set batch_sizes to (1,), not {config.batch_sizes}")
    questions = _selected(spec_bench.read_questions(config.task.path), config.selection.per_category)
    job = load_job(config)
    settings = [Setting("lossless", temperature, 1) for temperature in config.temperatures]
    cases = [make_cases(job, setting) for setting in settings]  # raises before the first setting takes its hours
    lines = []
    for setting, of_setting in zip(settings, cases, strict=True):
        lines += _rows(job, setting, of_setting, questions, _answers(job, setting, of_setting, questions))
    path = workdir / "results.json"
    results = records.write_results(path, binary="spec_bench", config=configs.to_plain(config), rows=lines)
    if processes.first():
        print(tables.summary_table([row for row in lines if row["subtask"] == OVERALL]))
        spec_bench_page.write(workdir, results)
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


def _answers(job: Job, setting: Setting, cases: list[Case], questions: Sequence[Question]) -> list[list[Answers]]:
    """Decodes all questions turn by turn, grouped by padded prompt length. Returns by question and case the answers."""
    answers = [[Answers() for _ in cases] for _ in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        groups: dict[int, dict[int, tuple[int, ...]]] = {}
        for number, question in enumerate(questions):
            if turn < len(question.turns):
                prompt = _prompt(job, question, answers[number][0].output.tokens)
                groups.setdefault(_slots(len(prompt)), {})[number] = prompt
        for slots, prompts in sorted(groups.items()):
            _answer_group(job, setting, cases, slots, prompts, turn, answers)
    return answers


def _prompt(job: Job, question: Question, answered: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The prompt of the turn after those in `answered`. Raises UserError if it is too long for the target."""
    tokenizer, decoder = job.target.tokenizer, job.target.decoder
    texts = [tokenizer.decode(tokens) for tokens in answered]
    prompt = spec_bench.prompt_ids(tokenizer, question.turns, texts, chat=job.config.selection.chat)
    try:
        batch.check_prompts(
            [prompt],
            vocab_size=decoder.vocab_size,
            max_new_tokens=job.config.max_new_tokens,
            max_positions=decoder.config.max_positions,
        )
    except UserError as error:
        raise UserError(f"question {question.number}, turn {len(texts) + 1}: {error}") from None
    return prompt


def _slots(length: int) -> int:
    return max(_SHORTEST, 1 << (length - 1).bit_length())


def _answer_group(
    job: Job,
    setting: Setting,
    cases: list[Case],
    slots: int,
    prompts: dict[int, tuple[int, ...]],
    turn: int,
    answers: list[list[Answers]],
) -> None:
    """Decodes prompts of one padded length, given by question number, and appends the results to `answers`."""
    config, numbers, ids = job.config, list(prompts), list(prompts.values())
    methods = make_methods(job, setting, cases, ids, slots)
    with meshes.use(job.target.mesh):
        turns = engine.decode_in_turns(
            methods,
            ids,
            batch_size=1,
            max_new_tokens=config.max_new_tokens,
            eos_ids=job.target.tokenizer.eos_ids,
            seed=config.seed,
            put=batch.Placer(job.target.mesh),
            label=f"T={setting.temperature:g} turn {turn + 1}, prompts up to {slots} tokens",
            indices=[number + turn * len(answers) for number in numbers],
        )
        for place, results in turns:
            for method, result, answer in zip(methods, results, answers[numbers[place]], strict=True):
                answer.output.batches.append(result)
                plain, output = Output([results[0]]), Output([result])
                answer.identical.append(engine.compare_with_plain(method, [ids[place]], plain, output, config.seed))


def _rows(
    job: Job, setting: Setting, cases: list[Case], questions: Sequence[Question], answers: list[list[Answers]]
) -> list[dict]:
    """Result rows for every case: one per subtask, and one for all questions."""
    subtasks = list(dict.fromkeys(question.subtask for question in questions))
    lines = []
    for subtask in (*subtasks, OVERALL):
        chosen = [i for i, question in enumerate(questions) if subtask in (question.subtask, OVERALL)]
        for index, case in enumerate(cases):
            of_case, plain = ([answers[i][place] for i in chosen] for place in (index, 0))
            joined = Output([result for answer in of_case for result in answer.output.batches])
            row = rows.SpecBenchRow(
                **rows.settings_of(job.config, setting, case, case.sampling, len(joined.batches)),
                **_measured([a.output for a in of_case], [a.output for a in plain], job.config.seed),
                **batch.layers_per_token(joined.batches, case.target.decoder.layers),
                iterations=joined.iterations,
                identical_to_baseline=_identical([questions[i] for i in chosen], of_case),
                subtask=subtask,
                questions=len(chosen),
            )
            lines.append(row.to_dict())
    return lines


def _measured(outputs: list[Output], plain: list[Output], seed: int) -> dict:
    """The fields of a row computed from counts and seconds; intervals resample questions with all their turns."""
    counts = [output.counts() for output in outputs]
    fields = [field.name for field in dataclasses.fields(metrics.Counts)]
    summed = {name: np.stack([getattr(of, name).sum(0, dtype=np.int32) for of in counts]) for name in fields}
    timing = metrics.Timing(
        seconds=np.asarray([output.seconds.sum() for output in outputs]),
        baseline_seconds=np.asarray([output.seconds.sum() for output in plain]),
        unit_of_prompt=np.arange(len(outputs)),
        baseline_emitted=np.asarray([output.emitted for output in plain]),
        prefill_seconds=sum(output.prefill_seconds for output in outputs),
    )
    return metrics.evaluate_row(metrics.Counts(**summed), timing, seed=seed)


def _identical(questions: Sequence[Question], answers: Sequence[Answers]) -> dict | None:
    """Number of turns whose tokens equal plain decoding's, and all differences with their question and turn."""
    compared = [
        (str(question.number), turn, identical)
        for question, answer in zip(questions, answers, strict=True)
        for turn, identical in enumerate(answer.identical, 1)
    ]
    if compared[0][2] is None:
        return None
    differences = [
        difference | {"prompt": name, "turn": turn}
        for name, turn, identical in compared
        for difference in identical["differences"]
    ]
    return {"equal": len(compared) - len(differences), "of": len(compared), "differences": differences}


if __name__ == "__main__":
    raise SystemExit(cli.launch(run, "specjax.spec_bench"))
