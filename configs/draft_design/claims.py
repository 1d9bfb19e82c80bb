"""Claims of "Decoding Speculative Decoding" (arXiv 2402.01528) beside what the committed records say.

What the paper says is typed here, with its place; what is ours is computed from the record that a claim names. The
bounds of verdicts stand in the functions that give them.
"""

import math
import statistics
from collections.abc import Callable, Mapping

from configs.distillspec.claims import (
    NOT_MEASURED,
    NOT_REPRODUCED,
    NOT_TESTABLE,
    REPRODUCED,
    Claim,
    claims_table,
)
from configs.distillspec.tradeoffs import Estimate

UNDECIDED = "undecided: the intervals are too wide"
CONSISTENT, HOLDS, FAILS = "consistent; arithmetic, nothing is reproduced", "holds", "does not hold"


def _of(record: Mapping, table: str) -> list[Mapping]:
    return [row for row in record["rows"] if row.get("table") == table]


def _published(record: Mapping) -> str:
    rows = _of(record, "consistency")
    return ", ".join(f"{row['computed_tokens_per_second']:.2f} ({row['off_by']:+.2%})" for row in rows)


def _published_verdict(record: Mapping) -> str:
    return CONSISTENT if all(abs(row["off_by"]) < 5e-3 for row in _of(record, "consistency")) else NOT_REPRODUCED


def _caches(record: Mapping) -> dict[str, float | int]:
    return {row["draft"]: row["kv_mebibytes"] for row in _of(record, "shapes")}


def _caches_verdict(record: Mapping) -> str:
    found = _caches(record)
    return CONSISTENT if (found["noft-1.3b"], found["wide-1.3b"]) == (192, 120) else NOT_REPRODUCED


def _line(record: Mapping, series: str, against: str) -> Mapping | None:
    rows = [row for row in _of(record, "lines") if (row["series"], row["against"]) == (series, against)]
    return rows[0] if rows else None


def _told_line(series: str, against: str) -> Callable[[Mapping], str]:
    def told(record: Mapping) -> str:
        row = _line(record, series, against)
        if row is None:
            return "–"
        ratio = f"slowest over fastest {row['slowest_over_fastest']:.2f}"
        device = f"on {record['environment']['device_kind']}"
        return f"{device}: R² {row['r_squared']:.3f}, {row['milliseconds_for_one_more']:.3g} ms for one more; {ratio}"

    return told


def _linear_in_depth(record: Mapping) -> str:
    row = _line(record, "depth at fixed parameters", "layers")
    if row is None:
        return NOT_MEASURED
    return REPRODUCED if row["r_squared"] >= 0.95 and row["milliseconds_for_one_more"] > 0 else NOT_REPRODUCED


def _widened(record: Mapping) -> list[float]:
    """By how much a step gets longer where the width doubles, and where heads do."""
    found = []
    for table, key in (("width_at_fixed_depth", "width"), ("heads_at_fixed_width", "heads")):
        took = {row[key]: row["milliseconds"] for row in _of(record, table) if not row["estimate"]}
        found += [took[2 * size] / took[size] for size in took if 2 * size in took]
    return found


def _told_widened(record: Mapping) -> str:
    ratios = _widened(record)
    if not ratios:
        return "–"
    return f"on {record['environment']['device_kind']}: a step is {min(ratios):.2f} to {max(ratios):.2f} times as long"


def _flat_in_width(record: Mapping) -> str:
    ratios = _widened(record)
    return NOT_MEASURED if not ratios else REPRODUCED if max(ratios) <= 1.25 else NOT_REPRODUCED


def _pooled(record: Mapping, layers: int, other: int, key: str) -> Estimate:
    """The ratio of two depths over tasks and seeds, each a mean over recipes and temperatures.

    These share targets and drafts; a task with a seed is what is drawn anew.
    """
    by_task: dict[str, list[list[float]]] = {}
    rows = _of(record, "depth_at_equal_parameters")
    group = lambda row: (row["task"], row["recipe"], row["temperature"])
    others = {group(row): row[f"{key}_by_seed"] for row in rows if row["layers"] == other}
    for row in rows:
        if row["layers"] == layers:
            pairs = zip(row[f"{key}_by_seed"], others[group(row)], strict=True)
            by_task.setdefault(row["task"], []).append([a / b for a, b in pairs])
    return Estimate.of(
        [statistics.fmean(ratios) for groups in by_task.values() for ratios in zip(*groups, strict=True)]
    )


def _all_depths(record: Mapping) -> list[int]:
    return sorted({row["layers"] for row in _of(record, "depth_at_equal_parameters")})


def _above(ratio: Estimate) -> bool:
    """Whether the whole interval is above 1; of a single draft nothing is."""
    return ratio.half is not None and ratio.mean - ratio.half > 1


def _depths(record: Mapping) -> str:
    *shallower, deepest = _all_depths(record) or [0]
    said = [
        f"{layers} over {deepest} layers: throughput {_pooled(record, layers, deepest, 'tokens_per_second')}, block "
        f"efficiency {_pooled(record, layers, deepest, 'block_efficiency')}"
        for layers in shallower
    ]
    return "; ".join(said) + f" ({_pooled(record, deepest, deepest, 'block_efficiency').seeds} tasks and seeds)"


def _shallow_wins(record: Mapping) -> str:
    """Every shallower draft is faster than the deepest, beyond the interval, and does not accept more, beyond it."""
    depths = _all_depths(record)
    if not depths:
        return NOT_MEASURED
    faster = [_above(_pooled(record, layers, depths[-1], "tokens_per_second")) for layers in depths[:-1]]
    accepts_more = [_above(_pooled(record, layers, depths[-1], "block_efficiency")) for layers in depths[:-1]]
    return REPRODUCED if all(faster) and not any(accepts_more) else NOT_REPRODUCED


def _not_the_shallowest(record: Mapping) -> str:
    """Some depth in between is faster than the shallowest and than the deepest, beyond the intervals."""
    depths = _all_depths(record)
    if not depths:
        return NOT_MEASURED
    ends = (depths[0], depths[-1])
    inside = any(
        all(_above(_pooled(record, layers, end, "tokens_per_second")) for end in ends) for layers in depths[1:-1]
    )
    return REPRODUCED if inside else NOT_REPRODUCED


def _optimum(record: Mapping) -> str:
    shallowest, *deeper = _all_depths(record) or [0]
    return "; ".join(
        f"{layers} over {shallowest} layers: throughput {_pooled(record, layers, shallowest, 'tokens_per_second')}"
        for layers in deeper
    )


def _correlations(record: Mapping) -> list[Mapping]:
    rows = _of(record, "perplexity_correlation")
    return [row for row in rows if row["with"] == "tokens per second" and row["spearman"] is not None]


def _told_correlations(record: Mapping) -> str:
    said = []
    for row in _correlations(record):
        low, high = _spearman_interval(row)
        of = f"{row['task']}, T {row['temperature']:g}"
        said.append(f"{of}: Spearman {row['spearman']:.2f} ({low:.2f} to {high:.2f}), {row['drafts']} drafts")
    return "; ".join(said)


def _spearman_interval(row: Mapping) -> tuple[float, float]:
    """95%, by Fisher's transformation with the variance 1.06 / (n - 3) of rank correlations."""
    middle = math.atanh(max(-0.999, min(0.999, row["spearman"])))
    half = 1.96 * math.sqrt(1.06 / max(row["drafts"] - 3, 1))
    return math.tanh(middle - half), math.tanh(middle + half)


def _weak(record: Mapping) -> str:
    """Good modelling is low perplexity: it says something of throughput where the correlation is surely below 0."""
    ends = [_spearman_interval(row) for row in _correlations(record)]
    if not ends:
        return NOT_MEASURED
    if any(high < 0 for _, high in ends):
        return NOT_REPRODUCED
    return REPRODUCED if all(low > -0.5 for low, _ in ends) else UNDECIDED


def _predicted(record: Mapping) -> str:
    return "; ".join(
        f"batch {row['batch_size']}, blocks {row['blocks']}: {row['within_10_percent']:.0%} of {row['configurations']} "
        f"within 10%, median error {row['median_error']:.1%}"
        for row in _of(record, "predicted_against_measured")
    )


def _predicted_verdict(record: Mapping) -> str:
    rows = [row for row in _of(record, "predicted_against_measured") if row["batch_size"] == 1]
    if not rows:
        return NOT_MEASURED
    good = lambda row: row["within_10_percent"] >= 0.9 and row["median_error"] < 0.04
    return HOLDS if all(good(row) for row in rows) else FAILS


def _advised(record: Mapping) -> str:
    return "; ".join(
        f"{row['within_5_percent']:.0%} of {row['settings']} settings within 5% (in "
        f"{row['of_them_one_and_the_same']} both are one), the worst at {row['least_of_advised_over_fastest']:.2f}"
        for row in _of(record, "advice")
    )


def _advised_verdict(record: Mapping) -> str:
    rows = _of(record, "advice")
    if not rows:
        return NOT_MEASURED
    return HOLDS if rows[0]["within_5_percent"] == 1 and rows[0]["settings"] >= 10 else FAILS


def _pairs(record: Mapping) -> dict[str, list[float]]:
    """Ratios of block efficiency, recovered over scratch, by shape and temperature, a seed each."""
    found: dict[str, list[float]] = {}
    for row in record.get("comparisons", ()):
        shape = row["drafter"].split("_")[1]
        found.setdefault(f"{shape}, T {row['temperature']:g}", []).append(row["block_efficiency_ratio"])
    return found


def _told_pairs(record: Mapping) -> str:
    return "; ".join(
        f"{name}: {statistics.fmean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), {len(ratios)} seeds"
        for name, ratios in _pairs(record).items()
    )


def _pruned_ahead(record: Mapping) -> str:
    pairs = _pairs(record).values()
    return NOT_MEASURED if not pairs else HOLDS if all(min(ratios) > 1 for ratios in pairs) else FAILS


CLAIMS = (
    Claim(
        "3.70 tokens a block at 6.69 ms a draft step give 32.59 tokens/s, 3.81 at 13.13 ms give 23.10; gamma 8 and "
        "60 ms of target are inferred from these rows",
        "wide against deep 1.3B",
        "design_published",
        _published,
        _published_verdict,
    ),
    Claim(
        "a cache of 1024 tokens takes 192 MB (NoFT-1.3B) and 120 MB (Wide-1.3B)",
        "designed drafts",
        "design_published",
        lambda record: f"{_caches(record)['noft-1.3b']:g} and {_caches(record)['wide-1.3b']:g} MiB",
        _caches_verdict,
    ),
    Claim(
        "up to 111% higher throughput of LLaMA-65B by a wide and shallow draft than by existing ones",
        "abstract",
        "design_published",
        lambda record: "neither such models nor a GPU were at hand",
        lambda record: NOT_TESTABLE,
    ),
    Claim(
        "at fixed parameters a draft step's time is linear in layers (GPU, batch 1)",
        "latency by depth",
        "design_profile",
        _told_line("depth at fixed parameters", "layers"),
        _linear_in_depth,
    ),
    Claim(
        "at fixed depth more heads and twice the width leave it almost unchanged (GPU, batch 1)",
        "latency by width",
        "design_profile",
        _told_widened,
        _flat_in_width,
    ),
    Claim(
        "at equal parameters the wide and shallow draft accepts 3% less and brings 41% more throughput",
        "wide against deep 1.3B",
        "design_study",
        _depths,
        _shallow_wins,
    ),
    Claim(
        "the optimum lies at few layers, and one layer is too shallow",
        "fewer layers",
        "design_study",
        _optimum,
        _not_the_shallowest,
    ),
    Claim(
        "how well a draft models language says little of the throughput that it brings",
        "abstract",
        "design_study",
        _told_correlations,
        _weak,
    ),
    Claim(
        "not a number of the paper's: of batch 1, throughput is predicted within 10% for 90% of configurations, median "
        "below 4%, from parts timed apart and the blocks that the run took, or those that its acceptance foretells",
        "–",
        "design_study",
        _predicted,
        _predicted_verdict,
    ),
    Claim(
        "not in the paper: the model's advice is within 5% of what was fastest when all configurations ran, in 10 "
        "settings or more, both measured again",
        "–",
        "design_study",
        _advised,
        _advised_verdict,
    ),
    Claim(
        "not in the paper: a draft pruned from the target is ahead of one from scratch after equal distillation, of as "
        "few steps as the config says",
        "–",
        "design_pruning",
        _told_pairs,
        _pruned_ahead,
    ),
)


def claims(records: Mapping[str, Mapping]) -> str:
    """One line a claim; of a record that is not there, that it has not been measured."""
    return claims_table(CLAIMS, records)
