"""The cost of an executable on one chip: memory reported by the compiler, work, and a lower bound of its time."""

import dataclasses
import re
import time
from typing import Any

from jax.errors import JaxRuntimeError
from jax.stages import Compiled

from specjax.planning import hlo
from specjax.planning.chips import CHIPS, Chip, Slice
from specjax.planning.executables import Executable
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError, first_line

# The compiler's error code for a program that does not fit.
_REFUSED = "RESOURCE_EXHAUSTED"
# Named scopes of prefill and decoding, and of an update.
_SCOPES = re.compile(r"\b(propose|verify|rule|commit|prefill|drafter_init|draft_trunk|target_trunk|heads|optimizer)\b")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that an executable needs on one chip.

    Attributes:
      arguments: bytes of its inputs.
      results: bytes of its outputs.
      aliased: bytes of outputs that reuse the memory of inputs.
      temporary: bytes of intermediate arrays; an estimate if the compiler is for another kind of device.
      peak: maximum bytes in use at any time.
    """

    arguments: int
    results: int
    aliased: int
    temporary: int
    peak: int

    @classmethod
    def of(cls, compiled: Compiled) -> "Memory":
        stats = compiled.memory_analysis()
        sizes = [getattr(stats, f"{part}_size_in_bytes") for part in ("argument", "output", "alias", "temp")]
        arguments, results, aliased, temporary = sizes
        # If the compiler reports no peak, assume that everything is in memory at the same time.
        return cls(*sizes, stats.peak_memory_in_bytes or arguments + results - aliased + temporary)


def compiled_on(mesh: Any, executable: Executable) -> tuple[Compiled | None, float, str]:
    """Compiles for a mesh. Returns (executable or None if it does not fit, seconds, the compiler's reason or "")."""
    with meshes.use(mesh):
        started = time.perf_counter()
        try:
            compiled = executable.lower().compile()
        except JaxRuntimeError as error:
            if _REFUSED not in str(error):
                raise
            return None, time.perf_counter() - started, _reason(str(error))
    return compiled, time.perf_counter() - started, ""


def _reason(refusal: str) -> str:
    """The sentences of the compiler's error that say what does not fit."""
    sentences = re.findall(r"(?:Ran out of memory|Used|Exceeded|Out of memory)[^\n]*", refusal)
    return " ".join(sentences[:3]) or refusal.strip().splitlines()[0][:300]


def program_of(compiled: Compiled) -> hlo.Program:
    """Parses the text of a compiled executable. Raises UserError if libtpu is of another version than jax expects."""
    try:
        return hlo.Program(compiled.as_text())
    except JaxRuntimeError as error:
        raise UserError(
            f"this jax cannot read what the TPU compiler wrote ({first_line(error)}); install "
            "the version that goes with it: make .venv/.installed-tpu-compiler"
        ) from error


def parts_of(program: hlo.Program, executable: Executable) -> dict[str, hlo.Work]:
    """The work on one chip of one call, or of one iteration of `executable.loop`, by the scope of its source."""
    counts, loop = executable.trip_counts, executable.loop
    scopes: dict[str, list[hlo.Execution]] = {}
    for execution in program.iteration(loop, counts) if loop else program.executions(counts):
        scope = _SCOPES.search(execution.source)
        scopes.setdefault(scope.group() if scope else "other", []).append(execution)
    return {scope: hlo.total(executions) for scope, executions in scopes.items()}


def outside_loop(program: hlo.Program, executable: Executable) -> hlo.Work:
    """The work of a call outside `executable.loop`, such as a copy of a weight that the compiler hoisted."""
    counts = lambda source: 0 if source == executable.loop else executable.trip_counts(source)
    return program.work(counts) if executable.loop else hlo.Work()


def gathered_weights(program: hlo.Program, executable: Executable) -> list[tuple[int, ...]]:
    """Shapes of weight matrices that a loop gathers on every chip in each iteration."""
    matrices = executable.weights | {shape[::-1] for shape in executable.weights}
    return sorted({shape for shape in hlo.gathered(program.inside_loops()) if shape in matrices})


def roofline(work: hlo.Work, chip: Chip) -> dict[str, float]:
    """A lower bound of the seconds for this work, with compute, memory and links at their peaks and overlapping."""
    parts = {
        "compute": work.flops / chip.flops,
        "memory": work.bytes / chip.bandwidth,
        "communication": sum(traffic.sent for traffic in work.traffic.values()) / chip.interconnect,
    }
    return {**parts, "seconds": max(parts.values())}


def row(
    stage: str, executable: Executable, part: Slice, mesh: Any, compiled: Compiled | None, seconds: float, reason: str
) -> dict:
    """The row of a cost report for an executable; bytes are those on one chip."""
    common = {
        "stage": stage,
        "step": executable.name,
        "slice": part.name,
        "chips": part.size,
        "mesh": {axis: int(mesh.shape[axis]) for axis in meshes.AXES},
        "compiler": "TPU" if part.chip.is_tpu else "CPU",
        "compile_seconds": seconds,
        "resident_bytes": executable.resident,
        "refusal": reason,
        "fits": False,
    }
    if compiled is None:
        return common
    memory, program = Memory.of(compiled), program_of(compiled)
    parts, outside = parts_of(program, executable), outside_loop(program, executable)
    work = hlo.Work.total((1, part) for part in parts.values())
    before = sum(size for name, size in executable.resident.items() if name not in executable.creates)
    unused = max(before - memory.arguments, 0)  # resident arrays that are not arguments of this executable
    peak = memory.peak + unused
    return common | {
        "unused_resident_bytes": unused,
        "memory": dataclasses.asdict(memory),
        "peak_bytes": peak,
        "fits": peak <= part.chip.memory,
        "flops": work.flops,
        "bytes": work.bytes,
        "parts": {scope: {"flops": part.flops, "bytes": part.bytes} for scope, part in sorted(parts.items())},
        "outside_loop": {"flops": outside.flops, "bytes": outside.bytes},
        "collectives": {kind: dataclasses.asdict(of) for kind, of in sorted(work.traffic.items()) if of.count},
        "gathered_weights": [list(shape) for shape in gathered_weights(program, executable)],
        "roofline": {chip.name: roofline(work, chip) for chip in CHIPS.values()},
    }
