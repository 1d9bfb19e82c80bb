"""What an executable does, read from its compiled text: operations, bytes, collectives, copies, turns of its loops.

The compiler's own account (`cost_analysis`) counts the body of each loop once, whatever its turns, and says nothing of
what travels between chips. Here every instruction is counted as often as it runs.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping

_ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"(?:ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][a-z0-9\-]*)\((.*)$")
_HEAD = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"\b(?:body|condition|calls|to_apply|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_KNOWN_TURNS = re.compile(r'known_trip_count"?[:=]\s*\{"?n"?[:=]"?(\d+)')
_BITS = {"pred": 8, "token": 0, "opaque": 0}

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
# What moves no bytes, or whose inside is counted.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "iota", "add-dependency"),
}
_PARTS = ("dynamic-slice", "slice", "gather")

# What writes a whole array again. A fusion that only reads the cache, or a slice update in place, does not.
_REWRITES = re.compile(r"(?:copy|copy-start|select|scatter|transpose)\(")

# Turns of a loop by the name of the operation that it came from; None leaves it to what the text says.
Turns = Callable[[str], int | None]
# Says of a loop that of several from one place in the program a single one is taken, for one turn.
ONE_OF_THEM = -1


@dataclasses.dataclass(frozen=True)
class Array:
    """The type of an array in the text.

    Attributes:
      near: whether it lies in memory on the chip, so that reading it is none of the slow memory.
    """

    kind: str
    shape: tuple[int, ...]
    near: bool

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _bits(self.kind) // 8


@functools.cache
def _bits(kind: str) -> int:
    return _BITS[kind] if kind in _BITS else int(re.sub(r"\D*(\d+).*", r"\1", kind) or 0)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation; `value` is a constant's, `rest` what stands behind the operands."""

    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    value: str
    rest: str

    @functools.cached_property
    def arrays(self) -> list[Array]:
        """What it gives: one array, or those of a tuple."""
        sides = lambda dims: tuple(int(side) for side in dims.split(",") if side)
        return [Array(kind, sides(dims), "S(1)" in layout) for kind, dims, layout in _ARRAY.findall(self.type)]

    @functools.cached_property
    def called(self) -> list[str]:
        """Computations that it runs."""
        return [name for group in _CALLED.findall(self.rest) for name in re.findall(r"[\w.\-]+", group)]

    @property
    def source(self) -> str:
        """The operation of the program that it came from."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found.group(1) if found else ""


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of a kind.

    Attributes:
      count: how often one runs.
      bytes: of the arrays that come together or are summed, on one chip.
      sent: of them, what a chip sends at least, in a ring.
    """

    count: int = 0
    bytes: float = 0.0
    sent: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.count + other.count, self.bytes + other.bytes, self.sent + other.sent)

    def times(self, turns: int) -> "Traffic":
        return Traffic(self.count * turns, self.bytes * turns, self.sent * turns)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a chip does.

    Attributes:
      flops: of products of matrices.
      bytes: read and written.
      traffic: by kind of collective.
    """

    flops: float = 0.0
    bytes: float = 0.0
    traffic: Mapping[str, Traffic] = dataclasses.field(default_factory=dict)

    def __add__(self, other: "Work") -> "Work":
        if not other.traffic:
            return Work(self.flops + other.flops, self.bytes + other.bytes, self.traffic)
        kinds = {*self.traffic, *other.traffic}
        traffic = {kind: self.traffic.get(kind, Traffic()) + other.traffic.get(kind, Traffic()) for kind in kinds}
        return Work(self.flops + other.flops, self.bytes + other.bytes, traffic)

    def times(self, turns: int) -> "Work":
        return Work(self.flops * turns, self.bytes * turns, {k: t.times(turns) for k, t in self.traffic.items()})


class Program:
    """An executable's text, read.

    Attributes:
      computations: instructions by their names, by computation.
      entry: the computation that is run.
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
            elif current is not None and (found := _INSTRUCTION.match(line.strip())):
                name, type_, op, rest = found.groups()
                inside, behind = _split_at_close(rest)
                current[name] = Instruction(name, type_, op, tuple(re.findall(r"%([\w.\-]+)", inside)), inside, behind)

    def work(self, turns: Turns = lambda source: None, *, known: bool = True) -> Work:
        """Everything that is done in one call.

        Args:
          turns: of loops of which the author knows more than the text says.
          known: whether turns count; otherwise the body of each loop counts once.
        """
        return self._work(self.entry, turns, known, {})

    def inside_loops(self) -> Iterator[Instruction]:
        """Instructions of every loop's body, and of whatever is called from one."""
        bodies = [
            name
            for part in self.computations.values()
            for line in part.values()
            if line.op == "while"
            for name in re.findall(r"\bbody=%?([\w.\-]+)", line.rest)
        ]
        reached = set()
        while bodies:
            name = bodies.pop()
            if name not in reached and name in self.computations:
                reached.add(name)
                bodies += [called for line in self.computations[name].values() for called in line.called]
        return (line for name in sorted(reached) for line in self.computations[name].values())

    def everywhere(self) -> Iterator[Instruction]:
        """Every instruction."""
        return (line for part in self.computations.values() for line in part.values())

    def _work(self, name: str, turns: Turns, known: bool, done: dict[str, Work]) -> Work:
        if name in done:
            return done[name]
        part, total = self.computations.get(name, {}), Work()
        choices: dict[str, list[Work]] = {}
        for line in part.values():
            inner = [self._work(called, turns, known, done) for called in line.called]
            if line.op == "while":
                body = functools.reduce(Work.__add__, inner)
                count = self._turns(line, turns) if known else 1
                if count == ONE_OF_THEM:
                    choices.setdefault(line.source, []).append(body)
                else:
                    total += body.times(count)
            elif line.op == "conditional":
                total += max(inner, key=lambda work: (work.flops, work.bytes), default=Work())
            elif line.op in ("fusion", "call", "async-start") or line.op.startswith("custom"):
                for work in inner:
                    total += dataclasses.replace(work, bytes=work.bytes if line.op == "call" else 0.0)
            total += Work(_flops(line, part), self._bytes(line, part), _traffic(line, part))
        for bodies in choices.values():
            total += max(bodies, key=lambda work: (work.flops, work.bytes))
        done[name] = total
        return total

    def _turns(self, line: Instruction, turns: Turns) -> int:
        """By the program's author, else by the compiler, else by the loop's condition; 1 where nobody knows."""
        if (said := turns(line.source)) is not None:
            return said
        if found := _KNOWN_TURNS.search(line.rest):
            return int(found.group(1))
        condition, body = (re.search(rf"\b{part}=%?([\w.\-]+)", line.rest) for part in ("condition", "body"))
        return self._bound(condition.group(1), body.group(1)) if condition and body else 1

    def _bound(self, condition: str, body: str) -> int:
        """From 0 to the constant below which a counter stays, where that is all that is asked (a scan); or else 1."""
        part = self.computations.get(condition, {})
        compared = [line for line in part.values() if line.op not in ("parameter", "get-tuple-element", "constant")]
        constants = [line for line in part.values() if line.op == "constant" and line.type[:5] in ("s32[]", "u32[]")]
        if len(compared) != 1 or len(constants) != 1 or compared[0].op != "compare":
            return 1
        if "direction=LT" not in compared[0].rest:
            return 1
        place = re.search(r"\bindex=(\d+)", part[compared[0].operands[0]].rest)
        return -(-int(constants[0].value) // (self._stride(body, int(place.group(1))) if place else 1))

    def _stride(self, body: str, place: int) -> int:
        """What a loop's body adds to its counter, which is at this place of what the body hands on; 1 if unknown."""
        part = self.computations.get(body, {})
        handed = list(part.values())[-1].operands[place : place + 1] if part else ()
        added = [part[name] for name in handed if name in part and part[name].op == "add"]
        steps = [part[name] for line in added for name in line.operands if name in part and part[name].op == "constant"]
        return max(int(steps[0].value), 1) if steps else 1

    def _bytes(self, line: Instruction, part: Mapping[str, Instruction]) -> float:
        """What an instruction reads and writes; of a fusion that looks at parts of an array, those parts."""
        if line.op in _FREE or line.op.endswith("-done") or line.op.startswith("async-"):
            return 0.0
        sizes = lambda x: sum(array.bytes for array in x.arrays if not array.near)
        given = [part[name] for name in line.operands if name in part]
        if line.op in _PARTS:
            return 2.0 * sizes(line)
        if line.op == "dynamic-update-slice":
            return 2.0 * sum(map(sizes, given[1:2]))
        if line.op == "scatter":
            return 2.0 * sum(map(sizes, given[2:3]))
        if line.op == "copy-start":
            return float(sum(map(sizes, given)) + sum(array.bytes for array in line.arrays[:1] if not array.near))
        if line.op == "fusion" and line.called and line.called[0] in self.computations:
            return self._fusion_bytes(line, given, sizes)
        return float(sum(map(sizes, given)) + sizes(line))

    def _fusion_bytes(self, line: Instruction, given: list[Instruction], sizes: Callable) -> float:
        inner = self.computations[line.called[0]]
        parameters = {}
        users: dict[str, list[Instruction]] = {}
        for x in inner.values():
            if x.op == "parameter":
                parameters[len(parameters)] = x.name
            for operand in x.operands:
                users.setdefault(operand, []).append(x)
        total, replaced = 0.0, 0.0
        for index, operand in enumerate(given):
            using = users.get(parameters.get(index, ""), [])
            own = parameters.get(index)
            if using and all(x.op in _PARTS and x.operands[:1] == (own,) for x in using):
                total += sum(sum(array.bytes for array in x.arrays) for x in using)
            elif using and all(x.op == "dynamic-update-slice" and x.operands[:1] == (own,) for x in using):
                written = [inner[x.operands[1]] for x in using if x.operands[1] in inner]
                total += sum(sum(array.bytes for array in x.arrays) for x in written)
                replaced += sizes(operand)
            else:
                total += sizes(operand)
        return total + max(sizes(line) - replaced, 0.0)


def _split_at_close(text: str) -> tuple[str, str]:
    """What stands before and behind the parenthesis that closes one opened before."""
    depth = 1
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[:index], text[index + 1 :]
    return text, ""


def _flops(line: Instruction, part: Mapping[str, Instruction]) -> float:
    """Two operations for each product of a matrix product, which on a TPU is a convolution."""
    given = [part[name].arrays[0].shape for name in line.operands if name in part and part[name].arrays]
    if line.op not in ("dot", "convolution") or len(given) < 2:
        return 0.0
    left, right, result = given[0], given[1], line.arrays[0].shape
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
        # A dimension of both that is not in the result is summed over.
        if result[of_result.index(label)] == 1 and right[of_right.index(label)] == left[of_left.index(label)]:
            inputs *= right[of_right.index(label)]
    return 2.0 * math.prod(result) * inputs


def _traffic(line: Instruction, part: Mapping[str, Instruction]) -> dict[str, Traffic]:
    kind = line.op.removesuffix("-start")
    if kind not in COLLECTIVES:
        return {}
    given = float(sum(array.bytes for name in line.operands if name in part for array in part[name].arrays))
    if kind == "collective-permute":
        return {kind: Traffic(1, given, given)}
    ways = _group_size(line.rest)
    if ways == 1:
        return {}
    share = (ways - 1) / ways
    whole = given * ways if kind == "all-gather" else given
    return {kind: Traffic(1, whole, (2 if kind == "all-reduce" else 1) * share * whole)}


def _group_size(rest: str) -> int:
    """How many chips take part in one collective: lists of ids, [groups,size]<=[...], or axes of a mesh by name."""
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(found.group(1).split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(found.group(1))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found.group(1)))
        named = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found.group(2))
        return math.prod(int(part or sizes[axis]) for axis, part in named)
    return 1


def cache_copies(program: Program, shapes: Collection[str]) -> list[str]:
    """Instructions inside loops that write a whole cache array again.

    A copy-start between memory spaces, S(1) on one side alone, is the compiler's prefetch of what fits on-chip
    memory, and no copy.

    Args:
      shapes: of caches on one chip, as the text writes them, such as "bf16[2,1,1024,128]".
    """
    copies = []
    for line in program.inside_loops():
        if not _REWRITES.match(f"{line.op}(") or not line.type.lstrip("(").startswith(tuple(shapes)):
            continue
        if line.op == "copy-start" and line.type.count("S(1)") == 1:
            continue
        copies.append(f"{line.name} = {line.type} {line.op}"[:200])
    return copies


def gathered(lines: Iterator[Instruction]) -> Iterator[tuple[int, ...]]:
    """Shapes that all-gathers give."""
    for line in lines:
        if line.op in ("all-gather", "all-gather-start"):
            yield max((array.shape for array in line.arrays), key=math.prod)
