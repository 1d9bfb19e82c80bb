"""Recommends a draft, gamma and confidence threshold for a target on this device, with an interval and reasons.

The seconds of a block's parts are measured for every candidate. Acceptance is measured by decoding if a draft exists;
for shapes that are not trained yet the user gives a range. The throughput model predicts the speed from both.
"""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from specjax.decoding import batch
from specjax.decoding.drafters.model import ModelDraft
from specjax.decoding.drafters.ngram import NGram
from specjax.decoding.drafters.table import build_drafter
from specjax.decoding.sampling import Sampling
from specjax.draft_design import shapes
from specjax.evaluation import prediction, throughput
from specjax.evaluation.engine import Method, Output, decode_all, decode_in_turns, group_size
from specjax.evaluation.expert_use import ExpertUse
from specjax.hub.model import Model
from specjax.models.config import DecoderConfig
from specjax.models.decoder import Decoder
from specjax.models.language_model import Params
from specjax.reporting import metrics, page, plots, records, row_tables
from specjax.runtime.timing import progress

# The name of n-gram lookup among the drafts.
LOOKUP = "ngram"


@dataclasses.dataclass(frozen=True)
class Workload:
    """The prompts and settings of decoding for which a draft is chosen.

    Attributes:
      prompts: token ids of each prompt.
      max_new_tokens: maximum number of new tokens per prompt.
      batch_sizes: numbers of prompts that are decoded together; each gets its own advice.
      temperature: sampling temperature.
      seed: seed of sampling.
    """

    prompts: tuple[tuple[int, ...], ...]
    max_new_tokens: int
    batch_sizes: tuple[int, ...]
    temperature: float
    seed: int

    def method(self, target: Model, draft: Model | None, gamma: int, threshold: float = 0.0) -> Method:
        """Decodes this workload with a target and a draft, or with n-gram lookup if `draft` is None."""
        options = NGram() if draft is None else ModelDraft(threshold=threshold)
        drafter = build_drafter(options, target.decoder, gamma, draft and draft.decoder)
        how = {"max_new_tokens": self.max_new_tokens, "drafter": drafter, "gamma": gamma}
        return Method.of(target, self.prompts, Sampling.of(self.temperature, threshold=threshold), draft, **how)


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """How often a draft's tokens are accepted.

    Attributes:
      ctar: estimated cumulative token acceptance rate (see `evaluation.throughput`) at each drafted position.
      low: lower end of its 95% interval, or of the range that the user gave.
      high: upper end of the interval or range.
      drafted: mean number of drafted tokens per block; gamma without early stops.
      texts: `ctar` of each text, see `prediction.text_ctars`; None if it is that of all.
      tokens: number of tokens of each text; None if it is the workload's maximum.
    """

    ctar: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    drafted: float
    texts: Float[np.ndarray, "N gamma"] | None = None
    tokens: tuple[int, ...] | None = None


def stated(low: float, high: float, gamma: int) -> Acceptance:
    """Acceptance from a rate between `low` and `high` at all positions, independently; the estimate is the middle."""
    middle = throughput.iid((low + high) / 2, gamma)
    return Acceptance(middle, throughput.iid(low, gamma), throughput.iid(high, gamma), float(gamma))


def measured(counts: metrics.Counts, *, seed: int) -> Acceptance:
    """The acceptance in the counts of a run at the largest gamma, with a bootstrap interval over prompts."""
    ctar = tuple(prediction.uncut_ctar(counts, np.ones(len(counts.emitted))).tolist())
    ratios = lambda weights: {str(w): chance for w, chance in enumerate(prediction.uncut_ctar(counts, weights))}
    intervals = metrics.intervals(ratios, len(counts.emitted), seed=seed)
    ends = [intervals[str(w)] or (ctar[w], ctar[w]) for w in range(len(ctar))]
    low, high = (tuple(float(end[side]) for end in ends) for side in (0, 1))
    drafted = float(counts.drafted.sum() / counts.target_calls.sum())
    return Acceptance(ctar, low, high, drafted, prediction.text_ctars(counts), tuple(counts.emitted.tolist()))


def decode(target: Model, draft: Model | None, work: Workload, gamma: int, threshold: float) -> metrics.Counts:
    """Decodes the workload speculatively, at its largest batch size, and returns the counts."""
    how = {"max_new_tokens": work.max_new_tokens, "eos_ids": target.tokenizer.stop_ids, "seed": work.seed}
    method = work.method(target, draft, gamma, threshold)
    return decode_all(method, work.prompts, batch_size=max(work.batch_sizes), **how)[1].counts()


def time_parts(
    target: Model, drafts: Sequence[Model | None], work: Workload, gammas: Sequence[int]
) -> list[dict[tuple[int, int], throughput.PartSeconds]]:
    """Times the parts of a block at the workload's mean context length.

    All drafts and gammas are timed in alternation. None is n-gram lookup.

    Returns:
      seconds by (batch size, gamma) for each draft.
    """
    parts: list[dict] = [{} for _ in drafts]
    plain = work.method(target, None, 0)
    speculative = {(i, gamma): work.method(target, draft, gamma) for i, draft in enumerate(drafts) for gamma in gammas}
    emitted = [tuple(prompt[:1]) * work.max_new_tokens for prompt in work.prompts]  # the time depends on their number
    for size in progress(work.batch_sizes, description="time parts", unit="batch size"):
        how = {"batch_size": size, "eos_ids": (-1,), "seed": work.seed, "put": batch.HERE}
        meter = prediction.parts_meter(plain, list(speculative.values()), work.prompts, emitted, **how)
        meter.keep_up(float("inf"))
        # The faster half of the rounds: in the others, the machine also did something else.
        blocks, *timed = [sorted(pairs)[: -(-len(pairs) // 2)] for pairs in meter.time_blocks()]
        for (i, gamma), of in zip(speculative, timed, strict=True):
            parts[i][size, gamma] = meter.parts(speculative[i, gamma].plan, of, blocks, work.seed)
    return parts


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A draft that could be recommended.

    Attributes:
      name: its directory, or the name of its shape; `LOOKUP` for n-gram lookup.
      decoder: the model, without parameters; None for n-gram lookup.
      acceptance: its acceptance by confidence threshold; 0 means no early stop.
      parts: seconds of a block's parts, by batch size and gamma.
      trained: whether the draft exists already.
      use: how the target's tokens use its experts; None for a dense target.
      at: its acceptance at gammas below the largest, where that was measured too: n-gram lookup's depends on gamma,
        because a short block that was accepted in full is followed by another at the same match.
    """

    name: str
    decoder: Decoder | None
    acceptance: dict[float, Acceptance]
    parts: dict[tuple[int, int], throughput.PartSeconds]
    trained: bool
    use: ExpertUse | None = None
    at: Mapping[int, Acceptance] = dataclasses.field(default_factory=dict)

    def options(self, work: Workload) -> list[dict]:
        """A row of predictions for each batch size and timed gamma, and for each threshold at the largest gamma.

        For a sparse target there is a row for every gamma up to the largest: a verification between two timed ones is
        interpolated linearly in the number of experts that it uses.

        The cost with a threshold is computed from the mean number of drafted tokens. This is right only at batch size
        1, because in a batch a block takes as long as the row that drafts most.
        """
        longest = max(gamma for _, gamma in self.parts)
        cases = list(self.parts)
        if self.use is not None:
            cases = [(size, gamma) for size in work.batch_sizes for gamma in range(1, longest + 1)]
        return [
            self._option(work, size, gamma, threshold, self.at.get(gamma, acceptance))
            for size, gamma in cases
            for threshold, acceptance in self.acceptance.items()
            if threshold == 0 or (size == 1 and gamma == longest)
        ]

    def _option(self, work: Workload, size: int, gamma: int, threshold: float, acceptance: Acceptance) -> dict:
        costs, parts = self._costs(size, gamma, acceptance.drafted if threshold else float(gamma))
        tokens = acceptance.tokens or (work.max_new_tokens,) * max(len(work.prompts), size)
        texts = np.tile(acceptance.ctar, (len(tokens), 1)) if acceptance.texts is None else acceptance.texts

        def speed(ctar: Sequence[float]) -> float:
            scaled = np.minimum(texts * np.divide(ctar, np.maximum(acceptance.ctar, 1e-9)), 1)[:, :gamma]
            return throughput.batch_throughput(scaled.tolist(), tokens, costs, gamma, size, group)

        group = group_size(len(tokens), size)
        speeds = [speed(ctar) for ctar in (acceptance.ctar, acceptance.low, acceptance.high)]
        plain = throughput.batch_throughput([()] * len(tokens), tokens, costs, 0, size, group)
        return {
            "table": "candidates",
            "draft": self.name,
            "trained": self.trained,
            "temperature": work.temperature,
            "batch_size": size,
            **{key: self.decoder and getattr(self.decoder.config, key) for key in ("layers", "width", "heads")},
            "parameters": self.decoder and shapes.parameters(self.decoder.config),
            "gamma": gamma,
            "threshold": threshold,
            "experts_in_a_block": self.use and self.use.touched(size * (gamma + 1)),
            "block_efficiency": throughput.emitted(acceptance.ctar, gamma),
            "draft_milliseconds": 1e3 * parts.draft_step,
            "verify_milliseconds": 1e3 * parts.verify,
            "plain_milliseconds": 1e3 * parts.baseline,
            "tokens_per_second": speeds[0],
            "tokens_per_second_low": speeds[1],
            "tokens_per_second_high": speeds[2],
            "plain_tokens_per_second": plain,
            "break_even_block_efficiency": costs.block(gamma) / parts.baseline,
            "break_even_acceptance": throughput.break_even_acceptance(costs, gamma),
            **{
                f"{part}_10_percent_better": gain
                for part, gain in throughput.sensitivity(acceptance.ctar[:gamma], costs, gamma).items()
            },
        }

    def _costs(self, size: int, gamma: int, drafted: float) -> tuple[throughput.Costs, throughput.PartSeconds]:
        """The costs of a block in which `drafted` tokens are drafted, interpolated between the timed gammas, and its
        parts; at an untimed gamma, draft steps and rule are those of the next larger one."""
        parts = self.parts[size, min(g for of, g in self.parts if of == size and g >= gamma)]
        verify = {g: each.verify + each.rule for (of, g), each in self.parts.items() if of == size}
        verify[0] = parts.baseline
        timed = sorted(verify)
        tokens = (lambda count: count) if self.use is None else (lambda count: self.use.touched(size * (count + 1)))
        target = float(np.interp(tokens(drafted), [tokens(g) for g in timed], [verify[g] for g in timed]))
        if (size, gamma) not in self.parts:
            parts = dataclasses.replace(parts, verify=target - parts.rule)
        return throughput.Costs(parts.draft_step * drafted / gamma, (verify[0], *[target] * gamma)), parts


def recommend(rows: Sequence[dict]) -> dict:
    """The advice row for a batch size: the fastest of its candidate rows, with gamma 0 if plain decoding is faster."""
    best = max(rows, key=lambda row: row["tokens_per_second"])
    plain = best["plain_tokens_per_second"]
    pays = best["tokens_per_second"] > plain
    speeds = ("tokens_per_second", "tokens_per_second_low", "tokens_per_second_high")
    chosen = best if pays else {**best, "gamma": 0, "threshold": 0.0, **dict.fromkeys(speeds, plain)}
    keys = ("batch_size", "draft", "trained", "temperature", "layers", "width", "heads", "parameters", "gamma")
    keys += ("threshold", *speeds, "plain_tokens_per_second", "break_even_acceptance")
    return {"table": "advice", "pays": pays, **{key: chosen[key] for key in keys}}


def reasons(rows: Sequence[dict]) -> list[str]:
    """Sentences that explain why the fastest row of a batch size is recommended, or why plain decoding is."""
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


# A recommendation is right if it is at least this share of the fastest.
_RIGHT = 0.95


def check(
    target: Model, drafts: Mapping[str, Model | None], work: Workload, rows: Sequence[dict]
) -> tuple[list[dict], list[dict]]:
    """Decodes the workload plainly and as in each candidate row of a draft that exists, in turns at each batch size.

    Returns:
      rows of the table `check`: predicted and measured tokens per second of decoding, without prefill;
      rows of the table `verdicts`: for each batch size what is recommended and what was fastest, and whether the former
      is within 5% of the latter.
    """
    checked, verdicts = [], []
    for size in work.batch_sizes:
        mine = [row for row in rows if row["batch_size"] == size and row["draft"] in drafts and not row["threshold"]]
        advised, plain = recommend(mine), {"draft": "", "gamma": 0}
        entries = [plain | {"tokens_per_second": advised["plain_tokens_per_second"]}, *mine]
        methods = [work.method(target, drafts.get(entry["draft"]), entry["gamma"]) for entry in entries]
        how = {"batch_size": size, "group": group_size(len(work.prompts), size), "label": f"check batch {size}"}
        how |= {"max_new_tokens": work.max_new_tokens, "eos_ids": target.tokenizer.stop_ids, "seed": work.seed}
        outputs = [Output() for _ in methods]
        for _, results in decode_in_turns(methods, work.prompts, **how):
            for output, result in zip(outputs, results, strict=True):
                output.batches.append(result)
        lines = []
        for entry, output in zip(entries, outputs, strict=True):
            predicted, measured = entry["tokens_per_second"], output.emitted / sum(each for each, _ in output.blocks)
            line = {"batch_size": size, "draft": entry["draft"], "gamma": entry["gamma"], "predicted": predicted}
            lines.append({"table": "check", **line, "measured": measured, "ratio": measured / predicted})
        checked += lines
        verdicts.append(_verdict(advised, lines))
    return checked, verdicts


def _verdict(advised: Mapping, lines: Sequence[Mapping]) -> dict:
    """What is recommended at a batch size, and what was fastest in the lines of `check`."""
    chosen = lambda line: (line["draft"], line["gamma"]) == (advised["draft"], advised["gamma"])
    (mine,) = [line for line in lines if (chosen(line) if advised["pays"] else not line["gamma"])]
    fastest = max(lines, key=lambda line: line["measured"])
    share = mine["measured"] / fastest["measured"]
    return {
        "table": "verdicts",
        "batch_size": advised["batch_size"],
        "draft": mine["draft"],
        "gamma": mine["gamma"],
        "predicted_speedup": advised["tokens_per_second"] / advised["plain_tokens_per_second"],
        "measured_speedup": mine["measured"] / lines[0]["measured"],
        "fastest_draft": fastest["draft"],
        "fastest_gamma": fastest["gamma"],
        "share_of_fastest": share,
        "right": share >= _RIGHT,
    }


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
        place = "drafter.path" if candidate.decoder else "drafter.kind"
        overrides |= {place: candidate.name, "gamma": row["gamma"], "drafter.threshold": row["threshold"]}
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
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        if row["table"] == "candidates" and not row["threshold"]:
            panel = curves.setdefault(f"expected, batch size {row['batch_size']}", {})
            curve = panel.setdefault(row["draft"], [(0, row["plain_tokens_per_second"])])
            curve.append((row["gamma"], row["tokens_per_second"]))
    path = workdir / "figures" / "throughput.png"
    plots.lines_figure(curves, path, labels=[("gamma", "tokens per second")] * len(curves), from_zero=True)
    caption = "Expected tokens per second by gamma, without a confidence stop; 0 is plain decoding."
    figure = page.Section("Throughput", [page.Figures([page.Figure(path, caption)])])
    page.write_report(
        workdir,
        title="Which draft to build",
        environment=records.environment(config.seed),
        sections=[figure, *row_tables.sections(rows)],
    )
