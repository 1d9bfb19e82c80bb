"""What the throughput model would have advised in each setting of an evaluation, beside what was fastest when all ran.

Whoever is fastest of many was also lucky: both have to be measured again before they are compared.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

from configs.distillspec import tradeoffs
from specjax.draft_design import advice
from specjax.evaluation import throughput
from specjax.models.decoder import Decoder


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


def contests(measured: Sequence[Mapping], drafts: Mapping[str, Mapping], seeds: Sequence[int]) -> list[Contest]:
    """One for each seed, temperature and batch size of which drafts were timed.

    The advice is that of `advice`: it knows the parts of a block and of plain decoding, and of each draft's largest
    gamma how often its tokens stood and how unlike the rows of a batch were.

    Args:
      measured: evaluate rows with their parts, plain decoding of every setting among them.
      drafts: "seed" and "decoder" of each drafter.
      seeds: whose drafts are looked at.
    """
    found = []
    for seed in seeds:
        mine = [row for row in measured if not row["gamma"] or drafts[row["drafter"]]["seed"] == seed]
        for temperature, size in sorted({(row["temperature"], row["batch_size"]) for row in mine if row["gamma"]}):
            group = [row for row in mine if (row["temperature"], row["batch_size"]) == (temperature, size)]
            if all(row["draft_step_seconds"] is not None for row in group if row["gamma"]):
                fastest = max(group, key=lambda row: row["tokens_per_second"])
                entries = (_advised(group, drafts), Entry.of(fastest))
                found.append(Contest(seed, temperature, size, len(group), *entries))
    return found


def _advised(group: Sequence[Mapping], drafts: Mapping[str, Mapping]) -> Entry:
    """Of one setting's rows, the entry that is recommended."""
    some = group[0]
    work = advice.Workload((), some["max_new_tokens"], some["batch_size"], some["temperature"], seed=0)
    by_drafter: dict[str, list[Mapping]] = {}
    for row in group:
        by_drafter.setdefault(row["drafter"], []).append(row)
    plain = next(name for name, rows in by_drafter.items() if not rows[0]["gamma"])
    options = []
    for name, rows in by_drafter.items():
        if name != plain:
            options += _candidate(name, rows, drafts[name]["decoder"]).options(work)
    advised = advice.recommend(options)
    return Entry(advised["draft"], advised["gamma"]) if advised["pays"] else Entry(plain, 0)


def parts_of(row: Mapping) -> throughput.Parts:
    """What an evaluate row says of its block's parts."""
    keys = ("draft_step_seconds", "target_step_seconds", "verify_seconds", "rule_seconds", "baseline_rule_seconds")
    return throughput.Parts(*(row[key] for key in keys))


def _candidate(name: str, rows: Sequence[Mapping], decoder: Decoder) -> advice.Candidate:
    """A draft with the parts of each gamma and the acceptance of its largest."""
    longest = max(rows, key=lambda row: row["gamma"])
    ctar = throughput.by_position(longest["acceptance_by_position"])
    parts = {row["gamma"]: parts_of(row) for row in rows}
    uneven = advice.unevenness(longest["iterations"], longest["expected_iterations"], longest["batch_size"])
    known = advice.Acceptance(ctar, ctar, ctar, float(longest["gamma"]), uneven)
    return advice.Candidate(name, decoder, {0.0: known}, parts, True)


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
