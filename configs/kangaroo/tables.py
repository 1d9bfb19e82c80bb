"""Tables of Kangaroo's page: speed and parts, ablations, recipes over seeds, Spec-Bench by subtask.

Records are those of `reporting/condense.py`, of the config that bears the record's name in configs/kangaroo.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from configs.distillspec.tradeoffs import Estimate
from specjax.reporting import tables
from specjax.reporting.records import provenance
from specjax.reporting.spec_bench_page import OVERALL

_STEPS = ("draft_step_seconds", "target_step_seconds", "verify_seconds", "rule_seconds")
_PARTS = (*_STEPS, "cost_ratio", "speedup", "predicted_speedup")
_LAYERS = {
    "target_layers_per_token": "target layers",
    "target_layers_per_token_once": "if each ran once a token",
    "target_layers_per_token_padded": "with padding",
    "draft_layers_per_token": "layers of the draft's own",
}


def rows_of(record: Mapping, stage: str) -> list[Mapping]:
    """The rows that a stage of evaluation left."""
    return [row for row in record["rows"] if row.get("stage") == stage and "drafter" in row]


def setting_of(record: Mapping, stage: str, key: str) -> Any:
    """A key ("drafters.adapter.path") of a stage in the record's config, None where it has none.

    In a condensed record a stage may say which other it is `like`, and in which keys it differs.
    """
    section = record["config"].get(stage, {})
    if key in section:
        return section[key]
    found: Any = section
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return setting_of(record, section["like"], key) if found is None and "like" in section else found


def trained_params(record: Mapping) -> dict[str, int]:
    """Parameters of what each training stage trained."""
    return {row["stage"]: row["params"] for row in record["rows"] if "params" in row}


def added_params(record: Mapping, stage: str, drafter: str) -> int | None:
    """Parameters that a drafter has besides its target's: 0 where it has none, None of plain decoding."""
    if setting_of(record, stage, f"drafters.{drafter}.kind") is None:
        return None
    path = setting_of(record, stage, f"drafters.{drafter}.path") or ""
    return trained_params(record).get(path.removeprefix("stage:"), 0)


def main_table(record: Mapping) -> str:
    """Every row of the evaluation with the parameters that its drafter adds; then the parts that were timed."""
    rows = rows_of(record, "evaluation")
    lines = [
        {**row, "added params": _millions(added_params(record, "evaluation", row["drafter"])), "ctar": _ctar(row)}
        for row in rows
    ]
    columns = ("drafter", "added params", "rule", "temperature", "gamma", "threshold", "block_efficiency")
    columns = (*columns, "acceptance_rate", "ctar", "tokens_per_second", "speedup", "identical_to_baseline")
    parts = [tables.markdown_table(lines, columns)]
    timed = [row for row in rows if row.get("draft_step_seconds") is not None]
    if timed:
        said = [{**row, **{key: _milliseconds(row[key]) for key in _STEPS}} for row in timed]
        headings = {key: tables.heading(key).replace(" seconds", " [ms]") for key in _PARTS}
        keys = {key: tables.heading(key) for key in ("drafter", "temperature", "gamma")}
        parts.append("Parts, timed apart, and the speed-up that they predict:")
        parts.append(tables.markdown_table(said, keys | headings))
    counted = [row for row in rows if row.get("target_layers_per_token") is not None]
    if counted:
        keys = ("drafter", "temperature", "gamma", "threshold", *_LAYERS)
        parts.append("Layer executions for each emitted token, counted as they ran, prefill left out:")
        parts.append(tables.markdown_table(counted, {key: _LAYERS.get(key, tables.heading(key)) for key in keys}))
    batches = rows_of(record, "batches")
    if batches:
        columns = ("batch_size", "drafter", "gamma", "threshold", "block_efficiency", "acceptance_rate")
        parts.append("Several prompts at once (greedy):")
        parts.append(
            tables.markdown_table(batches, (*columns, "tokens_per_second", "speedup", "identical_to_baseline"))
        )
    return "\n\n".join([*parts, provenance(record)])


def _millions(count: int | None) -> str | None:
    return None if count is None else f"{count / 1e6:.2f}M" if count >= 10_000 else str(count)


def _milliseconds(seconds: float | None) -> str | None:
    return None if seconds is None else f"{1e3 * seconds:.2f}"


def _ctar(row: Mapping) -> str | None:
    return " ".join(f"{100 * share:.0f}" for share in row["ctar"]) if row["ctar"] else None


def _exit_layer(record: Mapping, stage: str, drafter: str) -> int:
    trained = setting_of(record, stage, f"drafters.{drafter}.path").removeprefix("stage:")
    return setting_of(record, trained, "adapter.exit_layer")


def exit_lines(record: Mapping) -> list[dict]:
    """One line an exit layer: with the threshold, and without one."""
    found: dict[int, dict] = {}
    for row in rows_of(record, "exits"):
        if not row["gamma"]:
            continue
        layer = _exit_layer(record, "exits", row["drafter"])
        kind = "threshold" if row["threshold"] else "fixed"
        found.setdefault(layer, {"exit layer": layer})[kind] = row
    return [found[layer] for layer in sorted(found)]


def _exits(record: Mapping) -> str:
    lines = []
    for line in exit_lines(record):
        said = {"exit layer": line["exit layer"]}
        for kind in ("threshold", "fixed"):
            row = line[kind]
            said |= {
                f"compression rate, {kind}": tables.cell(row, "block_efficiency"),
                f"acceptance, {kind}": tables.cell(row, "acceptance_rate"),
                f"speed-up, {kind}": tables.cell(row, "speedup"),
            }
        lines.append(said)
    return tables.markdown_table(lines, list(lines[0]))


def _grid(record: Mapping) -> str:
    rows = [row for row in rows_of(record, "grid") if row["gamma"]]
    gammas = sorted({row["gamma"] for row in rows})
    lines = []
    for threshold in sorted({row["threshold"] for row in rows}):
        mine = {row["gamma"]: row for row in rows if row["threshold"] == threshold}
        said = {
            f"gamma {gamma}": f"{mine[gamma]['speedup']:.2f}x ({mine[gamma]['block_efficiency']:.2f})"
            for gamma in gammas
        }
        lines.append({"threshold": f"{threshold:g}"} | said)
    return tables.markdown_table(lines, list(lines[0]))


def _kinds(record: Mapping) -> str:
    rows = [row for row in rows_of(record, "kinds") if row["gamma"]]
    lines = [{**row, "params": _millions(added_params(record, "kinds", row["drafter"]))} for row in rows]
    columns = {"drafter": "adapter", "params": "params", "block_efficiency": "compression rate"}
    columns |= {key: tables.heading(key) for key in ("acceptance_rate", "speedup")}
    return tables.markdown_table(lines, columns)


def _temperatures(record: Mapping) -> str:
    rows = [row for row in rows_of(record, "temperatures") if row["gamma"] and row["rule"] == "lossless"]
    columns = {"drafter": "confidence", "temperature": "T", "drafted_tokens": "drafted"}
    columns |= {"block_efficiency": "compression rate"}
    columns |= {key: tables.heading(key) for key in ("acceptance_rate", "speedup")}
    return tables.markdown_table(rows, columns)


def separation(histogram: Mapping[str, Sequence[int]]) -> float | None:
    """The chance that an accepted token had more confidence than a refused one (the area under the ROC curve).

    Within a bin, half of the pairs count. None where there is no pair.
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
    """The greedy row without a stop that drafted most: nothing hides its unsure tokens."""
    rows = [row for row in rows_of(record, "grid") if row["gamma"] and not row["threshold"] and row.get("confidence")]
    return max(rows, key=lambda row: row["gamma"], default=None)


def _confidence(record: Mapping) -> str:
    row = histogram_row(record)
    if row is None:
        return ""
    share = separation(row["confidence"])
    counts = {kind: sum(counts) for kind, counts in row["confidence"].items()}
    return (
        f"Of {counts['accepted']} accepted and {counts['rejected']} refused tokens (greedy, gamma {row['gamma']}, no "
        f"threshold), an accepted one was the surer of a pair with probability {share:.2f}."
    )


def ablations(record: Mapping) -> str:
    """Exit layer, threshold and gamma, architecture, temperature of the confidence, how well confidence separates.

    Of each evaluation that has finished.
    """
    raw = "Confidence at temperature 1 (raw), after temperature (adjusted), not used (fixed)"
    parts = (
        ("exits", "Exit layer (greedy)", _exits),
        ("grid", "Threshold and gamma (greedy): speed-up (compression rate)", _grid),
        ("kinds", "Architecture (greedy)", _kinds),
        ("temperatures", raw, _temperatures),
        ("grid", "Confidence of accepted and refused tokens", _confidence),
    )
    told = [f"{title}\n\n{write(record)}" for stage, title, write in parts if rows_of(record, stage)]
    return "\n\n".join([*told, provenance(record)])


def recipe_values(record: Mapping) -> dict[tuple[str, float], dict[int, Mapping]]:
    """{(recipe, temperature): {seed: row}}; drafters are named RECIPE_SEED."""
    found: dict[tuple[str, float], dict[int, Mapping]] = {}
    for row in rows_of(record, "evaluation"):
        if row["gamma"]:
            recipe, _, seed = row["drafter"].rpartition("_")
            found.setdefault((recipe, row["temperature"]), {})[int(seed)] = row
    return found


def gain_over_paper(record: Mapping, recipe: str, temperature: float) -> Estimate:
    """Relative gain of block efficiency over the paper's recipe, paired by seed, in percent."""
    values = recipe_values(record)
    mine, papers = values[recipe, temperature], values["paper", temperature]
    efficiency = "block_efficiency"
    return Estimate.of([100 * (mine[seed][efficiency] / papers[seed][efficiency] - 1) for seed in sorted(mine)])


def recipes(record: Mapping) -> str:
    """Each recipe over its seeds: block efficiency, its gain over the paper's, what training took."""
    trained = {row["stage"]: row for row in record["rows"] if "train_seconds" in row}
    lines = []
    for (recipe, temperature), rows in recipe_values(record).items():
        mean = lambda key, recipe=recipe, rows=rows: (
            Estimate.of([float(trained[f"{recipe}_{seed}"][key]) for seed in rows]).mean
        )
        gain = gain_over_paper(record, recipe, temperature)
        half = "" if gain.half is None else f" ± {gain.half:.1f}"
        lines.append(
            {
                "recipe": recipe,
                "temperature": temperature,
                "steps": f"{mean('steps'):.0f}",
                "train_seconds": f"{mean('train_seconds'):.0f}",
                "held-out acceptance": f"{mean('validation_acceptance'):.3f}",
                "compression rate": str(Estimate.of([row["block_efficiency"] for row in rows.values()])),
                "over paper": None if recipe == "paper" else f"{gain.mean:+.1f}%{half}",
                "seeds": str(len(rows)),
            }
        )
    return "\n\n".join([tables.markdown_table(lines, list(lines[0])), provenance(record)])


def spec_bench(record: Mapping) -> str:
    """Compression rate and speed-up of each drafter by subtask; then all questions together."""
    rows = [row for row in record["rows"] if "subtask" in row and row["gamma"]]
    name = lambda row: f"{row['drafter']}, gamma {row['gamma']}, T {row['temperature']:g}"
    subtasks = list(dict.fromkeys(row["subtask"] for row in rows))
    lines = []
    for drafter in dict.fromkeys(map(name, rows)):
        mine = {row["subtask"]: row for row in rows if name(row) == drafter}
        said = {s: f"{mine[s]['block_efficiency']:.2f} / {mine[s]['speedup']:.2f}x" for s in subtasks}
        lines.append({"drafter": drafter} | said)
    overall = [{**row, "ctar": _ctar(row)} for row in rows if row["subtask"] == OVERALL]
    columns = ("drafter", "temperature", "gamma", "threshold", "questions", "block_efficiency", "ctar")
    columns = (*columns, "acceptance_rate", "tokens_per_second", "speedup", "identical_to_baseline")
    parts = [tables.markdown_table(lines, list(lines[0])), tables.markdown_table(overall, columns)]
    return "\n\n".join(parts)


def _spec_bench_record(record: Mapping) -> str:
    return f"{spec_bench(record)}\n\n{provenance(record)}"


# The name of a record and of its table -> what writes the table; joined into `sync.TABLES`.
TABLES: dict[str, Callable[[Mapping], str]] = {
    "kangaroo": main_table,
    "kangaroo_ablations": ablations,
    "kangaroo_recipes": recipes,
    "kangaroo_recipes_continued": recipes,
    "kangaroo_spec_bench": _spec_bench_record,
}
