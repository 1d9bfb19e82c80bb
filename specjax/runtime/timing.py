"""Wall-clock measurements of device work, and progress bars."""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Repeated measurements of one thing, in seconds.

    Attributes:
      all: in the order they were taken.
    """

    all: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.all)

    @property
    def best(self) -> float:
        return min(self.all)

    @property
    def spread(self) -> float:
        """The interquartile range relative to the median; 0 for fewer than two measurements."""
        if len(self.all) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.all, n=4, method="inclusive")
        return (high - low) / self.median


def block_seconds(fn: Callable[..., Any], *args: Any, repeats: int) -> Seconds:
    """Times `fn(*args)` until its results are ready, `repeats` times, after one call that warms it up."""
    if repeats < 1:
        raise ValueError(f"A measurement needs at least 1 repeat, not {repeats}.")
    jax.block_until_ready(fn(*args))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        seconds.append(time.perf_counter() - start)
    return Seconds(tuple(seconds))


def in_turns(cases: Sequence[tuple[Callable, Callable]], repeats: int) -> list[list[float]]:
    """Seconds of `call(inputs)` for each case (fresh, call), in turns; neither `fresh()` nor the first round counts."""
    seconds: list[list[float]] = [[] for _ in cases]
    for repeat in range(repeats + 1):
        for turn in range(len(cases)):
            # Each round begins with another case, so that none always follows the same neighbour.
            index = (turn + repeat) % len(cases)
            fresh, call = cases[index]
            inputs = jax.block_until_ready(fresh())
            started = time.perf_counter()
            jax.block_until_ready(call(inputs))
            if repeat:
                seconds[index].append(time.perf_counter() - started)
    return seconds


def progress(iterable: Iterable | None = None, *, total: int | None = None, description: str, unit: str):
    """A tqdm bar on stderr with the time left; where stderr is not a terminal, a line every ten seconds.

    Either iterate over the result, or call `update(n)` and `close()` (it is a context manager). Only the
    first process of a run shows one.
    """
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    return tqdm(
        iterable,
        total=total,
        desc=description,
        unit=unit,
        file=sys.stderr if terminal else _Lines(),
        mininterval=0.2 if terminal else 10.0,
        maxinterval=10.0,
        dynamic_ncols=terminal,
        disable=jax.process_index() != 0,
    )


class _Lines:
    """A stream to stderr that gives each state of a bar a line of its own: log files stay readable."""

    def write(self, text: str) -> None:
        text = text.strip("\r\n ")
        if text:
            sys.stderr.write(text + "\n")

    def flush(self) -> None:
        sys.stderr.flush()
