"""Trade-off of quality and speed: decoding settings over the seeds of a record, operating points, Pareto front.

A record is several runs of one config, joined by `configs.records.condense`. Quality and block efficiency come from the
stage "quality", latency from the stage "latency", which is short, so that it can run on an otherwise idle machine.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

from configs.records.claims import Measured
from specjax.reporting import tables

# Maximum relative loss of quality, compared with plain decoding, of an operating point.
LOSS = 0.01
# The metrics that papers report. For a task without these, its first metric is used.
MAIN_METRICS = ("exact_match", "rouge2", "bleu")

Way = TypeVar("Way")


class Point(NamedTuple):
    """The cost (lower is better) and the quality (higher is better) of one way to decode."""

    cost: float
    quality: float


def operating_point(points: Mapping[Way, Point], least_quality: float) -> Way | None:
    """The way with the lowest cost among those of at least this quality, ties by quality; None if there is none."""
    good = [way for way, point in points.items() if point.quality >= least_quality]
    return min(good, key=lambda way: (points[way].cost, -points[way].quality), default=None)


def pareto_front(points: Mapping[Way, Point]) -> list[Way]:
    """The ways, ordered by cost, for which no other has lower or equal cost and higher or equal quality."""
    dominates = lambda other, point: other.cost <= point.cost and other.quality >= point.quality and other != point
    front = [way for way, point in points.items() if not any(dominates(other, point) for other in points.values())]
    return sorted(front, key=points.__getitem__)


def main_metric(rows: Sequence[Mapping]) -> str:
    """The name of the quality metric to use for these rows."""
    quality = next(row["quality"] for row in rows if row.get("quality"))
    return next((name for name in MAIN_METRICS if name in quality), next(iter(quality)))


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
    """A decoding setting with its results over the seeds of a record.

    Attributes:
      quality: quality of its texts.
      lost: plain decoding's quality on the same prompts minus its own.
      efficiencies: block efficiency by seed.
      latency: seconds per token divided by those of the run's plain decoding; None if it was not measured.
    """

    drafter: str
    rule: str
    lenience: float | None
    gamma: int
    temperature: float
    quality: Measured
    lost: Measured
    efficiencies: Mapping[int, float]
    latency: Measured | None

    @property
    def label(self) -> str:
        return tables.rule_label({"rule": self.rule, "lenience": self.lenience})

    @property
    def block_efficiency(self) -> Measured:
        return Measured.over_seeds(list(self.efficiencies.values()))

    @property
    def timed(self) -> Point:
        """Relative latency and quality."""
        return Point(self.latency.value, self.quality.value)

    @property
    def counted(self) -> Point:
        """Target calls per token, which are the same on any machine, and quality."""
        return Point(1 / self.block_efficiency.value, self.quality.value)

    @property
    def scores(self) -> dict[str, str | None]:
        """The columns of a table, as text."""
        return {
            "quality": self.quality.plus_minus,
            "lost": self.lost.plus_minus,
            "block efficiency": self.block_efficiency.plus_minus,
            "relative latency": None if self.latency is None else self.latency.plus_minus,
        }


_SETTINGS = ("drafter", "rule", "lenience", "gamma", "temperature")


def cells(record: Mapping) -> list[Cell]:
    """A Cell for each decoding setting of a record's stage "quality", in the order of rows, with measured latency."""
    metric = main_metric(record["rows"])
    stages: dict[str, dict[tuple, list[Mapping]]] = {"quality": {}, "latency": {}}
    for row in record["rows"]:
        if row["stage"] in stages:
            stages[row["stage"]].setdefault(tuple(row[key] for key in _SETTINGS), []).append(row)
    made = []
    for settings, rows in stages["quality"].items():
        latencies = [1 / row["speedup"] for row in stages["latency"].get(settings, ()) if row["speedup"]]
        made.append(
            Cell(
                *settings,
                quality=Measured.over_seeds([row["quality"][metric] for row in rows]),
                lost=Measured.over_seeds([-row["quality_difference"][metric] for row in rows]),
                efficiencies={row["run_seed"]: row["block_efficiency"] for row in rows},
                latency=Measured.over_seeds(latencies) if latencies else None,
            )
        )
    return made


def least_quality(ways: Sequence[Cell], temperature: float) -> float:
    """The minimum quality of an operating point at this temperature."""
    plain = next(way for way in ways if (way.gamma, way.drafter, way.temperature) == (0, "none", temperature))
    return (1 - LOSS) * plain.quality.value
