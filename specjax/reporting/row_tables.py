"""Rows that say in which `table` they belong: printed in the terminal, and as sections of a report."""

from collections.abc import Mapping, Sequence

from specjax.reporting import page, tables

# Columns of which three digits say too little.
_FORMATS = {
    "published_tokens_per_second": "{:.2f}",
    "computed_tokens_per_second": "{:.2f}",
    "off_by": "{:+.2%}",
    "kv_mebibytes": "{:.4g}",
    "parameters": "{:,}",
    "r_squared": "{:.3f}",
    "spread": "{:.1%}",
    "within_10_percent": "{:.0%}",
    "within_5_percent": "{:.0%}",
    "median_error": "{:.1%}",
    "largest_error": "{:.1%}",
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


def terminal(rows: Sequence[Mapping]) -> str:
    """Every table of the rows, aligned."""
    parts = by_table(rows).items()
    return "\n".join(
        f"\n{tables.heading(name)}\n{tables.aligned_table(members, columns_of(members))}" for name, members in parts
    )


def page_tables(rows: Sequence[Mapping]) -> list[tuple[str, list[page.Table]]]:
    """(title, [table]) of each table of the rows, as sections of a report."""
    found = []
    for name, members in by_table(rows).items():
        keys = columns_of(members)
        columns = [page.Column(tables.heading(key), tables.is_text(members, key)) for key in keys]
        lines = [[tables.cell(row, key) for key in keys] for row in members]
        found.append((tables.heading(name).capitalize(), [page.Table(columns, lines)]))
    return found


def columns_of(rows: Sequence[Mapping]) -> list[str]:
    """What is printed of rows: not the stage that they came from, nor lists."""
    return [key for key, value in rows[0].items() if key != "stage" and not isinstance(value, (Mapping, list))]
