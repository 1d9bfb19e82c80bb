"""Computes the work of an executable from its compiled text (HLO): operations, bytes and collectives.

XLA's `cost_analysis` counts the body of each loop once, regardless of its trip count, and does not report traffic
between chips. Here every instruction is counted as often as it runs.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

_ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"(?:ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][a-z0-9\-]*)\((.*)$")
_HEAD = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"\b(?:body|condition|calls|to_apply|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_KNOWN_TRIP_COUNT = re.compile(r'known_trip_count"?[:=]\s*\{"?n"?[:=]"?(\d+)')
_BITS = {"pred": 8, "token": 0, "opaque": 0}

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
# Instructions that move no bytes themselves.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "iota", "add-dependency"),
}
_SLICES = ("dynamic-slice", "slice", "gather")

# Function from the op_name of a loop to its trip count; None means that it is derived from the text.
TripCounts = Callable[[str], int | None]
# The trip count for loops with the same op_name of which exactly one runs, once.
ONE_OF_THEM = -1


def unknown(source: str) -> None:
    """A TripCounts function that derives all trip counts from the text."""


@dataclasses.dataclass(frozen=True)
class Array:
    """An array type in HLO.

    Attributes:
      kind: the dtype's name in HLO.
      on_chip: whether it is in on-chip memory, so that accessing it costs no bandwidth of the main memory.
    """

    kind: str
    shape: tuple[int, ...]
    on_chip: bool

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _bits(self.kind) // 8


@functools.cache
def _bits(kind: str) -> int:
    return _BITS[kind] if kind in _BITS else int(re.sub(r"\D*(\d+).*", r"\1", kind) or 0)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a computation.

    Attributes:
      type: type of the result, as text.
      value: text between the parentheses; for a constant, its value.
      rest: text after the parentheses: attributes and metadata.
    """

    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    value: str
    rest: str

    @functools.cached_property
    def arrays(self) -> list[Array]:
        """The array types of the result: one, or those of a tuple."""
        sides = lambda dims: tuple(int(side) for side in dims.split(",") if side)
        return [Array(kind, sides(dims), "S(1)" in layout) for kind, dims, layout in _ARRAY.findall(self.type)]

    @property
    def bytes(self) -> int:
        """Bytes of the result."""
        return sum(array.bytes for array in self.arrays)

    @property
    def main_bytes(self) -> int:
        """Bytes of the result in main memory."""
        return sum(array.bytes for array in self.arrays if not array.on_chip)

    @functools.cached_property
    def called(self) -> list[str]:
        """Names of the computations that it calls."""
        return [name for group in _CALLED.findall(self.rest) for name in re.findall(r"[\w.\-]+", group)]

    @property
    def source(self) -> str:
        """Its op_name: the path of the traced operation that it was compiled from."""
        match = re.search(r'op_name="([^"]*)"', self.rest)
        return match.group(1) if match else ""


# A computation: its instructions by name.
Computation = Mapping[str, Instruction]


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
    """

    flops: float = 0.0
    bytes: float = 0.0
    traffic: Mapping[str, Traffic] = dataclasses.field(default_factory=dict)

    @classmethod
    def total(cls, parts: Iterable[tuple[int, "Work"]]) -> "Work":
        """The sum of (number of executions, work) pairs."""
        flops, moved, traffic = 0.0, 0.0, {}
        for times, work in parts:
            flops += times * work.flops
            moved += times * work.bytes
            for kind, x in work.traffic.items():
                y = traffic.get(kind, Traffic())
                counts = y.count + times * x.count, y.bytes + times * x.bytes, y.sent + times * x.sent
                traffic[kind] = Traffic(*counts)
        return cls(flops, moved, traffic)


def _costliest(works: Iterable[Work]) -> Work:
    return max(works, key=lambda work: (work.flops, work.bytes), default=Work())


class Program:
    """The parsed HLO text of an executable.

    Attributes:
      computations: its computations by name.
      entry: name of the entry computation.
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry, current = "", None
        for line in text.splitlines():
            if head := _HEAD.match(line):
                current = self.computations.setdefault(head.group(1), {})
                self.entry = head.group(1) if line.startswith("ENTRY") else self.entry
            elif line.startswith("}"):
                current = None
            elif current is not None and (match := _INSTRUCTION.match(line.strip())):
                name, type_, op, tail = match.groups()
                inside, rest = _split_at_close(tail)
                current[name] = Instruction(name, type_, op, tuple(re.findall(r"%([\w.\-]+)", inside)), inside, rest)

    def work(self, trip_counts: TripCounts = unknown, *, loops: bool = True) -> Work:
        """The work of one call.

        Args:
          trip_counts: gives trip counts that cannot be derived from the text.
          loops: whether to multiply by trip counts; otherwise each loop's body is counted once, as in `cost_analysis`.
        """
        return self._work(self.entry, trip_counts, loops, {})

    def inside_loops(self) -> Iterator[Instruction]:
        """Instructions in the bodies of all loops, and in the computations called from them."""
        loops = [line for part in self.computations.values() for line in part.values() if line.op == "while"]
        pending = [name for line in loops for name in re.findall(r"\bbody=%?([\w.\-]+)", line.rest)]
        reached = set()
        while pending:
            name = pending.pop()
            if name not in reached and name in self.computations:
                reached.add(name)
                pending += [called for line in self.computations[name].values() for called in line.called]
        return (line for name in sorted(reached) for line in self.computations[name].values())

    def _work(self, name: str, trip_counts: TripCounts, loops: bool, done: dict[str, Work]) -> Work:
        if name in done:
            return done[name]
        part = self.computations.get(name, {})
        parts: list[tuple[int, Work]] = []
        choices: dict[str, list[Work]] = {}
        for line in part.values():
            inner = [self._work(called, trip_counts, loops, done) for called in line.called]
            if line.op == "while":
                body = Work.total((1, work) for work in inner)
                count = self._trip_count(line, trip_counts) if loops else 1
                if count == ONE_OF_THEM:
                    choices.setdefault(line.source, []).append(body)
                else:
                    parts.append((count, body))
            elif line.op == "conditional":
                parts.append((1, _costliest(inner)))
            elif line.op == "call":
                parts += [(1, work) for work in inner]
            elif line.op in ("fusion", "async-start") or line.op.startswith("custom"):
                # Instructions inside a fusion do not access main memory.
                parts += [(1, dataclasses.replace(work, bytes=0.0)) for work in inner]
            parts.append((1, Work(_flops(line, part), self._bytes(line, part), _traffic(line, part))))
        parts += [(1, _costliest(bodies)) for bodies in choices.values()]
        done[name] = Work.total(parts)
        return done[name]

    def _trip_count(self, line: Instruction, trip_counts: TripCounts) -> int:
        """A loop's trip count from `trip_counts`, the compiler's annotation or the loop's condition; 1 if unknown."""
        if (count := trip_counts(line.source)) is not None:
            return count
        if match := _KNOWN_TRIP_COUNT.search(line.rest):
            return int(match.group(1))
        condition, body = (re.search(rf"\b{part}=%?([\w.\-]+)", line.rest) for part in ("condition", "body"))
        return self._bound(condition.group(1), body.group(1)) if condition and body else 1

    def _bound(self, condition: str, body: str) -> int:
        """The trip count of a loop whose condition is `counter < constant`, as in a scan; 1 for any other loop."""
        part = self.computations.get(condition, {})
        compared = [line for line in part.values() if line.op not in ("parameter", "get-tuple-element", "constant")]
        constants = [line for line in part.values() if line.op == "constant" and line.type[:5] in ("s32[]", "u32[]")]
        if len(compared) != 1 or len(constants) != 1 or compared[0].op != "compare":
            return 1
        if "direction=LT" not in compared[0].rest:
            return 1
        index = re.search(r"\bindex=(\d+)", part[compared[0].operands[0]].rest)
        return -(-int(constants[0].value) // (self._stride(body, int(index.group(1))) if index else 1))

    def _stride(self, body: str, index: int) -> int:
        """The number that a loop's body adds to the counter (element `index` of its result); 1 if unknown."""
        part = self.computations.get(body, {})
        results = list(part.values())[-1].operands[index : index + 1] if part else ()
        added = [part[name] for name in results if name in part and part[name].op == "add"]
        steps = [part[name] for line in added for name in line.operands if name in part and part[name].op == "constant"]
        return max(int(steps[0].value), 1) if steps else 1

    def _bytes(self, line: Instruction, part: Computation) -> float:
        """Bytes of main memory that an instruction reads and writes."""
        if line.op in _FREE or line.op.endswith("-done") or line.op.startswith("async-"):
            return 0.0
        operands = [part[name] for name in line.operands if name in part]
        read = lambda lines: float(sum(x.main_bytes for x in lines))
        if line.op in _SLICES:
            return 2.0 * line.main_bytes
        if line.op in ("dynamic-update-slice", "scatter"):  # in place, so only the update is read and written
            index = 1 if line.op == "dynamic-update-slice" else 2
            return 2.0 * read(operands[index : index + 1])
        if line.op == "copy-start":
            return read(operands) + sum(array.bytes for array in line.arrays[:1] if not array.on_chip)
        if line.op == "fusion" and line.called and line.called[0] in self.computations:
            return self._fusion_bytes(line, operands)
        return read(operands) + line.main_bytes

    def _fusion_bytes(self, line: Instruction, operands: list[Instruction]) -> float:
        """Bytes that a fusion reads and writes; operands that are only sliced or updated in place count by slice."""
        inner = self.computations[line.called[0]]
        parameters = [x.name for x in inner.values() if x.op == "parameter"]
        total, replaced = 0.0, 0.0
        for index, operand in enumerate(operands):
            name = parameters[index] if index < len(parameters) else ""
            users = [x for x in inner.values() if name in x.operands]
            if users and all(x.op in _SLICES and x.operands[0] == name for x in users):
                total += sum(x.bytes for x in users)
            elif users and all(x.op == "dynamic-update-slice" and x.operands[0] == name for x in users):
                total += sum(inner[x.operands[1]].bytes for x in users if x.operands[1] in inner)
                replaced += operand.main_bytes
            else:
                total += operand.main_bytes
        return total + max(line.main_bytes - replaced, 0.0)


def _split_at_close(text: str) -> tuple[str, str]:
    """Splits at the parenthesis that closes one opened before the start of `text`."""
    depth = 1
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[:index], text[index + 1 :]
    return text, ""


def _flops(line: Instruction, part: Computation) -> float:
    """Operations of a matrix product, two for each multiplication; TPUs write it as a convolution."""
    shapes = [part[name].arrays[0].shape for name in line.operands if name in part and part[name].arrays]
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
