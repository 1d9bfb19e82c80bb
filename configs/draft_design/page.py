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


def advice_checked(record: Mapping) -> str:
    """What was advised for each temperature and batch size, what was measured, and how often it was right."""
    verdicts = [row for row in record["rows"] if row.get("table") == "verdicts"]
    lines = [
        {
            "temperature": record["config"][row["stage"]]["temperature"],
            "batch size": row["batch_size"],
            "advised": _named(row["draft"], row["gamma"]),
            "predicted": f"{row['predicted_speedup']:.2f}",
            "measured": f"{row['measured_speedup']:.2f}",
            "fastest": _named(row["fastest_draft"], row["fastest_gamma"]),
            "share of the fastest": f"{row['share_of_fastest']:.2f}",
        }
        for row in verdicts
    ]
    right = sum(row["right"] for row in verdicts)
    counted = f"Within 5% of the fastest in {right} of {len(verdicts)} settings."
    return f"{markdown(lines)}\n\n{counted}\n\n{provenance(record)}"


def block_rule(record: Mapping) -> str:
    """Expected tokens per target call of each draft with both exact rules, and their ratio paired by text."""
    rows = [row for row in record["rows"] if row.get("table") == "acceptance"]
    lossless = {_setting(row): row for row in rows if row["rule"] == "lossless"}
    lines = []
    for row in rows:
        if row["rule"] == "block" and row["temperature"]:  # at temperature 0 both rules accept the same tokens
            low, high = row["over_lossless_ci"]
            lines.append(
                {"draft": row["draft"].removeprefix("stage:"), "T": f"{row['temperature']:g}", "gamma": row["gamma"]}
                | {"tokens": f"{row['tokens']:,}", "lossless": f"{lossless[_setting(row)]['block_efficiency']:.3f}"}
                | {"block": f"{row['block_efficiency']:.3f}"}
                | {"block over lossless": f"{row['over_lossless']:.3f} [{low:.3f}, {high:.3f}]"}
            )
    return f"{markdown(lines)}\n\n{provenance(record)}"


def _setting(row: Mapping) -> tuple:
    return row["draft"], row["gamma"], row["temperature"]


def _named(draft: str | None, gamma: int) -> str:
    return f"{'n-gram' if draft == 'ngram' else 'the draft'}, {gamma} tokens" if draft else "plain"


TABLES = {
    "advice_quickstart": advice_checked,
    "real_advice_smollm2": advice_checked,
    "real_block_smollm2": block_rule,
    "design_published": all_tables,
    "design_profile": all_tables,
    "design_study": all_tables,
    "design_pruning": pruning,
}
FIGURES = {}
CLAIMS = {"design_claims": claims.CLAIMS}
