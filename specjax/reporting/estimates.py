"""A mean over seeds with its interval."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

# 97.5% quantiles of Student's t distribution for 2, 3, .. values.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and half the width of its 95% Student's t interval (None for a single seed)."""

    mean: float
    half: float | None
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """The estimate from one value per seed."""
        if len(values) < 2:
            return cls(float(values[0]), None, 1)
        quantile = _STUDENT[min(len(values) - 2, len(_STUDENT) - 1)]
        half = quantile * statistics.stdev(values) / math.sqrt(len(values))
        return cls(statistics.fmean(values), half, len(values))

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.half is None else f"{self.mean:.3f} ± {self.half:.3f}"
