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


REPRODUCED, NOT_REPRODUCED = "reproduced in shape", "not reproduced"


def claims(rows: Sequence[Mapping]) -> list[dict]:
    """What a record says of the claims that it speaks to: claim, what was found, verdict by a stated bound."""
    found = []
    of = lambda name: [row for row in rows if row.get("table") == name]

    def add(claim: str, bound: str, said: str, holds: bool, yes: str = REPRODUCED, no: str = NOT_REPRODUCED) -> None:
        found.append({"claim": claim, "bound": bound, "found": said, "verdict": yes if holds else no})

    if of("consistency"):
        worst = max(abs(row["off_by"]) for row in of("consistency"))
        yes = "consistent; arithmetic, no reproduction"
        add("the published rows follow from the model", "within 0.5%", f"within {worst:.2%}", worst < 5e-3, yes)
    for row in of("lines"):
        if (row["series"], row["against"]) == ("depth at fixed parameters", "layers"):
            said = f"R² {row['r_squared']:.3f}, {row['milliseconds_for_one_more']:.3g} ms a layer"
            holds = row["r_squared"] >= 0.95 and row["milliseconds_for_one_more"] > 0
            add("at fixed parameters a step's time is linear in depth", "R² >= 0.95, rising", said, holds)
        if (row["series"], row["against"]) == ("width at fixed depth", "width"):
            said = f"slowest over fastest {row['slowest_over_fastest']:.2f}"
            flat = row["slowest_over_fastest"] <= 1.25
            add("at fixed depth a step's time is nearly flat in width", "at most 1.25", said, flat)
    for row in of("predicted_against_measured"):
        said = f"{row['within_10_percent']:.0%} of {row['configurations']}, median error {row['median_error']:.1%}"
        holds = row["within_10_percent"] >= 0.9 and row["median_error"] < 0.04
        claim = f"throughput is predicted from parts, batch {row['batch_size']}"
        add(claim, "90% within 10%, median below 4%", said, holds, "holds", "does not hold")
    for row in of("advice"):
        if "within_5_percent" in row:
            said = (
                f"{row['within_5_percent']:.0%} of {row['settings']}, least {row['least_of_advised_over_fastest']:.2f}"
            )
            holds = row["within_5_percent"] == 1 and row["settings"] >= 10
            add(
                "advice is as good as trying everything",
                "within 5%, 10 settings",
                said,
                holds,
                "holds",
                "does not hold",
            )
    return [*found, *_study_claims(of)]


def _study_claims(of: Callable[[str], list[Mapping]]) -> list[dict]:
    """Of each group of drafts of equal parameters: which depth is fastest, and what perplexity says of throughput."""
    found = []
    groups: dict[tuple, list[Mapping]] = {}
    for row in of("depth_at_equal_parameters"):
        groups.setdefault((row["task"], row["recipe"], row["temperature"]), []).append(row)
    for (task, recipe, temperature), rows in groups.items():
        best = max(rows, key=lambda row: row["tokens_per_second"])
        deepest = max(row["layers"] for row in rows)
        verdict = REPRODUCED if best["layers"] < deepest else NOT_REPRODUCED
        said = (
            f"{best['layers']} of {deepest} layers; throughput {best['tokens_per_second_over_deepest']} of the deepest"
        )
        claim = f"few layers are fastest at equal parameters: {task}, {recipe}, T {temperature:g}"
        found.append({"claim": claim, "bound": "fewer than the deepest", "found": said, "verdict": verdict})
    for row in of("perplexity_correlation"):
        if row["with"] == "tokens per second" and row["spearman"] is not None:
            weak = abs(row["spearman"]) < 0.5
            claim = f"perplexity says little of throughput: {row['task']}, T {row['temperature']:g}"
            said = f"Spearman {row['spearman']:.2f}, {row['drafts']} drafts"
            verdict = REPRODUCED if weak else NOT_REPRODUCED
            found.append({"claim": claim, "bound": "|Spearman| below 0.5", "found": said, "verdict": verdict})
    return found


def all_tables(record: Mapping) -> str:
    """What a record claims, every table of it under its name, and what machine and commit it came from."""
    claimed = claims(record["rows"])
    parts = [tables.markdown_table(claimed, list(claimed[0]))] if claimed else []
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
