"""Measures compile time, and shows progress bars."""

import functools
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax


@functools.cache
def _compilations() -> list[tuple[float, float]]:
    """(end, seconds) of every trace, lowering and compilation of this process since the first call, which starts it."""
    events: list[tuple[float, float]] = []

    def record(name: str, seconds: float, **_) -> None:
        if name.startswith("/jax/core/compile/"):
            end = time.perf_counter()
            # An event contains those that began after it, as a trace contains those of the functions that it calls.
            while events and events[-1][0] > end - seconds:
                events.pop()
            events.append((end, seconds))

    jax.monitoring.register_event_duration_secs_listener(record)
    return events


def compile_seconds() -> float:
    """Seconds that this process spent on tracing, lowering and compiling, or loading from JAX's cache, so far.

    Only differences of two calls are meaningful: nothing before the first call counts.
    """
    return sum((seconds for _, seconds in _compilations()), 0.0)


def timed(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """The result of a call once the device has it, its seconds without compiling, and those of compiling."""
    started, compiled = time.perf_counter(), compile_seconds()
    result = jax.block_until_ready(call())
    compiled = compile_seconds() - compiled
    return result, time.perf_counter() - started - compiled, compiled


def progress(iterable: Iterable | None = None, *, total: int | None = None, description: str, unit: str):
    """A tqdm bar on stderr with the remaining time; one line every ten seconds if stderr is not a terminal.

    Iterate over the result, or use it as a context manager and call `update(n)`. Only process 0 prints.
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
    """A stream that prints each update of a progress bar on a separate line of stderr, for readable log files."""

    def write(self, text: str) -> None:
        if text := text.strip("\r\n "):
            sys.stderr.write(text + "\n")

    def flush(self) -> None:
        sys.stderr.flush()
