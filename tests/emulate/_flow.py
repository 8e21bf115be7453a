"""Where lanes that a branch parted meet again: the branch's immediate post-dominator."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import networkx

EXIT = -1


def reconvergence(
    length: int, branches: dict[int, int], tables: dict[int, Sequence[int]], returns: set[int], guarded: set[int]
) -> dict[int, int]:
    """For each branch the instruction where its lanes meet, `EXIT` where that is the end.

    Args:
        length: number of instructions.
        branches: of each branch its target.
        tables: of each indexed branch its targets.
        returns: instructions that end the kernel.
        guarded: those of all these that lanes may pass by.
    """
    turns = {*branches, *tables, *returns}
    leaders = {0, *branches.values(), *itertools.chain(*tables.values()), *(at + 1 for at in turns)}
    starts = sorted(at for at in leaders if at < length)
    flow = networkx.DiGraph()
    last_of = dict(zip(starts, (*(at - 1 for at in starts[1:]), length - 1), strict=True))
    for start, last in last_of.items():
        targets = [branches[last]] if last in branches else list(tables.get(last, []))
        if last in returns:
            targets.append(EXIT)
        if last not in turns or last in guarded:
            targets.append(last + 1)
        flow.add_edges_from((start, target if target < length else EXIT) for target in targets)
    flow.add_node(EXIT)
    after = networkx.immediate_dominators(flow.reverse(), EXIT)
    return {last: after.get(start, EXIT) for start, last in last_of.items() if last in branches}
