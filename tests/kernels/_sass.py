"""What the assembler made of a kernel, where PTX cannot tell: uniform registers that are read before they are written.

ptxas 12.8, of Triton 3.6 and 3.7, derives the descriptor of a tile in shared memory from a register pair that nothing
has written where two products read the tile by one descriptor in different shapes. On a GPU the numbers are wrong.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.kernels._compiler import Compiled, disassemble

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?(\S+)(?:\s+(.*?))?\s*;", re.MULTILINE)
_PRODUCT = re.compile(r"wgmma\.mma_async\S*?\.(m64n\d+)\S* \{[^}]*\}, (?:\{[^}]*\}|%rd\d+), (%rd\d+), ([^;]*);")
# the first operand of these is read too, unlike that of the others whose names begin with U
_NO_RESULT = ("UTMA", "USTS", "UBLK", "USETMAX")
_RESULTS = ("R2UR", "S2UR", "VOTEU", "REDUX", "CREDUX")


@dataclass(frozen=True)
class _Step:
    address: int
    text: str
    reads: frozenset[int]
    writes: frozenset[int]
    jump: int | None
    falls: bool


def _steps(sass: str) -> list[_Step]:
    steps = []
    for address, predicate, name, rest in _INSTRUCTION.findall(sass):
        operands = [operand.strip() for operand in rest.split(",")]
        writes: set[int] = set()
        if (name.startswith("U") and not name.startswith(_NO_RESULT)) or name.startswith(_RESULTS):
            # a predicate may stand before the result
            at = next((i for i, operand in enumerate(operands[:2]) if re.fullmatch(r"UR\d+", operand)), None)
            if at is not None:
                first, wide = int(operands.pop(at)[2:]), 2 if ".64" in name or ".WIDE" in name else 1
                writes = set(range(first, first + wide))
        reads: set[int] = set()
        for kind, number in re.findall(r"(gdesc|t?desc|cx)?\[?(?<![A-Z])UR(\d+)", ",".join(operands)):
            first = int(number)
            # a product's two descriptors, or that of its second operand alone where registers hold the first one
            pair = range(first + 2 * bool(re.match(r"R\d+, *R\d+", rest)), first + 4)
            reads.update(pair if kind == "gdesc" else range(first, first + (2 if kind else 1)))
        target = re.search(r"0x([0-9a-f]+)$", rest) if name.startswith(("BRA", "CALL")) else None
        conditional = bool(predicate) or "P" in rest
        falls = conditional or not name.startswith(("BRA", "EXIT", "RET"))
        jump = None if target is None else int(target[1], 16)
        steps.append(_Step(int(address, 16), f"{name} {rest}", frozenset(reads), frozenset(writes), jump, falls))
    return steps


def unwritten(sass: str) -> list[str]:
    """Instructions that some path reaches without a write of a uniform register that they read."""
    steps = _steps(sass)
    index = {step.address: i for i, step in enumerate(steps)}
    before: dict[int, frozenset[int]] = {0: frozenset()}
    todo = [0]
    while todo:
        at = todo.pop()
        after = before[at] | steps[at].writes
        following = [at + 1] if steps[at].falls and at + 1 < len(steps) else []
        for to in (*following, *(index[jump] for jump in (steps[at].jump,) if jump in index)):
            known = after if to not in before else before[to] & after
            if known != before.get(to):
                before[to] = known
                todo.append(to)
    return [steps[at].text for at, written in sorted(before.items()) if not steps[at].reads <= written]


def shares_descriptors(ptx: str) -> bool:
    """Whether products of different shapes read one descriptor, without which the fault has not been seen."""
    forms: dict[str, set[tuple[str, str]]] = {}
    for shape, descriptor, flags in _PRODUCT.findall(ptx):
        forms.setdefault(descriptor, set()).add((shape, flags.split(",")[-1]))
    return any(len(found) > 1 for found in forms.values())


def check_uniform_registers(kernel: Compiled) -> None:
    """A kernel for sm_90 reads no uniform register that may not have been written."""
    if shares_descriptors(kernel.assembly):
        assert unwritten(disassemble(kernel.cubin)) == [], f"{kernel.name}: {kernel.arguments}"
