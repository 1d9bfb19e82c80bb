"""The tables of cost reports in configs/plan/README.md, by record."""

from collections.abc import Mapping

from specjax.planning.tables import gib, mesh_text, roofline_line, seconds, stage_line, step_line, table
from specjax.reporting.tables import markdown_table


def steps(record: Mapping) -> str:
    """The cost of each step, its least time on other chips, and the smallest slices."""
    rows = record["rows"]
    costs = table(map(step_line, rows), markdown_table)
    times = table([roofline_line(row) for row in rows if "roofline" in row], markdown_table)
    return "\n\n".join([costs, times, "\n".join(f"- {stage_line(summary)}" for summary in record["stages"])])


def scaling(record: Mapping) -> str:
    """On-policy distillation with the same number of rows per chip: communication and compute by number of chips."""
    stages: dict[str, list[Mapping]] = {}
    for row in record["rows"]:
        stages.setdefault(row["stage"], []).append(row)
    lines = []
    for rows in stages.values():
        chip = rows[0]["slice"].split(":")[0]
        parts = ("compute", "memory", "communication")
        total = {part: sum(row["roofline"][chip][part] for row in rows) for part in parts}
        ratio = total["communication"] / max(total["compute"], total["memory"])
        lines.append(
            {
                "chips": rows[0]["chips"],
                "mesh": mesh_text(rows[0]),
                "peak GiB": gib(max(row["peak_bytes"] for row in rows)),
                **{part: seconds(total[part]) for part in parts},
                "communication / the larger of the two": f"{ratio:.3f}",
            }
        )
    return markdown_table(lines, list(lines[0]))


PLANNED = ("llama_65b", "vicuna_13b", "t5_xxl", "llama3_70b", "qwen3_30b_a3b", "gpt_oss_120b")
TABLES = {f"plan_{pair}": steps for pair in PLANNED}
TABLES["plan_scaling"] = scaling
FIGURES = {}
CLAIMS = {}
