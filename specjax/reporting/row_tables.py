"""Prints rows that have a key `table`, which names their table, in the terminal and as sections of a report."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePath

from specjax.reporting import page, tables

# Formats of columns that are not printed with three digits.
_FORMATS = {
    "published_tokens_per_second": "{:.2f}",
    "computed_tokens_per_second": "{:.2f}",
    "off_by": "{:+.2%}",
    "kv_mebibytes": "{:.4g}",
    "parameters": "{:,}",
    "r_squared": "{:.3f}",
    "spread": "{:.1%}",
    "block_efficiency_within": "{:.1%}",
    "over_lossless": "{:.3f}",
    "decoded_within": "{:.1%}",
    "within_10_percent": "{:.0%}",
    "within_5_percent": "{:.0%}",
    "median_error": "{:.1%}",
    "largest_error": "{:.1%}",
}


# Columns with names or paths of checkpoints and texts.
_PATHS = ("draft", "fastest_draft", "text")


def by_table(rows: Sequence[Mapping]) -> dict[str, list[dict]]:
    """The rows of each table, by its name, with the columns of `_FORMATS` formatted as text, and paths shortened."""
    members: dict[str, list[dict]] = {}
    names = _shortened({row[key] for row in rows for key in _PATHS if row.get(key)})
    for row in rows:
        if "table" in row:
            exact = {key: form.format(row[key]) for key, form in _FORMATS.items() if row.get(key) is not None}
            exact |= {key: names[row[key]] for key in _PATHS if row.get(key)}
            members.setdefault(row["table"], []).append({k: v for k, v in row.items() if k != "table"} | exact)
    return members


def _shortened(paths: Collection[str]) -> dict[str, str]:
    """For each path its last folders without a final `export`: as few as tell it from the others."""
    parts = {path: [part for part in PurePath(path).parts if part != "export"] for path in paths}
    names: dict[str, str] = {}
    for path, mine in parts.items():
        others = [other for name, other in parts.items() if name != path]
        enough = [n for n in range(1, len(mine) + 1) if all(other[-n:] != mine[-n:] for other in others)]
        names[path] = str(PurePath(*mine[-enough[0] :])) if enough else path
    return names


def terminal(rows: Sequence[Mapping]) -> str:
    """All tables of the rows as aligned text."""
    parts = by_table(rows).items()
    return "\n".join(
        f"\n{tables.heading(name)}\n{tables.aligned_table(members, columns_of(members))}" for name, members in parts
    )


def sections(rows: Sequence[Mapping]) -> list[page.Section]:
    """A section of a report for each table of the rows."""
    blocks = {name: page.rows_table(members, columns_of(members)) for name, members in by_table(rows).items()}
    return [page.Section(tables.heading(name).capitalize(), [block]) for name, block in blocks.items()]


def columns_of(rows: Sequence[Mapping]) -> list[str]:
    """The keys of rows that are printed: all but `stage` and those with nested values."""
    return [key for key, value in rows[0].items() if key != "stage" and not isinstance(value, (Mapping, list))]
