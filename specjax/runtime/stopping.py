"""Being told to stop: SIGTERM, with which spot and preemptible capacity says that it goes.

A run that is stopped saves what there is to save, ends with an exit code of its own, and goes on when the same command
is given again.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

# Exit code of a run that was told to stop and goes on when it is started again: EX_TEMPFAIL of sysexits.h.
STOPPED = 75


class Stopped(Exception):
    """The run was told to stop; whatever was to be saved is saved."""


class _Notice:
    """What is known of a request to stop, in this process."""

    asked = False
    held = False
    looks = 0


def _on_sigterm(number: int, frame: Any) -> None:
    del frame
    signal.signal(number, signal.SIG_DFL)  # who asks twice does not want to wait
    _Notice.asked = True
    if not _Notice.held:
        raise Stopped


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """In it SIGTERM, how spot capacity says that it goes, ends the run by `Stopped`.

    One process is stopped at once, or where `stop_asked` is looked at inside of `holding`. Several go on to a place
    that all of them reach: JAX watches for the signal in each, and lets them agree on the next look.
    """
    watched = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
    if not watched:
        yield
        return
    before = signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        yield
    finally:
        _Notice.asked = False
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def holding() -> Iterator[None]:
    """In it a request to stop waits until `stop_asked` is looked at, so that there is something to save."""
    _Notice.held = True
    try:
        yield
    finally:
        _Notice.held = False


def stop_asked() -> bool:
    """Whether the run is to stop here; all processes are told the same, at the same look."""
    if jax.process_count() == 1:
        return _Notice.asked
    _Notice.looks += 1
    return multihost_utils.reached_preemption_sync_point(_Notice.looks)


def stop_if_asked() -> None:
    """Raises Stopped where the run is to stop: for places with nothing to save."""
    if stop_asked():
        raise Stopped
