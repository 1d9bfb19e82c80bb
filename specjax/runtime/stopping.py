"""Stops a run on SIGTERM, which processes on spot and preemptible machines receive shortly before these end.

A stopped run saves its state and exits with code `STOPPED`. The same command resumes it.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

# Exit code of a run that stopped on request and can be resumed: EX_TEMPFAIL of sysexits.h.
STOPPED = 75


class Stopped(Exception):
    """The run stopped on request; its state is saved."""


class _Request:
    """The state of stopping in this process."""

    received = False
    deferred = False  # inside `holding`: do not raise in the signal handler
    checks = 0  # calls of `stop_asked`, equally many in every process


def _on_sigterm(number: int, frame: Any) -> None:
    del frame
    signal.signal(number, signal.SIG_DFL)  # a second SIGTERM ends the process at once
    _Request.received = True
    if not _Request.deferred:
        raise Stopped


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """A context in which SIGTERM (spot preemption) raises `Stopped`.

    A single process raises at once, or inside `holding` at the next `stop_if_asked`. With several processes, JAX
    catches the signal, and `stop_asked` returns True in all of them at the same call.
    """
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        yield
    finally:
        _Request.received = False
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def holding() -> Iterator[None]:
    """A context in which SIGTERM raises nothing; the caller checks `stop_asked` and saves its state before stopping."""
    _Request.deferred = True
    try:
        yield
    finally:
        _Request.deferred = False


def stop_asked() -> bool:
    """Whether the run should stop now. All processes must call this equally often, and get the same result."""
    if jax.process_count() == 1:
        return _Request.received
    _Request.checks += 1
    return multihost_utils.reached_preemption_sync_point(_Request.checks)


def stop_if_asked() -> None:
    """Raises `Stopped` if the run should stop now; for callers that have no state to save."""
    if stop_asked():
        raise Stopped
