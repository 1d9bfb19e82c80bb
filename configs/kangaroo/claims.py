"""The claims of Kangaroo (arXiv 2404.18911): each with what our record measures and what it takes to hold."""

import itertools
import math
from collections.abc import Callable, Mapping

from configs.kangaroo import tables as written
from configs.records.claims import OURS, Claim, Measured, Measures, all_above, descending, every, numbers, some
from configs.records.rows import percent


def _speedup(row: Mapping, note: str = "") -> Measured:
    return Measured.of_row(row, "speedup", unit="x", note=note)


def _fastest(record: Mapping, kind: str, temperature: float = 0.0) -> dict[str, Measured]:
    """The speed-up of the fastest drafter whose name starts with `kind`; nothing without such a row."""
    rows = [
        row
        for row in written.drafted(record, "evaluation")
        if (row["temperature"], row["rule"]) == (temperature, "lossless") and row["drafter"].startswith(kind)
    ]
    if not rows:
        return {}
    row = max(rows, key=lambda row: row["speedup"])
    threshold = f", threshold {row['threshold']:g}" if row["threshold"] else ""
    params = written.added_params(record, "evaluation", row["drafter"])
    note = f"gamma {row['gamma']}{threshold}, {params} parameters, one seed"
    return {f"{row['drafter']}, T {temperature:g}": _speedup(row, note)}


def _faster_than(kind: str) -> Callable[[Mapping], Measures]:
    """The fastest adapter and the fastest drafter of another kind, greedy; nothing unless both were run."""

    def measure(record: Mapping) -> Measures:
        adapter, other = _fastest(record, "adapter"), _fastest(record, kind)
        return adapter | other if adapter and other else {}

    return measure


def _shared_layers(record: Mapping) -> Measures:
    """Executions of target layers, divided by those needed if each layer ran once per pending and drafted token."""
    rows = [row for row in written.drafted(record, "evaluation") if row["drafter"].startswith("adapter")]
    ratios = [row["target_layers_per_token"] / row["target_layers_per_token_once"] for row in rows]
    ends = {"least": min(ratios), "most": max(ratios)} if ratios else {}
    label = f"layer executions over layers x (pending + drafted tokens), {{}} of {len(ratios)} rows"
    return {label.format(end): Measured.exact(ratio, ".3f") for end, ratio in ends.items()}


def _exits(record: Mapping) -> Measures:
    """Compression rate and speed-up with a threshold, in turns, from the shallowest exit layer to the deepest."""
    measures = {}
    for layer, line in written.exit_lines(record).items():
        measures[f"layer {layer}, rate"] = Measured.of_row(line["threshold"], "block_efficiency")
        measures[f"layer {layer}, speed-up"] = _speedup(line["threshold"])
    return measures


def _rises_and_peaks_inside(measures: Measures) -> bool | None:
    """Rates rise from the first layer to the last without a fall between; the fastest layer is neither of these."""
    rates, speeds = numbers(measures)[::2], numbers(measures)[1::2]
    falls = some(first.above(second) for first, second in itertools.pairwise(rates))
    peak = max(speeds[1:-1], key=lambda speed: speed.value)
    return every([rates[-1].above(rates[0]), falls is not True, peak.above(speeds[0]), peak.above(speeds[-1])])


def _thresholds(record: Mapping) -> Measures:
    """For each gamma the speed-up of the fastest threshold between the ends, without one, and with the largest."""
    measures = {}
    for gamma, rows in written.threshold_grid(record).items():
        _, *between, largest = rows
        best = max(between, key=lambda threshold: rows[threshold]["speedup"])
        for name, threshold in ((f"{best:g}", best), ("none", 0.0), (f"{largest:g}", largest)):
            measures[f"gamma {gamma}, threshold {name}"] = _speedup(rows[threshold])
    return measures


def _threshold_between_is_fastest(measures: Measures) -> bool | None:
    speeds = numbers(measures)
    triples = zip(speeds[::3], speeds[1::3], speeds[2::3], strict=True)
    return every(best.above(end) for best, *ends in triples for end in ends)


def _kinds(record: Mapping) -> Measures:
    """Speed-ups in the paper's order, from its fastest architecture to its slowest."""
    rows = {row["drafter"]: row for row in written.drafted(record, "kinds")}
    return {name: _speedup(rows[name]) for name in ("attention", "own_head", "layer", "mlp") if name in rows}


def _confidences(record: Mapping) -> Measures:
    """Speed-ups of the confidence before temperature (raw) and after it (adjusted), the coldest first."""
    rows = [row for row in written.drafted(record, "temperatures") if row["drafter"] in ("raw", "adjusted")]
    rows.sort(key=lambda row: (row["temperature"], row["drafter"] != "raw"))
    return {f"T {row['temperature']:g}, {row['drafter']}": _speedup(row) for row in rows}


def _separation(record: Mapping) -> Measures:
    """The area under the ROC curve, with the interval of Hanley and McNeil (1982), as if tokens were independent."""
    row = written.histogram_row(record)
    area = None if row is None else written.separation(row["confidence"])
    if area is None:
        return {}
    accepted, rejected = (sum(row["confidence"][fate]) for fate in ("accepted", "rejected"))
    variance = area * (1 - area)
    variance += (accepted - 1) * (area / (2 - area) - area**2) + (rejected - 1) * (2 * area**2 / (1 + area) - area**2)
    half = 1.96 * math.sqrt(variance / (accepted * rejected))
    label = "probability that an accepted token has more confidence than a rejected one"
    return {label: Measured(area, area - half, area + half, note="one seed")}


def _recipes(record: Mapping) -> Measures:
    """Gains in compression rate over the paper's recipe."""
    return {
        f"{recipe}, T {temperature:g}": percent(written.gains_over_paper(record, recipe, temperature))
        for recipe in ("on_policy", "paper_clock", "reverse_kl", "jsd", "tv")
        for temperature in written.recipe_rows(record)
    }


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "up to 1.68x over plain decoding, single sequence, greedy (Vicuna-7B)",
        "abstract, table 1",
        "kangaroo",
        lambda record: _fastest(record, "adapter") | _fastest(record, "adapter", 1.0),
        all_above(1),
    ),
    Claim(
        "faster than Medusa-1 with 88.7% fewer additional parameters (67M against 591M)",
        "abstract, table 1",
        "kangaroo",
        _faster_than("medusa"),
        descending,
    ),
    Claim(
        "not in the paper: faster than plain early exit, which has no adapter",
        "–",
        "kangaroo",
        _faster_than("early_exit"),
        descending,
        OURS,
    ),
    Claim(
        "the first layers run once per token, for drafting and verification together",
        "method",
        "kangaroo",
        _shared_layers,
        # Tokens drafted after the end of a text run, and count nowhere as drafted.
        lambda measures: all(0.999 < ratio.value < 1.1 for ratio in numbers(measures)),
    ),
    Claim(
        "compression rate rises with the exit layer, speed peaks early (7B: layer 2 of 32, 1.50x; 8: 1.28x)",
        "ablation of the exit layer",
        "kangaroo_ablations",
        _exits,
        _rises_and_peaks_inside,
    ),
    Claim(
        "for every gamma a threshold of 0.6 to 0.7 is fastest (1.50x; without one 1.11x to 1.36x)",
        "ablation of the threshold",
        "kangaroo_ablations",
        _thresholds,
        _threshold_between_is_fastest,
    ),
    Claim(
        "attention alone 1.50x, own head 1.44x, a whole layer 1.37x, MLP 1.22x",
        "ablation of the architecture",
        "kangaroo_ablations",
        _kinds,
        descending,
    ),
    Claim(
        "confidence before temperature is the better stop (T 0.2: 1.48x against 1.34x)",
        "NeurIPS version, temperature",
        "kangaroo_ablations",
        _confidences,
        lambda measures: numbers(measures)[0].above(numbers(measures)[1]),
    ),
    Claim(
        "confidence separates accepted tokens from rejected ones (judged here by a probability above 0.7)",
        "figure 4",
        "kangaroo_ablations",
        _separation,
        all_above(0.7),
    ),
    Claim(
        "not in the paper: on-policy text, as in DistillSpec, makes a better adapter than the corpus",
        "–",
        "kangaroo_recipes",
        _recipes,
        lambda measures: every(gain.above(0) for label, gain in measures.items() if label.startswith("on_policy")),
        OURS,
    ),
    Claim(
        "Spec-Bench, 480 questions, Vicuna-7B: 1.50x on average, 1.24x (translation) to 1.68x (MT-bench)",
        "table 1",
        "kangaroo_spec_bench",
        lambda record: {"": "the harness runs; our targets are not Vicuna"},
    ),
)
