"""Tables of draft design for the page of configs/draft_design: functions of its records."""

from collections.abc import Callable, Mapping

from specjax.reporting import records, tables
from specjax.reporting.row_tables import by_table, columns_of


def all_tables(record: Mapping) -> str:
    """Every table of a record under its name, and what machine and commit it came from."""
    parts = []
    for name, rows in by_table(record["rows"]).items():
        parts.append(f"{tables.heading(name)}\n\n{tables.markdown_table(rows, columns_of(rows))}")
    return "\n\n".join([*parts, records.provenance(record)])


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
