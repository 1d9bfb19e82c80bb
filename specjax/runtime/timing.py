"""Times work on devices, and shows progress bars."""

import sys
import time
from collections.abc import Callable, Iterable, Sequence

import jax


def in_turns(cases: Sequence[tuple[Callable, Callable]], repeats: int) -> list[list[float]]:
    """Times several cases in alternation, so that a slow phase of the machine affects all of them.

    Args:
      cases: pairs (fresh, call); `call(fresh())` is one run, of which only `call` is timed.
      repeats: number of timed rounds, after one more round to warm up.

    Returns:
      For each case the seconds of its timed runs.
    """
    seconds: list[list[float]] = [[] for _ in cases]
    for repeat in range(repeats + 1):
        for turn in range(len(cases)):
            # The order of the cases rotates from round to round.
            index = (turn + repeat) % len(cases)
            fresh, call = cases[index]
            inputs = jax.block_until_ready(fresh())
            started = time.perf_counter()
            jax.block_until_ready(call(inputs))
            if repeat:
                seconds[index].append(time.perf_counter() - started)
    return seconds


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
