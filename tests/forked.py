"""Runs of the command line, each in a process of its own that is forked from one that has imported all they need."""

import multiprocessing
import os
import sys
from pathlib import Path

from specjax import main

ROOT = Path(__file__).resolve().parents[1]
# Imports are some four seconds a run. None of these starts JAX's backend, which no fork would outlive.
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["specjax.reporting.page", *(f"specjax.{name}" for name in main.BINARIES)])


def run(arguments, log, environment):
    """The exit code of `python -m specjax.main` with these arguments, which leaves in `log` what it says.

    The environment is ours and these variables, but what JAX reads of it when it is imported is of the first run. Small
    compiled programs are stored too, as in users' runs: each run has hundreds, and another has most of them.
    """
    process = start(arguments, log, environment)
    process.join()
    return process.exitcode


def start(arguments, log, environment, folder=ROOT):
    """The process of such a run in `folder`, which runs on."""
    process = _server.Process(target=_run, args=(arguments, log, environment, folder))
    process.start()
    return process


def _run(arguments, log, environment, folder):
    import jax

    from specjax.runtime import cli

    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    os.chdir(folder)
    os.environ.update(environment)
    if "JAX_PLATFORMS" in environment:
        jax.config.update("jax_platforms", environment["JAX_PLATFORMS"])
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
    sys.exit(cli.launch(main.run, "specjax.main", arguments))
