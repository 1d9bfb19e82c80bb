"""What the grid of drafts of configs/draft_design/study.py shows: one CSV of all configurations, tables and a report.

Predicted throughput compared with measured, depth with width, language modelling with acceptance.
"""

import csv
import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from configs.draft_design import contest
from configs.records.claims import Measured
from specjax import design
from specjax.reporting import page, plots, records, row_tables
from specjax.runtime import files
from specjax.runtime.errors import UserError

FILE = "configurations.csv"
COLUMNS = (
    *("task", "drafter", "recipe", "seed", "layers", "width", "heads", "parameters", "steps", "perplexity"),
    *("rule", "temperature", "batch_size", "gamma", "prompts", "max_new_tokens"),
    *("block_efficiency", "acceptance_rate", "iterations", "expected_iterations"),
    *("draft_step_seconds", "target_step_seconds", "verify_seconds", "rule_seconds", "prefill_seconds"),
    *("tokens_per_second", "predicted_tokens_per_second", "off_by", "off_by_with_expected_blocks", "speedup"),
)
# What the table of depths holds for every seed, too.
_BY_SEED = ("block_efficiency", "tokens_per_second")


def run(config: Any, workdir: str | Path) -> dict:
    """Writes configurations.csv, report.html and results.json; returns the content of the last.

    Raises:
      UserError: for a stage without results, and a drafter that no training of the study made.
    """
    workdir = Path(workdir)
    drafts, made = contest.drafts_of(config.trained), []
    for path in config.evaluations:
        measured = records.read_results(Path(path) / "results.json")["rows"]
        contest.check_drafters(measured, drafts)
        made += [configuration(row, drafts[row["drafter"]]) for row in measured if row["gamma"]]
    if not made:
        raise UserError("the study's evaluations have no rows with a draft; give its drafters some gammas")
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(made)
    files.write_atomically(workdir / FILE, text.getvalue())
    compared = _comparable(made, config.gamma)
    rows = [*_prediction_rows(made), *_depth_rows(compared), *_correlation_rows(compared)]
    checked = [row for path in config.checked for row in records.read_results(Path(path) / "results.json")["rows"]]
    rows += [*contest.summary(checked), *checked]
    figures = page.Section("Figures", [page.Figures(_figures(config.gamma, workdir / "figures", made))])
    page.write_report(
        workdir,
        title="Which draft to build: a study",
        environment=records.environment(config.seed),
        sections=[figures, *row_tables.sections(rows)],
    )
    return design.finish(config, workdir, rows)


def configuration(row: Mapping, draft: Mapping) -> dict:
    """One evaluate row with its draft, and the throughput that its parts predict.

    Prompts run until the last of their group is done: their blocks are the expected ones, each row with the mean
    acceptance. A batch of one is predicted from the blocks of its own run and, for comparison, from expected ones.
    """
    predicted = dict.fromkeys(("predicted_tokens_per_second", "off_by", "off_by_with_expected_blocks"))
    if row["draft_step_seconds"] is not None:
        block = contest.parts_of(row).block(row["gamma"])
        speed = lambda blocks: row["emitted_tokens"] / (row["prefill_seconds"] + blocks * block)
        expected = speed(row["expected_iterations"])
        best = speed(row["iterations"]) if row["batch_size"] == 1 else expected
        values = (best, best / row["tokens_per_second"] - 1, expected / row["tokens_per_second"] - 1)
        predicted = dict(zip(predicted, values, strict=True))
    plainly = draft["divergence"] == "cross_entropy"
    perplexity = math.exp(draft["validation_loss"]) if plainly else None
    known = {**row, **draft, **predicted, "perplexity": perplexity}
    return {key: known[key] for key in COLUMNS}


def _prediction_rows(made: Sequence[Mapping]) -> list[dict]:
    """How far predicted throughput is from measured, by batch size; of batches with expected blocks only."""
    rows = []
    for size in sorted({row["batch_size"] for row in made}):
        timed = [row for row in made if row["batch_size"] == size and row["off_by"] is not None]
        kinds = {"of the run": "off_by"} if size == 1 else {}
        for blocks, key in (kinds | {"expected": "off_by_with_expected_blocks"}).items() if timed else ():
            errors = [abs(row[key]) for row in timed]
            rows.append(
                {
                    "table": "predicted_against_measured",
                    "batch_size": size,
                    "blocks": blocks,
                    "configurations": len(errors),
                    "within_10_percent": sum(error <= 0.1 for error in errors) / len(errors),
                    "median_error": statistics.median(errors),
                    "largest_error": max(errors),
                }
            )
    return rows


_GROUP = ("task", "recipe", "temperature", "gamma")


def _comparable(made: Sequence[Mapping], gamma: int) -> dict[tuple, list[Mapping]]:
    """The configurations with this gamma and batch size 1, by task, recipe and temperature."""
    groups: dict[tuple, list[Mapping]] = {}
    for row in made:
        if row["gamma"] == gamma and row["batch_size"] == 1:
            groups.setdefault(tuple(row[key] for key in _GROUP), []).append(row)
    return groups


def _depth_rows(groups: Mapping[tuple, Sequence[Mapping]]) -> list[dict]:
    """Each depth compared with the deepest, as means and as ratios paired by seed."""
    rows = []
    for group, members in groups.items():
        by_depth: dict[int, dict[int, Mapping]] = {}
        for row in sorted(members, key=lambda row: (row["layers"], row["seed"])):
            by_depth.setdefault(row["layers"], {})[row["seed"]] = row
        deepest = by_depth[max(by_depth)]
        for by_seed in by_depth.values():
            drafts = [row for seed, row in by_seed.items() if seed in deepest]
            timed = drafts[0]["draft_step_seconds"] is not None
            pairs = [(row, deepest[row["seed"]]) for row in drafts]
            # A draft step can be lost in the noise of a busy machine, and its seconds are then 0.
            comparable = timed and all(other["draft_step_seconds"] for _, other in pairs)
            mean = lambda key, drafts=drafts: statistics.fmean(row[key] for row in drafts)
            ratios = lambda key, pairs=pairs: [row[key] / other[key] for row, other in pairs]
            rows.append(
                {
                    "table": "depth_at_equal_parameters",
                    **dict(zip(_GROUP, group, strict=True)),
                    **{key: drafts[0][key] for key in ("layers", "width", "parameters")},
                    "seeds": len(drafts),
                    "block_efficiency": mean("block_efficiency"),
                    "draft_milliseconds": 1e3 * mean("draft_step_seconds") if timed else None,
                    "tokens_per_second": mean("tokens_per_second"),
                    **{f"{key}_over_deepest": Measured.over_seeds(ratios(key)).plus_minus for key in _BY_SEED},
                    # Drafts of one shape are timed once for all seeds, so there is no interval.
                    "draft_step_over_deepest": statistics.fmean(ratios("draft_step_seconds")) if comparable else None,
                    **{f"{key}_by_seed": [row[key] for row in drafts] for key in _BY_SEED},
                }
            )
    return rows


def _correlation_rows(groups: Mapping[tuple, Sequence[Mapping]]) -> list[dict]:
    """Perplexity against block efficiency and throughput, over the plainly trained drafts."""
    rows = []
    for group, members in groups.items():
        known = [row for row in members if row["perplexity"] is not None]
        for key in _BY_SEED if len(known) >= 3 else ():
            pairs = np.asarray([(row["perplexity"], row[key]) for row in known])
            rows.append(
                {
                    "table": "perplexity_correlation",
                    **dict(zip(_GROUP, group, strict=True)),
                    "with": key.replace("_", " "),
                    "drafts": len(known),
                    "pearson": _correlation(pairs),
                    "spearman": _correlation(pairs.argsort(0, kind="stable").argsort(0, kind="stable")),
                }
            )
    return rows


def _correlation(pairs: np.ndarray) -> float | None:
    if any(len(set(column)) < 2 for column in pairs.T.tolist()):
        return None
    return float(np.corrcoef(pairs.T)[0, 1])


def _figures(gamma: int, folder: Path, made: Sequence[Mapping]) -> list[page.Figure]:
    """Latency against acceptance, throughput by gamma, perplexity against acceptance, predicted against measured."""
    single = [row for row in made if row["batch_size"] == 1]
    at_gamma = [row for row in single if row["gamma"] == gamma]
    timed = [row for row in at_gamma if row["verify_seconds"]]
    figures = []

    def draw(
        name: str, caption: str, rows: Sequence[Mapping], x: Callable, y: str, x_label: str, **options: Any
    ) -> None:
        panels: dict[str, dict[str, list]] = {}
        for row in rows:
            if x(row) is not None:
                panel = panels.setdefault(f"{row['task']}, temperature {row['temperature']:g}", {})
                panel.setdefault(f"{row['recipe']}, layers {row['layers']}", []).append((x(row), row[y]))
        if panels:
            path = folder / f"{name}.png"
            labels = [(x_label, y.replace("_", " "))] * len(panels)
            plots.lines_figure(panels, path, labels=labels, from_zero=True, **options)
            figures.append(page.Figure(path, caption))

    if timed:
        rest = statistics.median(row["verify_seconds"] + row["rule_seconds"] for row in timed)
        ends = [0.0, 1.05e3 * max(row["draft_step_seconds"] for row in timed)]
        speeds = np.quantile([row["tokens_per_second"] for row in timed], (0.0, 0.5, 1.0)).tolist()
        guides = [[(x, speed * (gamma * x / 1e3 + rest)) for x in ends] for speed in speeds]
        caption = f"Latency against acceptance at gamma {gamma}; along a dashed line throughput is the same: "
        caption += f"{', '.join(f'{speed:.0f}' for speed in speeds)} tokens/s."
        step = lambda row: 1e3 * row["draft_step_seconds"]
        x_label = "draft step, milliseconds"
        draw("pareto", caption, timed, step, "block_efficiency", x_label, joined=False, guides=guides)
    caption = "Throughput against gamma, one seed."
    first = sorted((row for row in single if row["seed"] == made[0]["seed"]), key=lambda row: row["gamma"])
    draw("throughput", caption, first, lambda row: row["gamma"], "tokens_per_second", "gamma")
    caption = "Language modelling against acceptance, of drafts that were trained plainly."
    x_label = "perplexity of the draft"
    draw("perplexity", caption, at_gamma, lambda row: row["perplexity"], "block_efficiency", x_label, joined=False)
    caption = "Measured against predicted throughput; on the dashed line they are equal."
    fastest = max(row["tokens_per_second"] for row in made)
    options = {"joined": False, "guides": [[(0.0, 0.0), (fastest, fastest)]]}
    predicted = lambda row: row["predicted_tokens_per_second"]
    draw("predicted", caption, single, predicted, "tokens_per_second", "predicted tokens per second", **options)
    return figures
