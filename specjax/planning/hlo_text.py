"""Reads compiled text (HLO): its computations, their instructions, and the types of results."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

_ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"(ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][a-z0-9\-]*)\((.*)$")
_HEAD = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(
    r"\b(?:body|condition|calls|to_apply|branch_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_BITS = {"pred": 8, "token": 0, "opaque": 0}


@dataclasses.dataclass(frozen=True)
class Array:
    """An array type in HLO.

    Attributes:
      kind: the dtype's name in HLO.
      on_chip: whether it is outside the main memory, in a memory space S(1), S(2), .. of the chip.
    """

    kind: str
    shape: tuple[int, ...]
    on_chip: bool

    @property
    def bytes(self) -> float:
        return math.prod(self.shape) * _bits(self.kind) / 8

    @property
    def main_bytes(self) -> float:
        """Bytes in main memory: all or none."""
        return 0.0 if self.on_chip else self.bytes


@functools.cache
def _bits(kind: str) -> int:
    return _BITS[kind] if kind in _BITS else int(re.sub(r"\D*(\d+).*", r"\1", kind) or 0)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a computation.

    Attributes:
      type: type of the result, as text.
      value: text between the parentheses; for a constant its value, for a parameter its number.
      rest: text after the parentheses: attributes and metadata.
      is_root: whether its result is that of the computation.
    """

    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    value: str
    rest: str
    is_root: bool

    @functools.cached_property
    def arrays(self) -> list[Array]:
        """The array types of the result: one, or those of a tuple."""
        sides = lambda dims: tuple(int(side) for side in dims.split(",") if side)
        return [Array(kind, sides(dims), "S(" in layout) for kind, dims, layout in _ARRAY.findall(self.type)]

    @property
    def bytes(self) -> float:
        """Bytes of the result."""
        return sum(array.bytes for array in self.arrays)

    @property
    def main_bytes(self) -> float:
        """Bytes of the result in main memory."""
        return sum(array.main_bytes for array in self.arrays)

    @functools.cached_property
    def called(self) -> list[str]:
        """Names of the computations that it calls."""
        return [name for group in _CALLED.findall(self.rest) for name in re.findall(r"[\w.\-]+", group)]

    @property
    def source(self) -> str:
        """Its op_name: the path of the traced operation that it was compiled from."""
        match = re.search(r'op_name="([^"]*)"', self.rest)
        return match.group(1) if match else ""

    @property
    def chained(self) -> bool:
        """Whether it is a collective that the compiler repeats in each of the fusions between its start and its end."""
        return "chain_id=" in self.rest


# A computation: its instructions by name.
Computation = Mapping[str, Instruction]


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """The computations of an executable by name, and the name of the entry computation."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations.setdefault(head.group(1), {})
            entry = head.group(1) if line.startswith("ENTRY") else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line.strip())):
            root, name, type_, op, tail = match.groups()
            inside, rest = _split_at_close(tail)
            operands = tuple(re.findall(r"%([\w.\-]+)", inside))
            current[name] = Instruction(name, type_, op, operands, inside, rest, bool(root))
    return computations, entry


def _split_at_close(text: str) -> tuple[str, str]:
    """Splits at the parenthesis that closes one opened before the start of `text`."""
    depth = 1
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[:index], text[index + 1 :]
    return text, ""


def root_of(part: Computation) -> Instruction:
    return next(line for line in part.values() if line.is_root)
