"""DistillSpec's claims (arXiv 2310.08461) beside what the committed records say: the table on the configs' page.

What the paper says is typed here, with its place; what is ours is computed from the record that a claim names.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from specjax.reporting import distillspec_tables as written
from specjax.reporting import tables

REPRODUCED, NOT_REPRODUCED, NOT_TESTABLE = "reproduced in shape", "not reproduced", "not testable here"
NOT_MEASURED = "not measured yet"


@dataclasses.dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
      paper: what it says, with its number.
      place: where.
      record: the one that it is judged by.
      ours: what the record says, with interval and seeds.
      verdict: one of the three words above, or NOT_MEASURED where the record lacks the stage.
    """

    paper: str
    place: str
    record: str
    ours: Callable[[Mapping], str]
    verdict: Callable[[Mapping], str]


def _calls_saved(record: Mapping) -> str:
    lines = [line for line in written.lossy_points(record) if line["by"] == "target calls"]
    told = [f"T {line['temperature']:g}, {line['draft']}: {line['lossy rule']}" for line in lines]
    return "; ".join(f"{who} ({line.get('against lossless', '–')})" for who, line in zip(told, lines, strict=True))


def _saved_everywhere(record: Mapping) -> str:
    lines = [line for line in written.lossy_points(record) if line["by"] == "target calls"]
    return REPRODUCED if all(line.get("against lossless", "+").startswith("-") for line in lines) else NOT_REPRODUCED


def _exponent_is_best(record: Mapping) -> str:
    lines = [line for line in written.lossy_points(record) if line["by"] == "target calls"]
    won = all(line["lossy rule"].startswith("lenient_exp") for line in lines)
    return REPRODUCED if won else NOT_REPRODUCED


def _fronts(record: Mapping) -> str:
    counts = written.lossy_fronts(record)
    return "settings on the front of quality and target calls: " + ", ".join(f"{n} {c}" for n, c in counts.items())


def _garden_verdict(record: Mapping) -> str:
    best = written.garden_best(record)
    if best is None:
        return NOT_MEASURED
    combined = best.model.endswith("_kd") and best.decoded == "DistillSpec"
    return REPRODUCED if combined else NOT_REPRODUCED


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "lossy rules trade little quality for latency: many tokens do not matter for the outcome",
        "abstract; figure 6, GSM8K",
        "lossy",
        _calls_saved,
        _saved_everywhere,
    ),
    Claim(
        "of p/ε, p/ε² and p^ε only the last gives a usable curve of quality against block efficiency",
        "figure 6, GSM8K",
        "lossy",
        _fronts,
        _exponent_is_best,
    ),
    Claim(
        "distil the target from a larger one, then its draft for it: 6 to 10 times less latency at almost no loss "
        "(XSum 17.3 to 2.7 at ROUGE-2 23.1 to 23.0; GSM8K 15.0 to 1.4 at accuracy 33.1 to 34.8)",
        "abstract; model garden",
        "garden",
        written.garden_line,
        _garden_verdict,
    ),
)


def claims(records: Mapping[str, Mapping]) -> str:
    """The table of claims; of a record that is not there, only what the paper says."""
    return claims_table(CLAIMS, records)


def claims_table(all_claims: Sequence[Claim], records: Mapping[str, Mapping]) -> str:
    """One line a claim."""
    lines = []
    for claim in all_claims:
        record = records.get(claim.record)
        told = (None, NOT_MEASURED) if record is None else (claim.ours(record), claim.verdict(record))
        lines.append({"the paper": claim.paper, "where": claim.place, "ours": told[0], "verdict": told[1]})
    return tables.markdown_table(lines, list(lines[0]))
