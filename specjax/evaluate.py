"""Evaluates task x drafter x rule x gamma: exactness, efficiency, quality and wall-clock time.

    python -m specjax.evaluate --config=FILE --workdir=DIR [--config.section.key=value ...]

Plain decoding (gamma = 0, the same loop) and every drafter decode each group of prompts in turn, in the same process,
so that a slow phase of the machine affects all of them. A stopped run resumes after its last group.
"""

import functools
import shutil
from pathlib import Path
from typing import Any

import jax

from specjax.data import tasks
from specjax.decoding import loop
from specjax.evaluation import confidence, engine, prediction, rows
from specjax.evaluation.cases import Case, Job, Setting, make_cases, make_job, make_methods, make_settings
from specjax.evaluation.engine import Method, Output
from specjax.evaluation.throughput import PartSeconds
from specjax.reporting import metrics, page, records, tables
from specjax.runtime import cli, process_memory, processes
from specjax.runtime import config as configs
from specjax.runtime import mesh as meshes
from specjax.runtime.files import write_atomically


def run(config: Any, workdir: str | Path) -> dict:
    """Runs every case of the config; writes results.json, figures and report.html; returns the results.

    Raises:
      UserError: for unknown names, settings out of range, and incompatible models or prompts.
      InexactText: at the end, if text of an exact rule differs from plain decoding's by more than ties.
    """
    workdir = Path(workdir)
    job = make_job(config)
    lines, counts, samples = [], {}, []
    settings = make_settings(config)
    for setting in settings:
        make_cases(job, setting)  # raises errors of all settings before decoding starts
    for setting in settings:
        if process_memory.crowded():  # with the programs of earlier settings
            jax.clear_caches()
        setting_rows, setting_counts, setting_samples = _run_setting(job, setting, job.batches_folder(workdir))
        lines += setting_rows
        counts |= setting_counts
        samples += setting_samples
    results = records.write_results(
        workdir / "results.json",
        binary="evaluate",
        config=configs.to_plain(config),
        rows=lines,
        concurrency=tables.concurrency(lines),
        comparisons=metrics.comparisons(config.compare, counts, config.seed),
        samples=samples,
    )
    if processes.first():
        print(tables.summary_table(results["rows"]))
        if by_concurrency := results["concurrency"]:
            print("\n" + tables.aligned_table(by_concurrency, list(by_concurrency[0])))
            table = tables.markdown_table(by_concurrency, list(by_concurrency[0]))
            write_atomically(workdir / "concurrency.md", table + "\n")
        page.write_run(workdir, results, stages={})
        shutil.rmtree(workdir / "batches", ignore_errors=True)
    metrics.check_exact(results["rows"])
    return results


def _run_setting(
    job: Job, setting: Setting, folder: Path
) -> tuple[list[dict], dict[tuple, metrics.Counts], list[dict]]:
    """Decodes with every case of one setting; returns rows, counts by (setting, drafter, rule, ...), and samples."""
    cases = make_cases(job, setting)
    methods = make_methods(job, setting, cases, job.ids)
    with meshes.use(job.target.mesh):
        outputs, parts = _decode_all(job, setting, cases, methods, folder)
    baseline = outputs[0]
    plain = {id(case.target): output for case, output in zip(cases, outputs, strict=True) if case.gamma == 0}
    lines, counts = [], {}
    for case, method, output, seconds in zip(cases, methods, outputs, parts, strict=True):
        counts[setting, case.name, case.rule, case.lenience, case.gamma] = output.counts()
        row = rows.EvaluationRow(
            **rows.settings_of(job.config, setting, case, method.sampling, len(job.prompts)),
            **rows.measured(output, baseline, method.plan.target.layers, job.config.seed),
            **_quality(job, output, baseline),
            **prediction.predict(seconds, method.plan, case.num_params, output, baseline, setting.batch_size),
            confidence=confidence.histogram(method, job.ids, output),
            identical_to_baseline=engine.compare_with_plain(
                method, job.ids, plain.get(id(case.target)), output, job.config.seed
            ),
        )
        lines.append(row.to_dict())
    favourite = job.config.compare[0][0] if job.config.compare else cases[-1].name
    priority = lambda index: (cases[index].name == favourite, cases[index].lenience is None, cases[index].gamma)
    chosen = max(range(len(cases)), key=priority)
    return lines, counts, _samples(job, setting, cases[chosen], outputs[chosen])


def _decode_all(
    job: Job, setting: Setting, cases: list[Case], methods: list[Method], folder: Path
) -> tuple[list[Output], list[PartSeconds | None]]:
    """Decodes with every case. Returns their outputs, and the seconds of their parts (None if not timed).

    Parts are timed between groups of prompts, from a quarter of them on, when the length of texts is known.
    """
    # Only plans that draft gamma tokens in every block are timed. Drafts of one shape have equal plans, timed once.
    constant = lambda case: case.gamma and not (case.section.options.threshold or case.section.options.adaptive)
    timed = [
        method.plan if job.config.measure_parts and constant(case) and case.target is job.target else None
        for case, method in zip(cases, methods, strict=True)
    ]
    by_plan = {plan: method for plan, method in zip(timed, methods, strict=True) if plan}
    outputs, meter = [Output() for _ in cases], None
    group = engine.group_size(len(job.ids), setting.batch_size)
    first = (-(-len(job.ids) // group) - 1) // 4
    shared = {"batch_size": setting.batch_size, **job.decoding}
    turns = engine.decode_in_turns(
        methods,
        job.ids,
        group=group,
        max_new_tokens=job.config.max_new_tokens,
        label=f"{setting.rule} T={setting.temperature:g} batch {setting.batch_size}",
        end_of=job.end_of,
        folder=folder,
        **shared,
    )
    for number, results in turns:
        for output, result in zip(outputs, results, strict=True):
            output.batches.append(result)
        if by_plan and number >= first:
            meter = meter or prediction.parts_meter(
                methods[0], list(by_plan.values()), job.ids, outputs[0].tokens, **shared
            )
            meter.keep_up(float(sum(output.seconds.sum() for output in outputs)))
    parts = lambda plan, output: plan and meter.parts(plan, output.blocks, outputs[0].blocks, job.config.seed)
    return outputs, list(map(parts, timed, outputs))


def _quality(job: Job, output: Output, baseline: Output) -> dict[str, dict]:
    """The task's quality metrics over all prompts, and their difference from plain decoding's, with intervals."""
    references = [prompt.reference for prompt in job.prompts]
    texts = lambda rows: list(map(job.stops.text, job.ids, rows))
    quality, plain = (tasks.quality(job.task, texts(done.tokens), references) for done in (output, baseline))
    scores = {"quality": quality.values, "quality_difference": functools.partial(quality.difference, plain)}
    intervals = lambda values: metrics.intervals(values, len(references), seed=job.config.seed)
    return {name: of() for name, of in scores.items()} | {f"{name}_ci": intervals(of) for name, of in scores.items()}


def _samples(job: Job, setting: Setting, case: Case, output: Output) -> list[dict]:
    """The first generated texts for the report's `Samples`, each token with its origin."""
    rule = tables.rule_label({"rule": case.rule, "lenience": case.lenience})
    pieces = job.target.tokenizer.pieces
    return [
        {
            "title": f"{case.name}, {rule}, temperature {setting.temperature:g}, gamma {case.gamma}",
            "prompt": prompt.text + ("\n\n" if job.config.selection.chat else ""),
            "tokens": [
                [piece, loop.ORIGINS[origin]]
                for piece, origin in zip(pieces(tokens, after=job.target.context(prompt.tokens)), origins, strict=True)
            ],
        }
        for prompt, tokens, origins, _ in zip(
            job.prompts, output.tokens, output.origins, range(job.config.samples), strict=False
        )
    ]


if __name__ == "__main__":
    cli.leave(cli.launch(run, "specjax.evaluate"))
