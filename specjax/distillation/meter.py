"""Measurements of a training run: its clock, and averages over the steps between two log lines."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping


class Clock:
    """Seconds spent on training steps; paused for evaluation, compilation and checkpoints."""

    def __init__(self, seconds: float = 0.0):
        self._before = seconds
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        return self._before + (0.0 if self._since is None else time.perf_counter() - self._since)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        self._since = time.perf_counter()
        try:
            yield
        finally:
            self._stop()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        was_running = self._since is not None
        self._stop()
        yield
        if was_running:
            self._since = time.perf_counter()

    def _stop(self) -> None:
        self._before, self._since = self.seconds, None


@dataclasses.dataclass
class Interval:
    """Sums of metrics since the last log line; `dataclasses.asdict` makes a copy of JSON types for a checkpoint.

    Attributes:
      since: seconds on the training clock at that line.
      steps: number of steps since then.
      learning_rate: learning rate of the last step.
      sums: sum of each metric over these steps.
    """

    since: float
    steps: int = 0
    learning_rate: float = 0.0
    sums: dict[str, float] = dataclasses.field(default_factory=dict)

    def add(self, values: Mapping[str, float]) -> None:
        self.steps += 1
        self.learning_rate = values["learning_rate"]
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def line(self, seconds: float, has_target: bool) -> dict[str, float]:
        """The next log line: means per position, mean gradient norm per step, last learning rate, tokens per second."""
        tokens = max(self.sums["tokens"], 1.0)
        line = {
            "loss": self.sums["loss"] / tokens,
            "grad_norm": self.sums["grad_norm"] / self.steps,
            "learning_rate": self.learning_rate,
            "tokens_per_second": self.sums["tokens"] / max(seconds - self.since, 1e-9),
            "train_seconds": seconds,
        }
        measured = ("acceptance", "outside") if has_target else ()
        return line | {name: self.sums[name] / tokens for name in measured if name in self.sums}
