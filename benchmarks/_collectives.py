"""What a compiled program sends between devices and multiplies, read from its text; loops count as often as run."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}
_SHAPE = re.compile(r"([a-z]+[0-9]*(?:e[0-9]m[0-9]\w*)?)\[([0-9,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_CALLED = re.compile(
    r"(?:body|condition|to_apply|calls|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Operation:
    """One line of a program.

    Attributes:
      name: what other lines call it.
      kind: the operation, without `-start`.
      shapes: dtype and dimensions of its result; several for a tuple.
      rest: operands and attributes.
    """

    name: str
    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    rest: str

    @property
    def bytes(self) -> int:
        """Bytes of the result on one device."""
        return sum(math.prod(dims) * bits(dtype) // 8 for dtype, dims in self.shapes)


def bits(dtype: str) -> int:
    """Returns the size of one value.

    >>> bits("bf16"), bits("f32"), bits("f8e4m3fn"), bits("pred")
    (16, 32, 8, 8)
    """
    if dtype in _BITS:
        return _BITS[dtype]
    found = re.match(r"[a-z]+(\d+)", dtype)
    return int(found.group(1)) if found else 0


def counted(text: str) -> Iterator[tuple[Operation, int, dict[str, Operation]]]:
    """Yields every operation of a program, how often it runs, and the operations beside it by name.

    Args:
      text: `compiled.as_text()`.

    Raises:
      ValueError: it is not said how often a loop with collectives or products runs.
    """
    computations, entry = _computations(text)
    times = {entry: 1}
    # A computation comes before those that call it, so callers are done first in reverse.
    for name in reversed(list(computations)):
        if name not in times:
            continue
        for operation in computations[name].values():
            trips = 1
            if operation.kind == "while":
                found = _TRIPS.search(operation.rest)
                if found is None:
                    raise ValueError(f"{operation.name}: the program does not say how often this loop runs.")
                trips = int(found.group(1))
            for called in _called(operation.rest):
                times[called] = times.get(called, 0) + times[name] * trips
    for name, operations in computations.items():
        for operation in operations.values():
            yield operation, times.get(name, 0), operations


def _computations(text: str) -> tuple[dict[str, dict[str, Operation]], str]:
    found: dict[str, dict[str, Operation]] = {}
    entry = current = ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = head.group(2)
            found[current] = {}
            entry = current if head.group(1) else entry
        elif current and (match := _OPERATION.match(line)):
            name, result, kind, rest = match.groups()
            shapes = tuple((d, tuple(int(n) for n in dims.split(",") if n)) for d, dims in _SHAPE.findall(result))
            if kind.endswith("-start"):  # its result holds the operands as well
                kind, shapes = kind.removesuffix("-start"), shapes[len(shapes) // 2 :]
            found[current][name] = Operation(name, kind, shapes, rest)
    return found, entry


def _called(rest: str) -> Iterator[str]:
    for group in _CALLED.findall(rest):
        yield from re.findall(r"[\w.\-]+", group)


def collectives(text: str) -> list[tuple[Operation, int]]:
    """Returns the collectives of a program with how often each runs."""
    return [(operation, times) for operation, times, _ in counted(text) if operation.kind in KINDS and times]


def totals(found: Iterable[tuple[Operation, int]]) -> dict[str, dict[str, int]]:
    """Returns count and bytes of results on one device by kind of collective."""
    out = {kind: {"count": 0, "bytes": 0} for kind in KINDS}
    for operation, times in found:
        out[operation.kind]["count"] += times * len(operation.shapes)
        out[operation.kind]["bytes"] += times * operation.bytes
    return out


def product_flops(text: str) -> int:
    """Returns the operations of all matrix products of a program on one device."""
    total = 0
    for operation, times, beside in counted(text):
        if operation.kind != "dot":
            continue
        names = re.findall(r"%([\w.\-]+)", operation.rest)
        left = beside[names[0]].shapes[0][1]
        contracted = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", operation.rest)
        axes = [int(n) for n in contracted.group(1).split(",") if n] if contracted else []
        total += 2 * times * math.prod(operation.shapes[0][1]) * math.prod(left[i] for i in axes)
    return total
