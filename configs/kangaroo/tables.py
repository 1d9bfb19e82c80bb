"""Tables of configs/kangaroo/README.md: speed and its parts, other drafts, ablations, recipes, Spec-Bench by subtask.

A record is a run of the config of its name in configs/kangaroo, condensed by `configs.records.condense`.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from configs.records.claims import Measured
from configs.records.rows import Cells, by_recipe, gains, markdown, percent, provenance, trained
from specjax.reporting import tables
from specjax.reporting.spec_bench_page import OVERALL

_STEPS = ("draft_step_seconds", "target_step_seconds", "verify_seconds", "rule_seconds")
_SPEED = ("tokens_per_second", "speedup", "identical_to_baseline")
_LAYERS = {
    "target_layers_per_token": "target layers",
    "target_layers_per_token_once": "if each ran once a token",
    "target_layers_per_token_padded": "with padding",
    "draft_layers_per_token": "layers of the draft's own",
}


def rows_of(record: Mapping, stage: str) -> list[Mapping]:
    """The rows of an evaluation stage."""
    return [row for row in record["rows"] if row.get("stage") == stage and "drafter" in row]


def drafted(record: Mapping, stage: str) -> list[Mapping]:
    """The rows of an evaluation stage that were decoded with a draft."""
    return [row for row in rows_of(record, stage) if row["gamma"]]


def setting_of(record: Mapping, stage: str, key: str) -> Any:
    """A key ("drafters.adapter.path") of a stage in the record's config, None if it has no such key.

    In a condensed record a stage names the other that it is `like`, and holds only the keys that differ.
    """
    section = record["config"].get(stage, {})
    if key in section:
        return section[key]
    value: Any = section
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return setting_of(record, section["like"], key) if value is None and "like" in section else value


def added_params(record: Mapping, stage: str, drafter: str) -> int | None:
    """The number of parameters that a drafter adds to its target: 0 if untrained, None for plain decoding."""
    if setting_of(record, stage, f"drafters.{drafter}.kind") is None:
        return None
    path = setting_of(record, stage, f"drafters.{drafter}.path") or ""
    params = {row["stage"]: row["params"] for row in record["rows"] if "params" in row}
    return params.get(path.removeprefix("stage:"), 0)


def main_table(record: Mapping) -> str:
    """Every row of the evaluation with its drafter's parameters; parts of a block, layer executions, batches."""
    rows = rows_of(record, "evaluation")
    lines = [
        {**row, "added params": _millions(added_params(record, "evaluation", row["drafter"])), "ctar": _ctar(row)}
        for row in rows
    ]
    columns = ("drafter", "added params", "rule", "temperature", "gamma", "threshold", "block_efficiency")
    parts = [tables.markdown_table(lines, (*columns, "acceptance_rate", "ctar", *_SPEED))]
    timed = [
        row | {key: f"{1e3 * row[key]:.2f}" for key in _STEPS}
        for row in rows
        if row.get("draft_step_seconds") is not None
    ]
    keys = ("drafter", "temperature", "gamma", *_STEPS, "cost_ratio", "speedup", "predicted_speedup")
    headings = {key: tables.heading(key).replace(" seconds", " [ms]") for key in keys}
    counted = [row for row in rows if row.get("target_layers_per_token") is not None]
    executions = {key: _LAYERS.get(key, tables.heading(key)) for key in (*keys[:3], "threshold", *_LAYERS)}
    batches = ("batch_size", "drafter", "gamma", "threshold", "block_efficiency", "acceptance_rate", *_SPEED)
    for title, members, headed in (
        ("Parts of a block, timed separately, and the speed-up that they predict:", timed, headings),
        ("Layer executions per emitted token, counted while they ran, without prefill:", counted, executions),
        ("Several prompts at once (greedy):", rows_of(record, "batches"), batches),
    ):
        parts += [title, tables.markdown_table(members, headed)] if members else []
    return "\n\n".join([*parts, provenance(record)])


def _millions(count: int | None) -> str | None:
    return None if count is None else f"{count / 1e6:.2f}M" if count >= 10_000 else str(count)


def _ctar(row: Mapping) -> str | None:
    return " ".join(f"{100 * share:.0f}" for share in row["ctar"]) if row["ctar"] else None


def exit_lines(record: Mapping) -> dict[int, dict[str, Mapping]]:
    """{exit layer: {"threshold": the row with a threshold, "fixed": the row without one}}"""
    lines: dict[int, dict[str, Mapping]] = {}
    for row in drafted(record, "exits"):
        stage = setting_of(record, "exits", f"drafters.{row['drafter']}.path").removeprefix("stage:")
        layer = setting_of(record, stage, "adapter.exit_layer")
        lines.setdefault(layer, {})["threshold" if row["threshold"] else "fixed"] = row
    return {layer: lines[layer] for layer in sorted(lines)}


def _exits(record: Mapping) -> str:
    scores = {"compression rate": "block_efficiency", "acceptance": "acceptance_rate", "speed-up": "speedup"}
    return markdown(
        [
            {"exit layer": layer}
            | {
                f"{name}, {kind}": tables.cell(line[kind], key)
                for kind in ("threshold", "fixed")
                for name, key in scores.items()
            }
            for layer, line in exit_lines(record).items()
        ]
    )


def threshold_grid(record: Mapping) -> dict[int, dict[float, Mapping]]:
    """{gamma: {threshold: row}}, both rising."""
    rows = sorted(drafted(record, "grid"), key=lambda row: (row["gamma"], row["threshold"]))
    grid: dict[int, dict[float, Mapping]] = {}
    for row in rows:
        grid.setdefault(row["gamma"], {})[row["threshold"]] = row
    return grid


def _grid(record: Mapping) -> str:
    lines: dict[float, dict[str, str]] = {}
    for gamma, rows in threshold_grid(record).items():
        for threshold, row in rows.items():
            line = lines.setdefault(threshold, {"threshold": f"{threshold:g}"})
            line[f"gamma {gamma}"] = f"{row['speedup']:.2f}x ({row['block_efficiency']:.2f})"
    return markdown(list(lines.values()))


_SCORES = {"block_efficiency": "compression rate", "acceptance_rate": "acceptance", "speedup": "speed-up"}


def _kinds(record: Mapping) -> str:
    rows = drafted(record, "kinds")
    lines = [{**row, "params": _millions(added_params(record, "kinds", row["drafter"]))} for row in rows]
    return tables.markdown_table(lines, {"drafter": "adapter", "params": "params"} | _SCORES)


def _temperatures(record: Mapping) -> str:
    rows = [row for row in drafted(record, "temperatures") if row["rule"] == "lossless"]
    columns = {"drafter": "confidence", "temperature": "T", "drafted_tokens": "drafted"}
    return tables.markdown_table(rows, columns | _SCORES)


def separation(histogram: Mapping[str, Sequence[int]]) -> float | None:
    """The probability that an accepted token has more confidence than a rejected one: the area under the ROC curve.

    Two tokens in the same bin count half. None without a pair.
    """
    accepted, rejected = histogram["accepted"], histogram["rejected"]
    pairs = sum(accepted) * sum(rejected)
    if not pairs:
        return None
    below, total = 0, 0.0
    for yes, no in zip(accepted, rejected, strict=True):
        total += yes * (below + no / 2)
        below += no
    return total / pairs


def histogram_row(record: Mapping) -> Mapping | None:
    """The greedy row without a threshold that drafted most tokens, so that uncertain tokens are not left out."""
    rows = [row for row in drafted(record, "grid") if not row["threshold"] and row.get("confidence")]
    return max(rows, key=lambda row: row["gamma"], default=None)


def _confidence(record: Mapping) -> str:
    row = histogram_row(record)
    if row is None:
        return ""
    counts = {fate: sum(counts) for fate, counts in row["confidence"].items()}
    return (
        f"Of {counts['accepted']} accepted and {counts['rejected']} rejected tokens (greedy, gamma {row['gamma']}, no "
        "threshold), an accepted one has more confidence than a rejected one with probability "
        f"{separation(row['confidence']):.2f}."
    )


def ablations(record: Mapping) -> str:
    """Exit layer, threshold and gamma, architecture, and confidence, of each evaluation that has finished."""
    raw = "Confidence at temperature 1 (raw), after temperature (adjusted), not used (fixed)"
    parts = (
        ("exits", "Exit layer (greedy)", _exits),
        ("grid", "Threshold and gamma (greedy): speed-up (compression rate)", _grid),
        ("kinds", "Architecture (greedy)", _kinds),
        ("temperatures", raw, _temperatures),
        ("grid", "Confidence of accepted and rejected tokens", _confidence),
    )
    written = [f"{title}\n\n{write(record)}" for stage, title, write in parts if rows_of(record, stage)]
    return "\n\n".join([*written, provenance(record)])


def recipe_rows(record: Mapping) -> Cells:
    """{temperature: {recipe: {seed: row}}} of the evaluation."""
    return by_recipe(drafted(record, "evaluation"))


def gains_over_paper(record: Mapping, recipe: str, temperature: float) -> list[float]:
    """The gain in block efficiency over the paper's recipe, in percent, for each seed."""
    rates = {
        name: {seed: row["block_efficiency"] for seed, row in rows.items()}
        for name, rows in recipe_rows(record)[temperature].items()
    }
    return gains(rates[recipe], rates["paper"])


def recipes(record: Mapping) -> str:
    """Each recipe over its seeds: what training took, block efficiency, its gain over the paper's recipe."""
    training, lines = trained(record), []
    for temperature, by_name in recipe_rows(record).items():
        for recipe, rows in by_name.items():
            trainings = [training[f"{recipe}_{seed}"] for seed in rows]
            line: dict[str, Any] = {"recipe": recipe, "temperature": temperature}
            for heading, key, digits in (
                ("steps", "steps", 0),
                ("train_seconds", "train_seconds", 0),
                ("held-out acceptance", "validation_acceptance", 3),
            ):
                line[heading] = f"{statistics.fmean(row[key] for row in trainings):.{digits}f}"
            rate = Measured.over_seeds([row["block_efficiency"] for row in rows.values()])
            gain = percent(gains_over_paper(record, recipe, temperature)).plus_minus
            line["compression rate"] = rate.plus_minus
            line["over paper"] = None if recipe == "paper" else gain
            lines.append(line | {"seeds": str(len(rows))})
    return f"{markdown(lines)}\n\n{provenance(record)}"


def spec_bench(record: Mapping) -> str:
    """Compression rate and speed-up of each drafter by subtask; then all questions together."""
    rows = [row for row in record["rows"] if "subtask" in row and row["gamma"]]
    by_drafter: dict[str, dict[str, str]] = {}
    for row in rows:
        name = f"{row['drafter']}, gamma {row['gamma']}, T {row['temperature']:g}"
        scores = f"{row['block_efficiency']:.2f} / {row['speedup']:.2f}x"
        by_drafter.setdefault(name, {"drafter": name})[row["subtask"]] = scores
    overall = [{**row, "ctar": _ctar(row)} for row in rows if row["subtask"] == OVERALL]
    columns = ("drafter", "temperature", "gamma", "threshold", "questions", "block_efficiency", "ctar")
    columns = (*columns, "acceptance_rate", *_SPEED)
    return "\n\n".join(
        [markdown(list(by_drafter.values())), tables.markdown_table(overall, columns), provenance(record)]
    )


def real_drafts(record: Mapping) -> str:
    """Every draft of one real target at every temperature, and its acceptance at the end of its training."""
    stages, sections = trained(record), record["config"]["evaluation"]["drafters"]
    rows = [row for row in rows_of(record, "evaluation") if row["gamma"]]
    lines = []
    for row in rows:
        stage = stages.get(sections[row["drafter"]].get("path", "").removeprefix("stage:"), {})
        acceptance = stage.get("validation_acceptance")
        lines.append({**row, "acceptance when trained": None if acceptance is None else f"{acceptance:.2f}"})
    columns = ("drafter", "acceptance when trained", "temperature", "gamma", "block_efficiency", "acceptance_rate")
    return f"{tables.markdown_table(lines, (*columns, *_SPEED, 'predicted_speedup'))}\n\n{provenance(record)}"
