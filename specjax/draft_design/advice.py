"""Recommends a draft, gamma and confidence threshold for a target on this device, with an interval and reasons.

The seconds of a block's parts are measured for every candidate. Acceptance is measured by decoding if a draft exists;
for shapes that are not trained yet the user gives a range. The throughput model predicts the speed from both.
"""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from specjax.decoding import batch
from specjax.decoding.drafters.model import ModelDraft
from specjax.decoding.drafters.table import build_drafter
from specjax.decoding.plan import Plan
from specjax.decoding.sampling import Sampling
from specjax.draft_design import shapes
from specjax.evaluation import prediction, throughput
from specjax.evaluation.engine import Method, decode_all
from specjax.hub.model import Model
from specjax.models.config import DecoderConfig
from specjax.models.decoder import Decoder
from specjax.models.language_model import LanguageModel, Params
from specjax.reporting import metrics, page, plots, records, row_tables


@dataclasses.dataclass(frozen=True)
class Workload:
    """The prompts and settings of decoding for which a draft is chosen.

    Attributes:
      prompts: token ids of each prompt.
      max_new_tokens: maximum number of new tokens per prompt.
      batch_size: number of prompts that are decoded together.
      temperature: sampling temperature.
      seed: seed of sampling.
    """

    prompts: tuple[tuple[int, ...], ...]
    max_new_tokens: int
    batch_size: int
    temperature: float
    seed: int

    def plan(self, target: LanguageModel, draft: LanguageModel | None, gamma: int, threshold: float) -> Plan:
        """The plan that decodes this workload with a target and a draft; without a draft if `draft` is None."""
        drafter = build_drafter(ModelDraft(threshold=threshold), target, gamma, draft)
        how = {"max_new_tokens": self.max_new_tokens, "greedy": self.temperature == 0}
        return Plan.for_prompts(target, self.prompts, drafter=drafter, gamma=gamma, **how)


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """How often a draft's tokens are accepted.

    Attributes:
      ctar: estimated cumulative token acceptance rate (see `evaluation.throughput`) at each drafted position.
      low: lower end of its 95% interval, or of the range that the user gave.
      high: upper end of the interval or range.
      drafted: mean number of drafted tokens per block; gamma without early stops.
      uneven: number of blocks that batches ran / number expected if all rows had the same acceptance; at least 1, as a
        batch runs as long as its slowest row. It is measured at the largest gamma.
    """

    ctar: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    drafted: float
    uneven: float = 1.0


def stated(low: float, high: float, gamma: int) -> Acceptance:
    """Acceptance from a rate between `low` and `high` at all positions, independently; the estimate is the middle."""
    middle = throughput.iid((low + high) / 2, gamma)
    return Acceptance(middle, throughput.iid(low, gamma), throughput.iid(high, gamma), float(gamma))


def measured(counts: metrics.Counts, *, seed: int, batch_size: int = 1) -> Acceptance:
    """The acceptance in the counts of a run at the largest gamma, with a bootstrap interval over prompts."""
    ctar = tuple(prediction.uncut_ctar(counts, np.ones(len(counts.emitted))).tolist())
    ratios = lambda weights: {str(w): chance for w, chance in enumerate(prediction.uncut_ctar(counts, weights))}
    intervals = metrics.intervals(ratios, len(counts.emitted), seed=seed)
    ends = [intervals[str(w)] or (ctar[w], ctar[w]) for w in range(len(ctar))]
    low, high = (tuple(float(end[side]) for end in ends) for side in (0, 1))
    drafted = float(counts.drafted.sum() / counts.target_calls.sum())
    firsts = range(0, len(counts.emitted), batch_size)
    taken = sum(int(counts.target_calls[first : first + batch_size].max()) for first in firsts)
    expected = prediction.expected_iterations(counts, batch_size)
    return Acceptance(ctar, low, high, drafted, max(1.0, taken / expected) if batch_size > 1 else 1.0)


def decode(target: Model, draft: Model, work: Workload, gamma: int, threshold: float) -> metrics.Counts:
    """Decodes the workload speculatively and returns the counts."""
    plan = work.plan(target.decoder, draft.decoder, gamma, threshold)
    method = Method(plan, target.params, draft.params, Sampling.of(work.temperature, threshold=threshold))
    how = {"max_new_tokens": work.max_new_tokens, "eos_ids": target.tokenizer.eos_ids, "seed": work.seed}
    return decode_all(method, work.prompts, batch_size=work.batch_size, **how)[1].counts()


def time_parts(
    target: LanguageModel,
    params: Params,
    drafts: Sequence[tuple[LanguageModel, Params]],
    work: Workload,
    gammas: Sequence[int],
) -> list[dict[int, throughput.PartSeconds]]:
    """Times the parts of a block at the workload's mean context length; returns seconds by gamma for each draft.

    All drafts and gammas are timed in alternation.
    """
    method = lambda draft, its, gamma: Method(
        work.plan(target, draft, gamma, 0.0), params, its, Sampling.of(work.temperature)
    )
    plain = method(None, None, 0)
    speculative = {(i, gamma): method(*draft, gamma) for i, draft in enumerate(drafts) for gamma in gammas}
    emitted = [tuple(prompt[:1]) * work.max_new_tokens for prompt in work.prompts]  # the time depends on their number
    how = {"batch_size": work.batch_size, "eos_ids": (-1,), "seed": work.seed, "put": batch.HERE}
    meter = prediction.parts_meter(plain, list(speculative.values()), work.prompts, emitted, **how)
    meter.keep_up(float("inf"))
    blocks, *timed = meter.time_blocks()
    parts = lambda method, of: meter.parts(method.plan, of, blocks, work.seed)
    by_key = dict(zip(speculative, map(parts, speculative.values(), timed), strict=True))
    return [{gamma: by_key[i, gamma] for gamma in gammas} for i in range(len(drafts))]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A draft model that could be recommended.

    Attributes:
      name: its directory, or the name of its shape.
      decoder: the model, without parameters.
      acceptance: its acceptance by confidence threshold; 0 means no early stop.
      parts: seconds of a block's parts, by gamma.
      trained: whether the draft exists already.
    """

    name: str
    decoder: Decoder
    acceptance: dict[float, Acceptance]
    parts: dict[int, throughput.PartSeconds]
    trained: bool

    def options(self, work: Workload) -> list[dict]:
        """A row of predictions for each timed gamma, and for each threshold at the largest gamma.

        The cost with a threshold is computed from the mean number of drafted tokens. This is right only at batch size
        1, because in a batch a block takes as long as the row that drafts most.
        """
        return [
            self._option(work, gamma, threshold, acceptance)
            for gamma in self.parts
            for threshold, acceptance in self.acceptance.items()
            if threshold == 0 or gamma == max(self.parts)
        ]

    def _option(self, work: Workload, gamma: int, threshold: float, acceptance: Acceptance) -> dict:
        costs = self._costs(gamma, acceptance.drafted if threshold else float(gamma))
        plain = self.parts[gamma].baseline
        speeds = [
            throughput.batch_throughput([ctar[:gamma]] * work.batch_size, costs, gamma, work.max_new_tokens)
            / acceptance.uneven
            for ctar in (acceptance.ctar, acceptance.low, acceptance.high)
        ]
        return {
            "table": "candidates",
            "draft": self.name,
            "trained": self.trained,
            "temperature": work.temperature,
            **{key: getattr(self.decoder.config, key) for key in ("layers", "width", "heads")},
            "parameters": shapes.parameters(self.decoder.config),
            "gamma": gamma,
            "threshold": threshold,
            "block_efficiency": throughput.emitted(acceptance.ctar, gamma),
            "draft_milliseconds": 1e3 * self.parts[gamma].draft_step,
            "verify_milliseconds": 1e3 * self.parts[gamma].verify,
            "plain_milliseconds": 1e3 * plain,
            "tokens_per_second": speeds[0],
            "tokens_per_second_low": speeds[1],
            "tokens_per_second_high": speeds[2],
            "plain_tokens_per_second": work.batch_size / plain,
            "break_even_block_efficiency": costs.block(gamma) / plain,
            "break_even_acceptance": throughput.break_even_acceptance(costs, gamma),
            **{
                f"{part}_10_percent_better": gain
                for part, gain in throughput.sensitivity(acceptance.ctar[:gamma], costs, gamma).items()
            },
        }

    def _costs(self, gamma: int, drafted: float) -> throughput.Costs:
        """The costs of a block in which `drafted` tokens are drafted, interpolated between the timed gammas."""
        verify = {0: self.parts[gamma].baseline, **{g: parts.verify + parts.rule for g, parts in self.parts.items()}}
        target = float(np.interp(drafted, sorted(verify), [verify[g] for g in sorted(verify)]))
        step = self.parts[gamma].draft_step * drafted / gamma
        return throughput.Costs(step, (verify[0], *[target] * gamma))


def recommend(rows: Sequence[dict]) -> dict:
    """The advice row, which is the fastest of the candidate rows, with gamma 0 if plain decoding is faster."""
    best = max(rows, key=lambda row: row["tokens_per_second"])
    plain = best["plain_tokens_per_second"]
    pays = best["tokens_per_second"] > plain
    speeds = ("tokens_per_second", "tokens_per_second_low", "tokens_per_second_high")
    chosen = best if pays else {**best, "gamma": 0, "threshold": 0.0, **dict.fromkeys(speeds, plain)}
    keys = ("draft", "trained", "temperature", "layers", "width", "heads", "parameters", "gamma", "threshold", *speeds)
    keys += ("plain_tokens_per_second", "break_even_acceptance")
    return {"table": "advice", "pays": pays, **{key: chosen[key] for key in keys}}


def reasons(rows: Sequence[dict]) -> list[str]:
    """Sentences that explain why the fastest row is recommended, or why plain decoding is."""
    best = max(rows, key=lambda row: row["tokens_per_second"])
    plain, low = best["plain_tokens_per_second"], best["tokens_per_second_low"]
    speedup, enough = best["tokens_per_second"] / plain, best["break_even_acceptance"]
    if speedup <= 1:
        verdict = f"speculation does not pay here: the best draft gives {speedup:.2f} times the plain speed"
    else:
        verdict = f"expect {speedup:.2f} times the speed of plain decoding"
        if low == best["tokens_per_second_high"]:
            verdict += "; one prompt gives no interval"
        elif low <= plain:
            verdict += ", but it is slower at the low end of the acceptance"
        else:
            verdict += ", and it is faster even at the low end of the acceptance"
    source = "was measured by decoding" if best["trained"] else "is the stated range; the draft is not trained yet"
    even = f"it breaks even at an acceptance of {enough:.2f}" if enough is not None else "no acceptance breaks even"
    return [
        verdict,
        f"a block of gamma {best['gamma']} must emit {best['break_even_block_efficiency']:.2f} tokens to break even "
        f"and emits {best['block_efficiency']:.2f}; {even}",
        f"a draft step takes {best['draft_milliseconds']:.3g} ms, a verification {best['verify_milliseconds']:.3g} "
        f"ms, a plain step {best['plain_milliseconds']:.3g} ms, measured on this device",
        f"the acceptance of {best['draft']} {source}",
        f"10% more acceptance changes the speed by {best['acceptance_10_percent_better'] - 1:+.1%}, 10% less draft "
        f"latency by {best['latency_10_percent_better'] - 1:+.1%}",
    ]


def untrained(
    target: DecoderConfig, layers: Sequence[int], share: float, acceptance: Acceptance, seed: int
) -> list[tuple[Candidate, Params]]:
    """Candidates with random weights, one for each number of layers, with `share` of the target's parameters.

    They are Llamas in the target's proportions; `configs/draft_design/train.py` trains such a model.

    Raises:
      UserError: if for some number of layers no shape has about this number of parameters.
    """
    budget = round(share * shapes.parameters(target))
    candidates = []
    for depth in layers:
        decoder = Decoder(shapes.at_parameters(shapes.plain_llama(target), depth, budget))
        candidate = Candidate(f"{depth}x{decoder.config.width}", decoder, {0.0: acceptance}, {}, False)
        candidates.append((candidate, decoder.init(jax.random.key(seed))))
    return candidates


def command(target: str, task: Any, row: dict, candidate: Candidate) -> str:
    """The shell command that decodes with the recommended draft, or that trains it if it does not exist yet."""
    overrides: dict[str, Any] = {"target": target}
    if candidate.trained:
        overrides |= {"drafter.path": candidate.name, "gamma": row["gamma"], "drafter.threshold": row["threshold"]}
        overrides |= {"temperature": row["temperature"], "prompt": "def main("}
        config, workdir = "configs/generate.py", "generate"
    else:
        shape = candidate.decoder.config
        fields = ("layers", "width", "heads", "kv_heads", "head_size", "mlp_width", "max_positions", "norm_epsilon")
        fields += ("tied_head", "param_dtype", "compute_dtype")
        overrides |= {"tokenizer.path": target, "task.name": task.name, "task.path": task.path}
        overrides |= {f"model.{name}": getattr(shape, name) for name in fields}
        overrides["model.rope_theta"] = shape.rotary.theta
        config, workdir = "configs/draft_design/train.py", f"draft_{candidate.name}"
    arguments = " ".join(shlex.quote(f"--config.{key}={value}") for key, value in overrides.items())
    return f"python -m specjax.main --config={config} --workdir=runs/{workdir} {arguments}"


def write_report(config: Any, workdir: Path, rows: Sequence[dict]) -> None:
    """Writes report.html: throughput of each candidate by gamma, and all tables."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["table"] == "candidates" and not row["threshold"]:
            curve = curves.setdefault(row["draft"], [(0, row["plain_tokens_per_second"])])
            curve.append((row["gamma"], row["tokens_per_second"]))
    path = workdir / "figures" / "throughput.png"
    plots.lines_figure({"expected": curves}, path, labels=[("gamma", "tokens per second")], from_zero=True)
    caption = "Expected tokens per second by gamma, without a confidence stop; 0 is plain decoding."
    figure = page.Section("Throughput", [page.Figures([page.Figure(path, caption)])])
    page.write_report(
        workdir,
        title="Which draft to build",
        environment=records.environment(config.seed),
        sections=[figure, *row_tables.sections(rows)],
    )
