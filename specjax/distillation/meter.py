"""What a run measures of itself: its training clock, and means between two lines of the log."""

import contextlib
import time
from collections.abc import Iterator, Mapping


class Clock:
    """Seconds of training proper; evaluation, compilation and checkpoints pause it."""

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


class Interval:
    """Sums since the last line of the log."""

    def __init__(self, seconds: float):
        self._since, self._steps, self._learning_rate = seconds, 0, 0.0
        self._sums: dict[str, float] = {}

    @classmethod
    def of(cls, state: Mapping) -> "Interval":
        """What `state` was taken of."""
        interval = cls(state["since"])
        interval._steps, interval._learning_rate = state["steps"], state["learning_rate"]
        interval._sums = dict(state["sums"])
        return interval

    def state(self) -> dict:
        """Of JSON's types, for a checkpoint between two lines; a copy, for it is written while training goes on."""
        since, steps, rate = self._since, self._steps, self._learning_rate
        return {"since": since, "steps": steps, "learning_rate": rate, "sums": dict(self._sums)}

    def add(self, values: Mapping[str, float]) -> None:
        self._steps += 1
        self._learning_rate = values["learning_rate"]
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def line(self, seconds: float, has_target: bool) -> dict[str, float]:
        """Means over counted positions (of the gradient's norm: over steps), the last rate, and the speed."""
        sums, tokens = self._sums, max(self._sums["tokens"], 1.0)
        line = {
            "loss": sums["loss"] / tokens,
            "grad_norm": sums["grad_norm"] / self._steps,
            "learning_rate": self._learning_rate,
            "tokens_per_second": sums["tokens"] / max(seconds - self._since, 1e-9),
            "train_seconds": seconds,
        }
        if has_target:
            line["acceptance"] = sums["acceptance"] / tokens
        return line
