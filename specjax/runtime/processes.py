"""Supports runs of several processes: connects them, checks that they agree, and exchanges small host values.

All processes run the same program on the same config, and every collective function here must be called by all of them.
Only process 0 (`first()`) writes records. With a single process, no function communicates.
"""

import dataclasses
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from specjax.runtime.config import leaves
from specjax.runtime.errors import UserError, first_line

# Command-line flags and their help.
FLAGS = {
    "--coordinator=HOST:PORT": "address at which process 0 listens, reachable from every host",
    "--processes=N": "number of processes",
    "--process_id=I": "number of this process, 0 to N - 1",
    "--join_seconds=SECONDS": "how long to wait for the other processes (300)",
}
_HELP = {flag.partition("=")[0]: f"{flag} ({what})" for flag, what in FLAGS.items()}
# How long a process waits at a barrier, where process 0 may be writing a large file.
_BARRIER_SECONDS = 3600
# How long a file written by one host may take to appear on another.
_VISIBLE_SECONDS = 20

_BARRIERS = itertools.count()

# Parts of error messages with which the runtime reports that another process is gone.
_LOST = ("Gloo", "Connection", "connection", "UNAVAILABLE", "DEADLINE_EXCEEDED", "heartbeat", "coordination service")


@dataclasses.dataclass(frozen=True)
class Joining:
    """How this process connects to the others.

    Attributes:
      coordinator: "HOST:PORT" of process 0; None for one process, or if JAX should detect the cluster.
      processes: number of processes.
      process_id: index of this process.
      seconds: how many seconds to wait for the others.
    """

    coordinator: str | None = None
    processes: int = 1
    process_id: int = 0
    seconds: int = 300


def parse(arguments: Sequence[str]) -> tuple[Joining, list[str]]:
    """Splits a command line into the flags of `FLAGS` and the other arguments.

    Raises:
      UserError: if only some of the flags are present, or a value is out of range.
    """
    values, rest = {}, []
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name not in _HELP:
            rest.append(argument)
            continue
        host, _, port = value.rpartition(":")
        if not (host and port.isdecimal() if name == "--coordinator" else value.isdecimal()):
            raise UserError(f'{name} is "{value}"; write {_HELP[name]}')
        values[name.removeprefix("--")] = value if name == "--coordinator" else int(value)
    seconds = values.pop("join_seconds", Joining.seconds)
    missing = [name for name in ("coordinator", "processes", "process_id") if name not in values]
    if len(missing) == 3:
        return Joining(seconds=seconds), rest
    if missing:
        raise UserError(f"--{missing[0]} is missing; add it, or leave out all three if JAX can detect the cluster")
    joining = Joining(**values, seconds=seconds)
    if not joining.process_id < joining.processes:
        raise UserError(
            f"--process_id={joining.process_id} of --processes={joining.processes} does not exist; ids run from 0 to "
            f"{joining.processes - 1}"
        )
    return joining, rest


def several(environment: Mapping[str, str]) -> bool:
    """Whether environment variables show that this is one of several processes.

    A Slurm allocation outside `srun` counts as one process. Launchers on other machines set SPECJAX_MULTIPROCESS=1.
    """
    return (
        environment.get("SPECJAX_MULTIPROCESS") == "1"
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or "," in environment.get("TPU_PROCESS_ADDRESSES", "")
        or int(environment.get("MEGASCALE_NUM_SLICES", "1")) > 1
        or int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1
        or int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
    )


def start(joining: Joining, environment: Mapping[str, str]) -> None:
    """Connects to the other processes, if flags or the environment say that there are any.

    JAX detects the cluster on Cloud TPU, GKE, Slurm and Open MPI. If the others do not connect in time, this process
    prints what to check and exits with code 2, before the JAX runtime aborts it.

    Raises:
      UserError: if JAX cannot detect the cluster.
    """
    if jax.distributed.is_initialized():
        return
    by_flags = joining.coordinator is not None
    if (joining.processes == 1) if by_flags else not several(environment):
        return
    options = {}
    if by_flags:
        options = {
            "coordinator_address": joining.coordinator,
            "num_processes": joining.processes,
            "process_id": joining.process_id,
            "cluster_detection_method": "deactivate",
        }
        if joining.coordinator.startswith(("127.0.0.1:", "localhost:")):  # then no other host needs to reach it
            options["coordinator_bind_address"] = joining.coordinator
    watch = threading.Timer(joining.seconds, _give_up, [joining])
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(**options, initialization_timeout=joining.seconds + 60)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot connect to the other processes ({first_line(error)}); add --coordinator, --processes and "
            "--process_id if JAX cannot detect the cluster, or unset the cluster's variables to run one process"
        ) from error
    finally:
        watch.cancel()


def _give_up(joining: Joining) -> None:
    """Prints what to check and exits this process, because the others did not connect in time."""
    by_flags = joining.coordinator is not None
    address = joining.coordinator or "the coordinator that the environment names"
    this = f"process {joining.process_id} of {joining.processes}" if by_flags else "this process"
    print(
        f"error: {this} did not find the others within {joining.seconds} s; check that all are started with different "
        f"ids and the same --processes, that process 0 listens at {address} (no other program uses the port, the other "
        "hosts can resolve the address, the port is open between them), and that no proxy variable is set; or wait "
        "longer with --join_seconds=N",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def lost_another(error: Exception) -> bool:
    """Whether the error means that another process of the run ended or cannot be reached."""
    return jax.process_count() > 1 and any(word in str(error) for word in _LOST)


def first() -> bool:
    """Whether this is process 0, which writes the records."""
    return jax.process_index() == 0


def refuse_several(what: str) -> None:
    """Raises UserError if the run has several processes; `what` names the feature that supports only one."""
    if jax.process_count() > 1:
        raise UserError(f"{what} runs in one process, and this run has {jax.process_count()}; start it with one")


def meet(name: str) -> None:
    """A barrier: waits until every process calls this. `name` must be the same in all of them.

    It uses no devices, because device collectives may time out after seconds and process 0 may write for minutes.
    """
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        key = f"specjax {next(_BARRIERS)} {name}"
        multihost.get_barrier_sync_fn()(key=key, timeout_ms=_BARRIER_SECONDS * 1000)


def from_first(array: Any) -> np.ndarray:
    """Process 0's value of an array that has the same shape in every process."""
    return multihost_utils.broadcast_one_to_all(np.asarray(array))


def gathered(text: str) -> list[str]:
    """The texts of all processes, in the order of processes."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def fetch(tree: Any) -> Any:
    """Converts the arrays of a tree, however sharded, to complete numpy arrays in every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)

    def complete(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return jax.device_get(x)
        if x.is_fully_replicated:
            return np.asarray(x.addressable_data(0))
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(complete, tree)


def fetch_to_first(tree: Any) -> Any:
    """Like `fetch`, but only process 0 keeps the arrays, fetched one at a time; one process gets the tree unchanged."""
    if jax.process_count() == 1:
        return tree
    keep = lambda array: array if first() else None
    return jax.tree.map(lambda x: keep(fetch(x)), tree)


def fail_together(problem: str) -> None:
    """Raises UserError in every process if any process has a `problem`; "" means none."""
    texts = gathered(problem)
    problems = [f"process {i}: {text}" if len(texts) > 1 else text for i, text in enumerate(texts) if text]
    if problems:
        raise UserError("; ".join(problems[:3]) + _and_more(len(problems) - 3, "; "))


def _and_more(count: int, comma: str = " ") -> str:
    return f"{comma}and {count} more" if count > 0 else ""


def check_same_command(config: Mapping[str, Any], workdir: str) -> None:
    """Checks that all processes have the same config, in JSON types, and the same workdir.

    Raises:
      UserError: in every process, naming the processes and keys that differ from process 0.
    """
    if jax.process_count() == 1:
        return
    mine = {"--workdir": workdir, **dict(leaves(config, "config"))}
    all_of = [json.loads(text) for text in gathered(json.dumps(mine, sort_keys=True))]
    differing = []
    for process, other in enumerate(all_of):
        keys = [key for key in sorted(all_of[0].keys() | other.keys()) if all_of[0].get(key) != other.get(key)]
        if keys:
            values = ", ".join(f"{key}: {all_of[0].get(key)!r} there, {other.get(key)!r} here" for key in keys[:3])
            differing.append(f"process {process} ({values})")
    if differing:
        raise UserError(
            f"the processes have different settings: {'; '.join(differing[:3])}{_and_more(len(differing) - 3)} differ "
            "from process 0; start all of them with the same command except for --process_id"
        )


def check_shared(workdir: str | Path) -> None:
    """Creates the workdir, and checks that every process can write to it and sees the files of the others.

    Raises:
      UserError: in every process, naming those that cannot.
    """
    workdir, problem = Path(workdir), ""
    note = workdir / f".process-{jax.process_index()}"
    host = socket.gethostname()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        note.write_text(host, encoding="utf-8")
    except OSError as error:
        problem = f"{workdir} on {host} cannot be written ({error}); choose another --workdir, or make it writable"
    fail_together(problem)
    missing = _invisible([workdir / f".process-{process}" for process in range(jax.process_count())])
    if missing:
        number = missing[0].name.removeprefix(".process-")
        problem = (
            f"{host} does not see what process {number} wrote to {workdir}; let --workdir be a folder that all hosts "
            "share (a mounted file system)"
        )
    fail_together(problem)
    note.unlink(missing_ok=True)


def _invisible(paths: Sequence[Path]) -> list[Path]:
    """The files that do not become visible in time; network file systems show files of other hosts with a delay."""
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while True:
        missing = [path for path in paths if not path.exists()]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.5)


def leave(code: int) -> None:
    """Exits at once if there are several processes; a normal exit would wait for the others, possibly forever."""
    if jax.process_count() > 1:
        time.sleep(1)  # lets processes that fail the same way print their error first
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
