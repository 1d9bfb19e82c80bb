"""Tables of draft design, for the terminal and for the page of configs/draft_design: functions of its records."""

from collections.abc import Callable, Mapping, Sequence

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


def all_tables(record: Mapping) -> str:
    """Every table of a record under its name, and what machine and commit it came from."""
    parts = []
    for name, rows in by_table(record["rows"]).items():
        parts.append(f"{tables.heading(name)}\n\n{tables.markdown_table(rows, _columns(rows))}")
    made = record["environment"]
    source = f"jax {made['jax']}, Python {made['python']}, {made['device_kind']}, commit {made['git_commit'][:12]}"
    return "\n\n".join([*parts, source])


def terminal(rows: Sequence[Mapping]) -> str:
    """Every table of the rows, aligned."""
    parts = by_table(rows).items()
    return "\n".join(
        f"\n{tables.heading(name)}\n{tables.aligned_table(members, _columns(members))}" for name, members in parts
    )


def page_tables(rows: Sequence[Mapping]) -> list[tuple[str, list[page.Table]]]:
    """(title, [table]) of each table of the rows, as sections of a report."""
    found = []
    for name, members in by_table(rows).items():
        keys = _columns(members)
        columns = [page.Column(tables.heading(key), tables.is_text(members, key)) for key in keys]
        lines = [[tables.cell(row, key) for key in keys] for row in members]
        found.append((tables.heading(name).capitalize(), [page.Table(columns, lines)]))
    return found


def _columns(rows: Sequence[Mapping]) -> list[str]:
    """What is printed of rows: not the stage that they came from, nor lists."""
    return [key for key, value in rows[0].items() if key != "stage" and not isinstance(value, (Mapping, list))]


def pruning(record: Mapping) -> str:
    """What was pruned to what, and each recovered draft against the one from scratch, prompt by prompt."""
    compared = [
        {
            **{key: row[key] for key in ("drafter", "against", "temperature", "gamma")},
            "ratio of block efficiencies": f"{row['block_efficiency_ratio']:.3f}",
            "95% interval": "{:.3f} to {:.3f}".format(*row["block_efficiency_ratio_ci"]),
        }
        for row in record["comparisons"]
    ]
    return f"{tables.markdown_table(compared, list(compared[0]))}\n\n{all_tables(record)}"


# The name of a record and of its table -> what writes the table; joined into `sync.TABLES`.
TABLES: dict[str, Callable[[Mapping], str]] = {
    "design_published": all_tables,
    "design_profile": all_tables,
    "design_study": all_tables,
    "design_pruning": pruning,
}
