"""Which draft to build: latency profiles, the throughput model, pruning, studies and advice, each an action.

    python -m specjax.design --config=FILE --workdir=DIR [--config.section.key=value ...]

`config.action` names what is done; its rows go to results.json and its tables to the terminal.
"""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from specjax import evaluate
from specjax.data import batches, tasks
from specjax.decoding import batch
from specjax.draft_design import advice, contest, profile, pruning, replay, series, shapes, study, throughput, what_if
from specjax.hub import load as hub_load
from specjax.hub import model as hub_model
from specjax.models.decoder import Decoder
from specjax.reporting import design_tables, records
from specjax.runtime import cli, processes
from specjax.runtime import config as configs
from specjax.runtime.errors import UserError, nearest


def run(config: Any, workdir: str | Path) -> dict:
    """Does what the config's `action` says; returns the content of results.json.

    Raises:
      UserError: for an action that does not exist, and whatever the action refuses.
    """
    if config.action not in ACTIONS:
        raise UserError(f'there is no action "{config.action}"{nearest(config.action, ACTIONS)}')
    processes.refuse_several("design")
    rows = ACTIONS[config.action](config, Path(workdir))
    path = Path(workdir) / "results.json"
    records.write_results(path, binary="design", config=configs.to_plain(config), rows=rows)
    results = records.read_results(path)
    print(design_tables.terminal(results["rows"]), flush=True)
    return results


def published(config: Any, workdir: Path) -> list[dict]:
    """The model on the paper's own rows, and parameters and caches of its shapes.

    A check of arithmetic: gamma and the target's seconds are not printed in the paper, they are what makes both rows
    come out.
    """
    del workdir
    rows = []
    for name, block_efficiency, draft_step, tokens_per_second in config.published:
        costs = throughput.Costs(draft_step, (config.target_seconds,) * (config.gamma + 1))
        computed = block_efficiency / costs.block(config.gamma)
        rows.append(
            {
                "table": "consistency",
                "draft": name,
                "block_efficiency": block_efficiency,
                "draft_step_seconds": draft_step,
                "gamma": config.gamma,
                "target_seconds": config.target_seconds,
                "computed_tokens_per_second": computed,
                "published_tokens_per_second": tokens_per_second,
                "off_by": computed / tokens_per_second - 1,
            }
        )
    for name in config.shapes:
        shape = shapes.preset(name)
        rows.append(
            {
                "table": "shapes",
                "draft": name,
                **{key: getattr(shape, key) for key in ("layers", "width", "heads", "mlp_width")},
                "parameters": shapes.parameters(shape),
                "context": config.context,
                "kv_mebibytes": shapes.kv_bytes(shape, config.context) / 2**20,
            }
        )
    return rows


def build(config: Any, workdir: Path) -> list[dict]:
    """Shapes of drafts for a target at a budget: of parameters, or of milliseconds a step on this device."""
    if not config.target:
        raise UserError("config.target is empty; give --config.target=DIR")
    if bool(config.parameters) == bool(config.milliseconds):
        raise UserError("a budget is either parameters or milliseconds; set one of them, and the other to 0")
    dtypes = {"param_dtype": config.param_dtype, "compute_dtype": config.compute_dtype}
    _, like = hub_load.read_config(Path(config.target), **dtypes)
    sizes = (config.parameters,) if config.parameters else config.sizes
    like = shapes.plain_llama(like)
    found = [shapes.at_parameters(like, layers, size) for layers in config.layers for size in sizes]
    store = profile.Profile(config.profile or workdir / "profile.json")
    cases = [profile.Case(shape, context=config.context, batch=config.batch_size) for shape in found]
    points = dict(zip(found, store.measure(cases, config.repeats), strict=True))
    fastest = min(found, key=lambda shape: points[shape].seconds)
    seconds_of = lambda shape: points[shape].seconds
    chosen = shapes.within_seconds(found, seconds_of, config.milliseconds / 1e3) if config.milliseconds else fastest
    rows = [
        {
            "table": "shapes",
            **{key: getattr(shape, key) for key in ("layers", "width", "heads", "mlp_width")},
            "parameters": shapes.parameters(shape),
            "milliseconds": 1e3 * point.seconds,
            "spread": point.spread,
            "estimate": point.estimate,
            "kv_mebibytes": shapes.kv_bytes(shape, config.context, config.batch_size) / 2**20,
            "chosen": shape == chosen,
        }
        for shape, point in points.items()
    ]
    named = advice.Candidate(f"{chosen.layers}x{chosen.width}", Decoder(chosen), {}, {}, False)
    return [*rows, {"table": "to_train_it", "command": advice.command(config.target, config.task, {}, named)}]


def prune(config: Any, workdir: Path) -> list[dict]:
    """Cuts a checkpoint to a shape, by what matters on calibration text; writes `workdir/export`."""
    source = hub_model.load(config.source, param_dtype=config.param_dtype, compute_dtype=config.compute_dtype)
    calibration = config.calibration
    rows = batches.training_batches(
        tasks.load_task(config.task),
        source.tokenizer,
        batch_size=calibration.batch_size,
        sequence_length=calibration.sequence_length,
        prompt_length=(1, 1),
        seed=config.seed,
    )
    texts = [(row["tokens"], row["lengths"]) for row in itertools.islice(rows, calibration.batches)]
    matters = pruning.importance(source.decoder, source.params, texts)
    sizes = {name: value for name, value in config.shape.to_dict().items() if value}
    shape = shapes.reshaped(source.decoder.config, **sizes)
    decoder, params = pruning.prune(source.decoder, source.params, shape, matters)
    hub_model.save(hub_model.Model(decoder, params, source.tokenizer), workdir / "export")
    row = {
        "table": "pruned",
        "source": config.source,
        **{key: getattr(shape, key) for key in ("layers", "width", "heads", "kv_heads", "mlp_width")},
        "parameters": shapes.parameters(shape),
        "parameters_of_source": shapes.parameters(source.decoder.config),
        "calibration_tokens": int(sum(lengths.sum() for _, lengths in texts)),
        "layer_importance": matters.layers.tolist(),
    }
    return [row]


def replayed(config: Any, workdir: Path) -> list[dict]:
    """Records a target's greedy text, or takes a recorded one, and scores drafts against it without the target."""
    load = lambda path: hub_model.load(path, param_dtype=config.param_dtype, compute_dtype=config.compute_dtype)
    if config.replay and config.target:
        raise UserError("a replay is scored without its target; give --config.replay=DIR or --config.target=DIR")
    if config.replay:
        stored = replay.load(config.replay)
    elif config.target:
        # The target is let go of before the first draft is loaded.
        stored = _recorded(config, load(config.target))
        replay.save(stored, workdir / "replay")
    else:
        raise UserError("config.target is empty; give --config.target=DIR to record, or --config.replay=DIR to score")
    rows = [
        {
            "table": "replay",
            "directory": config.replay or str(workdir / "replay"),
            "target_fingerprint": stored.target,
            "prompts": len(stored.prompts),
            "emitted_tokens": sum(map(len, stored.emitted)),
            "top_k": stored.top_ids.shape[2],
        }
    ]
    for path in config.drafts:
        draft = load(path)
        shown = {"draft": path, "parameters": draft.decoder.num_params}
        found = replay.agreement(stored, draft, batch_size=config.batch_size)
        rows.append(
            {
                "table": "agreement",
                **shown,
                "agrees": float(found["agrees"].mean()),
                "perplexity": float(np.exp(found["surprise"].mean())),
                "overlap": float(found["overlap"].mean()) if len(found["overlap"]) else None,
            }
        )
        for gamma, threshold in itertools.product(config.gammas, (0.0, *config.thresholds)):
            options = {"threshold": threshold}
            counts = replay.score(stored, "model", gamma, options, draft=draft, batch_size=config.batch_size)
            known = advice.measured(counts, seed=config.seed)
            rows.append(
                {
                    "table": "scores",
                    **shown,
                    "gamma": gamma,
                    "threshold": threshold,
                    "block_efficiency": throughput.emitted(known.ctar, gamma),
                    "acceptance_rate": float(counts.accepted.sum() / counts.drafted.sum()),
                    "drafted_a_block": known.drafted,
                    "ctar": known.ctar,
                }
            )
    return rows


def _recorded(config: Any, target: hub_model.Model) -> replay.Replay:
    how = {"max_new_tokens": config.max_new_tokens, "batch_size": config.batch_size, "top_k": config.top_k}
    return replay.record(target, _prompts(config, target), **how)


def _prompts(config: Any, target: hub_model.Model) -> tuple[tuple[int, ...], ...]:
    """Of the validation split of the config's task."""
    found = batches.evaluation_prompts(
        tasks.load_task(config.task),
        target.tokenizer,
        count=config.selection.count,
        prompt_length=(config.selection.length_min, config.selection.length_max),
        seed=config.seed,
    )
    return tuple(prompt.tokens for prompt in found)


def advise(config: Any, workdir: Path) -> list[dict]:
    """Times target and candidates, learns or is told how often tokens stand, and says which draft to take; or none."""
    low, high = _refuse_unadvisable(config)
    load = lambda path: hub_model.load(path, param_dtype=config.param_dtype, compute_dtype=config.compute_dtype)
    target = load(config.target)
    if target.decoder.reads_prompt_apart:
        raise UserError("advice is for decoder-only targets; measure an encoder-decoder's drafts with evaluate")
    work = _workload(config, target)
    gamma, shape = max(config.gammas), target.decoder.config
    nobodys = advice.untrained(shape, config.layers, config.share, advice.stated(low, high, gamma), config.seed)
    thresholds = config.thresholds if config.batch_size == 1 else ()
    acceptances = []
    for path in config.drafts:
        draft = load(path)
        hub_model.check_pair(target, draft)
        found = {eta: _acceptance(config, target, draft, work, gamma, eta) for eta in (0.0, *thresholds)}
        acceptances.append((advice.Candidate(path, draft.decoder, found, {}, True), draft.params))
    acceptances += nobodys
    drafts = [(candidate.decoder, params) for candidate, params in acceptances]
    timed = advice.time_parts(target.decoder, target.params, drafts, work, config.gammas)
    candidates = [
        dataclasses.replace(candidate, parts=parts) for (candidate, _), parts in zip(acceptances, timed, strict=True)
    ]
    rows = [row for candidate in candidates for row in candidate.options(work)]
    advised = advice.recommend(rows)
    taken = next(candidate for candidate in candidates if candidate.name == advised["draft"])
    said = [{"table": "reasons", "because": reason} for reason in advice.reasons(rows)]
    if config.drafts and len(thresholds) < len(config.thresholds):
        left_out = "thresholds were left out: in a batch the row that drafts most decides how long a block takes"
        said.append({"table": "reasons", "because": left_out})
    if advised["pays"]:
        said.append({"table": "reasons", "because": advice.command(config.target, config.task, advised, taken)})
    rows = [*rows, advised, *said]
    series.advice_report(config, workdir, rows)
    return rows


def _refuse_unadvisable(config: Any) -> tuple[float, float]:
    """What can be refused before anything is loaded; returns the range of the acceptance."""
    if not config.target:
        raise UserError("config.target is empty; give --config.target=DIR")
    if not config.drafts and not config.layers:
        raise UserError("there is nothing to choose from; name drafts, or layers of shapes to consider")
    if not config.gammas or min(config.gammas) < 1:
        raise UserError(f"gammas are numbers of drafted tokens, 1 or more, such as 1,2,4; not {config.gammas}")
    if config.share <= 0:
        raise UserError(f"share is that of the target's parameters, above 0, such as 0.1; not {config.share}")
    ends = config.acceptance
    if len(ends) != 2 or not 0 <= ends[0] <= ends[1] <= 1:
        raise UserError(f"acceptance is a range within 0 .. 1, such as 0.5,0.7, for shapes without a draft; not {ends}")
    return ends[0], ends[1]


def _workload(config: Any, target: hub_model.Model) -> advice.Workload:
    prompts = _replay(config, target).prompts if config.replay else _prompts(config, target)
    if not 1 <= config.batch_size <= len(prompts):
        raise UserError(f"batch_size must lie in 1 .. {len(prompts)}, the number of prompts, not {config.batch_size}")
    shape = target.decoder.config
    sizes = {"vocab_size": shape.vocab_size, "max_positions": shape.max_positions}
    batch.check_prompts(prompts, max_new_tokens=config.max_new_tokens, **sizes)
    return advice.Workload(prompts, config.max_new_tokens, config.batch_size, config.temperature, config.seed)


def _replay(config: Any, target: hub_model.Model) -> replay.Replay:
    stored = replay.load(config.replay)
    stored.check_target(target)
    if config.temperature:
        raise UserError("a replay is of greedy decoding; set temperature to 0, or leave out the replay")
    if stored.max_new_tokens != config.max_new_tokens:
        raise UserError(
            f"the replay has texts of {stored.max_new_tokens} tokens, not of {config.max_new_tokens}; set "
            f"max_new_tokens to {stored.max_new_tokens}"
        )
    return stored


def _acceptance(config: Any, target, draft, work: advice.Workload, gamma: int, threshold: float) -> advice.Acceptance:
    """From the replay where there is one, else by decoding."""
    if config.replay:
        stored, options = _replay(config, target), {"threshold": threshold}
        counts = replay.score(stored, "model", gamma, options, draft=draft, batch_size=work.batch_size)
    else:
        counts = advice.decode(target, draft, work, gamma, threshold)
    return advice.measured(counts, seed=config.seed, batch_size=work.batch_size)


def check_advice(config: Any, workdir: Path) -> list[dict]:
    """Runs what would have been advised and what was fastest in an evaluation again, beside each other.

    Both decode other prompts than before, some times over; where they are one, nothing is run. What has been run stays
    in its folder, so that the action goes on where it stopped.
    """
    first = Path(config.evaluation)
    results = records.read_results(first / "results.json")
    drafts = study.drafts_of(config.trained)
    study.refuse_strangers(results["rows"], drafts)
    rows = []
    for each in contest.contests(results["rows"], drafts, config.seeds):
        repeats = []
        for repeat in range(config.repeats) if each.entries else ():
            folder = workdir / f"seed{each.seed}_T{each.temperature:g}_batch{each.batch_size}_{repeat}"
            if not (folder / "results.json").exists():
                evaluate.run(_again(results["config"], each, config.count, repeat), folder)
            repeats.append(records.read_results(folder / "results.json")["rows"])
        rows.append(each.row(first.name, repeats))
    return rows


def _again(evaluation: dict, each: contest.Contest, count: int, repeat: int) -> ConfigDict:
    """The evaluation's config, of one setting and two ways to decode, with other prompts."""
    config = ConfigDict(evaluation)
    gammas = {entry.drafter: [e.gamma for e in each.entries if e.drafter == entry.drafter] for entry in each.entries}
    drafters = {name: section for name, section in evaluation["drafters"].items() if name in gammas}
    config.drafters = ConfigDict({name: {**how, "lossless": gammas[name]} for name, how in drafters.items()})
    config.update({"batch_sizes": [each.batch_size], "temperatures": [each.temperature]})
    config.update({"measure_parts": False, "seed": config.seed + 1 + repeat})
    config.task.seed += 1 + repeat
    config.selection.count = count
    return config


ACTIONS: dict[str, Callable[[Any, Path], list[dict]]] = {
    "published": published,
    "what_if": what_if.run,
    "profile": series.run,
    "build": build,
    "prune": prune,
    "replay": replayed,
    "advise": advise,
    "study": study.run,
    "check_advice": check_advice,
}


if __name__ == "__main__":
    raise SystemExit(cli.launch(run, "specjax.design"))
