"""What an executable takes of each chip: memory by the compiler's own account, work, and the least time for it."""

import dataclasses
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

from jax.errors import JaxRuntimeError
from jax.stages import Compiled

from specjax.planning import hlo
from specjax.planning.chips import CHIPS, Chip, Slice
from specjax.planning.steps import Decoding, Step
from specjax.runtime import mesh as meshes
from specjax.runtime.errors import UserError

# How a compiler says that what it was given does not fit.
_REFUSED = "RESOURCE_EXHAUSTED"


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one chip, of an executable alone.

    Attributes:
      arguments: of these the results that take their place are `aliased`.
      temporary: while it runs; of a compiler for another kind of device an estimate.
      peak: the most at one time.
    """

    arguments: int
    results: int
    aliased: int
    temporary: int
    peak: int

    @classmethod
    def of(cls, compiled: Compiled) -> "Memory":
        found = compiled.memory_analysis()
        sizes = [getattr(found, f"{part}_size_in_bytes") for part in ("argument", "output", "alias", "temp")]
        arguments, results, aliased, temporary = sizes
        # Not every compiler tells its peak, and one that does not has all of this at a time.
        peak = found.peak_memory_in_bytes or arguments + results - aliased + temporary
        return cls(arguments, results, aliased, temporary, peak)


def compiled_step(step: Step, mesh: Any) -> tuple[Compiled | None, float, str]:
    """Compiles a step: the executable (None where it does not fit), the seconds, and the compiler's words if not."""
    with meshes.use(mesh):
        started = time.perf_counter()
        try:
            compiled = step.lower().compile()
        except JaxRuntimeError as error:
            if _REFUSED not in str(error):
                raise
            return None, time.perf_counter() - started, _words(str(error))
    return compiled, time.perf_counter() - started, ""


def _words(refusal: str) -> str:
    """The sentences of a refusal that say what does not fit."""
    told = re.findall(r"(?:Ran out of memory|Used|Exceeded|Out of memory)[^\n]*", refusal)
    return " ".join(told[:3]) or refusal.strip().splitlines()[0][:300]


def program_of(compiled: Compiled) -> hlo.Program:
    """The executable's text, read. Raises UserError where the compiler wrote what this jax cannot read."""
    try:
        return hlo.Program(compiled.as_text())
    except JaxRuntimeError as error:
        raise UserError(
            f"this jax cannot read what the TPU compiler wrote ({str(error).splitlines()[0][:120]}); install "
            "the version that goes with it: make .venv/.installed-tpu-compiler"
        ) from error


def work_of(compiled: Compiled, step: Step, program: hlo.Program) -> hlo.Work:
    """Work of one call on one chip.

    Operations and bytes are the compiler's (`cost_analysis`), which counts each loop's body once; what further turns
    add, and collectives, are read from its text.
    """
    every, once = program.work(step.turns), program.work(known=False)
    said = compiled.cost_analysis() or {}
    flops = said["flops"] + every.flops - once.flops if "flops" in said else every.flops
    moved = said["bytes accessed"] + every.bytes - once.bytes if "bytes accessed" in said else every.bytes
    return hlo.Work(max(flops, every.flops), max(moved, 0.0), every.traffic)


def gathered_weights(program: hlo.Program, step: Step) -> list[tuple[int, ...]]:
    """Shapes of matrices of the model that a loop of this executable puts together on every chip, turn by turn."""
    wanted = step.weights | {shape[::-1] for shape in step.weights}
    return sorted({shape for shape in hlo.gathered(program.inside_loops()) if shape in wanted})


def cache_shapes(decoding: Decoding) -> set[str]:
    """The caches of one chip as the compiled text writes them."""
    short = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
    return {
        f"{short[x.dtype.name]}[{','.join(map(str, x.sharding.shard_shape(x.shape)))}]"
        for x in decoding.caches_on(decoding.mesh)
    }


def roofline(work: hlo.Work, chip: Chip) -> dict[str, float]:
    """The least seconds for this work on a chip: operations, memory and links at their peaks, all at the same time."""
    parts = {
        "compute": work.flops / chip.flops,
        "memory": work.bytes / chip.bandwidth,
        "communication": sum(traffic.sent for traffic in work.traffic.values()) / chip.interconnect,
    }
    return {**parts, "seconds": max(parts.values())}


def row(stage: str, step: Step, part: Slice, mesh: Any, compiled: Compiled | None, seconds: float, words: str) -> dict:
    """Everything that is known of a step on a slice, as a row of a record; bytes are those of one chip."""
    found = {
        "stage": stage,
        "step": step.name,
        "slice": part.name,
        "chips": part.size,
        "mesh": {axis: int(mesh.shape[axis]) for axis in meshes.AXES},
        "compiler": "TPU" if part.chip.is_tpu else "CPU",
        "compile_seconds": seconds,
        "resident_bytes": step.resident,
        "refusal": words,
        "fits": False,
    }
    if compiled is None:
        return found
    memory, program = Memory.of(compiled), program_of(compiled)
    work = work_of(compiled, step, program)
    beside = beside_of(step.resident, step.makes, memory.arguments)
    peak = memory.peak + beside
    return found | {
        "beside_bytes": beside,
        "memory": dataclasses.asdict(memory),
        "peak_bytes": peak,
        "fits": peak <= part.chip.memory,
        "flops": work.flops,
        "bytes": work.bytes,
        "collectives": {kind: dataclasses.asdict(of) for kind, of in sorted(work.traffic.items()) if of.count},
        "gathered_weights": [list(shape) for shape in gathered_weights(program, step)],
        "roofline": {chip.name: roofline(work, chip) for chip in CHIPS.values()},
    }


def beside_of(resident: Mapping[str, int], makes: Iterable[str], arguments: int) -> int:
    """Bytes of a stage that lie beside the arguments of one of its steps: what it does not look at."""
    there = sum(size for name, size in resident.items() if name not in makes)
    return max(there - arguments, 0)


def peak_of(rows: Iterable[Mapping]) -> int | None:
    """The most bytes on one chip in any of these steps; None where one of them was refused."""
    peaks = [found.get("peak_bytes") for found in rows]
    return None if None in peaks else max(peaks)
