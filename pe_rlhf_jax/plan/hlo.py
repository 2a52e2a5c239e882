"""Reads a compiled program's text: collectives with the trip counts of the loops around them, and the largest arrays.

The text is one device's program (SPMD). A computation's name starts its block; loops are `while(init), condition=%c, body=%b`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast", "ragged-all-to-all")
_WIDTH = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_WIDTH |= {"s64": 8, "u64": 8, "f64": 8, "c64": 8, "f8e4m3fn": 1, "f8e5m2": 1}
_ARRAY = re.compile(r"\b(" + "|".join(_WIDTH) + r")\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*)$")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|called_computations|branch_computations|true_computation|false_computation)=\{?((?:%?[\w.-]+(?:, )?)+)\}?"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind in one run of the program, on one device."""

    kind: str
    count: int
    bytes: float
    """That a device sends, if they go around a ring: (g-1)/g of the gathered or scattered array in a group of g, twice that for an
    all-reduce, all of it for a permute."""


@dataclasses.dataclass(frozen=True)
class Array:
    """An array that the program makes on each device."""

    type: str
    shape: tuple[int, ...]
    operation: str
    """The path of names in the source."""

    @property
    def bytes(self) -> float:
        return _WIDTH[self.type] * math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Communication:
    """What a program sends."""

    collectives: tuple[Collective, ...]
    unknown_loops: int
    """Loops with collectives whose length the text does not tell; they are counted as `unknown` says."""

    @property
    def bytes(self) -> float:
        """That a device sends."""
        return sum(collective.bytes for collective in self.collectives)


class _Instruction:
    def __init__(self, name: str, text: str):
        self.name = name
        self.shape, rest = _split_shape(text)
        self.op = rest.partition("(")[0].strip()
        self.rest = rest

    @functools.cached_property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", _inside(self.rest))

    def attribute(self, name: str) -> str | None:
        found = re.search(rf"\b{name}=%?([\w.-]+)", self.rest)
        return found and found[1]


def communication(text: str, devices: int, unknown: Sequence[int] = ()) -> Communication:
    """Collectives of one run of the program, loops included.

    Args:
        devices: in the mesh; the group of a collective that names none.
        unknown: how often to count the body of a loop that ends early, such as that of generation; then of such a loop in it, and so on.
            Others are counted once.
    """
    computations, entry = _computations(text)
    totals: dict[str, list[float]] = {}
    loops = 0
    # A collective that runs beside other work stands in several fusions, under one channel: its start, its middle and its end.
    seen: set[str] = set()

    @functools.cache
    def sends(name: str) -> bool:
        return any(_kind(i.op) or any(sends(other) for other in _called(i)) for i in computations.get(name, {}).values())

    def visit(name: str, times: int, depth: int) -> None:
        nonlocal loops
        for i in computations.get(name, {}).values():
            kind = _kind(i.op)
            channel = re.search(r"channel_id=(\d+)", i.rest)
            key = channel[1] if channel else f"{name} {i.name}"
            if kind and not i.op.endswith("-done") and key not in seen:
                seen.add(key)
                total = totals.setdefault(kind, [0, 0.0])
                total[0] += times
                total[1] += times * _sent(kind, i, devices)
            called = _called(i)
            if not any(sends(other) for other in called) or i.op in ("async-update", "async-done"):
                continue
            repeats, inside = times, depth
            if i.op == "while":
                trips = _trips(i, computations, computations[name])
                if trips is None:
                    trips = unknown[depth] if depth < len(unknown) else 1
                    loops, inside = loops + 1, depth + 1
                repeats = times * trips
            for other in called:
                visit(other, repeats, inside)

    visit(entry, 1, 0)
    found = tuple(Collective(kind, int(count), size) for kind, (count, size) in sorted(totals.items(), key=lambda item: -item[1][1]))
    return Communication(found, loops)


def arrays(text: str) -> list[Array]:
    """Every array that an instruction makes, largest first; tuples and parameters make none. Fusions' insides are never in memory.

    Of a fusion with several results, each belongs to the operation inside that makes it: the product of one layer's matrix may run while
    another's arrives. A result that is one of its operands, it does not make.
    """
    computations, _ = _computations(text)
    fused = {name for block in computations.values() for i in block.values() if i.op == "fusion" for name in _called(i)}
    found: dict[tuple, Array] = {}
    for name, block in computations.items():
        if name in fused:
            continue
        for made in (made for i in block.values() for made in _made(i, computations)):
            operation = re.search(r'op_name="([^"]*)"', made.rest)
            for kind, dimensions in _ARRAY.findall(made.shape):
                shape = tuple(int(n) for n in dimensions.split(",") if n)
                array = Array(kind, shape, operation[1] if operation else made.op)
                found.setdefault((kind, shape, array.operation), array)
    return sorted(found.values(), key=lambda array: -array.bytes)


def _made(i: _Instruction, computations: dict[str, dict[str, _Instruction]]) -> list[_Instruction]:
    """The instruction, or, of a fusion with several results, those inside that make them."""
    if i.op in ("parameter", "tuple", "get-tuple-element", "bitcast", "while", "constant", "conditional"):
        return []
    if i.op != "fusion" or not i.shape.startswith("("):
        return [i]
    inside = computations[i.attribute("calls") or ""]
    results = list(inside.values())[-1]  # the root, a tuple
    return [made for name in results.operands for made in _made(_unwrapped(inside[name], inside), computations)]


def _unwrapped(i: _Instruction, block: dict[str, _Instruction]) -> _Instruction:
    while i.op == "bitcast":
        i = block[i.operands[0]]
    return i


def _computations(text: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
    blocks: dict[str, dict[str, _Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            head = re.match(r"^(ENTRY )?%?([\w.-]+) \(.*\{$", line)
            if head:
                current = blocks.setdefault(head[2], {})
                entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif found := _INSTRUCTION.match(line):
            current[found[1]] = _Instruction(found[1], found[2])
    return blocks, entry


def _split_shape(text: str) -> tuple[str, str]:
    """`(f32[2]{0}, s32[]) while(...)` -> shape, rest."""
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    end = _closing(text, 0)
    return text[: end + 1], text[end + 2 :]


def _closing(text: str, start: int) -> int:
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at
    return len(text)


def _inside(rest: str) -> str:
    start = rest.find("(")
    return rest[start + 1 : _closing(rest, start)]


def _kind(op: str) -> str | None:
    base = op.removesuffix("-start").removesuffix("-done")
    return base if base in KINDS else None


def _called(i: _Instruction) -> list[str]:
    names = [name for group in _CALLED.findall(i.rest) for name in re.findall(r"[\w.-]+", group)]
    return names + [name for key in ("body", "condition") if (name := i.attribute(key))] if i.op == "while" else names


def _sent(kind: str, i: _Instruction, devices: int) -> float:
    sizes = [_WIDTH[t] * math.prod(int(n) for n in d.split(",") if n) for t, d in _ARRAY.findall(i.shape)]
    if i.op.endswith("-start"):  # (operands, results, contexts): what is sent is the result, of the second half
        real = [size for size in sizes if size > 8]
        sizes = real[len(real) // 2 :]
    size, group = sum(sizes), _group(i, devices)
    if kind in ("collective-permute", "collective-broadcast"):
        return size
    if group <= 1:
        return 0.0
    share = (group - 1) / group
    if kind == "all-reduce":
        return 2 * size * share
    return size * group * share if kind == "reduce-scatter" else size * share


def _group(i: _Instruction, devices: int) -> int:
    """Devices that take part together: by mesh axes, lists, or [groups,size]<=[devices]."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", i.rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", found[2]))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", i.rest):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", i.rest):
        return len(found[1].split(","))
    return devices


def _trips(i: _Instruction, computations: dict[str, dict[str, _Instruction]], caller: dict[str, _Instruction]) -> int | None:
    """Rounds of a counted loop, from its bound, start and step; None for any other."""
    if found := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', i.rest):
        return int(found[1])
    condition, body = (computations.get(str(i.attribute(key)), {}) for key in ("condition", "body"))
    compare = list(condition.values())[-1:] if condition else []
    if not compare or compare[0].op != "compare" or "direction=LT" not in compare[0].rest:
        return None
    left, right = compare[0].operands
    bound, counter = _constant(condition, right), condition[left]
    index = re.search(r"index=(\d+)", counter.rest)
    root = list(body.values())[-1]
    if bound is None or counter.op != "get-tuple-element" or index is None or root.op != "tuple":
        return None
    step = _step(body, root.operands[int(index[1])])
    first = caller.get(i.operands[0])
    start = _constant(caller, first.operands[int(index[1])]) if first is not None and first.op == "tuple" else 0
    return None if step is None or start is None else math.ceil((bound - start) / step)


def _step(body: dict[str, _Instruction], name: str) -> int | None:
    """The constant that the counter grows by."""
    i, total = body.get(name), 0
    while i is not None and i.op in ("add", "copy", "bitcast"):
        if i.op == "add":
            constants = [value for operand in i.operands if (value := _constant(body, operand)) is not None]
            if not constants:
                return None
            total += constants[0]
        others = [operand for operand in i.operands if _constant(body, operand) is None]
        i = body.get(others[0]) if others else None
    return total or None


def _constant(block: dict[str, _Instruction], name: str) -> int | None:
    i = block.get(name)
    while i is not None and i.op in ("copy", "bitcast"):
        i = block.get(i.operands[0])
    if i is None or i.op != "constant":
        return None
    value = _inside(i.rest)
    return int(value) if re.fullmatch(r"-?\d+", value) else None
