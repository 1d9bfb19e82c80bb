"""Rows with a key `table` that names their table: printed in the terminal, and as sections of a report."""

from collections.abc import Mapping, Sequence

from specjax.reporting import page, tables

# Columns that need another format than three digits.
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


def by_table(rows: Sequence[Mapping]) -> dict[str, list[dict]]:
    """The printed form of the rows of each table, in order."""
    members: dict[str, list[dict]] = {}
    for row in rows:
        if "table" in row:
            exact = {key: form.format(row[key]) for key, form in _FORMATS.items() if row.get(key) is not None}
            members.setdefault(row["table"], []).append({k: v for k, v in row.items() if k != "table"} | exact)
    return members


def terminal(rows: Sequence[Mapping]) -> str:
    """Every table of the rows, aligned."""
    parts = by_table(rows).items()
    return "\n".join(
        f"\n{tables.heading(name)}\n{tables.aligned_table(members, columns_of(members))}" for name, members in parts
    )


def page_tables(rows: Sequence[Mapping]) -> list[tuple[str, list[page.Table]]]:
    """(title, [table]) for each table of the rows, as sections of a report."""
    return [
        (tables.heading(name).capitalize(), [page.rows_table(members, columns_of(members))])
        for name, members in by_table(rows).items()
    ]


def columns_of(rows: Sequence[Mapping]) -> list[str]:
    """The keys of rows that are printed: neither the stage nor nested values."""
    return [key for key, value in rows[0].items() if key != "stage" and not isinstance(value, (Mapping, list))]
