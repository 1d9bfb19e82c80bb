"""Which draft, gamma and confidence threshold to take for a target on this device, how sure that is, and why.

Seconds are measured here, part by part, for every candidate; acceptance comes from drafts that there are, decoded with,
or is a stated range for shapes that nobody has trained yet. The throughput model puts them together.
"""

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax.decoding import batch
from specjax.decoding.drafters.model import ModelDraft
from specjax.decoding.drafters.table import build_drafter
from specjax.decoding.plan import Plan
from specjax.decoding.sampling import Sampling, row_keys
from specjax.draft_design import shapes
from specjax.evaluation import latency, prediction, throughput
from specjax.hub.model import Model
from specjax.models.config import DecoderConfig
from specjax.models.decoder import Decoder
from specjax.models.language_model import LanguageModel, Params
from specjax.reporting import metrics


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is decoded.

    Attributes:
      prompts: token ids.
      max_new_tokens: that each is continued by.
      batch_size: rows at a time.
      temperature: of the target.
      seed: of the rows' randomness.
    """

    prompts: tuple[tuple[int, ...], ...]
    max_new_tokens: int
    batch_size: int
    temperature: float
    seed: int

    @property
    def slots(self) -> int:
        return batch.prompt_slots(self.prompts)

    def plan(self, target: LanguageModel, draft: LanguageModel | None, gamma: int, threshold: float) -> Plan:
        """The decoding of this workload by such a pair."""
        drafter = build_drafter(ModelDraft(threshold=threshold), target, gamma, draft)
        how = {"max_new_tokens": self.max_new_tokens, "greedy": self.temperature == 0}
        return Plan.for_prompts(target, self.prompts, drafter=drafter, gamma=gamma, **how)


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """What is known of how often a draft's tokens stand.

    Attributes:
      ctar: the best guess, for as many positions as were drafted.
      low: the lower end of its 95% interval, or of a stated range.
      high: the upper one.
      drafted: tokens of a block, gamma where it never stops early.
      uneven: how many times as many blocks batches took as they would if their rows were alike: a batch runs as long as
        its slowest row, and greedy texts differ in how well they are drafted. It is measured at the largest gamma.
    """

    ctar: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    drafted: float
    uneven: float = 1.0


def stated(low: float, high: float, gamma: int) -> Acceptance:
    """A range of i.i.d. acceptance, and its middle."""
    middle = throughput.iid((low + high) / 2, gamma)
    return Acceptance(middle, throughput.iid(low, gamma), throughput.iid(high, gamma), float(gamma))


def measured(counts: metrics.Counts, *, seed: int, batch_size: int = 1) -> Acceptance:
    """From the counts of a run at the largest gamma; the interval is that of the bootstrap over prompts."""
    ctar = tuple(prediction.uncut_ctar(counts, np.ones(len(counts.emitted))).tolist())
    ratios = lambda weights: {str(w): chance for w, chance in enumerate(prediction.uncut_ctar(counts, weights))}
    found = metrics.intervals(ratios, len(counts.emitted), seed=seed)
    ends = [found[str(w)] or (ctar[w], ctar[w]) for w in range(len(ctar))]
    low, high = (tuple(float(end[side]) for end in ends) for side in (0, 1))
    drafted = float(counts.drafted.sum() / counts.target_calls.sum())
    taken = sum(
        int(counts.target_calls[at : at + batch_size].max()) for at in range(0, len(counts.emitted), batch_size)
    )
    expected = prediction.expected_iterations(counts, batch_size)
    return Acceptance(ctar, low, high, drafted, unevenness(taken, expected, batch_size))


def unevenness(taken: int, expected: float, batch_size: int) -> float:
    """`Acceptance.uneven`, from blocks that were taken and expected; rows that differ can only make them more."""
    return max(1.0, taken / expected) if batch_size > 1 else 1.0


def decode(target: Model, draft: Model, work: Workload, gamma: int, threshold: float) -> metrics.Counts:
    """The counts of speculative decoding of the whole workload."""
    results = batch.decode_all(
        work.plan(target.decoder, draft.decoder, gamma, threshold),
        target.params,
        draft.params,
        work.prompts,
        batch_size=work.batch_size,
        seed=work.seed,
        sampling=Sampling.of(work.temperature, threshold=threshold),
        max_new_tokens=work.max_new_tokens,
        eos_ids=target.tokenizer.eos_ids,
    )
    return metrics.Counts(**batch.join_counts([result.counts(size) for size, result in results]))


def time_parts(
    target: LanguageModel,
    params: Params,
    drafts: Sequence[tuple[LanguageModel, Params]],
    work: Workload,
    gammas: Sequence[int],
) -> list[dict[int, throughput.Parts]]:
    """Of each draft, the parts of a block by gamma, at the workload's mean context; everything timed in turns."""
    mean = int(np.mean([len(prompt) for prompt in work.prompts])) + work.max_new_tokens // 2
    rows = tuple((work.prompts[0] * mean)[:mean] for _ in range(work.batch_size))
    longer = dataclasses.replace(work, prompts=rows)
    tokens, lengths = batch.pad(rows, longer.slots)
    keys = row_keys(work.seed, np.arange(work.batch_size, dtype=np.int32))
    given = (jnp.asarray(tokens), jnp.asarray(lengths), keys, Sampling.of(work.temperature))
    pairs = [(draft, its, gamma) for draft, its in drafts for gamma in gammas]
    timers = lambda draft, its, gamma: latency.timers(
        longer.plan(target, draft, gamma, 0.0), params, its, *given, behind=0
    )
    meter = latency.PartsMeter(
        timers(None, None, 0), [timers(*pair) for pair in pairs], [gamma for _, _, gamma in pairs]
    )
    meter.keep_up(1.0)
    measured = meter.parts()
    rows_of = [measured[i : i + len(gammas)] for i in range(0, len(measured), len(gammas))]
    return [dict(zip(gammas, parts, strict=True)) for parts in rows_of]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A draft that could be taken, with what a block of it takes and brings.

    Attributes:
      name: of a directory, or of a shape.
      decoder: its shape.
      acceptance: by threshold; 0 is without a stop.
      parts: by gamma.
      trained: whether it exists.
    """

    name: str
    decoder: Decoder
    acceptance: dict[float, Acceptance]
    parts: dict[int, throughput.Parts]
    trained: bool

    def options(self, work: Workload) -> list[dict]:
        """A row for each gamma whose parts were timed, and for each threshold at the largest.

        A threshold is priced by the mean number of drafted tokens, which is true of one row: in a batch a block takes
        as long as the row that drafts most.
        """
        rows = []
        for gamma in self.parts:
            for threshold, acceptance in self.acceptance.items():
                if threshold == 0 or gamma == max(self.parts):
                    rows.append(self._option(work, gamma, threshold, acceptance))
        return rows

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
                f"{what}_10_percent_better": gain
                for what, gain in throughput.sensitivity(acceptance.ctar[:gamma], costs, gamma).items()
            },
        }

    def _costs(self, gamma: int, drafted: float) -> throughput.Costs:
        """As if every block took what one of `drafted` tokens takes, between the gammas that were timed."""
        of = {0: self.parts[gamma].baseline, **{g: each.verify + each.rule for g, each in self.parts.items()}}
        target = float(np.interp(drafted, sorted(of), [of[g] for g in sorted(of)]))
        step = self.parts[gamma].draft_step * drafted / gamma
        return throughput.Costs(step, (of[0], *[target] * gamma))


def recommend(rows: Sequence[dict]) -> dict:
    """The fastest row as advice; plain decoding where nothing is faster than it."""
    best = max(rows, key=lambda row: row["tokens_per_second"])
    plain = best["plain_tokens_per_second"]
    pays = best["tokens_per_second"] > plain
    return {
        "table": "advice",
        "pays": pays,
        **{key: best[key] for key in ("draft", "trained", "temperature", "layers", "width", "heads", "parameters")},
        "gamma": best["gamma"] if pays else 0,
        "threshold": best["threshold"] if pays else 0.0,
        "tokens_per_second": best["tokens_per_second"] if pays else plain,
        "tokens_per_second_low": best["tokens_per_second_low"] if pays else plain,
        "tokens_per_second_high": best["tokens_per_second_high"] if pays else plain,
        "plain_tokens_per_second": plain,
        "break_even_acceptance": best["break_even_acceptance"],
    }


def reasons(rows: Sequence[dict]) -> list[str]:
    """Why the fastest row is recommended, or speculation is not, a sentence each."""
    best = max(rows, key=lambda row: row["tokens_per_second"])
    plain = best["plain_tokens_per_second"]
    speedup, enough = best["tokens_per_second"] / plain, best["break_even_acceptance"]
    known = best["tokens_per_second_low"] < best["tokens_per_second_high"]
    if speedup <= 1:
        verdict = f"speculation does not pay here: the best candidate would be {speedup:.2f} times as fast as without"
    elif not known:
        verdict = f"{speedup:.2f} times as fast as plain decoding is expected; of one prompt there is no interval"
    elif best["tokens_per_second_low"] <= plain:
        verdict = f"{speedup:.2f} times as fast as plain decoding is expected, but the low end of the acceptance loses"
    else:
        verdict = f"{speedup:.2f} times as fast as plain decoding is expected, and the low end of the acceptance wins"
    source = "is known from decoding with it" if best["trained"] else "is the stated range, nobody has trained it yet"
    even = f"an i.i.d. acceptance of {enough:.2f} would break even" if enough is not None else "no acceptance would do"
    return [
        verdict,
        f"a block of gamma {best['gamma']} has to emit {best['break_even_block_efficiency']:.2f} tokens to break even "
        f"and emits {best['block_efficiency']:.2f}; {even}",
        f"a draft step takes {best['draft_milliseconds']:.3g} ms, a verification {best['verify_milliseconds']:.3g} "
        f"ms, a plain step {best['plain_milliseconds']:.3g} ms, measured on this device",
        f"the acceptance of {best['draft']} {source}",
        f"10% more acceptance would bring {best['acceptance_10_percent_better'] - 1:+.1%}, 10% less draft latency "
        f"{best['latency_10_percent_better'] - 1:+.1%}",
    ]


def untrained(
    target: DecoderConfig, layers: Sequence[int], share: float, acceptance: Acceptance, seed: int
) -> list[tuple[Candidate, Params]]:
    """A candidate of each depth with this share of the target's parameters, in its proportions, and random weights.

    All are Llamas, as `train.py` trains them.

    Raises:
      UserError: for a budget that no shape of a depth meets.
    """
    wanted = round(share * shapes.parameters(target))
    found = []
    for depth in layers:
        decoder = Decoder(shapes.at_parameters(shapes.plain_llama(target), depth, wanted))
        name = f"{depth}x{decoder.config.width}"
        found.append((Candidate(name, decoder, {0.0: acceptance}, {}, False), decoder.init(jax.random.key(seed))))
    return found


def command(target: str, task: Any, row: dict, candidate: Candidate) -> str:
    """What trains the recommended draft for its target, or decodes with it where it is trained."""
    given: dict[str, Any] = {"target": target}
    if candidate.trained:
        given |= {"drafter.path": candidate.name, "gamma": row["gamma"], "drafter.threshold": row["threshold"]}
        given |= {"temperature": row["temperature"], "prompt": "def main("}
        config, workdir = "configs/generate.py", "generate"
    else:
        shape = candidate.decoder.config
        fields = ("layers", "width", "heads", "kv_heads", "head_size", "mlp_width", "max_positions", "norm_epsilon")
        fields += ("tied_head", "param_dtype", "compute_dtype")
        given |= {"tokenizer.path": target, "task.name": task.name, "task.path": task.path}
        given |= {f"model.{name}": getattr(shape, name) for name in fields}
        given["model.rope_theta"] = shape.rotary.theta
        config, workdir = "configs/draft_design/train.py", f"draft_{candidate.name}"
    said = " ".join(shlex.quote(f"--config.{key}={value}") for key, value in given.items())
    return f"python -m specjax.main --config={config} --workdir=runs/{workdir} {said}"
