"""Runs an action of draft design: the throughput model, pruning, vocabularies, replays, acceptance or advice.

    python -m specjax.main --config=configs/advise.py --workdir=runs/advice --config.target=DIR

`config.action` names the action. Its rows are written to results.json, and its tables are printed.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from specjax.data import batches, tasks
from specjax.decoding import batch
from specjax.decoding.drafters.model import ModelDraft
from specjax.decoding.drafters.ngram import NGram
from specjax.distillation import cached_text
from specjax.draft_design import acceptance, advice, pruning, replay, shapes, vocabulary, what_if
from specjax.evaluation import expert_use, throughput
from specjax.hub import adapter as hub_adapter
from specjax.hub import load as hub_load
from specjax.hub import model as hub_model
from specjax.hub.tokenizer import Tokenizer
from specjax.models.vocabulary import FILE as VOCABULARY_FILE
from specjax.models.vocabulary import draft_vocabulary, most_written_ids
from specjax.reporting import records, row_tables
from specjax.runtime import cli, processes
from specjax.runtime import config as configs
from specjax.runtime.errors import UserError, nearest


def run(config: Any, workdir: str | Path) -> dict:
    """Runs the config's `action` and returns the content of results.json.

    Raises:
      UserError: for an unknown action, and for invalid input of an action.
    """
    if config.action not in ACTIONS:
        raise UserError(f'there is no action "{config.action}"{nearest(config.action, ACTIONS)}')
    processes.refuse_several("design")
    return finish(config, workdir, ACTIONS[config.action](config, Path(workdir)))


def finish(config: Any, workdir: str | Path, rows: list[dict]) -> dict:
    """Writes the rows to results.json and prints their tables. Returns the content of the file."""
    path = Path(workdir) / "results.json"
    results = records.write_results(path, binary="design", config=configs.to_plain(config), rows=rows)
    print(row_tables.terminal(results["rows"]), flush=True)
    return results


def prune(config: Any, workdir: Path) -> list[dict]:
    """Prunes a checkpoint to a shape by importance on calibration text; writes it to `workdir/export`."""
    source = hub_model.loader(config)(config.source)
    texts = _calibration_texts(config, source.tokenizer)
    importance = pruning.importance(source.decoder, source.params, texts)
    sizes = {name: value for name, value in config.shape.to_dict().items() if value}
    shape = shapes.reshaped(source.decoder.config, **sizes)
    decoder, params = pruning.prune(source.decoder, source.params, shape, importance)
    ids = draft_vocabulary(config.vocabulary)
    ids = ids and ids.including(source.tokenizer.stop_ids)
    pruned = hub_model.reduced(hub_model.Model(decoder, params, source.tokenizer), ids)
    hub_model.save(pruned, workdir / "export")
    row = {
        "table": "pruned",
        "source": config.source,
        **{key: getattr(shape, key) for key in ("layers", "width", "heads", "kv_heads", "mlp_width")},
        "draft_vocabulary": len(ids) if ids else None,
        "parameters": pruned.decoder.num_params,
        "parameters_of_source": shapes.parameters(source.decoder.config),
        "calibration_tokens": int(sum(lengths.sum() for _, lengths in texts)),
        "layer_importance": importance.layers.tolist(),
    }
    return [row]


def _calibration_texts(config: Any, tokenizer: Tokenizer) -> list[tuple[np.ndarray, np.ndarray]]:
    """Batches of tokens and lengths: of stored text of the target, or of the task's training text."""
    calibration = config.calibration
    if calibration.text:
        stored = cached_text.load(calibration.text)
        rows = [stored.batch(config.seed, step, calibration.batch_size) for step in range(calibration.batches)]
    else:
        layout = batches.RowLayout(calibration.batch_size, calibration.sequence_length, (1, 1), config.seed)
        endless = batches.training_batches(tasks.load_task(config.task), tokenizer, layout)
        rows = list(itertools.islice(endless, calibration.batches))
    return [(row["tokens"], row["lengths"]) for row in rows]


def count_vocabulary(config: Any, workdir: Path) -> list[dict]:
    """Counts the ids of a target's text; writes the `size` most frequent ones to `workdir/export`.

    The text is that in `target_text`, or else the training text of the task: completions, or documents.
    """
    tokenizer = Tokenizer.load(config.target)
    vocab_size = hub_load.describe(config.target, param_dtype="float32", compute_dtype="float32").vocab_size
    if config.target_text:
        written = cached_text.load(config.target_text)
        if written.about["tokenizer"] != tokenizer.fingerprint():
            raise UserError(
                f"the text in {config.target_text} has another tokenizer than {config.target}; name its own"
            )
        bounds = zip(written.rows["tokens"], written.rows["loss_start"], written.rows["lengths"], strict=True)
        texts = [tokens[start:end] for tokens, start, end in bounds]
    else:
        texts = tokenizer.encode_batch([example.completion for example in tasks.load_task(config.task).train])
    counts = vocabulary.count_ids(texts, vocab_size)
    chosen = most_written_ids(counts, config.size, tokenizer.stop_ids)
    (workdir / "export").mkdir(parents=True, exist_ok=True)
    chosen.save(workdir / "export" / VOCABULARY_FILE)
    row = {
        "table": "vocabulary",
        "size": len(chosen),
        "vocab_size": vocab_size,
        "tokens": int(counts.sum()),
        "written_ids": int((counts > 0).sum()),
    }
    shares = vocabulary.coverage(texts, vocab_size, tokenizer.stop_ids)
    return [row, *({"table": "coverage", "size": size, "share_of_held_out_tokens": share} for size, share in shares)]


def replayed(config: Any, workdir: Path) -> list[dict]:
    """Records a target's greedy text, or loads a recorded one, and scores drafts against it without the target."""
    if config.replay and config.target:
        raise UserError("a replay is scored without its target; give --config.replay=DIR or --config.target=DIR")
    if config.replay:
        stored = replay.load(config.replay)
    elif config.target:
        stored = _recorded(config)
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
        draft = hub_model.loader(config)(path)
        about = {"draft": path, "parameters": draft.decoder.num_params}
        scores = replay.agreement(stored, draft, batch_size=config.batch_size)
        rows.append(
            {
                "table": "agreement",
                **about,
                "agrees": float(scores["agrees"].mean()),
                "perplexity": float(np.exp(scores["surprise"].mean())),
                "overlap": float(scores["overlap"].mean()) if len(scores["overlap"]) else None,
            }
        )
        for gamma, threshold in itertools.product(config.gammas, (0.0, *config.thresholds)):
            options = ModelDraft(threshold=threshold)
            counts = replay.score(stored, options, gamma, draft=draft, batch_size=config.batch_size)
            known = advice.measured(counts, seed=config.seed)
            rows.append(
                {
                    "table": "scores",
                    **about,
                    "gamma": gamma,
                    "threshold": threshold,
                    "block_efficiency": throughput.emitted(known.ctar, gamma),
                    "acceptance_rate": float(counts.accepted.sum() / counts.drafted.sum()),
                    "drafted_a_block": known.drafted,
                    "ctar": known.ctar,
                }
            )
    return rows


def _recorded(config: Any) -> replay.Replay:
    """Records the target's greedy text. The target is freed on return, before a draft is loaded."""
    target = hub_model.loader(config)(config.target)
    lengths = {"max_new_tokens": config.max_new_tokens, "batch_size": config.batch_size, "top_k": config.top_k}
    return replay.record(target, _prompts(config, target), **lengths)


def _prompts(config: Any, target: hub_model.Model) -> tuple[tuple[int, ...], ...]:
    """The token ids of prompts from the validation split of the config's task."""
    prompts = batches.evaluation_prompts(
        tasks.load_task(config.task),
        target.tokenizer,
        count=config.selection.count,
        prompt_length=(config.selection.length_min, config.selection.length_max),
        seed=config.seed,
        chat=config.selection.chat,
    )
    return tuple(prompt.tokens for prompt in prompts)


def accepted(config: Any, workdir: Path) -> list[dict]:
    """Scores drafts on stored texts of their target, without decoding; decodes a few prompts to check the numbers."""
    del workdir
    if not config.texts or not config.drafts:
        raise UserError("texts or drafts is empty; name folders that target_text wrote, and drafts to score")
    for name, gammas in config.rules.items():
        if not gammas or min(gammas) < 1:
            raise UserError(f"rules.{name} is {gammas}; give one or more numbers of drafted tokens from 1, such as 2,4")
    target = hub_model.loader(config)(config.target)
    if target.decoder.is_encoder_decoder:
        raise UserError("only drafts of a decoder-only target are scored on its text; use evaluate")
    drafts = {path: _draft_of(config, path, target) for path in config.drafts}
    rows = []
    for path in config.texts:
        text = cached_text.load(path)
        fingerprints = {"target": target.fingerprint, "tokenizer": target.tokenizer.fingerprint()}
        text.check(fingerprints, "name text of this target in texts")
        generation = text.about["generation"]
        texts = {name: array[: config.count or None] for name, array in text.rows.items()}
        sampling = tuple(generation[name] for name in ("temperature", "top_k", "top_p"))
        scorer = acceptance.Scorer(target, texts, sampling, config.batch_size)
        how = {"decoded": config.decoded, "max_new_tokens": generation["max_new_tokens"], "seed": config.seed}
        for name, draft in drafts.items():
            about = {"table": "acceptance", "draft": name, "parameters": draft.network.num_params}
            for row in acceptance.score(scorer, draft, config.rules.to_dict(), **how):
                rows.append({**about, **row, "text": path})
                logging.info("%s", rows[-1])
    return rows


def _draft_of(config: Any, path: str, target: hub_model.Model) -> hub_model.Model | hub_adapter.LoadedAttachment:
    """Loads a draft model, or an attachment of the target."""
    if hub_adapter.holds_one(path):
        return hub_model.load_adapter(path, target)
    draft = hub_model.loader(config)(path)
    hub_model.check_pair(target, draft)
    return draft


def advise(config: Any, workdir: Path) -> list[dict]:
    """Times the target and every candidate draft, and recommends for each batch size a draft, gamma and threshold, or
    plain decoding. With `check` it measures whether that is the fastest.

    The acceptance of existing drafts is measured; for other shapes it is the range in the config.
    """
    low, high = _check_advise(config)
    target = hub_model.loader(config)(config.target)
    if target.decoder.is_encoder_decoder:
        raise UserError("advice is for decoder-only targets; measure an encoder-decoder's drafts with evaluate")
    work = _workload(config, target)
    gamma, drafts, candidates = max(config.gammas), {}, []
    for name in config.drafts:
        drafts[name] = draft = None if name == advice.LOOKUP else _draft_of(config, name, target)
        if isinstance(draft, hub_adapter.LoadedAttachment):
            raise UserError(
                f"advice is for draft models and n-gram lookup, and {name} attaches to a target; measure it with "
                "--config=configs/evaluate.py"
            )
        thresholds = config.thresholds if draft is not None and 1 in work.batch_sizes else ()
        measure = functools.partial(_acceptance, config, target, draft, work)
        acceptance = {eta: measure(gamma, eta) for eta in (0.0, *thresholds)}
        at = {shorter: measure(shorter, 0.0) for shorter in config.gammas if draft is None and shorter < gamma}
        candidates.append(advice.Candidate(name, draft and draft.decoder, acceptance, {}, True, at=at))
    expected = advice.stated(low, high, gamma)
    untrained = advice.untrained(target.decoder.config, config.layers, config.share, expected, config.seed)
    models = [*drafts.values(), *(dataclasses.replace(target, decoder=c.decoder, params=p) for c, p in untrained)]
    timed = advice.time_parts(target, models, work, config.gammas)
    candidates += [candidate for candidate, _ in untrained]
    use = expert_use.measured(target.decoder, target.params, work.prompts)
    candidates = [dataclasses.replace(each, parts=of, use=use) for each, of in zip(candidates, timed, strict=True)]
    rows = [row for candidate in candidates for row in candidate.options(work)]
    advised, reasons = [], []
    for size in work.batch_sizes:
        mine = [row for row in rows if row["batch_size"] == size]
        advised.append(advice.recommend(mine))
        because = advice.reasons(mine)
        if size > 1 and config.drafts and config.thresholds:
            because.append("thresholds were not considered: a block takes as long as the row that drafts most")
        if advised[-1]["pays"]:
            (chosen,) = [each for each in candidates if each.name == advised[-1]["draft"]]
            because.append(advice.command(config.target, config.task, advised[-1], chosen))
        reasons += [{"table": "reasons", "batch_size": size, "because": reason} for reason in because]
    checked, verdicts = advice.check(target, drafts, work, rows) if config.check else ([], [])
    rows = [*rows, *advised, *reasons, *checked, *verdicts]
    advice.write_report(config, workdir, rows)
    return rows


def _check_advise(config: Any) -> tuple[float, float]:
    """Checks the settings before anything is loaded. Returns the acceptance range of untrained shapes."""
    if not config.target:
        raise UserError("config.target is empty; give --config.target=DIR")
    if config.check and not config.drafts:
        raise UserError("check decodes with drafts that exist, and there are none; set drafts, or check to False")
    if not config.drafts and not config.layers:
        raise UserError("there is no candidate; set drafts, or layers for shapes that are not trained yet")
    if not config.gammas or min(config.gammas) < 1:
        raise UserError(f"gammas are {config.gammas}; set one or more numbers of drafted tokens from 1, such as 1,2,4")
    if not config.batch_sizes:
        raise UserError("batch_sizes is empty; set one or more numbers of prompts that are decoded together")
    if config.share <= 0:
        raise UserError(f"share is {config.share}; set a fraction of the target's parameters above 0, such as 0.1")
    ends = config.acceptance
    if len(ends) != 2 or not 0 <= ends[0] <= ends[1] <= 1:
        raise UserError(f"acceptance is {ends}; set a range for untrained shapes within 0 .. 1, such as 0.5,0.7")
    return ends[0], ends[1]


def _workload(config: Any, target: hub_model.Model) -> advice.Workload:
    prompts = _replay(config, target).prompts if config.replay else _prompts(config, target)
    for size in config.batch_sizes:
        if not 1 <= size <= len(prompts):
            raise UserError(f"batch_sizes must lie in 1 .. {len(prompts)}, the number of prompts, not {size}")
    batch.check_prompts(prompts, target.decoder, config.max_new_tokens)
    return advice.Workload(prompts, config.max_new_tokens, tuple(config.batch_sizes), config.temperature, config.seed)


def _replay(config: Any, target: hub_model.Model) -> replay.Replay:
    stored = replay.load(config.replay)
    stored.check_target(target)
    if config.temperature:
        raise UserError("a replay holds greedy text; set temperature to 0, or leave out the replay")
    if stored.max_new_tokens != config.max_new_tokens:
        raise UserError(
            f"max_new_tokens is {config.max_new_tokens} and the replay's texts have {stored.max_new_tokens} tokens; "
            f"set max_new_tokens to {stored.max_new_tokens}"
        )
    return stored


def _acceptance(config: Any, target, draft, work: advice.Workload, gamma: int, threshold: float) -> advice.Acceptance:
    """Measures a draft's acceptance, on the replay if the config names one, and otherwise by decoding."""
    if config.replay:
        stored, options = _replay(config, target), NGram() if draft is None else ModelDraft(threshold=threshold)
        counts = replay.score(stored, options, gamma, draft=draft, batch_size=max(work.batch_sizes))
    else:
        counts = advice.decode(target, draft, work, gamma, threshold)
    return advice.measured(counts, seed=config.seed)


ACTIONS: dict[str, Callable[[Any, Path], list[dict]]] = {
    "what_if": what_if.run,
    "prune": prune,
    "vocabulary": count_vocabulary,
    "replay": replayed,
    "acceptance": accepted,
    "advise": advise,
}


if __name__ == "__main__":
    cli.leave(cli.launch(run, "specjax.design"))
