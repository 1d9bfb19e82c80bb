"""Reads an evaluation's config and loads its models: prompts, settings, and the cases to decode in each setting."""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from specjax.data import batches, tasks
from specjax.decoding import batch
from specjax.decoding.drafters.adaptive import block_costs
from specjax.decoding.drafters.base import Drafter, DrafterOptions, HeadOptions
from specjax.decoding.drafters.model import ModelDraft
from specjax.decoding.drafters.table import build_drafter, make_options, options_class
from specjax.decoding.rules import RULES, Rule, rule_named
from specjax.decoding.sampling import Sampling
from specjax.evaluation import prediction
from specjax.evaluation.continuations import Stops, note_positions
from specjax.evaluation.engine import Method
from specjax.hub import model as hub_model
from specjax.hub.adapter import LoadedAttachment
from specjax.hub.location import locate
from specjax.reporting import records
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError, nearest, prefixed

BASELINE = "none"

# Keys of a drafter's section that are not fields of its options class.
_SECTION_KEYS = ("kind", "path", "target", "replicate", "param_dtype", "rules")


@dataclasses.dataclass(frozen=True)
class DrafterSection:
    """A drafter's section of a config, parsed and checked.

    Attributes:
      options: the options of the drafter.
      path: directory of its draft model or attachment; "" if it has none.
      target: directory of the target that it drafts for.
      replicate: whether every device of the tensor axis holds all of the draft model.
      param_dtype: dtype of the draft model's parameters; "" is the config's.
      rules: (name in the results, rule, gammas) of each rule to evaluate.
    """

    options: DrafterOptions
    path: str
    target: str
    replicate: bool
    param_dtype: str
    rules: tuple[tuple[str, Rule, tuple[int, ...]], ...]


def read_drafters(config: Any) -> dict[str, DrafterSection]:
    """The config's drafters by name.

    Raises:
      UserError: for an unknown kind, rule or key, a value that is missing, and a lossy rule without leniences.
    """
    return {name: _read_section(config, f"drafters.{name}.", section) for name, section in config.drafters.items()}


def _read_section(config: Any, where: str, section: Any) -> DrafterSection:
    values = section.to_dict()
    for rule in RULES:
        if rule in values:  # the layout of earlier versions
            raise UserError(f"{where}{rule} is now {where}rules.{rule}; move the gammas of every rule there")
    for key in ("kind", "rules"):
        if key not in values:
            raise UserError(f"{where}{key} is missing; give it a value")
    loads = options_class(values["kind"]).loads
    options = {key: value for key, value in values.items() if key not in _SECTION_KEYS}
    # A config may give every option of drafts with a head, so that each can be set on the command line. A drafter that
    # lacks one is not refused for its default.
    known = {field.name for field in dataclasses.fields(options_class(values["kind"]))}
    usual = {field.name: field.default for field in dataclasses.fields(HeadOptions) if field.name not in known}
    options = {key: value for key, value in options.items() if key not in usual or value != usual[key]}
    if isinstance(options.get("skipped"), str):
        options["skipped"] = records.chosen(options["skipped"])["skipped"]
    path, replicate, dtype = values.get("path", ""), values.get("replicate", False), values.get("param_dtype", "")
    if bool(path) != bool(loads):
        raise UserError(
            f"{where}path is empty; name the directory of the {loads}"
            if loads
            else f'{where}path is "{path}", and drafter "{values["kind"]}" loads nothing; leave path out'
        )
    for key, value in (("replicate", replicate), ("param_dtype", dtype)):
        if value and loads != "model":
            raise UserError(f'{where}{key} is for draft models, not for drafter "{values["kind"]}"; leave it out')
    return DrafterSection(
        make_options(values["kind"], options, where),
        path,
        values.get("target", config.target),
        replicate,
        dtype,
        _read_rules(config, f"{where}rules", values["rules"]),
    )


def _read_rules(config: Any, where: str, section: Any) -> tuple[tuple[str, Rule, tuple[int, ...]], ...]:
    """Parses a `rules` section: those of `RULES` first, then a user's own, {NAME: {"rule": PLACE, "gammas": (2,)}}."""
    if not isinstance(section, Mapping):
        raise UserError(f'{where} must hold gammas by rule, such as {{"lossless": (2, 4)}}, not {section!r}')
    rules = []
    for name in sorted(section, key=lambda name: [*RULES, *section].index(name)):
        entry = section[name]
        place, gammas = (entry.get("rule"), entry.get("gammas")) if isinstance(entry, Mapping) else (name, entry)
        gammas = (gammas,) if isinstance(gammas, int) else gammas
        if not isinstance(gammas, tuple | list) or not isinstance(place, str):
            raise UserError(
                f'{where}.{name} must be gammas, such as (2, 4), or {{"rule": "file.py:Name", "gammas": (2, 4)}}, '
                f"not {entry!r}"
            )
        with prefixed(f"{where}.{name}: "):
            rule = rule_named(place)
        if rule.lossy and gammas and not config.leniences:
            raise UserError(f"{where}.{name} needs leniences, and config.leniences is empty; name some")
        rules.append((name, rule, tuple(gammas)))
    return tuple(rules)


@dataclasses.dataclass(frozen=True)
class Case:
    """One drafter with one rule at one gamma; plain decoding has the name `BASELINE` and gamma 0.

    Attributes:
      target: the target that verifies: the job's, or another one that the drafter's section names.
      section: the drafter's section of the config.
      loaded: the draft model or attachment; None if there is none.
      rule: name of the rule in the results.
      lenience: epsilon of a lossy rule; None for an exact rule.
      plan_rule: the rule itself.
      drafter: the drafter at this gamma; None for plain decoding.
      sampling: the setting's sampling with the case's lenience, threshold and block costs.
    """

    name: str
    target: hub_model.Model
    section: DrafterSection
    loaded: hub_model.Model | LoadedAttachment | None
    rule: str
    lenience: float | None
    plan_rule: Rule
    gamma: int
    drafter: Drafter | None
    sampling: Sampling

    @property
    def num_params(self) -> int:
        """Number of parameters of a separate draft model; 0 for every other drafter."""
        return self.loaded.decoder.num_params if isinstance(self.loaded, hub_model.Model) else 0


@dataclasses.dataclass(frozen=True)
class Setting:
    """Settings that a group of cases shares; `rule` is the exact rule whose random numbers plain decoding uses."""

    rule: str
    temperature: float
    batch_size: int


@dataclasses.dataclass(frozen=True)
class Job:
    """The config, models, task and prompts of an evaluation, shared by all settings."""

    config: Any
    targets: dict[str, hub_model.Model]
    task: tasks.Task | None
    prompts: list[batches.Prompt]
    drafters: dict[str, hub_model.Model | LoadedAttachment]

    @property
    def target(self) -> hub_model.Model:
        """The config's target, whose plain decoding is the baseline of all cases."""
        return self.targets[self.config.target]

    @property
    def ids(self) -> list[tuple[int, ...]]:
        return [prompt.tokens for prompt in self.prompts]

    @property
    def decoding(self) -> dict[str, Any]:
        """Arguments of `scheduler.decode` that all cases and groups of prompts share."""
        target = self.target
        return {"eos_ids": target.tokenizer.stop_ids, "seed": self.config.seed, "put": batch.Placer(target.mesh)}

    @property
    def stops(self) -> Stops:
        """The config's stop strings."""
        return Stops.of(self.target, self.config.stop)

    @property
    def end_of(self) -> Callable[[Sequence[int], Sequence[int]], int | None] | None:
        """The argument of `scheduler.decode` that ends texts at stop strings; None without any."""
        return self.stops.end if self.config.stop else None

    def batches_folder(self, workdir: Path) -> Path:
        """The folder for finished batches of a run, which differs for other weights in the models' directories."""
        places = [*self.targets, *(section.path for section in read_drafters(self.config).values() if section.path)]
        paths = [Path(locate(place)) for place in places]
        files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.glob("*.safetensors")))]
        state = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return workdir / "batches" / hashlib.sha256(str(state).encode()).hexdigest()[:16]

    def check(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raises UserError for prompts that a target cannot continue, see `batch.check_prompts`."""
        for model in self.targets.values():
            batch.check_prompts(prompts, model.decoder, self.config.max_new_tokens)
        for name, loaded in self.drafters.items():
            note_positions(f"drafters.{name}", loaded.network, prompts, self.config.max_new_tokens)


def load_job(config: Any) -> Job:
    """Loads the targets, drafters and task of a config, without prompts.

    Raises:
      UserError: for missing or damaged models, incompatible models, and lossy rules without leniences.
    """
    load = hub_model.loader(config, meshes.make_mesh(config.mesh))
    targets, drafters = load_models(config, load, hub_model.load_adapter)
    return Job(config, targets, tasks.load_task(config.task), [], drafters)


def load_models(config: Any, load: Callable, load_adapter: Callable) -> tuple[dict, dict]:
    """Loads the targets, by path, and what the drafters load, by drafter name.

    Args:
      load: (path) -> Model; for a draft model also takes `replicate`, and `param_dtype` if it has its own.
      load_adapter: (path, target, states_after=...) -> LoadedAttachment.

    Raises:
      UserError: for incompatible models, and lossy rules without leniences.
    """
    sections, target = read_drafters(config), load(config.target)
    targets, drafters = {config.target: target}, {}
    for name, section in sections.items():
        if section.target not in targets:
            targets[section.target] = load(section.target)
            hub_model.check_pair(target, targets[section.target])
        if section.options.loads == "model":
            own_dtype = {"param_dtype": section.param_dtype} if section.param_dtype else {}
            drafters[name] = load(section.path, replicate=section.replicate, **own_dtype)
            hub_model.check_pair(target, drafters[name])
        elif section.options.loads:
            how = {"states_after": section.options.states_after}
            with prefixed(f"drafters.{name}: "):
                drafters[name] = load_adapter(section.path, targets[section.target], **how)
        if name in drafters:
            options = hub_model.with_end_ids(section.options, targets[section.target])
            drafters[name] = hub_model.reduced(drafters[name], options.vocabulary)
    return targets, drafters


def make_job(config: Any) -> Job:
    """`load_job` with the prompts that the config selects. Raises UserError for invalid prompts or batch sizes."""
    job = load_job(config)
    prompts = batches.evaluation_prompts(
        job.task,
        job.target.tokenizer,
        count=config.selection.count,
        prompt_length=(config.selection.length_min, config.selection.length_max),
        chat=config.selection.chat,
        seed=config.seed,
    )
    job = dataclasses.replace(job, prompts=prompts)
    job.check(job.ids)
    for pair in config.compare:
        if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(name, str) for name in pair):
            raise UserError(f"compare has {pair!r}; give pairs of drafters, as in (('draft', 'ngram'),)")
    for name in (name for pair in config.compare for name in pair):
        if name not in config.drafters:
            raise UserError(f"compare names no drafter of this config: {name!r}{nearest(name, config.drafters)}.")
    for key in ("batch_sizes", "temperatures"):
        if not config[key]:
            raise UserError(f"config.{key} is empty; give one or more")
    for size in config.batch_sizes:
        if not 1 <= size <= len(prompts):
            raise UserError(f"A batch size must lie in 1 .. {len(prompts)}, the number of prompts, not {size}.")
    return job


def make_settings(config: Any) -> list[Setting]:
    """Every batch size and temperature with `lossless`; above temperature 0 also with `coupled` if a rule needs it."""
    shared = any(
        rule.shared_noise and gammas for section in read_drafters(config).values() for _, rule, gammas in section.rules
    )
    settings = []
    for size in config.batch_sizes:
        for temperature in config.temperatures:
            settings.append(Setting("lossless", temperature, size))
            if temperature > 0 and shared:
                settings.append(Setting("coupled", temperature, size))
    return settings


def make_cases(job: Job, setting: Setting) -> list[Case]:
    """Plain decoding, then every drafter with the rules that use the setting's random numbers, at each gamma.

    Raises:
      UserError: for options that are invalid for a target or gamma.
    """
    plain = DrafterSection(ModelDraft(), "", job.config.target, False, "", ())
    exact = RULES[setting.rule]
    cuts = {name: job.config[name] for name in ("top_k", "top_p", "min_p")}
    sampling = functools.partial(Sampling.of, setting.temperature, **cuts)
    cases = [Case(BASELINE, job.target, plain, None, setting.rule, None, exact, 0, None, sampling())]
    for name, section in read_drafters(job.config).items():
        target, loaded = job.targets[section.target], job.drafters.get(name)
        options = hub_model.with_end_ids(section.options, target)
        chosen = [(key, rule, gammas) for key, rule, gammas in section.rules if rule.shared_noise == exact.shared_noise]
        for key, rule, gammas in chosen:
            for lenience, gamma in itertools.product(job.config.leniences if rule.lossy else (None,), gammas):
                with prefixed(f"drafters.{name}: "):
                    costs = block_costs(*options.costs, gamma) if options.adaptive and options.costs else None
                    how = sampling(
                        lenience=1.0 if lenience is None else lenience, threshold=options.threshold, block_costs=costs
                    )
                    drafter = build_drafter(options, target.decoder, gamma, loaded and loaded.network)
                cases.append(Case(name, target, section, loaded, key, lenience, rule, gamma, drafter, how))
    return cases


def needs_costs(case: Case) -> bool:
    """Whether the case has an adaptive draft length and its block costs must be measured first."""
    return case.gamma > 0 and case.section.options.adaptive and case.sampling.block_costs is None


def make_method(case: Case, prompts: Sequence[Sequence[int]] | int, max_new_tokens: int) -> Method:
    """The method of a case for these prompts, or for prompts of at most this many tokens."""
    how = {"drafter": case.drafter, "gamma": case.gamma, "rule": case.plan_rule}
    how |= {"max_new_tokens": max_new_tokens, "replicate_draft": case.section.replicate}
    return Method.of(case.target, prompts, case.sampling, case.loaded, **how)


def make_methods(job: Job, setting: Setting, cases: Sequence[Case], prompts: Sequence[Sequence[int]]) -> list[Method]:
    """The method of each case for these prompts; measures block costs where they are needed and not in the config."""
    max_new_tokens, methods = job.config.max_new_tokens, []
    for case in cases:
        method = make_method(case, prompts, max_new_tokens)
        if needs_costs(case):
            how = {"max_new_tokens": max_new_tokens, "batch_size": setting.batch_size, **job.decoding}
            with meshes.use(job.target.mesh):
                costs = prediction.measure_block_costs(method, prompts, **how)
            method = dataclasses.replace(method, sampling=dataclasses.replace(case.sampling, block_costs=costs))
        methods.append(method)
    return methods
