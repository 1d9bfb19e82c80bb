"""The table of configs/evaluate/README.md: drafts of one real target, trained alike, on the same questions."""

from collections.abc import Mapping

from configs.records.rows import markdown, provenance, trained


def drafts(record: Mapping) -> str:
    """Tokens per target call and speed-up of every draft at every temperature, and its acceptance in training."""
    stages, sections = trained(record), record["config"]["evaluation"]["drafters"]
    lines = []
    for row in record["rows"]:
        if not row.get("gamma"):
            continue
        stage = sections[row["drafter"]].get("path", "").removeprefix("stage:")
        identical = row["identical_to_baseline"]
        lines.append(
            {
                "draft": row["drafter"],
                "acceptance when trained": f"{stages[stage]['validation_acceptance']:.2f}" if stage in stages else "",
                "temperature": f"{row['temperature']:g}",
                "gamma": row["gamma"],
                "tokens per target call": _with_interval(row["block_efficiency"], row["block_efficiency_ci"]),
                "speed-up": _with_interval(row["speedup"], row["speedup_ci"]),
                "same text": f"{identical['prompts']} of {row['prompts']}" if identical else "",
            }
        )
    return f"{markdown(lines)}\n\n{provenance(record)}"


def _with_interval(value: float, interval) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(value, *interval)


TABLES = {"real_drafts_smollm2": drafts}
FIGURES = {}
CLAIMS = {}
