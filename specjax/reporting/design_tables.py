"""Tables of draft design, for the terminal and for the page of configs/draft_design: functions of its records."""

from collections.abc import Callable, Mapping, Sequence

from specjax.reporting import tables

# Columns of which three digits say too little.
_FORMATS = {
    "published_tokens_per_second": "{:.2f}",
    "computed_tokens_per_second": "{:.2f}",
    "off_by": "{:+.2%}",
    "kv_mebibytes": "{:.0f}",
    "parameters": "{:,}",
}


def shown(row: Mapping) -> dict:
    """A row as it is printed."""
    exact = {key: form.format(row[key]) for key, form in _FORMATS.items() if row.get(key) is not None}
    return {**{key: value for key, value in row.items() if key != "table"}, **exact}


def by_table(rows: Sequence[Mapping]) -> dict[str, list[dict]]:
    """The rows to print of each table, in order."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        if "table" in row:
            found.setdefault(row["table"], []).append(shown(row))
    return found


def all_tables(record: Mapping) -> str:
    """Every table of a record under its name, and what machine and commit it came from."""
    parts = []
    for name, rows in by_table(record["rows"]).items():
        columns = [key for key in rows[0] if key != "stage" and not isinstance(rows[0][key], (Mapping, list))]
        parts.append(f"{tables.heading(name)}\n\n{tables.markdown_table(rows, columns)}")
    made = record["environment"]
    source = f"jax {made['jax']}, Python {made['python']}, {made['device_kind']}, commit {made['git_commit'][:12]}"
    return "\n\n".join([*parts, source])


# The name of a record and of its table -> what writes the table; joined into `sync.TABLES`.
TABLES: dict[str, Callable[[Mapping], str]] = {"design_published": all_tables}
