"""Writes the tables of the README and of the configs' pages from the committed records: no number is typed by hand.

    python -m configs.records.sync README.md configs/*/README.md configs/records

A record is `NAME.json`; its table goes between `<!-- table:NAME -->` and `<!-- /table -->`, on the page that has these
marks. A record that is not there leaves its table as it is. Of a record with a figure, `NAME.png` is drawn beside the
page of its table. An overview is made of all records together.
"""

import inspect
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.distillspec import claims as distillspec_claims
from configs.distillspec import figures as distillspec_figures
from configs.distillspec import recipe_sweep
from configs.distillspec import tables as distillspec_tables
from configs.draft_design import claims as design_claims
from configs.draft_design import tables as design_tables
from configs.kangaroo import claims as kangaroo_claims
from configs.kangaroo import figures as kangaroo_figures
from configs.kangaroo import tables as kangaroo_tables
from specjax.planning import tables as plan_tables
from specjax.reporting import records, tables
from specjax.runtime.errors import UserError


def quickstart(record: Mapping) -> str:
    """The evaluate rows of a results.json, and its paired comparisons where it has any."""
    rows = [row for row in record["rows"] if "block_efficiency" in row]
    parts = [tables.markdown_table(rows, tables.summary_columns(rows))]
    if record.get("comparisons"):
        compared = [_comparison(row) for row in record["comparisons"]]
        parts.append(tables.markdown_table(compared, list(compared[0])))
    return "\n\n".join([*parts, records.provenance(record)])


def _comparison(row: Mapping) -> dict:
    settings = {key: row[key] for key in ("drafter", "against", "rule", "temperature", "gamma")}
    settings["rule"] = tables.rule_label(row)
    ratio, interval = row["block_efficiency_ratio"], row["block_efficiency_ratio_ci"]
    said = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
    return settings | {"ratio of block efficiencies [95%]": f"{ratio:.3f}{said}"}


def study(record: Mapping) -> str:
    """Each recipe over its seeds: mean block efficiency, the seeds' values, and its gain over each control.

    Gains are paired: a seed's recipe against the same seed's control. The record is the results.json of
    configs/quickstart_controls.py, whose stages and drafters are named RECIPE_SEED.
    """
    groups: dict[tuple, dict[str, list[Mapping]]] = {}
    for row in _study_rows(record):
        recipes = groups.setdefault((row["temperature"], row["gamma"]), {})
        recipes.setdefault(row["recipe"], []).append(row)
    lines = []
    for (temperature, gamma), recipes in groups.items():
        for recipe, rows in recipes.items():
            values = {row["seed"]: row["block_efficiency"] for row in rows}
            line = {
                "recipe": recipe,
                "temperature": temperature,
                "gamma": gamma,
                "steps": _mean(rows, "steps"),
                "train_seconds": _mean(rows, "train_seconds"),
                "block_efficiency": statistics.fmean(values.values()),
                "by seed": " ".join(f"{values[seed]:.3f}" for seed in sorted(values)),
            }
            for control in (name for name in recipes if name.startswith("control")):
                line[f"over {control}"] = _gain(values, recipes[control]) if control != recipe else None
            lines.append(line)
    columns = list(dict.fromkeys(key for line in lines for key in line))
    return tables.markdown_table(lines, columns)


def _study_rows(record: Mapping) -> list[dict]:
    """Each evaluated draft with its recipe, its seed and what its training took."""
    trained = {row["stage"]: row for row in record["rows"] if "train_seconds" in row}
    rows = []
    for row in record["rows"]:
        if row.get("drafter") not in trained:
            continue
        recipe, _, seed = row["drafter"].rpartition("_")
        training = {key: trained[row["drafter"]][key] for key in ("steps", "train_seconds")}
        settings = {key: row[key] for key in ("temperature", "gamma", "block_efficiency")}
        rows.append({"recipe": recipe, "seed": int(seed), **settings, **training})
    return rows


def _mean(rows: Sequence[Mapping], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key) is not None]
    return statistics.fmean(values) if values else None


def _gain(values: Mapping[int, float], control: Sequence[Mapping]) -> str | None:
    """Mean and range of the gain in percent, over the seeds that both have."""
    theirs = {row["seed"]: row["block_efficiency"] for row in control}
    gains = [100 * (values[seed] / theirs[seed] - 1) for seed in values if seed in theirs]
    if not gains:
        return None
    return f"{statistics.fmean(gains):+.1f}% ({min(gains):+.1f} to {max(gains):+.1f})"


def benchmark(record: Mapping) -> str:
    """One table for each benchmark; nested values are left to the record."""
    parts: dict[str, list[Mapping]] = {}
    for row in record["rows"]:
        parts.setdefault(row["benchmark"], []).append(row)
    written = []
    for name, rows in parts.items():
        flat = [key for key, value in rows[0].items() if not isinstance(value, (Mapping, list))]
        columns = [key for key in flat if key != "benchmark"]
        written.append(f"{tables.heading(name)}\n\n{tables.markdown_table(rows, columns)}")
    return "\n\n".join(written)


def peers(record: Mapping) -> str:
    """Tokens per second of each system at its best setting, and what was run."""
    table = tables.markdown_table(record["rows"], ("system", "setting", "tokens_per_second"))
    run = (
        f"{record['prompts']} prompts of {record['prompt_tokens']} tokens, "
        f"{record['max_new_tokens']} new tokens, "
        f"{record['cpus']} CPU cores, {'trained' if record['trained'] else 'untrained'} pair."
    )
    return f"{table}\n\n{run}"


def peers_distillation(record: Mapping) -> str:
    """Tokens written and learned from per second by each trainer's on-policy step, pair by pair, and what was run."""
    settings = ("pair", "batch_size", "system", "setting")
    columns = (*settings, "tokens_per_second", "step_seconds", "generation_seconds", "ratio")
    pairs = "; ".join(
        f"{name}: target {target[0]} x {target[1]}, draft {draft[0]} x {draft[1]}"
        for name, (target, draft) in record["pairs"].items()
    )
    run = (
        f"Layers x width of {pairs}. Vocabulary {record['vocabulary']}, "
        f"{record['prompt_tokens']} prompt and {record['new_tokens']} new tokens, JSD, float32, random weights, "
        f"{record['cpus']} CPU cores."
    )
    return f"{tables.markdown_table(record['rows'], columns)}\n\n{run}"


# The name of a record and of its table -> what writes the table.
TABLES: dict[str, Callable[[Mapping], str]] = {
    "quickstart": quickstart,
    "study": study,
    "benchmark": benchmark,
    "peers": peers,
    "peers_distillation": peers_distillation,
    **design_tables.TABLES,
    **distillspec_tables.TABLES,
    **kangaroo_tables.TABLES,
    **plan_tables.TABLES,
    **recipe_sweep.TABLES,
}

# The name of a table -> what writes it from all records that are there, by their names.
OVERVIEWS: dict[str, Callable[[Mapping[str, Mapping]], str]] = {
    "claims": distillspec_claims.claims,
    "kangaroo_claims": kangaroo_claims.claims,
    "design_claims": design_claims.claims,
}

# The name of a record -> what draws its figure to a path.
FIGURES: dict[str, Callable[[Mapping, Path], None]] = {
    **distillspec_figures.FIGURES,
    **kangaroo_figures.FIGURES,
    **recipe_sweep.FIGURES,
}


def synced(readme_text: str, directory: str | Path) -> str:
    """A page's text with the table of every record in `directory` that it has a place for.

    Raises:
      UserError: for a damaged record, one that lacks what its table shows, and missing markers.
    """
    written = {}
    for name, write in TABLES.items():
        path = Path(directory) / f"{name}.json"
        if _has_table(readme_text, name) and path.is_file():
            written[name] = _figure(name) + _of_record(write, path)
    for name, write in OVERVIEWS.items():
        if _has_table(readme_text, name):
            paths = {made: Path(directory) / f"{made}.json" for made in TABLES}
            written[name] = write({made: _read(path) for made, path in paths.items() if path.is_file()})
    return tables.sync_readme(readme_text, written)


def draw_figures(page: Path, directory: str | Path) -> list[Path]:
    """Draws, beside a page, the figure of every record in `directory` whose table is on it; returns their paths.

    Raises:
      UserError: as `synced` does.
    """
    text, drawn = page.read_text(encoding="utf-8"), []
    for name, draw in FIGURES.items():
        path = Path(directory) / f"{name}.json"
        if _has_table(text, name) and path.is_file():
            drawn.append(page.parent / f"{name}.png")
            _of_record(lambda record, draw=draw: draw(record, drawn[-1]), path)
    return drawn


def _figure(name: str) -> str:
    """The lines that show a record's figure above its table; nothing where it has none."""
    if name not in FIGURES:
        return ""
    said = inspect.getdoc(FIGURES[name]).splitlines()[0].replace('"', "'")
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{name}.dark.png">'
    return f'<picture>{dark}<img src="{name}.png" alt="{said}"></picture>\n\n'


def _has_table(page: str, name: str) -> bool:
    return tables.OPENING.format(name=name) in page


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); write the record again") from error


def _of_record(write: Callable[[Mapping], Any], path: Path) -> Any:
    record = _read(path)
    try:
        return write(record)
    except KeyError as error:
        raise UserError(f"{path} lacks {error}, which its table shows; write the record again") from error


def main(arguments: Sequence[str]) -> int:
    """Rewrites the pages; returns the exit code, 2 for a mistake of the user's."""
    if len(arguments) < 2:
        print("error: give the pages, such as README.md, and then the folder of the records", file=sys.stderr)
        return 2
    *pages, directory = map(Path, arguments)
    return max(_rewritten(path, directory) for path in pages)


def _rewritten(path: Path, directory: Path) -> int:
    try:
        old = path.read_text(encoding="utf-8")
        new = synced(old, directory)
        if new != old:
            records.write_atomically(path, new)
        draw_figures(path, directory)
    except OSError as error:
        print(f"error: {path} cannot be rewritten ({error}); name a README that exists", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
