"""What the throughput model would have advised in each setting of an evaluation, beside what was fastest when all ran.

Whoever is fastest of many was also lucky: both have to be measured again before they are compared.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from specjax.draft_design import throughput
from specjax.reporting import tradeoffs


@dataclasses.dataclass(frozen=True)
class Entry:
    """One way to decode: a drafter at a gamma; plain decoding at gamma 0."""

    drafter: str
    gamma: int

    @classmethod
    def of(cls, row: Mapping) -> "Entry":
        """That of an evaluate row."""
        return cls(row["drafter"], row["gamma"])

    def __str__(self) -> str:
        return f"{self.drafter}, gamma {self.gamma}" if self.gamma else "plain decoding"


@dataclasses.dataclass(frozen=True)
class Contest:
    """One setting, of the drafts of one seed.

    Attributes:
      seed: that the drafts were trained with.
      temperature: of the target.
      batch_size: rows at a time.
      configurations: how many were run, plain decoding among them.
      advised: the entry of highest predicted throughput.
      fastest: the entry of highest measured throughput.
    """

    seed: int
    temperature: float
    batch_size: int
    configurations: int
    advised: Entry
    fastest: Entry

    @property
    def entries(self) -> tuple[Entry, ...]:
        """What to measure again: both, or nothing where they are one."""
        return () if self.advised == self.fastest else (self.advised, self.fastest)

    def row(self, evaluation: str, repeats: Sequence[Sequence[Mapping]]) -> dict:
        """Of the study's table.

        Args:
          evaluation: its name.
          repeats: the evaluate rows of each time that both were measured again; none where they are one.
        """
        speeds = [{Entry.of(row): row["tokens_per_second"] for row in rows} for rows in repeats]
        mean = lambda entry: statistics.fmean(each[entry] for each in speeds) if speeds else None
        ratio = tradeoffs.Estimate.of([each[self.advised] / each[self.fastest] for each in speeds] or [1.0])
        return {
            "table": "advice_checked",
            "evaluation": evaluation,
            "seed": self.seed,
            "temperature": self.temperature,
            "batch_size": self.batch_size,
            "configurations": self.configurations,
            "advised": str(self.advised),
            "fastest": str(self.fastest),
            "repeats": len(speeds),
            "tokens_per_second_of_advised": mean(self.advised),
            "tokens_per_second_of_fastest": mean(self.fastest),
            "advised_over_fastest": ratio.mean,
            "with_interval": str(ratio),
        }


def contests(measured: Sequence[Mapping], seed_of: Mapping[str, int], seeds: Sequence[int]) -> list[Contest]:
    """One for each seed, temperature and batch size.

    The advice knows the parts of a block, how often each draft's tokens stood at its largest gamma, and how fast plain
    decoding was. Where no draft is predicted to beat that, plain decoding is the advice.

    Args:
      measured: evaluate rows with their parts, plain decoding of every setting among them.
      seed_of: of each drafter.
      seeds: whose drafts are looked at.
    """
    found = []
    for seed in seeds:
        mine = [row for row in measured if not row["gamma"] or seed_of[row["drafter"]] == seed]
        for temperature, size in sorted({(row["temperature"], row["batch_size"]) for row in mine}):
            group = [row for row in mine if (row["temperature"], row["batch_size"]) == (temperature, size)]
            if all(row["draft_step_seconds"] is not None for row in group if row["gamma"]):
                fastest = max(group, key=lambda row: row["tokens_per_second"])
                entries = (_advised(group), Entry.of(fastest))
                found.append(Contest(seed, temperature, size, len(group), *entries))
    return found


def _advised(group: Sequence[Mapping]) -> Entry:
    """Of one setting's rows, the entry that should be fastest."""
    longest = {row["drafter"]: row for row in sorted(group, key=lambda row: row["gamma"])}
    plain = next(row for row in group if not row["gamma"])
    tokens = round(plain["emitted_tokens"] / plain["prompts"])
    speeds = {Entry.of(plain): plain["tokens_per_second"]}
    for row in group:
        if row["gamma"]:
            speeds[Entry.of(row)] = _foretold(row, longest[row["drafter"]]["ctar"], tokens)
    return max(speeds, key=lambda entry: speeds[entry])


def _foretold(row: Mapping, ctar: Sequence[float], tokens: int) -> float:
    """Tokens per second of batches whose rows all emit so many tokens."""
    gamma, size, batches = row["gamma"], row["batch_size"], math.ceil(row["prompts"] / row["batch_size"])
    rounds = throughput.expected_rounds([ctar[:gamma]] * size, tokens)
    return size * tokens / (row["prefill_seconds"] / batches + rounds * block_seconds(row))


def block_seconds(row: Mapping) -> float:
    """Seconds of a block of an evaluate row, from its parts."""
    return row["gamma"] * row["draft_step_seconds"] + row["verify_seconds"] + row["rule_seconds"]


def summary(checked: Sequence[Mapping]) -> list[dict]:
    """Of the rows of all contests: in how many the advice was as good as the best."""
    if not checked:
        return []
    ratios = [row["advised_over_fastest"] for row in checked]
    return [
        {
            "table": "advice",
            "settings": len(checked),
            "of_them_one_and_the_same": sum(not row["repeats"] for row in checked),
            "within_5_percent": sum(ratio >= 0.95 for ratio in ratios) / len(ratios),
            "median_of_advised_over_fastest": statistics.median(ratios),
            "least_of_advised_over_fastest": min(ratios),
        }
    ]
