"""What an evaluation runs: targets, drafters and prompts, settings, and the cases of each setting."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from specjax.data import batches, tasks
from specjax.decoding import batch, loop, rules
from specjax.decoding.drafters.adaptive import block_costs
from specjax.decoding.drafters.table import ATTACHED, LISTS, make_drafter
from specjax.decoding.sampling import Sampling
from specjax.hub import model as hub_model
from specjax.hub.adapter import LoadedAdapter
from specjax.reporting import records
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError, nearest

BASELINE = "none"


@dataclasses.dataclass(frozen=True)
class Case:
    """One drafter under one rule at one gamma; `BASELINE` at gamma 0 is plain decoding.

    Attributes:
      target: whose text it is: the job's, or the drafter's own, whose plain decoding is its gamma 0.
      lenience: None under an exact rule.
      num_params: of a draft model; 0 where there is no ratio of parameters to speak of.
      sampling: the setting's, with the rule's lenience, the drafter's threshold, and the costs of its blocks.
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
    task: tasks.Task | None
    prompts: list[batches.Prompt]
    drafters: dict[str, hub_model.Model | LoadedAdapter]

    @property
    def target(self) -> hub_model.Model:
        """The one whose plain decoding is the baseline of all."""
        return self.targets[self.config.target]

    @property
    def ids(self) -> list[tuple[int, ...]]:
        return [prompt.tokens for prompt in self.prompts]


def load_job(config: Any) -> Job:
    """Targets, drafters and task of a config, without prompts yet.

    Raises:
      UserError: for directories that do not hold what they should, models that do not fit, rules without leniences.
    """
    mesh = meshes.make_mesh(config.mesh)
    load = lambda path, **how: hub_model.load(
        path, param_dtype=config.param_dtype, compute_dtype=config.compute_dtype, mesh=mesh, **how
    )
    targets, drafters = load_models(config, load, hub_model.load_adapter)
    return Job(config, targets, tasks.load_task(config.task), [], drafters)


def load_models(config: Any, load: Callable, load_adapter: Callable) -> tuple[dict, dict]:
    """Targets by their paths and drafters by their names.

    Args:
      load: (path) -> Model.
      load_adapter: (path, target) -> LoadedAdapter.

    Raises:
      UserError: for models that do not fit each other, and rules without leniences.
    """
    target = load(config.target)
    _check_rules(config)
    targets, drafters = {config.target: target}, {}
    for name, section in config.drafters.items():
        own = _options(config, section)["target"]
        if own not in targets:
            targets[own] = load(own)
            hub_model.check_pair(target, targets[own])
        if section.kind == "model":
            drafters[name] = load(section.path, replicate=_options(config, section)["replicate"])
            hub_model.check_pair(target, drafters[name])
        elif section.kind in ATTACHED:
            drafters[name] = load_adapter(section.path, targets[own])
    return targets, drafters


def make_job(config: Any) -> Job:
    """`load_job` with the prompts of the config's selection; refuses those that do not fit (UserError)."""
    job = load_job(config)
    prompts = batches.evaluation_prompts(
        job.task,
        job.target.tokenizer,
        count=config.selection.count,
        prompt_length=(config.selection.length_min, config.selection.length_max),
        chat=config.selection.chat,
        seed=config.seed,
    )
    batch.check_prompts(
        [prompt.tokens for prompt in prompts],
        vocab_size=min(model.decoder.vocab_size for model in job.targets.values()),
        max_new_tokens=config.max_new_tokens,
        max_positions=min(model.decoder.config.max_positions for model in job.targets.values()),
    )
    for name in (name for pair in config.compare for name in pair):
        if name not in config.drafters:
            raise UserError(f"compare names no drafter of this config: {name!r}{nearest(name, config.drafters)}.")
    for size in config.batch_sizes:
        if not 1 <= size <= len(prompts):
            raise UserError(f"A batch size must lie in 1 .. {len(prompts)}, the number of prompts, not {size}.")
    return dataclasses.replace(job, prompts=prompts)


def _check_rules(config: Any) -> None:
    """In a drafter's section lists are gammas: refuses those of no rule, and of a lossy one without leniences."""
    for name, section in config.drafters.items():
        for key, gammas in section.items():
            of_rule = isinstance(gammas, (tuple, list)) and key not in LISTS
            if of_rule and rules.rule_named(key).lossy and gammas and not config.leniences:
                raise UserError(f"drafters.{name}.{key} needs leniences, and config.leniences is empty; name some.")


def make_settings(config: Any) -> list[Setting]:
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


def _sampling(job: Job, setting: Setting, lenience: float | None, options: dict[str, Any], gamma: int) -> Sampling:
    return Sampling.of(
        setting.temperature,
        job.config.top_k,
        job.config.top_p,
        lenience=1.0 if lenience is None else lenience,
        threshold=options["threshold"],
        costs=block_costs(*options["costs"], gamma) if options["adaptive"] and options["costs"] else None,
    )


def _options(config: Any, section: ConfigDict) -> dict[str, Any]:
    """A drafter's section, with what it leaves out: the target of all, a draft length that is fixed and never stops."""
    return {
        "target": config.target,
        "threshold": 0.0,
        "adaptive": False,
        "costs": (),
        "replicate": False,
        **section.to_dict(),
    }


def make_cases(job: Job, setting: Setting) -> list[Case]:
    """Plain decoding, then every drafter at its gammas; refuses what does not fit (UserError)."""
    options = _options(job.config, ConfigDict())
    plain = (setting.rule, None, 0, _sampling(job, setting, None, options, 0))
    cases = [Case(BASELINE, job.target, "model", *plain, options, None, 0)]
    for name, section in job.config.drafters.items():
        options, drafter = _options(job.config, section), job.drafters.get(name)
        params, size = (None, 0) if drafter is None else (drafter.params, 0)
        if isinstance(drafter, LoadedAdapter):
            options["adapter"] = drafter.adapter
        elif drafter is not None:
            options["model"], size = drafter.decoder, drafter.decoder.num_params
        if isinstance(options.get("skipped"), str):
            options["skipped"] = records.chosen(options["skipped"])["skipped"]
        if len(options["costs"]) not in (0, 2):
            raise UserError(
                f"drafters.{name}.costs has {len(options['costs'])} numbers; give the costs of a drafted token and of "
                "verifying it, relative to a plain step, or none to have them measured"
            )
        target = job.targets[options["target"]]
        for rule, lenience in _rules(job.config, setting):
            for gamma in section.get(rule, ()):
                make_drafter(section.kind, target.decoder, gamma, options)  # refuses what does not fit
                how = (rule, lenience, gamma, _sampling(job, setting, lenience, options, gamma))
                cases.append(Case(name, target, section.kind, *how, options, params, size))
    return cases


def needs_costs(case: Case) -> bool:
    """Whether its draft length adapts to costs of blocks that have to be measured first."""
    return case.gamma > 0 and case.options["adaptive"] and case.sampling.costs is None


def make_plan(job: Job, setting: Setting, case: Case, slots: int) -> loop.Plan:
    """How a case decodes prompts that are padded to `slots`."""
    decoder = case.target.decoder
    return loop.Plan(
        target=decoder,
        drafter=make_drafter(case.kind, decoder, case.gamma, case.options),
        rule=rules.rule_named(case.rule),
        gamma=case.gamma,
        capacity=batch.capacity_bucket(decoder.text_slots(slots), job.config.max_new_tokens, case.gamma),
        greedy=setting.temperature == 0,
        replicate_draft=case.options["replicate"],
    )


def described(config: Any, setting: Setting, case: Case, prompts: int) -> dict:
    """What was run: the first keys of a row."""
    return {
        "task": config.task.name,
        "prompts": prompts,
        "target": case.options["target"],
        "drafter": case.name,
        "rule": case.rule,
        "lenience": case.lenience,
        "gamma": case.gamma,
        "threshold": case.options["threshold"],
        "block_costs": None if case.sampling.costs is None else np.asarray(case.sampling.costs).tolist(),
        "temperature": setting.temperature,
        "top_k": config.top_k,
        "top_p": config.top_p,
        "batch_size": setting.batch_size,
        "max_new_tokens": config.max_new_tokens,
        "seed": config.seed,
    }
