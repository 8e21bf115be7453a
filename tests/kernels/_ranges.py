"""Bounds of every 32-bit integer that a kernel computes, read off its Triton IR.

The proof that offsets into a tensor of more than 2^31 elements do not wrap: each argument of the launch is known,
program ids run up to the grid's size, and interval arithmetic carries both through the IR. An `i32` result whose
interval leaves 32 bits is an overflow, whichever row it belongs to; nothing of that size needs to be allocated.
"""

from __future__ import annotations

import re
from typing import Any

Interval = tuple[int, int]
_INT32 = (-(2**31), 2**31 - 1)
_OPERATION = re.compile(r"^\s*(%[\w$]+)(?::\d+)? = ([\w.]+)(.*)$")
_VALUE = re.compile(r"%[\w$]+")


def overflows(ttir: str, arguments: dict[str, Any], programs: int) -> list[str]:
    """The lines of `ttir` whose 32-bit result can wrap.

    Args:
        ttir: of one kernel, inlined.
        arguments: of the launch, by parameter name.
        programs: the grid's size.

    Raises:
        AssertionError: a 32-bit product or sum has an operand of unknown range.
    """
    known: dict[str, Interval] = {
        f"%{name}": (int(value), int(value)) for name, value in arguments.items() if isinstance(value, int)
    }
    found = []
    for raw in ttir.splitlines():
        line = re.sub(r" loc\(.*\)$", "", raw)
        # a loop that carries nothing has no result
        if " scf.for " in line:
            _loop(line, known)
            continue
        match = _OPERATION.match(line)
        if match is None:
            continue
        result, operation, rest = match.groups()
        interval = _interval(operation, rest, known, programs)
        if interval is None:
            continue
        narrow = re.search(r"i32>?$", rest.strip()) is not None
        if narrow and operation in ("arith.muli", "arith.addi", "arith.subi"):
            if interval[0] < _INT32[0] or interval[1] > _INT32[1]:
                found.append(line.strip())
        known[result] = interval
    return found


def _loop(line: str, known: dict[str, Interval]) -> None:
    # induction variable, and integers carried beside it: a count of tiles that takes the same steps
    header = re.search(r"scf\.for (%[\w$]+) = (%[\w$]+) to (%[\w$]+) step (%[\w$]+)", line)
    assert header, line
    variable, low, high, step = header.groups()
    known[variable] = (known[low][0], known[high][1] - 1)
    for carried, start in re.findall(r"(%[\w$]+) = (%[\w$]+)[,)]", line):
        if start in known:
            known[carried] = (known[start][0], max(known[start][1], known[high][1]) + known[step][1])


def _interval(operation: str, rest: str, known: dict[str, Interval], programs: int) -> Interval | None:
    if operation == "arith.constant":
        constant = re.match(r" (?:dense<)?(-?\d+)>? : .*i\d+>?$", rest)
        return (int(constant[1]), int(constant[1])) if constant else None
    if operation == "tt.get_program_id":
        return 0, programs - 1
    if operation == "tt.make_range":
        end = re.search(r"end = (\d+)", rest)
        assert end, rest
        return 0, int(end[1]) - 1
    operands = [known.get(name) for name in _VALUE.findall(rest)]
    if operation in ("tt.splat", "tt.broadcast", "tt.expand_dims", "arith.extsi", "tt.reshape", "tt.trans"):
        return operands[0]
    if operation == "arith.trunci":
        # `x.to(int32)` claims that the number fits: hold it to that
        assert operands[0] is not None, f"unknown range: {operation}{rest}"
        assert _INT32[0] <= operands[0][0] and operands[0][1] <= _INT32[1], f"truncated: {operation}{rest}"
        return operands[0]
    if operation == "arith.select":
        first, second = operands[1:3]
        return (min(first[0], second[0]), max(first[1], second[1])) if first and second else None
    if operation in (
        "arith.muli",
        "arith.addi",
        "arith.subi",
        "arith.divsi",
        "arith.remsi",
        "arith.minsi",
        "arith.maxsi",
    ):
        first, second = operands[:2]
        assert first is not None and second is not None, f"unknown range: {operation}{rest}"
        return _arithmetic(operation, first, second)
    return None


def _arithmetic(operation: str, a: Interval, b: Interval) -> Interval:
    if operation == "arith.addi":
        return a[0] + b[0], a[1] + b[1]
    if operation == "arith.subi":
        return a[0] - b[1], a[1] - b[0]
    if operation == "arith.minsi":
        return min(a[0], b[0]), min(a[1], b[1])
    if operation == "arith.maxsi":
        return max(a[0], b[0]), max(a[1], b[1])
    if operation == "arith.muli":
        corners = [x * y for x in a for y in b]
        return min(corners), max(corners)
    largest = max(abs(a[0]), abs(a[1]))
    if operation == "arith.remsi":
        if b[0] > 0:
            largest = min(largest, b[1] - 1)
        return (0 if a[0] >= 0 else -largest), largest
    # arith.divsi; a divisor that may be anything still does not enlarge the dividend
    if a[0] >= 0 and b[0] > 0:
        return a[0] // b[1], a[1] // b[0]
    return -largest, largest
