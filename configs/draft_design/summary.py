"""What a grid of drafts shows: predicted beside measured, depth against width, language modelling against acceptance.

The grid itself is a config of stages (configs/draft_design/study.py); here its evaluations and trainings are put
together, into one CSV of all configurations and a few tables.
"""

import csv
import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from configs.distillspec import tradeoffs
from configs.draft_design import contest
from specjax import design
from specjax.draft_design import shapes
from specjax.hub import load as hub_load
from specjax.models.config import DecoderConfig
from specjax.models.decoder import Decoder
from specjax.reporting import page, plots, records, row_tables
from specjax.runtime.errors import UserError

FILE = "configurations.csv"
COLUMNS = (
    *("task", "drafter", "recipe", "seed", "layers", "width", "heads", "parameters", "steps", "perplexity"),
    *("rule", "temperature", "batch_size", "gamma", "prompts", "max_new_tokens"),
    *("block_efficiency", "acceptance_rate", "iterations", "expected_iterations"),
    *("draft_step_seconds", "target_step_seconds", "verify_seconds", "rule_seconds", "prefill_seconds"),
    *("tokens_per_second", "predicted_tokens_per_second", "off_by", "off_by_with_expected_blocks", "speedup"),
)


def run(config: Any, workdir: str | Path) -> dict:
    """Runs the study's stage; returns the content of results.json."""
    return design.finish(config, workdir, measured(config, Path(workdir)))


def measured(config: Any, workdir: Path) -> list[dict]:
    """Writes configurations.csv and report.html; returns the tables' rows.

    Raises:
      UserError: for a stage without results, and a drafter that none of the trainings made.
    """
    drafts = drafts_of(config.trained)
    found = []
    for path in config.evaluations:
        measured = records.read_results(Path(path) / "results.json")["rows"]
        refuse_strangers(measured, drafts)
        found += [configuration(row, drafts[row["drafter"]]) for row in measured if row["gamma"]]
    if not found:
        raise UserError("the study's evaluations have no rows with a draft; give its drafters some gammas")
    _write_csv(workdir / FILE, found)
    rows = [*_prediction_rows(found), *_shape_rows(found, config.gamma), *_correlation_rows(found, config.gamma)]
    checked = [row for path in config.checked for row in records.read_results(Path(path) / "results.json")["rows"]]
    rows += [*contest.summary(checked), *checked]
    _report(config, workdir, rows, found)
    return rows


def refuse_strangers(measured: Sequence[Mapping], drafts: Mapping[str, Mapping]) -> None:
    """Raises UserError for a drafter of these evaluate rows that is none of the drafts."""
    for name in (row["drafter"] for row in measured if row["gamma"]):
        if name not in drafts:
            raise UserError(f'no training of this study made the drafter "{name}"; list its stage')


def drafts_of(trained: Sequence[str]) -> dict[str, dict]:
    """Shape and training of each draft by its name, that of its training's folder."""
    return {Path(path).name: _draft(Path(path)) for path in trained}


def _draft(folder: Path) -> dict:
    """Shape and training of one draft: its stage's name is RECIPE_TASK_LAYERS_SEED."""
    (trained,) = records.read_results(folder / "results.json")["rows"]
    _, shape = hub_load.read_config(folder / "export", param_dtype="float32", compute_dtype="float32")
    return {
        "decoder": Decoder(shape),
        "recipe": folder.name.partition("_")[0],
        "seed": trained["seed"],
        "steps": trained["steps"],
        "perplexity": math.exp(trained["validation_loss"]) if trained["divergence"] == "cross_entropy" else None,
        **_of_shape(shape),
    }


def _of_shape(shape: DecoderConfig) -> dict:
    sizes = {key: getattr(shape, key) for key in ("layers", "width", "heads")}
    return {**sizes, "parameters": shapes.parameters(shape)}


def configuration(row: Mapping, draft: Mapping) -> dict:
    """One evaluate row with its draft, and what the throughput model says of it.

    A batch runs until its slowest row has its tokens: its blocks are the expected maximum over rows, each with the
    acceptance of all. Of a batch of one the run's own blocks are taken, as its block efficiency says them, and for
    comparison the expected ones.
    """
    known = {**row, **draft, "predicted_tokens_per_second": None, "off_by": None, "off_by_with_expected_blocks": None}
    if row["draft_step_seconds"] is not None:
        block = contest.parts_of(row).block(row["gamma"])
        speed = lambda blocks: row["emitted_tokens"] / (row["prefill_seconds"] + blocks * block)
        expected = speed(row["expected_iterations"])
        predicted = speed(row["iterations"]) if row["batch_size"] == 1 else expected
        known["predicted_tokens_per_second"] = predicted
        known["off_by"] = predicted / row["tokens_per_second"] - 1
        known["off_by_with_expected_blocks"] = expected / row["tokens_per_second"] - 1
    return {key: known[key] for key in COLUMNS}


def _write_csv(path: Path, found: Sequence[Mapping]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(found)
    records.write_atomically(path, text.getvalue())


def _prediction_rows(found: Sequence[Mapping]) -> list[dict]:
    """How far predicted throughput is from measured, at each batch size; of batches with expected blocks only."""
    rows = []
    for size in sorted({row["batch_size"] for row in found}):
        of_size = [row for row in found if row["batch_size"] == size and row["off_by"] is not None]
        blocks = {"of the run": "off_by"} if size == 1 else {}
        for name, key in (blocks | {"expected": "off_by_with_expected_blocks"}).items():
            errors = [abs(row[key]) for row in of_size]
            if errors:
                rows.append(
                    {
                        "table": "predicted_against_measured",
                        "batch_size": size,
                        "blocks": name,
                        "configurations": len(errors),
                        "within_10_percent": sum(error <= 0.1 for error in errors) / len(errors),
                        "median_error": statistics.median(errors),
                        "largest_error": max(errors),
                    }
                )
    return rows


def _alike(found: Sequence[Mapping], gamma: int) -> dict[tuple, list[Mapping]]:
    """Configurations at this gamma and batch 1, by task, recipe and temperature."""
    groups: dict[tuple, list[Mapping]] = {}
    for row in found:
        if row["gamma"] == gamma and row["batch_size"] == 1:
            groups.setdefault((row["task"], row["recipe"], row["temperature"]), []).append(row)
    return groups


def _shape_rows(found: Sequence[Mapping], gamma: int) -> list[dict]:
    """Each depth beside the deepest, paired by seed: acceptance lost, latency gained, and what comes of both."""
    rows = []
    for (task, recipe, temperature), members in _alike(found, gamma).items():
        deepest = {row["seed"]: row for row in members if row["layers"] == max(row["layers"] for row in members)}
        for layers in sorted({row["layers"] for row in members}):
            mine = sorted((row for row in members if row["layers"] == layers), key=lambda row: row["seed"])
            mine = [row for row in mine if row["seed"] in deepest]
            group = {"task": task, "recipe": recipe, "temperature": temperature, "gamma": gamma}
            rows.append(
                {
                    "table": "depth_at_equal_parameters",
                    **group,
                    **_of_depth(mine, [deepest[row["seed"]] for row in mine]),
                }
            )
    return rows


# What the table of depths says of every seed too.
_BY_SEED = ("block_efficiency", "tokens_per_second")


def _of_depth(mine: Sequence[Mapping], deepest: Sequence[Mapping]) -> dict:
    """Means of the drafts of one depth, and their ratios to the deepest ones of the same seeds."""
    timed = mine[0]["draft_step_seconds"] is not None
    mean = lambda key: statistics.fmean(row[key] for row in mine)
    ratios = lambda key: [row[key] / other[key] for row, other in zip(mine, deepest, strict=True)]
    return {
        **{key: mine[0][key] for key in ("layers", "width", "parameters")},
        "seeds": len(mine),
        "block_efficiency": mean("block_efficiency"),
        "draft_milliseconds": 1e3 * mean("draft_step_seconds") if timed else None,
        "tokens_per_second": mean("tokens_per_second"),
        **{f"{key}_over_deepest": str(tradeoffs.Estimate.of(ratios(key))) for key in _BY_SEED},
        # Drafts of one shape are timed once for all seeds, so there is no interval.
        "draft_step_over_deepest": statistics.fmean(ratios("draft_step_seconds")) if timed else None,
        **{f"{key}_by_seed": [row[key] for row in mine] for key in _BY_SEED},
    }


def _correlation_rows(found: Sequence[Mapping], gamma: int) -> list[dict]:
    """Perplexity against block efficiency and throughput, over the plainly trained drafts."""
    rows = []
    for (task, recipe, temperature), members in _alike(found, gamma).items():
        known = [row for row in members if row["perplexity"] is not None]
        if len(known) < 3:
            continue
        for key in ("block_efficiency", "tokens_per_second"):
            pairs = np.asarray([(row["perplexity"], row[key]) for row in known])
            rows.append(
                {
                    "table": "perplexity_correlation",
                    "task": task,
                    "recipe": recipe,
                    "temperature": temperature,
                    "gamma": gamma,
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


def _report(config: Any, workdir: Path, rows: Sequence[Mapping], found: Sequence[Mapping]) -> None:
    """report.html: Pareto plot, throughput by gamma, perplexity against acceptance, predicted against measured."""
    figures = [figure for figure in (draw(config, workdir / "figures", found) for draw in _FIGURES) if figure]
    page.write_report(
        workdir / "report.html",
        title="Which draft to build: a study",
        subtitle=workdir.name,
        environment=records.environment(config.seed),
        sections=[
            page.Section("Figures", [page.Figures(figures)]),
            *(page.Section(*each) for each in row_tables.page_tables(rows)),
        ],
    )


def _groups(found: Sequence[Mapping], point: Callable[[Mapping], tuple | None]) -> dict[str, dict[str, list]]:
    """{temperature: {recipe and layers: points}} of batch 1."""
    panels: dict[str, dict[str, list]] = {}
    for row in found:
        at = point(row) if row["batch_size"] == 1 else None
        if at is not None and None not in at:
            panel = panels.setdefault(f"{row['task']}, temperature {row['temperature']:g}", {})
            panel.setdefault(f"{row['recipe']}, layers {row['layers']}", []).append(at)
    return panels


def _pareto(config: Any, folder: Path, found: Sequence[Mapping]) -> page.Figure | None:
    at = lambda row: (row["draft_step_seconds"] and 1e3 * row["draft_step_seconds"], row["block_efficiency"])
    panels = _groups(found, lambda row: at(row) if row["gamma"] == config.gamma else None)
    timed = [row for row in found if row["gamma"] == config.gamma and row["batch_size"] == 1 and row["verify_seconds"]]
    if not panels or not timed:
        return None
    rest = statistics.median(row["verify_seconds"] + row["rule_seconds"] for row in timed)
    ends = [0.0, 1.05e3 * max(row["draft_step_seconds"] for row in timed)]
    speeds = np.quantile([row["tokens_per_second"] for row in timed], (0.0, 0.5, 1.0))
    needed = lambda speed, x: float(speed * (config.gamma * x / 1e3 + rest))
    guides = [[(x, needed(speed, x)) for x in ends] for speed in speeds]
    path = folder / "pareto.png"
    labels = {"x_label": "draft step, milliseconds", "y_label": "block efficiency"}
    plots.lines_figure(panels, path, joined=False, guides=guides, **labels)
    said = ", ".join(f"{speed:.0f}" for speed in speeds)
    caption = (
        f"Latency against acceptance at gamma {config.gamma}; along a dashed line throughput is one: {said} tokens/s."
    )
    return page.Figure(path, caption)


def _by_gamma(config: Any, folder: Path, found: Sequence[Mapping]) -> page.Figure | None:
    first = [row for row in found if row["seed"] == found[0]["seed"]]
    panels = _groups(first, lambda row: (row["gamma"], row["tokens_per_second"]))
    path = folder / "throughput.png"
    if not panels:
        return None
    plots.lines_figure(panels, path, x_label="gamma", y_label="tokens per second")
    return page.Figure(path, "Throughput against gamma, one seed.")


def _quality(config: Any, folder: Path, found: Sequence[Mapping]) -> page.Figure | None:
    panels = _groups(
        found, lambda row: (row["perplexity"], row["block_efficiency"]) if row["gamma"] == config.gamma else None
    )
    if not panels:
        return None
    path = folder / "perplexity.png"
    labels = {"x_label": "perplexity of the draft", "y_label": "block efficiency"}
    plots.lines_figure(panels, path, joined=False, **labels)
    return page.Figure(path, "Language modelling against acceptance, of drafts that were trained plainly.")


def _measured(config: Any, folder: Path, found: Sequence[Mapping]) -> page.Figure | None:
    panels = _groups(found, lambda row: (row["predicted_tokens_per_second"], row["tokens_per_second"]))
    if not panels:
        return None
    longest = max(y for panel in panels.values() for points in panel.values() for _, y in points)
    path = folder / "predicted.png"
    labels = {"x_label": "predicted tokens per second", "y_label": "measured"}
    plots.lines_figure(panels, path, joined=False, guides=[[(0.0, 0.0), (longest, longest)]], **labels)
    return page.Figure(path, "Predicted against measured throughput; on the dashed line they are equal.")


_FIGURES = (_pareto, _by_gamma, _quality, _measured)
