"""What one pays for quality: points of several runs of one config, over seeds; where one would operate; the front.

A record is that of `reporting/condense.py`. Quality and block efficiency are taken from its stage "quality", speed
from "latency", which is short enough for a machine with nothing else to do.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from specjax.reporting import tables
from specjax.reporting.estimates import Estimate

# The share of plain decoding's quality that an operating point may lose.
LOSS = 0.01
# Of a task's metrics the one that papers quote; of a task with another, its first.
MAIN_METRICS = ("exact_match", "rouge2", "bleu")


@dataclasses.dataclass(frozen=True)
class Point:
    """One way to decode: what it costs (less is better) and how good its texts are (more is better)."""

    name: str
    cost: float
    quality: float


def operating_point(points: Iterable[Point], least_quality: float) -> Point | None:
    """The cheapest point of at least this quality; of equally cheap ones the better; None where there is none."""
    good = [point for point in points if point.quality >= least_quality]
    return min(good, key=lambda point: (point.cost, -point.quality), default=None)


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats: in both coordinates as good, and better in one. By cost; ties all stay."""

    def beaten(point: Point) -> bool:
        return any(
            other.cost <= point.cost
            and other.quality >= point.quality
            and (other.cost, other.quality) != (point.cost, point.quality)
            for other in points
        )

    return sorted((point for point in points if not beaten(point)), key=lambda point: (point.cost, point.quality))


def main_metric(rows: Sequence[Mapping]) -> str:
    """The metric that the rows are judged by."""
    found = next(row["quality"] for row in rows if row.get("quality"))
    return next((name for name in MAIN_METRICS if name in found), next(iter(found)))


@dataclasses.dataclass(frozen=True)
class Cell:
    """One way to decode, over the seeds of its record.

    Attributes:
      quality: of its texts; `lost` is plain decoding's, on the same prompts, less its own.
      latency: seconds a token relative to the plain decoding that its run calls its baseline; None where not measured.
    """

    drafter: str
    rule: str
    lenience: float | None
    gamma: int
    temperature: float
    quality: Estimate
    lost: Estimate
    block_efficiency: Estimate
    latency: Estimate | None

    @property
    def label(self) -> str:
        return tables.rule_label({"rule": self.rule, "lenience": self.lenience})


_SETTINGS = ("drafter", "rule", "lenience", "gamma", "temperature")


def cells(record: Mapping) -> list[Cell]:
    """Each way to decode of a record's stage "quality", in its order, with what "latency" measured of it."""
    metric = main_metric(record["rows"])
    groups: dict[tuple, dict[str, list[Mapping]]] = {}
    for row in record["rows"]:
        if row["stage"] in ("quality", "latency"):
            groups.setdefault(tuple(row[key] for key in _SETTINGS), {}).setdefault(row["stage"], []).append(row)
    found = []
    for settings, stages in groups.items():
        if "quality" not in stages:
            continue
        rows, timed = stages["quality"], [row for row in stages.get("latency", ()) if row["speedup"]]
        found.append(
            Cell(
                *settings,
                quality=Estimate.of([row["quality"][metric] for row in rows]),
                lost=Estimate.of([-row["quality_difference"][metric] for row in rows]),
                block_efficiency=Estimate.of([row["block_efficiency"] for row in rows]),
                latency=Estimate.of([1 / row["speedup"] for row in timed]) if timed else None,
            )
        )
    return found


def least_quality(found: Sequence[Cell], temperature: float) -> float:
    """What an operating point at this temperature may not fall below."""
    plain = next(
        cell for cell in found if cell.gamma == 0 and cell.drafter == "none" and cell.temperature == temperature
    )
    return (1 - LOSS) * plain.quality.mean
