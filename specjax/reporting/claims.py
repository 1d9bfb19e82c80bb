"""Claims as data: what a source says, what a record measures of it, and the verdict that follows from the intervals."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from specjax.reporting import tables
from specjax.reporting.estimates import Estimate

REPRODUCED, NOT_REPRODUCED, NOT_DECIDED = "reproduced", "not reproduced", "not decided"
NOT_MEASURED, NOT_TESTABLE = "not measured yet", "not testable here"
# The verdicts on a claim of our own, which no source makes.
OURS = ("holds", "does not hold")


@dataclasses.dataclass(frozen=True)
class Measured:
    """A number with its 95% interval, and how it is printed.

    Attributes:
      value: the number.
      low: the lower end of its interval. Both ends of an exact number, such as a count, are the number itself; an
        estimate from a single sample has the ends -inf and inf, so that it decides nothing.
      high: the upper end.
      form: format specification of the three numbers, such as "+.1f".
      unit: printed after the number, such as "%".
      note: printed last, in parentheses.
    """

    value: float | int
    low: float | int
    high: float | int
    form: str = ".2f"
    unit: str = ""
    note: str = ""

    @classmethod
    def exact(cls, value: float | int, form: str = "g", **printed: str) -> "Measured":
        """A number without uncertainty."""
        return cls(value, value, value, form, **printed)

    @classmethod
    def over_seeds(cls, values: Sequence[float], form: str = ".3f", **printed: str) -> "Measured":
        """The mean of one value per seed, with Student's interval."""
        mean = Estimate.of(values)
        half = math.inf if mean.half is None else mean.half
        alone = {"note": "1 seed"} if mean.half is None else {}
        return cls(mean.mean, mean.mean - half, mean.mean + half, form, **(alone | printed))

    @classmethod
    def of_row(cls, row: Mapping[str, Any], key: str, **printed: str) -> "Measured":
        """A value of an evaluation's row, with the bootstrap interval over prompts in `KEY_ci`."""
        low, high = row.get(f"{key}_ci") or (-math.inf, math.inf)
        return cls(row[key], low, high, **printed)

    def above(self, bound: "float | int | Measured") -> bool | None:
        """Whether this is larger than the bound: None if the intervals leave it open."""
        other = bound if isinstance(bound, Measured) else Measured.exact(bound)
        return True if self.low > other.high else False if self.high <= other.low else None

    def below(self, bound: "float | int | Measured") -> bool | None:
        """Whether this is smaller than the bound: None if the intervals leave it open."""
        other = bound if isinstance(bound, Measured) else Measured.exact(bound)
        return other.above(self)

    def __str__(self) -> str:
        low, high = (format(end, self.form) for end in (self.low, self.high))
        interval = f" [{low}, {high}]" if self.low < self.high and math.isfinite(self.low) else ""
        return f"{self.value:{self.form}}{self.unit}{interval}" + (f" ({self.note})" if self.note else "")


# What a record measures of a claim, by label. A text is printed and decides nothing.
Measures = Mapping[str, Measured | str]


def every(outcomes: Iterable[bool | None]) -> bool | None:
    """False if any outcome is False, else None if any is not decided, else True."""
    outcomes = list(outcomes)
    return False if False in outcomes else None if None in outcomes else True


def some(outcomes: Iterable[bool | None]) -> bool | None:
    """True if any outcome is True, else None if any is not decided, else False."""
    outcomes = list(outcomes)
    return True if True in outcomes else None if None in outcomes else False


def numbers(measures: Measures) -> list[Measured]:
    """The measured numbers, in order, without the texts."""
    return [value for value in measures.values() if isinstance(value, Measured)]


def all_above(bound: float | int) -> Callable[[Measures], bool | None]:
    """The claim that every number is above the bound."""
    return lambda measures: every(number.above(bound) for number in numbers(measures))


def all_below(bound: float | int) -> Callable[[Measures], bool | None]:
    """The claim that every number is below the bound."""
    return lambda measures: every(number.below(bound) for number in numbers(measures))


def descending(measures: Measures) -> bool | None:
    """The claim that every number is above the one after it."""
    return every(first.above(second) for first, second in zip(numbers(measures), numbers(measures)[1:], strict=False))


@dataclasses.dataclass(frozen=True)
class Claim:
    """One claim and how a record judges it.

    Attributes:
      says: the claim, with its numbers.
      where: its place in the source.
      record: name of the record that judges it.
      measure: what the record measures, by label; nothing if the record has no such rows yet.
      holds: whether that bears the claim out, None if the intervals do not decide it. A claim without this predicate
        cannot be tested here; `measure` then gives the reason.
      words: the verdicts if the claim holds and if it does not.
    """

    says: str
    where: str
    record: str
    measure: Callable[[Mapping], Measures]
    holds: Callable[[Measures], bool | None] | None = None
    words: tuple[str, str] = (REPRODUCED, NOT_REPRODUCED)

    def judged(self, record: Mapping | None) -> tuple[str | None, str]:
        """What the record measures, as text, and the verdict; without a record or its rows, NOT_MEASURED."""
        measures = {} if record is None else self.measure(record)
        if not measures:
            return None, NOT_MEASURED
        text = "; ".join(f"{label}: {value}" if label else str(value) for label, value in measures.items())
        if self.holds is None:
            return text, NOT_TESTABLE
        outcome = self.holds(measures)
        return text, NOT_DECIDED if outcome is None else self.words[0 if outcome else 1]


def claims_table(claims: Sequence[Claim], records: Mapping[str, Mapping]) -> str:
    """A Markdown table with one line per claim, judged by the records that exist, by name."""
    lines = []
    for claim in claims:
        text, verdict = claim.judged(records.get(claim.record))
        lines.append({"the paper": claim.says, "where": claim.where, "ours": text, "verdict": verdict})
    return tables.markdown_table(lines, list(lines[0]))
