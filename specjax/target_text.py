"""Writes the target's continuations of a task's training prompts to a folder, for drafts to learn on.

    python -m specjax.target_text --config=FILE --workdir=DIR [--config.section.key=value ...]

With a draft the text is decoded speculatively, under an exact rule: `coupled` writes, token for token, what the target
alone would have written, so the text does not depend on the draft. An interrupted run goes on behind its last batch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from specjax.data import batches, tasks
from specjax.decoding import batch, rules
from specjax.decoding.drafters.model import ModelDraft
from specjax.decoding.drafters.table import build_drafter
from specjax.decoding.plan import Plan
from specjax.decoding.sampling import Sampling
from specjax.distillation import cached_text
from specjax.hub import model as hub_model
from specjax.reporting import records
from specjax.runtime import cli, processes, stopping
from specjax.runtime import config as configs
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError
from specjax.runtime.timing import progress


def run(config: Any, workdir: str | Path) -> dict:
    """Writes `workdir/export`, which `data.target_path` names, and `workdir/results.json`; returns the latter.

    Raises:
      UserError: for settings, models and prompts that do not fit, and for a folder of other text.
    """
    workdir = Path(workdir)
    writer = _Writer(config)
    directory = workdir / "export"
    if processes.first():
        cached_text.begin(directory, writer.about)
    processes.meet("the folder of the text")
    total = -(-config.count // config.data.batch_size)
    written = [cached_text.rows_file(directory, number).exists() for number in range(total)]
    missing = [number for number, there in enumerate(processes.from_first(written)) if not there]
    with meshes.use(writer.target.mesh):
        if missing:
            writer.write(0, writer.plan)  # compiles, so that no batch's seconds have that in them
        with progress(total=total, description=workdir.name, unit="batch") as bar:
            bar.update(total - len(missing))
            for number in missing:
                stopping.stop_if_asked()
                rows = writer.rows(number, writer.write(number, writer.plan))
                if processes.first():
                    cached_text.write_rows(directory, number, rows)
                bar.update(1)
        processes.meet("the text is written")
        measured = writer.measure()
    row = {**_settings(config), **_written(cached_text.load(directory)), **measured}
    path = workdir / "results.json"
    return records.write_results(path, binary="target_text", config=configs.to_plain(config), rows=[row])


def _settings(config: Any) -> dict:
    return {
        "task": config.task.name,
        "target": config.target,
        "drafter": config.drafter.path,
        "rule": config.drafter.rule,
        "gamma": config.drafter.gamma,
        "temperature": config.data.generation.temperature,
        "batch_size": config.data.batch_size,
        "seed": config.seed,
    }


def _written(text: cached_text.CachedText) -> dict:
    start = np.minimum(text.rows["loss_start"], text.rows["lengths"])
    tokens = int((text.rows["lengths"] - start).sum())
    return {"rows": len(text), "tokens": tokens, "seconds": text.seconds, "tokens_per_second": tokens / text.seconds}


class _Writer:
    """The models, the prompts, and how a batch of them is continued."""

    def __init__(self, config: Any):
        mesh, data = meshes.make_mesh(config.mesh), config.data
        load = lambda path: hub_model.load(
            path, param_dtype=config.param_dtype, compute_dtype=config.compute_dtype, mesh=mesh
        )
        self.config, self.target, self.draft = config, load(config.target), None
        if config.drafter.path:
            self.draft = load(config.drafter.path)
            hub_model.check_pair(self.target, self.draft)
        for name in ("count", "measure_batches"):
            if config[name] < 1:
                raise UserError(f"{name} is {config[name]}; it must be 1 or more")
        self.rule = rules.rule_named(config.drafter.rule)
        if self.rule.lossy:
            raise UserError(
                f"the rule {config.drafter.rule} is lossy, and its text would not be the target's; take lossless or "
                "coupled"
            )
        task = tasks.load_task(config.task)
        self.prompts = _prompts(config, task, self.target)
        batch.check_prompts(
            self.prompts,
            vocab_size=self.target.decoder.vocab_size,
            max_new_tokens=data.generation.max_new_tokens,
            max_positions=self.target.decoder.config.max_positions,
        )
        self.plan, self.plain = self._plan(config.drafter.gamma if self.draft else 0), self._plan(0)
        fingerprints = self.target.fingerprint, self.target.tokenizer.fingerprint()
        written = {"seed": config.seed, "count": config.count, "batch_size": data.batch_size}
        exactly = {"rule": config.drafter.rule}
        self.about = cached_text.provenance(*fingerprints, config.task, data) | written | exactly

    def _plan(self, gamma: int) -> Plan:
        generation, target = self.config.data.generation, self.target.decoder
        return Plan.for_prompts(
            target,
            self.prompts,
            max_new_tokens=generation.max_new_tokens,
            greedy=generation.temperature == 0,
            drafter=build_drafter(ModelDraft(), target, gamma, self.draft.decoder) if gamma else None,
            gamma=gamma,
            rule=self.rule,
        )

    def write(self, number: int, plan: Plan) -> tuple[int, batch.BatchResult]:
        """Continues batch `number`: how many of its rows count, and the result."""
        generation, size = self.config.data.generation, self.config.data.batch_size
        return batch.decode_batch_of(
            plan,
            self.target.params,
            self.draft.params if plan.gamma else None,
            self.prompts,
            first=number * size,
            batch_size=size,
            seed=self.config.seed,
            sampling=Sampling.of(generation.temperature, generation.top_k, generation.top_p),
            max_new_tokens=generation.max_new_tokens,
            eos_ids=self.target.tokenizer.eos_ids,
            put=batch.Placer(self.target.mesh),
        )

    def rows(self, number: int, written: tuple[int, batch.BatchResult]) -> dict[str, np.ndarray]:
        """A batch of the layout of `data.batches`, and the seconds that it took."""
        count, result = written
        first, decoder = number * self.config.data.batch_size, self.target.decoder
        prompts = self.prompts[first : first + count]
        openings = [decoder.start_text(prompt) for prompt in prompts]
        texts = [[*opening, *emitted] for opening, emitted in zip(openings, result.tokens[:count], strict=True)]
        width = decoder.text_slots(self.plan.prompt_slots) + self.config.data.generation.max_new_tokens
        lengths = lambda rows: np.asarray([len(row) for row in rows], np.int32)
        rows = {
            "tokens": _padded(texts, width),
            "lengths": lengths(texts),
            "loss_start": lengths(openings),
            "prompt_lengths": lengths(prompts),
            "seconds": np.asarray(result.seconds),
        }
        return {**rows, "sources": _padded(prompts, self.plan.prompt_slots)} if decoder.is_encoder_decoder else rows

    def measure(self) -> dict:
        """Tokens per second with and without the draft on the first batches, turn about; and whether texts agree."""
        if not self.plan.gamma:
            return {}
        count = min(self.config.measure_batches, -(-len(self.prompts) // self.config.data.batch_size))
        results = {}
        for plan in (self.plan, self.plain):
            self.write(0, plan)
        for number in range(count):
            for plan in (self.plan, self.plain) if number % 2 else (self.plain, self.plan):
                results[number, plan.gamma] = self.write(number, plan)
        drafted, plain = ([results[number, plan.gamma] for number in range(count)] for plan in (self.plan, self.plain))
        counts = batch.join_counts([result.counts(size) for size, result in drafted])
        speeds = [_speed(written) for written in (drafted, plain)]
        return {
            "measured_batches": count,
            "drafted_tokens_per_second": speeds[0],
            "plain_tokens_per_second": speeds[1],
            "speedup": speeds[0] / speeds[1],
            "block_efficiency": float(counts["emitted"].sum() / counts["target_calls"].sum()),
            "same_text": [a.tokens[:n] for n, a in drafted] == [b.tokens[:n] for n, b in plain],
        }


def _speed(written: Sequence[tuple[int, batch.BatchResult]]) -> float:
    tokens = sum(len(row) for size, result in written for row in result.tokens[:size])
    return tokens / sum(result.seconds for _, result in written)


def _prompts(config: Any, task: tasks.Task, target: hub_model.Model) -> list[list[int]]:
    """The prompts of the first `count` rows of the training data, as training with this seed would meet them."""
    data, decoder = config.data, target.decoder
    rows = batches.training_batches(
        task,
        target.tokenizer,
        batch_size=data.batch_size,
        sequence_length=data.sequence_length,
        prompt_length=(data.prompt_length_min, data.prompt_length_max),
        seed=config.seed,
        start_token=decoder.config.start_token if decoder.is_encoder_decoder else None,
    )
    prompts: list[list[int]] = []
    while len(prompts) < config.count:
        part = next(rows)
        given = part["sources" if decoder.is_encoder_decoder else "tokens"]
        prompts += [row[:length].tolist() for row, length in zip(given, part["prompt_lengths"], strict=True)]
    return prompts[: config.count]


def _padded(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    padded = np.zeros((len(rows), width), np.int32)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return padded


if __name__ == "__main__":
    raise SystemExit(cli.launch(run, "specjax.target_text"))
