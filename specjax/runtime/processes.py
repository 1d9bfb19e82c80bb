"""Runs of several processes: joining them, agreeing before anything begins, sharing what hosts know.

In a run of one process all of this is trivial. All processes run the same program on the same config, so that each
collective here is reached by all of them; what only one of them may do (writing records) is behind `first`.
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

from specjax.runtime.errors import UserError

# Flags of the command line, and what each is.
FLAGS = {
    "--coordinator": "HOST:PORT of process 0, which the others reach it by",
    "--processes": "how many there are",
    "--process_id": "which of them this one is, from 0",
    "--join_seconds": "how long to wait for the others (300)",
}
# How long one process may be ahead of another, where the first writes what the others then read.
_PATIENCE_SECONDS = 3600
# How long a file written by one host may take to be seen by another.
_VISIBLE_SECONDS = 20

_MEETINGS = itertools.count()

# What the runtime says where a process of the run is gone, not where something is wrong with this one.
_LOST = ("Gloo", "Connection", "connection", "UNAVAILABLE", "DEADLINE_EXCEEDED", "heartbeat", "coordination service")


@dataclasses.dataclass(frozen=True)
class Joining:
    """How this process finds the others.

    Attributes:
      coordinator: "HOST:PORT" of process 0; None where the environment tells, or where there is one process.
      processes: how many there are.
      process_id: which of them this one is.
      seconds: to wait for the others.
    """

    coordinator: str | None = None
    processes: int = 1
    process_id: int = 0
    seconds: int = 300


def parse(arguments: Sequence[str]) -> tuple[Joining, list[str]]:
    """Takes the flags of `FLAGS` out of a command line; returns the rest of it beside them.

    Raises:
      UserError: for a flag without its others, and for values out of range.
    """
    given, rest = {}, []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in FLAGS and equals:
            given[name] = value
        elif name in FLAGS:
            raise UserError(f"{name} has no value; write {name}=..., {FLAGS[name]}")
        else:
            rest.append(argument)
    numbers = {name: _number(name, text) for name, text in given.items() if name != "--coordinator"}
    seconds = numbers.pop("--join_seconds", Joining.seconds)
    missing = [name for name in ("--coordinator", "--processes", "--process_id") if name not in given]
    if len(missing) == 3:
        return Joining(seconds=seconds), rest
    if missing:
        raise UserError(f"{missing[0]} is missing; give it, or leave out the others too where the environment tells")
    coordinator, processes, process_id = given["--coordinator"], numbers["--processes"], numbers["--process_id"]
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f'--coordinator is "{coordinator}"; it must be HOST:PORT, such as 10.0.0.2:8476')
    if processes < 1 or not 0 <= process_id < processes:
        raise UserError(f"--process_id={process_id} of --processes={processes}: ids are 0 to --processes less 1")
    return Joining(coordinator, processes, process_id, seconds), rest


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise UserError(f'{name} is "{text}"; it must be a whole number: {FLAGS[name]}')
    return int(text)


def several(environment: Mapping[str, str]) -> bool:
    """Whether the environment says that this is one of several processes. Inside an allocation but outside `srun` it
    is not. SPECJAX_MULTIPROCESS=1 is for launchers on machines whose environment does not tell.
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
    """Joins the other processes, where flags or the environment say that there are any.

    JAX finds out the rest by itself on Cloud TPU, GKE, Slurm and Open MPI. Where the others are not found in time the
    process ends, with what to check and exit code 2: the runtime itself would abort it.

    Raises:
      UserError: where the environment does not tell enough.
    """
    if jax.distributed.is_initialized():
        return
    told = joining.coordinator is not None
    if (joining.processes == 1) if told else not several(environment):
        return
    flags = {}
    if told:
        flags = {
            "coordinator_address": joining.coordinator,
            "num_processes": joining.processes,
            "process_id": joining.process_id,
            "cluster_detection_method": "deactivate",
        }
        if joining.coordinator.startswith(("127.0.0.1:", "localhost:")):  # then no other host needs to reach it
            flags["coordinator_bind_address"] = joining.coordinator
    watch = threading.Timer(joining.seconds, _give_up, [joining])
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(**flags, initialization_timeout=joining.seconds + 60)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the other processes cannot be joined ({_first_line(error)}); give --coordinator, --processes and "
            "--process_id where the environment does not tell them, or start this process without the others' variables"
        ) from error
    finally:
        watch.cancel()


def _give_up(joining: Joining) -> None:
    """Ends the process, which waits for others in vain."""
    where = joining.coordinator or "the coordinator that the environment names"
    told = joining.coordinator is not None
    who = f"process {joining.process_id} of {joining.processes}" if told else "this process"
    print(
        f"error: {who} did not find the others within {joining.seconds} s; check that all of them are started, each "
        f"with an id of its own and the same count, that process 0 listens at {where} (no other program at that "
        "port, an address that the other hosts know, the port open between them), and that no proxy variable is set; "
        "--join_seconds=N waits longer",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def lost_another(error: Exception) -> bool:
    """Whether this is how the runtime tells that another process of the run is gone."""
    return jax.process_count() > 1 and any(word in str(error) for word in _LOST)


def first() -> bool:
    """Whether this process writes the records."""
    return jax.process_index() == 0


def refuse_several(what: str) -> None:
    """Raises UserError in a run of several processes, for what is measured on one host."""
    if jax.process_count() > 1:
        raise UserError(f"{what} runs on one host, and this is one of {jax.process_count()} processes; start it alone")


def meet(name: str) -> None:
    """Waits until all processes have come here; `name` is the same in all, and says where that is.

    No device takes part: collectives of some backends give up after seconds, and the first process may write for long.
    """
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        key = f"specjax {next(_MEETINGS)} {name}"
        multihost.get_barrier_sync_fn()(key=key, timeout_ms=_PATIENCE_SECONDS * 1000)


def from_first(array: Any) -> np.ndarray:
    """Process 0's value of an array that has one shape in all processes."""
    return multihost_utils.broadcast_one_to_all(np.asarray(array))


def gathered(text: str) -> list[str]:
    """Each process's text, in the order of the processes."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def fetch(tree: Any) -> Any:
    """Arrays as numpy's, whole in every process, wherever their parts lie."""
    if jax.process_count() == 1:
        return jax.device_get(tree)

    def whole(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return jax.device_get(x)
        if x.is_fully_replicated:
            return np.asarray(x.addressable_data(0))
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(whole, tree)


def fetch_to_first(tree: Any) -> Any:
    """As `fetch`, one array after another, and only process 0 keeps them: the others have None in their place.

    The tree itself in a run of one process, which has all of it at hand.
    """
    if jax.process_count() == 1:
        return tree

    def whole(x: Any) -> Any:
        found = fetch(x)
        return found if first() else None

    return jax.tree.map(whole, tree)


def fail_together(problem: str) -> None:
    """Raises UserError in all processes where any of them has a problem ("" is none)."""
    problems = gathered(problem)
    told = [f"process {i}: {text}" if len(problems) > 1 else text for i, text in enumerate(problems) if text]
    if told:
        raise UserError("; ".join(told[:3]) + (f"; and {len(told) - 3} more" if len(told) > 3 else ""))


def check_alike(config: Mapping[str, Any], workdir: str) -> None:
    """Refuses processes that were started with different configs or workdirs.

    Args:
      config: in JSON's own types.
      workdir: of the run, as it was given.

    Raises:
      UserError: in all of them, naming the processes and the first keys in which they differ from process 0.
    """
    if jax.process_count() == 1:
        return
    mine = {"--workdir": workdir, **_flat(config, "config")}
    all_of = [json.loads(text) for text in gathered(json.dumps(mine, sort_keys=True))]
    differing = []
    for process, other in enumerate(all_of):
        keys = [key for key in sorted(all_of[0].keys() | other.keys()) if all_of[0].get(key) != other.get(key)]
        if keys:
            shown = ", ".join(f"{key}: {all_of[0].get(key)!r} there, {other.get(key)!r} here" for key in keys[:3])
            differing.append(f"process {process} ({shown})")
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise UserError(
            f"not all processes were started alike: {'; '.join(differing[:3])}{more} differ from process 0; start all "
            "of them with the same command, but for --process_id"
        )


def _flat(tree: Any, prefix: str) -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {key: leaf for name, value in tree.items() for key, leaf in _flat(value, f"{prefix}.{name}").items()}


def check_shared(workdir: str | Path) -> None:
    """Makes the workdir, and refuses one that cannot be written, or that the hosts of the run do not share.

    Raises:
      UserError: in all processes, naming those that cannot, or do not see what process 0 wrote.
    """
    workdir, problem = Path(workdir), ""
    note = workdir / f".process-{jax.process_index()}"
    host = socket.gethostname()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        note.write_text(host, encoding="utf-8")
    except OSError as error:
        problem = f"{workdir} on {host} cannot be written ({error}); choose another --workdir, or give it the right"
    fail_together(problem)
    missing = _unseen([workdir / f".process-{process}" for process in range(jax.process_count())])
    if missing:
        number = missing[0].name.removeprefix(".process-")
        problem = (
            f"{host} does not see what process {number} wrote to {workdir}; let --workdir be a folder that all hosts "
            "share (a mounted file system)"
        )
    fail_together(problem)
    note.unlink(missing_ok=True)


def _unseen(paths: Sequence[Path]) -> list[Path]:
    """The files that do not appear: network file systems show another host's files with some delay."""
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while True:
        missing = [path for path in paths if not path.exists()]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.5)


def leave(code: int) -> None:
    """Ends this process of several without waiting for the others, who may be waiting for it in vain."""
    if jax.process_count() > 1:
        time.sleep(1)  # others who fail alike tell it too, before they learn that this one is gone
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]
