"""Spec-Bench: every drafter on every question, turn by turn, reported by subtask and overall.

    python -m specjax.spec_bench --config=FILE --workdir=DIR [--config.section.key=value ...]

One question at a time, as the benchmark has it. Plain decoding and all drafters answer a prompt one after another, each
prompt beginning with another of them. A second turn's prompt holds what plain decoding answered to the first, for all
drafters alike (at temperature 0 that is what each of them answered): all continue the same text.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from specjax.data import spec_bench
from specjax.data.spec_bench import Question
from specjax.decoding import batch, identity
from specjax.evaluate import with_costs
from specjax.evaluation.cases import Job, Setting, described, load_job, make_cases, make_plan
from specjax.reporting import metrics, records, spec_bench_page, tables
from specjax.reporting.spec_bench_page import OVERALL
from specjax.runtime import cli, processes, stopping
from specjax.runtime import config as configs
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError
from specjax.runtime.timing import progress

# Prompts are padded to powers of two from here, so that long ones do not make short ones dear.
_SHORTEST = 64


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one case made of one turn.

    Attributes:
      identical: of `identity.compare`; None where equality with plain decoding is not claimed.
    """

    result: batch.BatchResult
    identical: dict | None


# answers[question][case] is a list of Answers, one a turn.
Answers = list[list[list[Answer]]]


def run(config: Any, workdir: str | Path) -> dict:
    """Runs every case of the config; writes results.json, figures and report.html; returns the results.

    Raises:
      UserError: for a file with missing turns, and whatever an evaluation refuses.
    """
    workdir = Path(workdir)
    if tuple(config.batch_sizes) != (1,):
        raise UserError(f"Spec-Bench is run question by question: set batch_sizes to (1,), not {config.batch_sizes}")
    questions = _selected(spec_bench.read_questions(config.task.path), config.selection.per_category)
    job = load_job(config)
    settings = [Setting("lossless", temperature, 1) for temperature in config.temperatures]
    for setting in settings:
        make_cases(job, setting)  # refuses what does not fit before the first takes its hours
    rows = []
    for setting in settings:
        cases = make_cases(job, setting)
        rows += _rows(job, setting, cases, questions, _answers(job, setting, cases, questions))
    path = workdir / "results.json"
    results = records.write_results(path, binary="spec_bench", config=configs.to_plain(config), rows=rows)
    if processes.first():
        print(tables.summary_table([row for row in rows if row["subtask"] == OVERALL]))
        spec_bench_page.write(workdir, results)
    return results


def _selected(questions: Sequence[Question], per_category: int) -> list[Question]:
    """The first so many of each category, 0: all."""
    if per_category < 0:
        raise UserError(f"selection.per_category is {per_category}; it must be positive, or 0 for every question")
    taken: dict[str, int] = {}
    kept = []
    for question in questions:
        taken[question.category] = taken.get(question.category, 0) + 1
        if not per_category or taken[question.category] <= per_category:
            kept.append(question)
    return kept


def _answers(job: Job, setting: Setting, cases, questions: Sequence[Question]) -> Answers:
    """Turn by turn, and within a turn by the length of prompts."""
    answers: Answers = [[[] for _ in cases] for _ in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        groups: dict[int, dict[int, tuple[int, ...]]] = {}
        for number, question in enumerate(questions):
            if turn < len(question.turns):
                prompt = _prompt(job, question, [made.result.tokens[0] for made in answers[number][0]])
                groups.setdefault(_slots(len(prompt)), {})[number] = prompt
        for slots, prompts in sorted(groups.items()):
            _answer_group(job, setting, cases, slots, prompts, turn, answers)
    return answers


def _prompt(job: Job, question: Question, answered: Sequence[Sequence[int]]) -> tuple[int, ...]:
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


def _answer_group(job, setting, cases, slots: int, prompts: dict[int, tuple[int, ...]], turn: int, answers) -> None:
    """Decodes prompts of about one length with every case, and puts what comes of it into `answers`."""
    config, target = job.config, job.target
    plans = [make_plan(job, setting, case, slots) for case in cases]
    ids = list(prompts.values())
    cases = [with_costs(job, setting, case, plan, ids) for case, plan in zip(cases, plans, strict=True)]
    put = batch.Placer(target.mesh)

    def decode(case, plan, number):
        return batch.decode(
            plan,
            target.params,
            case.params,
            [prompts[number]],
            indices=[number + turn * len(answers)],
            seed=config.seed,
            sampling=case.sampling,
            max_new_tokens=config.max_new_tokens,
            eos_ids=target.tokenizer.eos_ids,
            put=put,
        )

    label = f"T={setting.temperature:g} turn {turn + 1}, prompts up to {slots} tokens"
    with meshes.use(target.mesh):
        for case, plan in zip(cases, plans, strict=True):
            decode(case, plan, min(prompts))  # compiles
        for place, number in enumerate(progress(prompts, description=label, unit="prompt")):
            stopping.stop_if_asked()
            made: list[batch.BatchResult | None] = [None] * len(cases)
            for offset in range(len(cases)):
                index = (offset + place) % len(cases)
                made[index] = decode(cases[index], plans[index], number)
            for case, plan, result, said in zip(cases, plans, made, answers[number], strict=True):
                identical = None
                if case.gamma and setting.temperature == 0 and not plan.rule.lossy:
                    how = dict(slots=plan.capacity, seed=config.seed, sampling=case.sampling)
                    both = (made[0].tokens, result.tokens)
                    identical = identity.compare(plan, target.params, [prompts[number]], *both, **how)
                said.append(Answer(result, identical))


def _rows(job, setting, cases, questions: Sequence[Question], answers: Answers) -> list[dict]:
    """A row for every subtask and case, and for all questions together."""
    subtasks = list(dict.fromkeys(question.subtask for question in questions))
    rows = []
    for subtask in (*subtasks, OVERALL):
        chosen = [i for i, question in enumerate(questions) if subtask in (question.subtask, OVERALL)]
        for index, case in enumerate(cases):
            made = [answers[i][index] for i in chosen]
            plain = [answers[i][0] for i in chosen]
            turns = sum(map(len, made))
            results = [(1, answer.result) for turns in made for answer in turns]
            settings = described(job.config, setting, case, turns)
            settings |= {"subtask": subtask, "questions": len(chosen)}
            settings["iterations"] = sum(result.iterations for _, result in results)
            settings["identical_to_baseline"] = _identical(questions, chosen, made)
            layers = batch.layers_per_token(results, case.target.decoder.layers)
            rows.append(settings | _measured(made, plain, job.config.seed) | layers)
    return rows


def _measured(made, plain, seed: int) -> dict:
    """The measured part of a row; a question with its turns is what intervals resample."""
    counts = [[answer.result.counts(1) for answer in turns] for turns in made]
    summed = {
        name: np.stack([sum(count[name][0] for count in turns) for turns in counts]).astype(np.int32)
        for name in counts[0][0]
    }
    seconds = lambda of: np.asarray([sum(answer.result.seconds for answer in turns) for turns in of])
    timing = metrics.Timing(
        seconds=seconds(made),
        baseline_seconds=seconds(plain),
        unit_of_prompt=np.arange(len(made)),
        baseline_emitted=np.asarray([sum(len(answer.result.tokens[0]) for answer in turns) for turns in plain]),
        prefill_seconds=sum(answer.result.prefill_seconds for turns in made for answer in turns),
    )
    return metrics.evaluate_row(metrics.Counts(**summed), timing, seed=seed)


def _identical(questions: Sequence[Question], chosen: Sequence[int], made) -> dict | None:
    """Turns whose tokens are those of plain decoding, and where the others differ."""
    if made[0][0].identical is None:
        return None
    found = [
        (i, turn, answer.identical) for i, turns in zip(chosen, made, strict=True) for turn, answer in enumerate(turns)
    ]
    differences = [
        difference | {"prompt": str(questions[number].number), "turn": turn + 1}
        for number, turn, identical in found
        for difference in identical["differences"]
    ]
    return {"equal": len(found) - len(differences), "of": len(found), "differences": differences}


if __name__ == "__main__":
    raise SystemExit(cli.launch(run, "specjax.spec_bench"))
