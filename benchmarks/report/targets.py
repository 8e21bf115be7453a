"""The speeds this project holds itself to, as data, and how a run stands against them.

They are printed beside what was measured; nothing fails over them, since a benchmark records a time and never asserts
one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..runner.results import Row, Run

SOURCE = (
    'issue 3, "Speed that the suite will hold us to (H100)": "B/16 bf16 b256 at least 17,000 img/s and 1.35x the best '
    'compiled peer in the same run; b1 at most 0.40 ms; L/16 5,200; H/14 1,900; S/16 50,000; Ti/16 110,000."'
)
"""Where the numbers come from, word for word. They were derived for the SXM board."""


@dataclass(frozen=True)
class Target:
    """A goal for the fastest vitfast candidate of one inference workload.

    Attributes:
        model: architecture.
        batch: images a call.
        dtype: precision name.
        kind: "img/s" or "x" (times the best compiled peer of the same run), both at least; "ms", at most.
        value: in that unit.
    """

    model: str
    batch: int
    dtype: str
    kind: str
    value: float


TARGETS = {
    "H100": (
        Target("vit_base_patch16_224", 256, "bf16", "img/s", 17_000),
        Target("vit_base_patch16_224", 256, "bf16", "x", 1.35),
        Target("vit_base_patch16_224", 1, "bf16", "ms", 0.40),
        Target("vit_large_patch16_224", 256, "bf16", "img/s", 5_200),
        Target("vit_huge_patch14_224", 256, "bf16", "img/s", 1_900),
        Target("vit_small_patch16_224", 256, "bf16", "img/s", 50_000),
        Target("vit_tiny_patch16_224", 256, "bf16", "img/s", 110_000),
    ),
}
"""By a word of the device's name."""


@dataclass(frozen=True)
class Standing:
    """A target beside what was measured.

    Attributes:
        target: the goal.
        measured: in the target's unit; None where the run has no such row (or no compiled peer to be compared with).
        candidate: who was measured; empty where nobody was.
        against: the best compiled peer, for targets of kind "x"; empty otherwise.
    """

    target: Target
    measured: float | None
    candidate: str = ""
    against: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None where nothing was measured."""
        if self.measured is None:
            return None
        at_most = self.target.kind == "ms"
        return self.measured <= self.target.value if at_most else self.measured >= self.target.value


def is_ours(candidate: str) -> bool:
    """Whether a candidate is a vitfast one."""
    return candidate.split(" ")[0] == "vitfast"


def is_compiled_peer(candidate: str) -> bool:
    """Whether a candidate is a peer with a compiler behind it: whoever is neither vitfast nor called eager."""
    return not is_ours(candidate) and "eager" not in candidate.split(" ")


def fastest(rows: Iterable[Row]) -> Row | None:
    """The row of the least median time; None if none was timed."""
    return min((row for row in rows if row.ms is not None), key=lambda row: row.ms or 0.0, default=None)


def targets_of(device: str) -> tuple[Target, ...]:
    """The targets of a device; none for a slice of a GPU (MIG), which cannot reach the whole board's."""
    words = device.replace("-", " ").split()
    return () if "MIG" in words else tuple(t for word, targets in TARGETS.items() if word in words for t in targets)


def standings(run: Run) -> list[Standing]:
    """How a run stands against its device's targets; empty for a device without any."""
    found = []
    for target in targets_of(str(run.environment.get("device", ""))):
        rows = [
            row
            for row in run.rows
            if (row.layer, row.workload, row.shape.get("batch"), row.dtype)
            == ("model", target.model, target.batch, target.dtype)
        ]
        ours = fastest(row for row in rows if is_ours(row.candidate))
        peer = fastest(row for row in rows if is_compiled_peer(row.candidate))
        if ours is None or ours.ms is None:
            found.append(Standing(target, None))
        elif target.kind == "ms":
            found.append(Standing(target, ours.ms, ours.candidate))
        elif target.kind == "img/s":
            found.append(Standing(target, ours.images_per_s, ours.candidate))
        elif peer is None or peer.ms is None:
            found.append(Standing(target, None, ours.candidate))
        else:
            found.append(Standing(target, peer.ms / ours.ms, ours.candidate, peer.candidate))
    return found
