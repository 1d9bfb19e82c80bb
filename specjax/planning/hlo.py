"""Computes the work of an executable from its compiled text (HLO): operations, bytes and collectives.

XLA's `cost_analysis` counts the body of each loop once, regardless of its trip count, and does not report traffic
between chips. Here every instruction is counted as often as it runs.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from specjax.planning import hlo_text
from specjax.planning.hlo_text import Computation, Instruction, root_of

_KNOWN_TRIP_COUNT = re.compile(r'known_trip_count"?[:=]\s*\{"?n"?[:=]"?(\d+)')
_ESTIMATED_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
# Instructions that run other computations; their work is that of the computations.
_CONTROL = ("while", "conditional", "call", "async-start")
# Instructions that move no bytes themselves.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "async-update", *_CONTROL),
    *("partition-id", "replica-id", "opt-barrier", "iota", "add-dependency"),
}
_SLICES = ("dynamic-slice", "slice", "gather")
# Instructions that update their first operand in place, and the index of the operand that they write into it.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}

# Function from the op_name of a loop to its trip count; None means that it is derived from the text.
TripCounts = Callable[[str], int | None]
# The trip count for loops with the same op_name of which exactly one runs, once.
ONE_OF_THEM = -1


def unknown(source: str) -> None:
    """A TripCounts function that derives all trip counts from the text."""


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The collectives of one kind.

    Attributes:
      count: number of executions.
      bytes: total bytes of the gathered or reduced arrays on one chip.
      sent: minimum bytes that a chip sends, with a ring algorithm.
    """

    count: int = 0
    bytes: float = 0.0
    sent: float = 0.0


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one chip.

    Attributes:
      flops: floating-point operations of matrix products.
      bytes: bytes of main memory read and written.
      traffic: collectives by kind.
      cycles: the TPU compiler's estimate, which leaves out collectives, prefetches and updates in place.
    """

    flops: float = 0.0
    bytes: float = 0.0
    traffic: Mapping[str, Traffic] = dataclasses.field(default_factory=dict)
    cycles: float = 0.0

    @classmethod
    def total(cls, parts: Iterable[tuple[int, "Work"]]) -> "Work":
        """The sum of (number of executions, work) pairs."""
        flops, moved, traffic, cycles = 0.0, 0.0, {}, 0.0
        for times, work in parts:
            flops += times * work.flops
            moved += times * work.bytes
            cycles += times * work.cycles
            for kind, x in work.traffic.items():
                y = traffic.get(kind, Traffic())
                counts = y.count + times * x.count, y.bytes + times * x.bytes, y.sent + times * x.sent
                traffic[kind] = Traffic(*counts)
        return cls(flops, moved, traffic, cycles)


class Execution(NamedTuple):
    """An instruction that runs: how many times, its op_name, and the work of one execution."""

    times: int
    source: str
    work: Work


def total(executions: Iterable[Execution]) -> Work:
    """The work of all executions together."""
    return Work.total((x.times, x.work) for x in executions)


def _costliest(choices: Iterable[list[Execution]]) -> list[Execution]:
    works = [(total(executions), executions) for executions in choices]
    return max(works, key=lambda pair: (pair[0].flops, pair[0].bytes), default=(Work(), []))[1]


class Program:
    """The parsed HLO text of an executable.

    Attributes:
      computations: its computations by name.
      entry: name of the entry computation.
    """

    def __init__(self, text: str):
        self.computations, self.entry = hlo_text.parse(text)

    def inside_loops(self) -> Iterator[Instruction]:
        """Instructions in the bodies of all loops, and in the computations called from them."""
        loops = [line for part in self.computations.values() for line in part.values() if line.op == "while"]
        pending = [name for line in loops for name in line.called]
        reached = set()
        while pending:
            name = pending.pop()
            if name not in reached and name in self.computations:
                reached.add(name)
                pending += [called for line in self.computations[name].values() for called in line.called]
        return (line for name in sorted(reached) for line in self.computations[name].values())

    def executions(self, trip_counts: TripCounts = unknown, name: str | None = None) -> list[Execution]:
        """All instructions that one call runs. Of the branches of a conditional, the costliest runs.

        Args:
          trip_counts: gives trip counts that cannot be derived from the text.
          name: the computation that is called; the entry computation by default.
        """
        part = self.computations.get(self.entry if name is None else name, {})
        executions: list[Execution] = []
        choices: dict[str, list[list[Execution]]] = {}
        for line in part.values():
            if line.op not in _CONTROL:
                executions.append(Execution(1, line.source, self._work(line, part)))
                continue
            inner = [self.executions(trip_counts, called) for called in line.called]
            joined = [execution for each in inner for execution in each]
            if line.op == "while":
                count = self._trip_count(line, trip_counts)
                if count == ONE_OF_THEM:
                    choices.setdefault(line.source, []).append(joined)
                else:
                    executions += [x._replace(times=count * x.times) for x in joined]
            else:
                executions += _costliest(inner) if line.op == "conditional" else joined
        return executions + [execution for each in choices.values() for execution in _costliest(each)]

    def work(self, trip_counts: TripCounts = unknown) -> Work:
        """The work of one call; see `executions`."""
        return total(self.executions(trip_counts))

    def iteration(self, source: str, trip_counts: TripCounts = unknown) -> list[Execution]:
        """All instructions that run in one iteration of the loop of the entry computation with this op_name."""
        loops = [line for line in self.computations[self.entry].values() if line.op == "while"]
        called = [name for line in loops if line.source == source for name in line.called]
        return [execution for name in called for execution in self.executions(trip_counts, name)]

    def _trip_count(self, line: Instruction, trip_counts: TripCounts) -> int:
        """A loop's trip count from `trip_counts`, the compiler's annotation or the loop's condition; 1 if unknown."""
        if (count := trip_counts(line.source)) is not None:
            return count
        if match := _KNOWN_TRIP_COUNT.search(line.rest):
            return int(match.group(1))
        return self._bound(line)

    def _bound(self, loop: Instruction) -> int:
        """The trip count of a loop whose condition is `counter < constant`, as in a scan; 1 for any other loop."""
        condition, body = (self.computations.get(name, {}) for name in loop.called)
        compared = [
            line for line in condition.values() if line.op not in ("parameter", "get-tuple-element", "constant")
        ]
        if len(compared) != 1 or compared[0].op != "compare" or "direction=LT" not in compared[0].rest:
            return 1
        counter, limit = (condition[name] for name in compared[0].operands)
        index = re.search(r"\bindex=(\d+)", counter.rest)
        if limit.op != "constant" or limit.type[:5] not in ("s32[]", "u32[]"):
            return 1
        return -(-int(limit.value) // (_stride(body, int(index.group(1))) if index else 1))

    def _work(self, line: Instruction, part: Computation) -> Work:
        """The work of an instruction; of those inside a fusion, only products and collectives count."""
        starts, works = line.name.startswith("async-collective-start"), []
        if line.op == "fusion" or line.op.startswith("custom"):
            lines = [(x, self.computations[name]) for name in line.called for x in self.computations[name].values()]
            works = [
                dataclasses.replace(self._work(*each), bytes=0.0) for each in lines if starts or not each[0].chained
            ]
        estimate = _ESTIMATED_CYCLES.search(line.rest)
        cycles = float(estimate.group(1)) if estimate else 0.0
        own = Work(_flops(line, part), self._bytes(line, part), _traffic(line, part), cycles)
        return Work.total((1, x) for x in (own, *works))

    def _bytes(self, line: Instruction, part: Computation) -> float:
        """Bytes of main memory that an instruction reads and writes."""
        if line.op in _FREE or line.op.endswith("-done") or line.name.startswith("async-collective-done"):
            return 0.0
        operands = [part[name] for name in dict.fromkeys(line.operands) if name in part]
        op, results = line.op.removesuffix("-start"), line.arrays
        if op != line.op and op != "all-reduce":  # a tuple: copy-start begins with the result, others with the operands
            results = results[:1] if op == "copy" else results[sum(len(x.arrays) for x in operands) :]
        written = sum(array.main_bytes for array in results)
        if op in _SLICES:
            return written + (results[0].bytes if operands[0].main_bytes else 0.0)
        if op in _UPDATES:
            update = operands[_UPDATES[op]]
            return update.main_bytes + (update.bytes if line.main_bytes else 0.0)
        if op == "fusion":
            return self._fusion_bytes(line, part)
        return written + sum(x.main_bytes for x in operands)

    def _fusion_bytes(self, line: Instruction, part: Computation) -> float:
        """Bytes that a fusion reads and writes; of operands that are only sliced or updated in place, the slices."""
        inner = self.computations[line.called[0]]
        if line.name.startswith("async-collective-start"):
            return sum(self._bytes(x, inner) for x in inner.values() if x.chained)
        parameters = {int(x.value): x.name for x in inner.values() if x.op == "parameter"}
        operands = [(parameters[index], part[name]) for index, name in enumerate(line.operands) if name in part]
        read = sum(min(self._read(inner, name), x.bytes) for name, x in operands if x.main_bytes)
        root = root_of(inner)
        results = zip(line.arrays, root.operands if root.op == "tuple" else (root.name,), strict=False)
        return read + sum(min(self._written(inner, name), array.main_bytes) for array, name in results)

    def _read(self, part: Computation, name: str) -> float:
        """Bytes of a parameter that a fused computation reads: slices, or infinity for all of it."""
        read = 0.0
        for line in (x for x in part.values() if name in x.operands):
            is_first = line.operands[0] == name and line.operands.count(name) == 1
            if line.op in _SLICES and is_first:
                read += line.bytes
            elif line.op == "fusion":
                inner, number = self.computations[line.called[0]], str(line.operands.index(name))
                read += sum(
                    self._read(inner, x.name) for x in inner.values() if (x.op, x.value) == ("parameter", number)
                )
            elif line.op == "bitcast" and not line.is_root:
                read += self._read(part, line.name)
            elif not (line.op == "tuple" or line.chained or (line.op in _UPDATES and is_first)):
                return math.inf
        return read

    def _written(self, part: Computation, name: str) -> float:
        """Bytes that a fused computation writes of one of its results; nothing of what it only passes on."""
        line = part[name]
        if line.op == "bitcast":
            return self._written(part, line.operands[0])
        if line.op in _UPDATES:
            return part[line.operands[_UPDATES[line.op]]].bytes + self._written(part, line.operands[0])
        if line.op == "fusion" and len(line.arrays) == 1:
            inner = self.computations[line.called[0]]
            return self._written(inner, root_of(inner).name) if root_of(inner).op in _UPDATES else line.bytes
        return 0.0 if line.op == "parameter" or line.chained else line.bytes


def _stride(body: Computation, index: int) -> int:
    """The number that a loop's body adds to the counter (element `index` of its result); 1 if unknown."""
    added = [
        body[name] for name in root_of(body).operands[index : index + 1] if name in body and body[name].op == "add"
    ]
    steps = [body[name] for line in added for name in line.operands if name in body and body[name].op == "constant"]
    return max(int(steps[0].value), 1) if steps else 1


def _flops(line: Instruction, part: Computation) -> float:
    """Operations of a matrix product, two for each multiplication; TPUs write it as a convolution."""
    shapes = [part[name].arrays[0].shape for name in line.operands if name in part and part[name].arrays]
    if line.op == "custom-call" and line.name.startswith("ragged-dot") and line.arrays:
        # The TPU compiler's product of rows [R, I], sorted by group, with kernels [E, I, O], or the gradient of these.
        shapes.append(line.arrays[0].shape)
        kernels, rows = ([shape for shape in shapes if len(shape) == dims] for dims in (3, 2))
        return 2.0 * rows[0][0] * math.prod(kernels[0][1:]) if kernels and rows else 0.0
    if line.op not in ("dot", "convolution") or len(shapes) < 2:
        return 0.0
    left, right, result = shapes[0], shapes[1], line.arrays[0].shape
    if line.op == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.rest)
        dims = [int(n) for n in contracted.group(1).split(",") if n] if contracted else []
        return 2.0 * math.prod(result) * math.prod(left[d] for d in dims)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.rest)
    if not labels:
        return 0.0
    of_left, of_right, of_result = labels.groups()
    inputs = right[of_right.index("i")]
    for label in filter(str.isdigit, of_right):
        # A spatial dimension that both inputs have and the result lacks is summed over.
        if result[of_result.index(label)] == 1 and right[of_right.index(label)] == left[of_left.index(label)]:
            inputs *= right[of_right.index(label)]
    return 2.0 * math.prod(result) * inputs


def _traffic(line: Instruction, part: Computation) -> dict[str, Traffic]:
    kind = line.op.removesuffix("-start")
    if kind not in COLLECTIVES:
        return {}
    size = float(sum(part[name].bytes for name in line.operands if name in part))
    if kind == "collective-permute":
        return {kind: Traffic(1, size, size)}
    chips = _group_size(line.rest)
    if chips == 1:
        return {}
    total = size * chips if kind == "all-gather" else size
    return {kind: Traffic(1, total, (2 if kind == "all-reduce" else 1) * (chips - 1) / chips * total)}


def _group_size(rest: str) -> int:
    """The number of chips in a group of a collective, for any of the three notations of replica groups."""
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(match.group(1).split(","))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(match.group(1))
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match.group(1)))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match.group(2))
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return 1


def gathered(lines: Iterable[Instruction]) -> Iterator[tuple[int, ...]]:
    """The shapes of the results of all all-gathers."""
    for line in lines:
        if line.op in ("all-gather", "all-gather-start"):
            yield max((array.shape for array in line.arrays), key=math.prod)
