"""Evaluates task x drafter x rule x gamma: exactness, efficiency, quality and wall-clock time.

    python -m specjax.evaluate --config=FILE --workdir=DIR [--config.section.key=value ...]

Plain decoding (gamma = 0, the same loop) runs in the same process, interleaved with every drafter prompt by prompt, so
that a slow moment of the machine hits all alike.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from specjax.data import tasks
from specjax.decoding import batch, identity, loop
from specjax.evaluation import confidence, latency, prediction
from specjax.evaluation.cases import (
    Case,
    Job,
    Setting,
    described,
    make_cases,
    make_job,
    make_plan,
    make_settings,
    needs_costs,
)
from specjax.evaluation.throughput import Parts
from specjax.reporting import metrics, page, records, tables
from specjax.runtime import cli, process_memory, processes, stopping
from specjax.runtime import config as configs
from specjax.runtime import mesh as meshes
from specjax.runtime.timing import progress


def run(config: Any, workdir: str | Path) -> dict:
    """Runs every case of the config; writes results.json, figures and report.html; returns the results.

    Raises:
      UserError: for unknown names, settings out of range, models and prompts that do not fit.
    """
    workdir = Path(workdir)
    job = make_job(config)
    rows, counts, samples = [], {}, []
    settings = make_settings(config)
    for setting in settings:
        make_cases(job, setting)  # refuses what does not fit before the first group takes its minutes
    for setting in settings:
        if process_memory.crowded():  # with programs of settings that are done
            jax.clear_caches()
        group_rows, group_counts, group_samples = _run_group(job, setting)
        rows += group_rows
        counts.update({(setting, *case): c for case, c in group_counts.items()})
        samples += group_samples
    comparisons = metrics.comparisons(config.compare, counts, config.seed)
    results = records.write_results(
        workdir / "results.json",
        binary="evaluate",
        config=configs.to_plain(config),
        rows=rows,
        comparisons=comparisons,
        samples=samples,
    )
    if processes.first():
        print(tables.summary_table(results["rows"]))
        page.write_run(workdir, results, stages={})
    return results


def _run_group(job: Job, setting: Setting):
    """Every case of one setting, interleaved batch by batch; rows, counts by (drafter, how it ran), samples."""
    cases = make_cases(job, setting)
    plans = [make_plan(job, setting, case, job.ids) for case in cases]
    cases = [with_costs(job, setting, case, plan, job.ids) for case, plan in zip(cases, plans, strict=True)]
    outputs, parts = _decode_all(job, setting, cases, plans)
    baseline = outputs[0]
    plain = {id(case.target): output for case, output in zip(cases, outputs, strict=True) if case.gamma == 0}
    rows, counts, samples = [], {}, []
    favourite = job.config.compare[0][0] if job.config.compare else cases[-1].name
    shown = max(cases, key=lambda case: (case.name == favourite, case.lenience is None, case.gamma))
    for index, (case, plan, output) in enumerate(zip(cases, plans, outputs, strict=True)):
        joined = metrics.Counts(**batch.join_counts([result.counts(size) for size, result in output]))
        counts[case.name, case.rule, case.lenience, case.gamma] = joined
        row = _row(job, setting, case, plan, joined, output, baseline)
        row |= prediction.nothing()
        if index in parts:
            efficiency = row["block_efficiency"]
            row |= prediction.predict(parts[index], plan, efficiency, case.num_params, output, baseline)
        row["confidence"] = confidence.histogram(plan, case.target.params, case.params, job.ids, output)
        row["identical_to_baseline"] = _identical(job, case, plan, output, plain.get(id(case.target)))
        rows.append(row)
        if case is shown:
            samples = _samples(job, setting, case, output)
    return rows, counts, samples


def with_costs(job: Job, setting: Setting, case: Case, plan: loop.Plan, ids) -> Case:
    """The case, with costs of blocks measured on these prompts where it adapts its draft length to such."""
    if not needs_costs(case):
        return case
    with meshes.use(job.target.mesh):
        costs = prediction.measure_block_costs(
            plan,
            case.target.params,
            case.params,
            ids,
            sampling=case.sampling,
            max_new_tokens=job.config.max_new_tokens,
            batch_size=setting.batch_size,
            seed=job.config.seed,
            put=batch.Placer(job.target.mesh),
        )
    return dataclasses.replace(case, sampling=dataclasses.replace(case.sampling, costs=costs))


def _decode_all(job: Job, setting: Setting, cases, plans) -> tuple[list[list], dict[int, Parts]]:
    """For each case a list of (rows that count, BatchResult), one per batch of prompts; and the parts, see `_parts`.

    Parts are timed between the batches, once a quarter of these has told how long texts get: a machine that gets slower
    or faster meanwhile changes them as it changes the run.
    """
    ids, size = job.ids, setting.batch_size
    put = batch.Placer(job.target.mesh)
    starts = range(0, len(ids), size)
    quarter = (len(starts) - 1) // 4

    def decode(case, plan, first):
        return batch.decode_batch_of(
            plan,
            case.target.params,
            case.params,
            ids,
            first=first,
            batch_size=size,
            seed=job.config.seed,
            sampling=case.sampling,
            max_new_tokens=job.config.max_new_tokens,
            eos_ids=job.target.tokenizer.eos_ids,
            put=put,
        )

    label = f"{setting.rule} T={setting.temperature:g} batch {size}"
    outputs, meter = [[] for _ in cases], None
    with meshes.use(job.target.mesh):
        with progress(total=len(cases), description=f"{label}: compile", unit="case") as bar:
            for case, plan in zip(cases, plans, strict=True):
                decode(case, plan, 0)
                bar.update(1)
        with progress(total=len(starts) * len(cases), description=label, unit="run") as bar:
            for number, first in enumerate(starts):
                stopping.stop_if_asked()
                # Each batch begins with another case, so that none always follows the same neighbour.
                for turn in range(len(cases)):
                    index = (turn + number) % len(cases)
                    outputs[index].append(decode(cases[index], plans[index], first))
                    bar.update(1)
                if number == quarter:
                    meter = _parts_meter(job, setting, cases, plans, outputs[0])
                if meter is not None:
                    meter.keep_up((number - quarter + 1) / (len(starts) - quarter))
    return outputs, {} if meter is None else _parts(job, cases, plans, meter)


def _emitted(output) -> list[list[int]]:
    return [row for size, result in output for row in result.tokens[:size]]


def _row(job: Job, setting: Setting, case: Case, plan, counts, output, baseline) -> dict:
    config = job.config
    timing = metrics.Timing(
        seconds=np.asarray([result.seconds for _, result in output]),
        baseline_seconds=np.asarray([result.seconds for _, result in baseline]),
        unit_of_prompt=np.arange(len(job.prompts)) // setting.batch_size,
        baseline_emitted=np.asarray([len(row) for row in _emitted(baseline)]),
        prefill_seconds=sum(result.prefill_seconds for _, result in output),
    )
    settings = described(config, setting, case, len(job.prompts))
    measured = metrics.evaluate_row(counts, timing, seed=config.seed)
    iterations = sum(result.iterations for _, result in output)
    expected = prediction.expected_iterations(counts, setting.batch_size)
    measured |= {"iterations": iterations, "expected_iterations": expected}
    measured |= batch.layers_per_token(output, plan.target.layers)
    return settings | measured | _quality(job, output, baseline)


def _quality(job: Job, output, baseline) -> dict[str, dict]:
    """The task's metrics over all prompts, and less those of the baseline on the same prompts; with intervals."""
    written = [[job.target.tokenizer.decode(row) for row in _emitted(texts)] for texts in (output, baseline)]
    references = [prompt.reference for prompt in job.prompts]
    found, plain = (tasks.quality(job.task, predictions, references) for predictions in written)
    scored = {"quality": found.values, "quality_difference": functools.partial(found.difference, plain)}
    intervals = lambda values: metrics.intervals(values, len(references), seed=job.config.seed)
    return {name: of() for name, of in scored.items()} | {f"{name}_ci": intervals(of) for name, of in scored.items()}


def _steady(job: Job, cases) -> list[int]:
    """Which cases have parts: the speculative ones on the job's target whose blocks have one length."""
    stops = lambda case: case.options.threshold or case.options.adaptive
    return [i for i, case in enumerate(cases) if case.gamma and case.target is job.target and not stops(case)]


def _parts_meter(job: Job, setting: Setting, cases, plans, baseline) -> latency.PartsMeter | None:
    """What times the parts of `_steady` cases; None where there are none, or parts are not to be measured."""
    # Drafts of one shape share a plan: one of them is timed for all.
    timed = {
        plans[index]: prediction.Timed(plans[index], cases[index].params, cases[index].sampling)
        for index in _steady(job, cases)
    }
    if not job.config.measure_parts or not timed:
        return None
    return prediction.parts_meter(
        prediction.Timed(plans[0], cases[0].params, cases[0].sampling),
        list(timed.values()),
        job.target.params,
        job.ids,
        _emitted(baseline),
        batch_size=setting.batch_size,
        seed=job.config.seed,
        put=batch.Placer(job.target.mesh),
    )


def _parts(job: Job, cases, plans, meter: latency.PartsMeter) -> dict[int, Parts]:
    """Measured parts by the case's index."""
    steady = _steady(job, cases)
    of_plan = dict(zip(dict.fromkeys(plans[index] for index in steady), meter.parts(), strict=True))
    return {index: of_plan[plans[index]] for index in steady}


def _identical(job: Job, case: Case, plan, output, baseline) -> dict | None:
    """Equality with the target's plain decoding where it is claimed: of exact rules, greedy or `coupled`."""
    if case.gamma == 0 or baseline is None or plan.rule.lossy or not (plan.greedy or case.rule == "coupled"):
        return None
    return identity.compare(
        plan,
        case.target.params,
        job.ids,
        _emitted(baseline),
        _emitted(output),
        slots=plan.capacity,
        seed=job.config.seed,
        sampling=case.sampling,
    )


def _samples(job: Job, setting: Setting, case: Case, output) -> list[dict]:
    """The first texts, token by token with origins, for the report."""
    tokens = _emitted(output)
    origins = [row for size, result in output for row in result.origins[:size]]
    pieces = job.target.tokenizer.pieces
    shown = range(min(job.config.samples, len(tokens)))
    rule = tables.rule_label({"rule": case.rule, "lenience": case.lenience})
    return [
        {
            "title": f"{case.name}, {rule}, temperature {setting.temperature:g}, gamma {case.gamma}",
            "prompt": job.prompts[i].text,
            "tokens": [
                [piece, loop.ORIGINS[origin]] for piece, origin in zip(pieces(tokens[i]), origins[i], strict=True)
            ],
        }
        for i in shown
    ]


if __name__ == "__main__":
    raise SystemExit(cli.launch(run, "specjax.evaluate"))
