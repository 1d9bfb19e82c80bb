"""DistillSpec's claims (arXiv 2310.08461) beside what the committed records say: the table on the configs' page.

What the paper says is typed here, with its place; what is ours is computed from the record that a claim names.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from configs.distillspec import recipe_sweep
from configs.distillspec import tables as written
from configs.distillspec.tradeoffs import Estimate
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
      stage: of a record that grows stage by stage, the one without which there is nothing to say.
    """

    paper: str
    place: str
    record: str
    ours: Callable[[Mapping], str]
    verdict: Callable[[Mapping], str]
    stage: str = ""

    def measured(self, record: Mapping | None) -> bool:
        """Whether the record, and the stage of it, is there."""
        return record is not None and (not self.stage or any(row.get("stage") == self.stage for row in record["rows"]))


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


def _told(found: Mapping[float, Estimate]) -> str:
    """Gains by temperature."""
    return "; ".join(f"T {at:g}: {recipe_sweep.said(gain)}" for at, gain in found.items()) or "–"


def _by_sign(found: Mapping[float, Estimate], sign: int) -> str:
    """Whether at every temperature the whole interval lies on this side of 0; nothing of a single seed."""
    if not found or any(gain.half is None for gain in found.values()):
        return NOT_MEASURED
    return REPRODUCED if all(sign * gain.mean > gain.half for gain in found.values()) else NOT_REPRODUCED


def _best_over(record: Mapping, other: str) -> dict[float, Estimate]:
    found = {}
    for temperature, cells in recipe_sweep.efficiencies(record).items():
        winner = recipe_sweep.best(cells)
        values = recipe_sweep.gains(cells.get(winner, {}), cells.get(other, {}))
        if values:
            found[temperature] = Estimate.of(values)
    return found


def _gains(record: Mapping) -> str:
    cells = recipe_sweep.efficiencies(record)
    winners = "; ".join(f"T {at:g}: {tables.heading(str(recipe_sweep.best(found)))}" for at, found in cells.items())
    others = ("supervised", "plain_clock")
    told = [f"over {tables.heading(other)}, {_told(_best_over(record, other))}" for other in others]
    return f"best of all ({winners}) {'; '.join(told)}"


def _gains_verdict(record: Mapping) -> str:
    verdicts = {_by_sign(_best_over(record, other), 1) for other in ("supervised", "plain_clock")}
    return verdicts.pop() if len(verdicts) == 1 else NOT_REPRODUCED


def _fixed_worst(record: Mapping) -> tuple[int, int]:
    worst, _ = recipe_sweep.ranks(record)
    return worst.count("fixed"), len(worst)


def _fixed_verdict(record: Mapping) -> str:
    count, of = _fixed_worst(record)
    return NOT_MEASURED if not of else REPRODUCED if count == of else NOT_REPRODUCED


def _tvd_best(record: Mapping) -> tuple[int, int]:
    _, best = recipe_sweep.ranks(record)
    return best.count("total_variation"), len(best)


def _tvd_verdict(record: Mapping) -> str:
    count, of = _tvd_best(record)
    # One of four divergences is best in a quarter of the cases by chance.
    return NOT_MEASURED if not of else REPRODUCED if 4 * count <= of else NOT_REPRODUCED


def _transferred(record: Mapping, places: Sequence[str]) -> dict[str, dict[float, Estimate]]:
    found = {place: recipe_sweep.transferred(record, place, "draft_forward_kl") for place in places}
    return {place: gains for place, gains in found.items() if gains}


def _transfer_claim(paper: str, place: str, places: Sequence[str]) -> Claim:
    told = lambda record: "; ".join(
        f"{tables.heading(where)}, {_told(gains)}" for where, gains in _transferred(record, places).items()
    )

    def verdict(record: Mapping) -> str:
        verdicts = {_by_sign(gains, 1) for gains in _transferred(record, places).values()}
        return NOT_MEASURED if not verdicts else verdicts.pop() if len(verdicts) == 1 else NOT_REPRODUCED

    return Claim(paper, place, "sweep", told, verdict)


def _sweep_claims(record: str) -> tuple[Claim, ...]:
    """The claims about recipes, judged by the sweep of one pair."""
    pair = "encoder-decoder" if record.endswith("encoder_decoder") else "decoder-only"
    compared = lambda cell, other: lambda made: _told(recipe_sweep.over(made, cell, other))
    signed = lambda cell, other, sign: lambda made: _by_sign(recipe_sweep.over(made, cell, other), sign)
    return (
        Claim(f"distilled drafts gain 10 to 45% ({pair})", "abstract; figure 1", record, _gains, _gains_verdict),
        Claim(
            f"fixed data is the worst text for every divergence ({pair})",
            "tables of the recipe sweep",
            record,
            lambda made: "worst in {} of {} (divergence and temperature)".format(*_fixed_worst(made)),
            _fixed_verdict,
        ),
        Claim(
            f"total variation is rarely the best divergence ({pair})",
            "tables of the recipe sweep",
            record,
            lambda made: "best in {} of {} (text and temperature)".format(*_tvd_best(made)),
            _tvd_verdict,
        ),
        Claim(
            f"hard labels of the target's text (SeqKD) are worse than its probabilities ({pair})",
            "comparison of KD algorithms",
            record,
            compared("seqkd", "target_forward_kl"),
            signed("seqkd", "target_forward_kl", -1),
        ),
    )


CLAIMS: tuple[Claim, ...] = (
    *_sweep_claims("sweep"),
    *_sweep_claims("sweep_encoder_decoder"),
    _transfer_claim(
        "a draft distilled on one task gains on others (BigBenchHard: 1.93 to 2.21 greedy, 1.78 to 2.02 at T 1)",
        "abstract; transfer",
        ("docstrings", "arithmetic"),
    ),
    _transfer_claim(
        "it gains 7 to 37% before a larger target that it was not distilled from", "transfer", ("large_target",)
    ),
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
        told = (claim.ours(record), claim.verdict(record)) if claim.measured(record) else (None, NOT_MEASURED)
        lines.append({"the paper": claim.paper, "where": claim.place, "ours": told[0], "verdict": told[1]})
    return tables.markdown_table(lines, list(lines[0]))
