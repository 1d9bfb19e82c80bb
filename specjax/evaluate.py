"""Evaluates task x drafter x rule x gamma: exactness, efficiency, quality and wall-clock time.

    python -m specjax.evaluate --config=FILE --workdir=DIR [--config.section.key=value ...]

Plain decoding (gamma = 0, the same loop) runs in the same process, interleaved with every drafter prompt by prompt, so
that a slow moment of the machine hits all alike.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np

from specjax.data import batches, tasks
from specjax.decoding import batch, identity, loop, rules
from specjax.decoding.drafters.table import make_drafter
from specjax.decoding.sampling import Sampling
from specjax.draft_design import prediction
from specjax.hub import model as hub_model
from specjax.hub.adapter import LoadedAdapter
from specjax.reporting import metrics, page, records, tables
from specjax.runtime import cli
from specjax.runtime import config as configs
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError, nearest
from specjax.runtime.timing import progress

BASELINE = "none"


@dataclasses.dataclass(frozen=True)
class Case:
    """One drafter under one rule at one gamma; `BASELINE` at gamma 0 is plain decoding.

    Attributes:
      target: whose text it is: the job's, or the drafter's own, whose plain decoding is its gamma 0.
      lenience: None under an exact rule.
      num_params: of a draft model; 0 where there is no ratio of parameters to speak of.
      sampling: the setting's, with the rule's lenience and the drafter's threshold.
    """

    name: str
    target: hub_model.Model
    kind: str
    rule: str
    lenience: float | None
    gamma: int
    sampling: Sampling
    options: dict[str, Any]
    params: Any
    num_params: int


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all cases of a group share; `rule` is the exact one, under which its plain decoding runs."""

    rule: str
    temperature: float
    batch_size: int


@dataclasses.dataclass(frozen=True)
class Job:
    """What all groups share."""

    config: Any
    targets: dict[str, hub_model.Model]
    task: tasks.Task
    prompts: list[batches.Prompt]
    drafters: dict[str, hub_model.Model | LoadedAdapter]

    @property
    def target(self) -> hub_model.Model:
        """The one whose plain decoding is the baseline of all."""
        return self.targets[self.config.target]

    @property
    def ids(self) -> list[tuple[int, ...]]:
        return [prompt.tokens for prompt in self.prompts]


def run(config: Any, workdir: str | Path) -> dict:
    """Runs every case of the config; writes results.json, figures and report.html; returns the results.

    Raises:
      UserError: for unknown names, settings out of range, models and prompts that do not fit.
    """
    workdir = Path(workdir)
    job = _job(config)
    rows, counts, samples = [], {}, []
    settings = _settings(config)
    for setting in settings:
        _cases(job, setting)  # refuses what does not fit before the first group takes its minutes
    for setting in settings:
        group_rows, group_counts, group_samples = _run_group(job, setting)
        rows += group_rows
        counts.update({(setting, *case): c for case, c in group_counts.items()})
        samples += group_samples
    comparisons = metrics.comparisons(config.compare, counts, config.seed)
    path = workdir / "results.json"
    records.write_results(
        path,
        binary="evaluate",
        config=configs.to_plain(config),
        rows=rows,
        comparisons=comparisons,
        samples=samples,
    )
    results = records.read_results(path)
    print(tables.summary_table(results["rows"]))
    page.write_run(workdir, results, stages={})
    return results


def _job(config: Any) -> Job:
    mesh = meshes.make_mesh(config.mesh)
    load = lambda path: hub_model.load(
        path, param_dtype=config.param_dtype, compute_dtype=config.compute_dtype, mesh=mesh
    )
    target = load(config.target)
    _check_rules(config)
    targets, drafters = {config.target: target}, {}
    for name, section in config.drafters.items():
        own = section.get("target", config.target)
        if own not in targets:
            targets[own] = load(own)
            hub_model.check_pair(target, targets[own])
        if section.kind == "model":
            drafters[name] = load(section.path)
            hub_model.check_pair(target, drafters[name])
        elif section.kind == "kangaroo":
            drafters[name] = hub_model.load_adapter(section.path, targets[own])
    task = tasks.load_task(config.task)
    prompts = batches.evaluation_prompts(
        task,
        target.tokenizer,
        count=config.selection.count,
        prompt_length=(config.selection.length_min, config.selection.length_max),
        chat=config.selection.chat,
        seed=config.seed,
    )
    batch.check_prompts(
        [prompt.tokens for prompt in prompts],
        vocab_size=min(model.decoder.vocab_size for model in targets.values()),
        max_new_tokens=config.max_new_tokens,
        max_positions=min(model.decoder.config.max_positions for model in targets.values()),
    )
    for name in (name for pair in config.compare for name in pair):
        if name not in config.drafters:
            raise UserError(f"compare names no drafter of this config: {name!r}{nearest(name, config.drafters)}.")
    for size in config.batch_sizes:
        if not 1 <= size <= len(prompts):
            raise UserError(f"A batch size must lie in 1 .. {len(prompts)}, the number of prompts, not {size}.")
    return Job(config, targets, task, prompts, drafters)


def _check_rules(config: Any) -> None:
    """In a drafter's section lists are gammas: refuses those of no rule, and of a lossy one without leniences."""
    for name, section in config.drafters.items():
        for key, gammas in section.items():
            of_rule = isinstance(gammas, (tuple, list))
            if of_rule and rules.rule_named(key).lossy and gammas and not config.leniences:
                raise UserError(f"drafters.{name}.{key} needs leniences, and config.leniences is empty; name some.")


def _settings(config: Any) -> list[Setting]:
    """Groups in order: every batch size and temperature under `lossless`, then under `coupled` where sampled."""
    settings = []
    for size in config.batch_sizes:
        for temperature in config.temperatures:
            settings.append(Setting("lossless", temperature, size))
            if temperature > 0 and any(section.coupled for section in config.drafters.values()):
                settings.append(Setting("coupled", temperature, size))
    return settings


def _rules(config: Any, setting: Setting) -> list[tuple[str, float | None]]:
    """The group's exact rule; beside `lossless`, whose baseline they share, every lossy one at every lenience."""
    lossy = [name for name, rule in rules.RULES.items() if rule.lossy] if setting.rule == "lossless" else []
    return [(setting.rule, None), *((name, lenience) for name in lossy for lenience in config.leniences)]


def _sampling(job: Job, setting: Setting, lenience: float | None, threshold: float) -> Sampling:
    lenience = 1.0 if lenience is None else lenience
    return Sampling.of(setting.temperature, job.config.top_k, job.config.top_p, lenience=lenience, threshold=threshold)


def _cases(job: Job, setting: Setting) -> list[Case]:
    plain = (setting.rule, None, 0, _sampling(job, setting, None, 0.0))
    cases = [Case(BASELINE, job.target, "model", *plain, {}, None, 0)]
    for name, section in job.config.drafters.items():
        options, drafter = section.to_dict(), job.drafters.get(name)
        params, size = (None, 0) if drafter is None else (drafter.params, 0)
        if isinstance(drafter, LoadedAdapter):
            options["adapter"] = drafter.adapter
        elif drafter is not None:
            options["model"], size = drafter.decoder, drafter.decoder.num_params
        threshold = options.setdefault("threshold", 0.0)
        target = job.targets[options.setdefault("target", job.config.target)]
        for rule, lenience in _rules(job.config, setting):
            for gamma in section.get(rule, ()):
                make_drafter(section.kind, target.decoder, gamma, options)  # refuses what does not fit
                how = (rule, lenience, gamma, _sampling(job, setting, lenience, threshold))
                cases.append(Case(name, target, section.kind, *how, options, params, size))
    return cases


def _plan(job: Job, setting: Setting, case: Case, slots: int) -> loop.Plan:
    decoder = case.target.decoder
    return loop.Plan(
        target=decoder,
        drafter=make_drafter(case.kind, decoder, case.gamma, case.options),
        rule=rules.rule_named(case.rule),
        gamma=case.gamma,
        capacity=batch.capacity_bucket(decoder.text_slots(slots), job.config.max_new_tokens, case.gamma),
        greedy=setting.temperature == 0,
    )


def _run_group(job: Job, setting: Setting):
    """Every case of one setting, interleaved batch by batch; rows, counts by (drafter, how it ran), samples."""
    cases = _cases(job, setting)
    slots = batch.prompt_slots(job.ids)
    plans = [_plan(job, setting, case, slots) for case in cases]
    outputs = _decode_all(job, setting, cases, plans, slots)
    baseline = outputs[0]
    plain = {id(case.target): output for case, output in zip(cases, outputs, strict=True) if case.gamma == 0}
    rows, counts, samples = [], {}, []
    favourite = job.config.compare[0][0] if job.config.compare else cases[-1].name
    shown = max(cases, key=lambda case: (case.name == favourite, case.lenience is None, case.gamma))
    for case, plan, output in zip(cases, plans, outputs, strict=True):
        joined = metrics.Counts(**batch.join_counts([result.counts(size) for size, result in output]))
        counts[case.name, case.rule, case.lenience, case.gamma] = joined
        row = _row(job, setting, case, plan, joined, output, baseline)
        row |= _prediction(job, setting, case, plan, row, output, baseline, plans[0])
        row["identical_to_baseline"] = _identical(job, case, plan, output, plain.get(id(case.target)))
        rows.append(row)
        if case is shown:
            samples = _samples(job, setting, case, output)
    return rows, counts, samples


def _decode_all(job: Job, setting: Setting, cases, plans, slots) -> list[list]:
    """For each case a list of (rows that count, BatchResult), one per batch of prompts."""
    ids, size = job.ids, setting.batch_size
    put = batch.placer(job.target.mesh)
    starts = range(0, len(ids), size)

    def decode(case, plan, first):
        return batch.decode_batch_of(
            plan,
            case.target.params,
            case.params,
            ids,
            first=first,
            batch_size=size,
            slots=slots,
            seed=job.config.seed,
            sampling=case.sampling,
            max_new_tokens=job.config.max_new_tokens,
            eos_ids=job.target.tokenizer.eos_ids,
            put=put,
        )

    label = f"{setting.rule} T={setting.temperature:g} batch {size}"
    outputs = [[] for _ in cases]
    with meshes.use(job.target.mesh):
        with progress(total=len(cases), description=f"{label}: compile", unit="case") as bar:
            for case, plan in zip(cases, plans, strict=True):
                decode(case, plan, 0)
                bar.update(1)
        with progress(total=len(starts) * len(cases), description=label, unit="run") as bar:
            for number, first in enumerate(starts):
                # Each batch begins with another case, so that none always follows the same neighbour.
                for turn in range(len(cases)):
                    index = (turn + number) % len(cases)
                    outputs[index].append(decode(cases[index], plans[index], first))
                    bar.update(1)
    return outputs


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
    settings = {
        "task": config.task.name,
        "prompts": len(job.prompts),
        "target": case.options.get("target", config.target),
        "drafter": case.name,
        "rule": case.rule,
        "lenience": case.lenience,
        "gamma": case.gamma,
        "threshold": case.options.get("threshold", 0.0),
        "temperature": setting.temperature,
        "top_k": config.top_k,
        "top_p": config.top_p,
        "batch_size": setting.batch_size,
        "max_new_tokens": config.max_new_tokens,
        "seed": config.seed,
    }
    measured = metrics.evaluate_row(counts, timing, seed=config.seed)
    iterations = sum(result.iterations for _, result in output)
    return settings | measured | {"iterations": iterations} | _quality(job, output, baseline)


def _quality(job: Job, output, baseline) -> dict[str, dict]:
    """The task's metrics over all prompts, and less those of the baseline on the same prompts; with intervals."""
    written = [[job.target.tokenizer.decode(row) for row in _emitted(texts)] for texts in (output, baseline)]
    references = [prompt.reference for prompt in job.prompts]
    found, plain = (tasks.quality(job.task, predictions, references) for predictions in written)
    scored = {"quality": found.values, "quality_difference": functools.partial(found.difference, plain)}
    intervals = lambda values: metrics.intervals(values, len(references), seed=job.config.seed)
    return {name: of() for name, of in scored.items()} | {f"{name}_ci": intervals(of) for name, of in scored.items()}


def _prediction(job: Job, setting: Setting, case: Case, plan, row: dict, output, baseline, plain_plan) -> dict:
    """Measured parts and the speed-up they predict; None at gamma 0 or where parts are not measured."""
    stops = case.gamma and case.options["threshold"] > 0  # then blocks differ in length, and one measured tells little
    if case.gamma == 0 or stops or case.target is not job.target or not job.config.measure_parts:
        return prediction.nothing()
    with meshes.use(job.target.mesh):
        parts = prediction.measure_parts(
            plan,
            plain_plan,
            job.target.params,
            case.params,
            job.ids,
            _emitted(baseline),
            batch_size=setting.batch_size,
            sampling=case.sampling,
            seed=job.config.seed,
            put=batch.placer(job.target.mesh),
        )
    return prediction.predict(parts, plan, row["block_efficiency"], case.num_params, output, baseline)


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
