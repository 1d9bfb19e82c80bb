"""The claims of "Decoding Speculative Decoding" (arXiv 2402.01528): what our records measure, what it takes to hold."""

import math
import statistics
from collections.abc import Callable, Mapping

from configs.records.claims import NOT_REPRODUCED, OURS, Claim, Measured, Measures, all_above, every, numbers

# The verdicts on arithmetic with published numbers, which reproduces nothing.
ARITHMETIC = ("consistent; arithmetic, nothing is reproduced", NOT_REPRODUCED)


def _of(record: Mapping, table: str) -> list[Mapping]:
    return [row for row in record["rows"] if row.get("table") == table]


def _columns(
    table: str,
    label: str,
    columns: Mapping[str, tuple[str, str, str]],
    where: Callable[[Mapping], bool] = lambda row: True,
) -> Callable[[Mapping], Measures]:
    """Measures these columns of a table's rows, as exact numbers; "%" in place of a unit multiplies by 100.

    Args:
      label: of a row, a format string of its values.
      columns: {name: (key, form, unit)}.
      where: which rows to take.
    """
    return lambda record: {
        label.format(**row) + name: Measured.exact(row[key] * (100 if unit == "%" else 1), form, unit=unit)
        for row in _of(record, table)
        if where(row)
        for name, (key, form, unit) in columns.items()
    }


def _values(measures: Measures) -> list[float]:
    return [number.value for number in numbers(measures)]


def _widened(record: Mapping) -> Measures:
    """The least and the most by which a step gets longer if the width, or the number of heads, is doubled."""
    ratios = []
    for table, key in (("width_at_fixed_depth", "width"), ("heads_at_fixed_width", "heads")):
        took = {row[key]: row["milliseconds"] for row in _of(record, table) if not row["estimate"]}
        ratios += [took[2 * size] / took[size] for size in took if 2 * size in took]
    ends = {"a step takes at least": min(ratios), "at most": max(ratios)} if ratios else {}
    return {label: Measured.exact(ratio, ".2f", unit=" times as long") for label, ratio in ends.items()}


def _depths(record: Mapping) -> list[int]:
    return sorted({row["layers"] for row in _of(record, "depth_at_equal_parameters")})


def _over(record: Mapping, layers: int, other: int, key: str) -> Measured:
    """The ratio of two depths over tasks and seeds, each one a mean over recipes and temperatures.

    Recipes and temperatures share targets and drafts; what is drawn anew is a task with a seed.
    """
    rows = _of(record, "depth_at_equal_parameters")
    group = lambda row: (row["task"], row["recipe"], row["temperature"])
    others = {group(row): row[f"{key}_by_seed"] for row in rows if row["layers"] == other}
    by_task: dict[str, list[list[float]]] = {}
    for row in rows:
        if row["layers"] == layers:
            pairs = zip(row[f"{key}_by_seed"], others[group(row)], strict=True)
            by_task.setdefault(row["task"], []).append([a / b for a, b in pairs])
    ratios = [statistics.fmean(seed) for groups in by_task.values() for seed in zip(*groups, strict=True)]
    return Measured.over_seeds(ratios)


_SPEED, _ACCEPTANCE = "tokens_per_second", "block_efficiency"


def _shallow_and_deep(record: Mapping) -> Measures:
    """Each shallower depth over the deepest: throughput and block efficiency, in turns."""
    *shallower, deepest = _depths(record) or [0]
    return {
        f"{layers} over {deepest} layers, {name}": _over(record, layers, deepest, key)
        for layers in shallower
        for name, key in (("throughput", _SPEED), ("block efficiency", _ACCEPTANCE))
    }


def _shallow_wins(measures: Measures) -> bool | None:
    """Every shallower draft is faster than the deepest, and none accepts more beyond its interval."""
    speeds, acceptances = numbers(measures)[::2], numbers(measures)[1::2]
    return every([*(speed.above(1) for speed in speeds), *(accepted.above(1) is not True for accepted in acceptances)])


def _optimum(record: Mapping) -> Measures:
    """Throughput of the fastest depth between the ends over both ends; as text, of the other depths over the least."""
    depths = _depths(record)
    if not depths:
        return {}
    shallowest, *between, deepest = depths
    best = max(between, key=lambda layers: _over(record, layers, shallowest, _SPEED).value)
    ends = (shallowest, deepest)
    measures: dict[str, Measured | str] = {
        f"throughput of {best} over {end} layers": _over(record, best, end, _SPEED) for end in ends
    }
    return measures | {
        f"of {layers} over {shallowest}": str(_over(record, layers, shallowest, _SPEED))
        for layers in (*between, deepest)
        if layers != best
    }


def _correlations(record: Mapping) -> Measures:
    """Spearman's correlation of perplexity with throughput over the plainly trained drafts.

    The interval is that of Fisher's transformation, with the variance 1.06 / (n - 3) of rank correlations.
    """
    measures = {}
    for row in _of(record, "perplexity_correlation"):
        if row["with"] == "tokens per second" and row["spearman"] is not None:
            middle = math.atanh(max(-0.999, min(0.999, row["spearman"])))
            half = 1.96 * math.sqrt(1.06 / max(row["drafts"] - 3, 1))
            ends = math.tanh(middle - half), math.tanh(middle + half)
            measures[f"{row['task']}, T {row['temperature']:g}"] = Measured(
                row["spearman"], *ends, note=f"Spearman, {row['drafts']} drafts"
            )
    return measures


def _weak(measures: Measures) -> bool | None:
    """Low perplexity goes with throughput if a correlation is surely below 0; weak is surely above -0.5 in all."""
    if any(correlation.below(0) for correlation in numbers(measures)):
        return False
    return True if all(correlation.above(-0.5) for correlation in numbers(measures)) else None


def _predicts(measures: Measures) -> bool:
    """At batch 1 at least 90% are predicted within 10%, with a median error below 4%."""
    values = [number.value for label, number in measures.items() if label.startswith("batch 1,")]
    return all(share >= 90 for share in values[::2]) and all(error < 4 for error in values[1::2])


def _pruned(record: Mapping) -> Measures:
    """Ratios of block efficiency, pruned over scratch, by shape and temperature, over seeds."""
    ratios: dict[str, list[float]] = {}
    for row in record.get("comparisons", ()):
        shape = row["drafter"].split("_")[1]
        ratios.setdefault(f"{shape}, T {row['temperature']:g}", []).append(row["block_efficiency_ratio"])
    return {label: Measured.over_seeds(values, ".2f", note=f"{len(values)} seeds") for label, values in ratios.items()}


CLAIMS = (
    Claim(
        "3.70 tokens a block at 6.69 ms a draft step give 32.59 tokens/s, 3.81 at 13.13 ms give 23.10; gamma 8 and "
        "60 ms of target are inferred from these rows",
        "wide against deep 1.3B",
        "design_published",
        _columns("consistency", "{computed_tokens_per_second:.2f} tokens/s", {"": ("off_by", "+.2f", "%")}),
        lambda measures: all(abs(off_by) < 0.5 for off_by in _values(measures)),
        ARITHMETIC,
    ),
    Claim(
        "a cache of 1024 tokens takes 192 MB (NoFT-1.3B) and 120 MB (Wide-1.3B)",
        "designed drafts",
        "design_published",
        _columns("shapes", "{draft}", {"": ("kv_mebibytes", "g", " MiB")}, lambda row: row["draft"].endswith("-1.3b")),
        lambda measures: _values(measures) == [192, 120],
        ARITHMETIC,
    ),
    Claim(
        "up to 111% higher throughput of LLaMA-65B by a wide and shallow draft than by existing ones",
        "abstract",
        "design_published",
        lambda record: {"": "needs such models and a GPU"},
    ),
    Claim(
        "at fixed parameters a draft step's time is linear in layers (GPU, batch 1)",
        "latency by depth",
        "design_profile",
        _columns(
            "lines",
            "",
            {
                "R²": ("r_squared", ".3f", ""),
                "milliseconds per layer": ("milliseconds_for_one_more", ".3g", ""),
                "slowest over fastest": ("slowest_over_fastest", ".2f", ""),
            },
            lambda row: (row["series"], row["against"]) == ("depth at fixed parameters", "layers"),
        ),
        lambda measures: _values(measures)[0] >= 0.95 and _values(measures)[1] > 0,
    ),
    Claim(
        "at fixed depth more heads and twice the width leave it almost unchanged (GPU, batch 1)",
        "latency by width",
        "design_profile",
        _widened,
        lambda measures: max(_values(measures)) <= 1.25,
    ),
    Claim(
        "at equal parameters the wide and shallow draft accepts 3% less and brings 41% more throughput",
        "wide against deep 1.3B",
        "design_study",
        _shallow_and_deep,
        _shallow_wins,
    ),
    Claim(
        "the optimum lies at few layers, and one layer is too shallow",
        "fewer layers",
        "design_study",
        _optimum,
        all_above(1),
    ),
    Claim(
        "how well a draft models language says little about the throughput that it brings",
        "abstract",
        "design_study",
        _correlations,
        _weak,
    ),
    Claim(
        "not in the paper: at batch 1, throughput is predicted within 10% for 90% of configurations, median below 4%, "
        "from separately timed parts and the blocks of the run, or the blocks that its acceptance predicts",
        "–",
        "design_study",
        _columns(
            "predicted_against_measured",
            "batch {batch_size}, blocks {blocks}, ",
            {"within 10%": ("within_10_percent", ".0f", "%"), "median error": ("median_error", ".1f", "%")},
        ),
        _predicts,
        OURS,
    ),
    Claim(
        "not in the paper: the model's advice is within 5% of the fastest configuration in 10 settings or more, "
        "both measured again",
        "–",
        "design_study",
        _columns(
            "advice",
            "",
            {
                "within 5%": ("within_5_percent", ".0f", "%"),
                "settings": ("settings", "g", ""),
                "of them advised the fastest": ("of_them_one_and_the_same", "g", ""),
                "the worst": ("least_of_advised_over_fastest", ".2f", ""),
            },
        ),
        lambda measures: _values(measures)[0] == 100 and _values(measures)[1] >= 10,
        OURS,
    ),
    Claim(
        "not in the paper: after equal distillation, in the few steps of the config, a draft pruned from the target "
        "accepts more than one from scratch",
        "–",
        "design_pruning",
        _pruned,
        all_above(1),
        OURS,
    ),
)
