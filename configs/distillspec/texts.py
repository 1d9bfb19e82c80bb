"""The tables of `real.py` and `on_policy.py`: drafts of a real target by the text that they learned from, and gains."""

import statistics
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from configs.distillspec import on_policy, real
from configs.records.claims import Measured, Measures
from configs.records.rows import gains, markdown, percent, provenance, trained

FIXED = "ground_truth"
ARMS = tuple(dict.fromkeys((*real.ARMS, *on_policy.ARMS)))
# The setting that the claims are judged by.
RULE, GAMMA = "lossless", 4


class Arm(NamedTuple):
    """One way to train a draft; `text` is one of `ARMS`."""

    draft: str
    text: str
    divergence: str


def arm_of(stage: str) -> tuple[Arm, int] | None:
    """The arm and the seed of a training stage DRAFT_TEXT_DIVERGENCE_SEED; None for other stages."""
    for text in ARMS:
        draft, found, rest = stage.partition(f"_{text}_")
        divergence, _, seed = rest.rpartition("_")
        if found and divergence and seed.isdigit():
            return Arm(draft, text, divergence), int(seed)
    return None


def efficiencies(record: Mapping, temperature: float, gamma: int, rule: str = RULE) -> dict[Arm, dict[int, float]]:
    """Expected tokens per target call of each arm, by seed."""
    values: dict[Arm, dict[int, float]] = {}
    for row in _scored(record, temperature):
        named = arm_of(_stage(row))
        if named and (row["gamma"], row["rule"]) == (gamma, rule):
            values.setdefault(named[0], {})[named[1]] = row["block_efficiency"]
    return values


def gains_over_fixed(record: Mapping, divergence: str = "forward_kl") -> Measures:
    """Gains of the other texts over fixed text at equal steps, paired by seed, for each draft and temperature."""
    measures = {}
    for temperature in _temperatures(record):
        values = efficiencies(record, temperature, GAMMA)
        for arm, by_seed in values.items():
            fixed = values.get(arm._replace(text=FIXED), {})
            if arm.text != FIXED and arm.divergence == divergence and fixed:
                measures[f"{arm.text}, {arm.draft}, T {temperature:g}"] = percent(gains(by_seed, fixed))
    return measures


def compared(record: Mapping) -> str:
    """Every arm at every temperature: tokens per call over its seeds, gains over the start and over fixed text, or in
    a study without it over the target's stored text."""
    lines = [line for temperature in _temperatures(record) for line in _lines(record, temperature)]
    rows = _scored(record)
    texts = {f"{row['tokens']:,} tokens of {row['texts']} texts at T {row['temperature']:g}" for row in rows}
    seeds = {named[1] for stage in trained(record) if (named := arm_of(stage))}
    about = (
        f"Expected tokens per target call at gamma {GAMMA} on {' and '.join(sorted(texts))}; {len(seeds)} seeds, "
        "gains paired by seed with 95% intervals; seconds of one training, with the text that it writes."
    )
    return f"{markdown(lines)}\n\n{about}\n\n{provenance(record)}"


def _lines(record: Mapping, temperature: float) -> Iterator[dict]:
    trainings = trained(record)
    values = efficiencies(record, temperature, GAMMA)
    starts = {_stage(row): row for row in _scored(record, temperature) if (row["gamma"], row["rule"]) == (GAMMA, RULE)}
    base, name = (FIXED, "fixed text") if any(arm.text == FIXED for arm in values) else ("target", "the stored text")
    for arm, by_seed in values.items():
        start = starts.get(f"start_{arm.draft}", starts.get(arm.draft))
        others = values.get(arm._replace(text=base), {})
        over_start = gains(by_seed, dict.fromkeys(by_seed, start["block_efficiency"])) if start else []
        stages = [trainings[f"{arm.draft}_{arm.text}_{arm.divergence}_{seed}"] for seed in by_seed]
        yield {
            "draft": arm.draft,
            "text": arm.text,
            "divergence": arm.divergence,
            "temperature": temperature,
            "tokens per call": str(Measured.over_seeds(list(by_seed.values()))),
            "over the start": percent(over_start),
            f"over {name}": percent(gains(by_seed, others)) if others and arm.text != base else None,
            "seconds": statistics.fmean(row["train_seconds"] for row in stages),
        }


def _scored(record: Mapping, temperature: float | None = None) -> list[Mapping]:
    rows = [row for row in record["rows"] if row.get("table") == "acceptance"]
    return [row for row in rows if temperature in (None, row["temperature"])]


def _temperatures(record: Mapping) -> list[float]:
    return sorted({row["temperature"] for row in _scored(record)})


def _stage(row: Mapping) -> str:
    """The stage that trained the draft of a row."""
    return row["draft"].removeprefix("stage:")
