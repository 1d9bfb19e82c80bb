"""The tables of configs/draft_design/README.md, by record, and its claims, by the name of their table."""

from collections.abc import Mapping

from configs.draft_design import claims
from configs.records.rows import markdown, provenance
from specjax.reporting import tables
from specjax.reporting.row_tables import by_table, columns_of


def all_tables(record: Mapping) -> str:
    """Every table of a record, each with its name as title."""
    parts = [
        f"{tables.heading(name)}\n\n{tables.markdown_table(rows, columns_of(rows))}"
        for name, rows in by_table(record["rows"]).items()
    ]
    return "\n\n".join([*parts, provenance(record)])


def pruning(record: Mapping) -> str:
    """Each pruned draft compared with the one from scratch, prompt by prompt; what was pruned to which shape."""
    compared = [
        {key: row[key] for key in ("drafter", "against", "temperature", "gamma")}
        | {
            "ratio of block efficiencies": f"{row['block_efficiency_ratio']:.3f}",
            "95% interval": "{:.3f} to {:.3f}".format(*row["block_efficiency_ratio_ci"]),
        }
        for row in record["comparisons"]
    ]
    return f"{markdown(compared)}\n\n{all_tables(record)}"


TABLES = {
    "design_published": all_tables,
    "design_profile": all_tables,
    "design_study": all_tables,
    "design_pruning": pruning,
}
FIGURES = {}
CLAIMS = {"design_claims": claims.CLAIMS}
