"""Helpers for the tables of all records: tables with all columns, and rows and gains by seed."""

from collections.abc import Iterable, Mapping, Sequence

from configs.records.claims import Measured
from specjax.reporting import tables


def markdown(lines: Sequence[Mapping]) -> str:
    """A Markdown table of every key that occurs in the lines."""
    return tables.markdown_table(lines, list(dict.fromkeys(key for line in lines for key in line)))


def provenance(record: Mapping) -> str:
    """One line with the versions, device and commit of a record, to be printed below its table."""
    made = record["environment"]
    return f"jax {made['jax']}, Python {made['python']}, {made['device_kind']}, commit {made['git_commit'][:12]}"


def trained(record: Mapping) -> dict[str, Mapping]:
    """The row of each training stage, by the stage's name."""
    return {row["stage"]: row for row in record["rows"] if "train_seconds" in row}


# {temperature: {recipe: {seed: row}}}
Cells = dict[float, dict[str, dict[int, Mapping]]]


def by_recipe(rows: Iterable[Mapping]) -> Cells:
    """The rows of drafters that are named RECIPE_SEED, by temperature (in rising order), recipe and seed."""
    cells: Cells = {}
    for row in rows:
        recipe, _, seed = row.get("drafter", "").rpartition("_")
        if recipe and seed.isdigit():
            cells.setdefault(row["temperature"], {}).setdefault(recipe, {})[int(seed)] = row
    return {temperature: cells[temperature] for temperature in sorted(cells)}


def gains(values: Mapping[int, float], others: Mapping[int, float]) -> list[float]:
    """The percentage by which `values` exceed `others`, for each seed that both have."""
    return [100 * (values[seed] / others[seed] - 1) for seed in sorted(values) if seed in others]


def percent(values: Sequence[float]) -> Measured | None:
    """The mean over seeds of gains in percent, with its interval; None without gains."""
    return Measured.over_seeds(values, "+.1f", unit="%") if values else None
