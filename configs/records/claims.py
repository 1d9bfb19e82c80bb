"""Claims of papers (or our own), measurements with intervals that test them, and the verdicts that follow."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from specjax.reporting import tables

REPRODUCED, NOT_REPRODUCED, NOT_DECIDED = "reproduced", "not reproduced", "not decided"
NOT_MEASURED, NOT_TESTABLE = "not measured yet", "not testable here"
# The verdicts on our own claims, which are not in a paper.
OURS = ("holds", "does not hold")
# 97.5% quantiles of Student's t distribution for 2, 3, .. values.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclasses.dataclass(frozen=True)
class Measured:
    """A number with its 95% interval, and how it is printed.

    Attributes:
      value: the number.
      low: lower end of the interval. For an exact number, such as a count, both ends equal the number; for an estimate
        from a single sample they are -inf and inf, so that no comparison is decided.
      high: upper end of the interval.
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
        """The mean of one value per seed, with Student's t interval."""
        mean, half = statistics.fmean(values), math.inf
        if len(values) > 1:
            quantile = _STUDENT[min(len(values) - 2, len(_STUDENT) - 1)]
            half = quantile * statistics.stdev(values) / math.sqrt(len(values))
        elif "note" not in printed:
            printed["note"] = "1 seed"
        return cls(mean, mean - half, mean + half, form, **printed)

    @classmethod
    def of_row(cls, row: Mapping[str, Any], key: str, **printed: str) -> "Measured":
        """A value of an evaluation's row, with the bootstrap interval over prompts in `KEY_ci`."""
        low, high = row.get(f"{key}_ci") or (-math.inf, math.inf)
        return cls(row[key], low, high, **printed)

    def above(self, bound: "float | int | Measured") -> bool | None:
        """Whether this is larger than the bound; None if the intervals do not decide it."""
        other = bound if isinstance(bound, Measured) else Measured.exact(bound)
        return True if self.low > other.high else False if self.high <= other.low else None

    def below(self, bound: "float | int | Measured") -> bool | None:
        """Whether this is smaller than the bound; None if the intervals do not decide it."""
        other = bound if isinstance(bound, Measured) else Measured.exact(bound)
        return other.above(self)

    @property
    def edges(self) -> tuple[float, float] | None:
        """Both ends of the interval; None for a single sample."""
        return (self.low, self.high) if math.isfinite(self.low) else None

    @property
    def plus_minus(self) -> str:
        """The number with its unit, and half the width of its interval; without the note."""
        half = f" ± {(self.high - self.low) / 2:{self.form.removeprefix('+')}}" if self.edges else ""
        return f"{self.value:{self.form}}{self.unit}{half}"

    def __str__(self) -> str:
        low, high = (format(end, self.form) for end in (self.low, self.high))
        interval = f" [{low}, {high}]" if self.low < self.high and math.isfinite(self.low) else ""
        return f"{self.value:{self.form}}{self.unit}{interval}" + (f" ({self.note})" if self.note else "")


# Measurements for a claim, by label. A text is only printed; it does not affect the verdict.
Measures = Mapping[str, Measured | str]


def every(outcomes: Iterable[bool | None]) -> bool | None:
    """False if any outcome is False, else None if any is None (not decided), else True."""
    outcomes = list(outcomes)
    return False if False in outcomes else None if None in outcomes else True


def some(outcomes: Iterable[bool | None]) -> bool | None:
    """True if any outcome is True, else None if any is None (not decided), else False."""
    outcomes = list(outcomes)
    return True if True in outcomes else None if None in outcomes else False


def numbers(measures: Measures) -> list[Measured]:
    """The numbers among the measurements, in order."""
    return [value for value in measures.values() if isinstance(value, Measured)]


def all_above(bound: float | int) -> Callable[[Measures], bool | None]:
    """A predicate for `Claim.holds`: every number is above the bound."""
    return lambda measures: every(number.above(bound) for number in numbers(measures))


def all_below(bound: float | int) -> Callable[[Measures], bool | None]:
    """A predicate for `Claim.holds`: every number is below the bound."""
    return lambda measures: every(number.below(bound) for number in numbers(measures))


def descending(measures: Measures) -> bool | None:
    """A predicate for `Claim.holds`: every number is above the next one."""
    return every(first.above(second) for first, second in zip(numbers(measures), numbers(measures)[1:], strict=False))


@dataclasses.dataclass(frozen=True)
class Claim:
    """One claim and how a record tests it.

    Attributes:
      statement: the claim in words, with its numbers.
      where: its location in the paper.
      record: name of the record that tests it.
      measure: function from the record to measurements; empty if the record does not have the needed rows yet.
      holds: function from the measurements to whether the claim holds; None if the intervals do not decide it. Without
        this function the claim cannot be tested here, and `measure` returns the reason.
      words: the verdicts if the claim holds and if it does not.
    """

    statement: str
    where: str
    record: str
    measure: Callable[[Mapping], Measures]
    holds: Callable[[Measures], bool | None] | None = None
    words: tuple[str, str] = (REPRODUCED, NOT_REPRODUCED)

    def judged(self, record: Mapping | None) -> tuple[str | None, str]:
        """The measurements as text, and the verdict, which is NOT_MEASURED without a record or its rows."""
        measures = {} if record is None else self.measure(record)
        if not measures:
            return None, NOT_MEASURED
        text = "; ".join(f"{label}: {value}" if label else str(value) for label, value in measures.items())
        if self.holds is None:
            return text, NOT_TESTABLE
        outcome = self.holds(measures)
        return text, NOT_DECIDED if outcome is None else self.words[0 if outcome else 1]


def claims_table(claims: Sequence[Claim], records: Mapping[str, Mapping]) -> str:
    """A Markdown table with a line per claim and its verdict; `records` has the existing records by name."""
    lines = []
    for claim in claims:
        text, verdict = claim.judged(records.get(claim.record))
        lines.append({"the paper": claim.statement, "where": claim.where, "ours": text, "verdict": verdict})
    return tables.markdown_table(lines, list(lines[0]))
