"""Claims of "Decoding Speculative Decoding" (arXiv 2402.01528) beside what the committed records say.

What the paper says is typed here, with its place; what is ours is computed from the record that a claim names. The
bounds of verdicts stand in the functions that give them.
"""

import statistics
from collections.abc import Callable, Mapping

from specjax.reporting.distillspec_claims import (
    NOT_MEASURED,
    NOT_REPRODUCED,
    NOT_TESTABLE,
    REPRODUCED,
    Claim,
    claims_table,
)

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
        return f"R² {row['r_squared']:.3f}, {row['milliseconds_for_one_more']:.3g} ms for one more; {ratio}"

    return told


def _linear_in_depth(record: Mapping) -> str:
    row = _line(record, "depth at fixed parameters", "layers")
    if row is None:
        return NOT_MEASURED
    return REPRODUCED if row["r_squared"] >= 0.95 and row["milliseconds_for_one_more"] > 0 else NOT_REPRODUCED


def _flat_in_width(record: Mapping) -> str:
    row = _line(record, "width at fixed depth", "width")
    if row is None:
        return NOT_MEASURED
    return REPRODUCED if row["slowest_over_fastest"] <= 1.25 else NOT_REPRODUCED


def _grown_depths(record: Mapping) -> dict[str, list[Mapping]]:
    """The depths of each group of drafts of equal parameters."""
    groups: dict[str, list[Mapping]] = {}
    for row in _of(record, "depth_at_equal_parameters"):
        groups.setdefault(f"{row['task']}, {row['recipe']}, T {row['temperature']:g}", []).append(row)
    return groups


def _fastest(rows: list[Mapping]) -> Mapping:
    return max(rows, key=lambda row: row["tokens_per_second"])


def _depths(record: Mapping) -> str:
    return "; ".join(
        f"{name}: {best['layers']} layers, throughput {best['tokens_per_second_over_deepest']}, block efficiency "
        f"{best['block_efficiency_over_deepest']} of the deepest, {best['seeds']} seeds"
        for name, best in ((name, _fastest(rows)) for name, rows in _grown_depths(record).items())
    )


def _shallow_wins(record: Mapping) -> str:
    groups = _grown_depths(record).values()
    if not groups:
        return NOT_MEASURED
    won = all(_fastest(rows)["layers"] < max(row["layers"] for row in rows) for rows in groups)
    return REPRODUCED if won else NOT_REPRODUCED


def _not_the_shallowest(record: Mapping) -> str:
    groups = _grown_depths(record).values()
    if not groups:
        return NOT_MEASURED
    inside = all(
        min(row["layers"] for row in rows) < _fastest(rows)["layers"] < max(row["layers"] for row in rows)
        for rows in groups
    )
    return REPRODUCED if inside else NOT_REPRODUCED


def _optimum(record: Mapping) -> str:
    return "; ".join(
        f"{name}: {_fastest(rows)['layers']} of {', '.join(str(row['layers']) for row in rows)}"
        for name, rows in _grown_depths(record).items()
    )


def _correlations(record: Mapping) -> list[Mapping]:
    rows = _of(record, "perplexity_correlation")
    return [row for row in rows if row["with"] == "tokens per second" and row["spearman"] is not None]


def _told_correlations(record: Mapping) -> str:
    return "; ".join(
        f"{row['task']}, T {row['temperature']:g}: Spearman {row['spearman']:.2f}, {row['drafts']} drafts"
        for row in _correlations(record)
    )


def _weak(record: Mapping) -> str:
    values = [abs(row["spearman"]) for row in _correlations(record)]
    return NOT_MEASURED if not values else REPRODUCED if statistics.fmean(values) < 0.5 else NOT_REPRODUCED


def _predicted(record: Mapping) -> str:
    return "; ".join(
        f"batch {row['batch_size']}: {row['within_10_percent']:.0%} of {row['configurations']} within 10%, "
        f"median error {row['median_error']:.1%}"
        for row in _of(record, "predicted_against_measured")
    )


def _predicted_verdict(record: Mapping) -> str:
    rows = [row for row in _of(record, "predicted_against_measured") if row["batch_size"] == 1]
    if not rows:
        return NOT_MEASURED
    return HOLDS if rows[0]["within_10_percent"] >= 0.9 and rows[0]["median_error"] < 0.04 else FAILS


def _advised(record: Mapping) -> str:
    return "; ".join(
        f"{row['within_5_percent']:.0%} of {row['settings']} settings within 5%, the worst at "
        f"{row['least_of_advised_over_fastest']:.2f}"
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
        _told_line("width at fixed depth", "width"),
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
        "not a number of the paper's: throughput is predicted within 10% for 90% of configurations, median below 4%",
        "–",
        "design_study",
        _predicted,
        _predicted_verdict,
    ),
    Claim(
        "not in the paper: the model's advice is within 5% of the best of all configurations, in 10 settings or more",
        "–",
        "design_study",
        _advised,
        _advised_verdict,
    ),
    Claim(
        "not in the paper: a draft pruned from the target is ahead of one from scratch at equal training",
        "–",
        "design_pruning",
        _told_pairs,
        _pruned_ahead,
    ),
)


def claims(records: Mapping[str, Mapping]) -> str:
    """One line a claim; of a record that is not there, that it has not been measured."""
    return claims_table(CLAIMS, records)
