"""What became of a tuning run, launch by launch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitfast.kernels._config import Key

from .candidates import Entry
from .subject import Job


@dataclass(frozen=True)
class Tuned:
    """What became of one launch.

    Attributes:
        op, key: which.
        before: the entry it had: a tuned one, or the heuristic's.
        after: the faster entry, or None where `before` stays.
        before_ms, after_ms: of the whole pass in the deciding round, as `measure.Timing`'s fields; None where no
            candidate was left to time.
        offered: candidates there were.
        failed: that did not compile or run.
        refused: that broke the parity rule.
        skipped: that the budget did not reach.
        note: one of those that failed, and why.
    """

    op: str
    key: str
    before: Entry
    after: Entry | None
    before_ms: dict[str, Any] | None = None
    after_ms: dict[str, Any] | None = None
    offered: int = 0
    failed: int = 0
    refused: int = 0
    skipped: int = 0
    note: str = ""


@dataclass(frozen=True)
class Result:
    """What became of one model, batch and dtype.

    Attributes:
        job: what was run.
        device_name: that entries are filed under.
        launches: in the order in which they were tuned.
        before_ms, after_ms: of the pass without and with all new entries, timed against each other at the end.
        kept: whether the new entries together are faster by more than the spread; only then they are written.
    """

    job: Job
    device_name: str
    launches: tuple[Tuned, ...] = ()
    before_ms: dict[str, Any] | None = None
    after_ms: dict[str, Any] | None = None
    kept: bool = False

    @property
    def entries(self) -> dict[Key, Entry]:
        """The new entries."""
        if not self.kept:
            return {}
        return {Key.parse(tuned.op, tuned.key): tuned.after for tuned in self.launches if tuned.after is not None}

    def __str__(self) -> str:
        lines = [
            f"{self.job.model} b{self.job.batch} {self.job.dtype}, {self.job.depth} blocks,"
            f" {'LayerNorms folded' if self.job.fold else 'LayerNorms by themselves'}, on {self.device_name}"
        ]
        for tuned in self.launches:
            said = f"{tuned.offered} candidates"
            for name in ("failed", "refused", "skipped"):
                if getattr(tuned, name):
                    said += f", {getattr(tuned, name)} {name}"
            said += f" ({tuned.note})" if tuned.note else ""
            if tuned.before_ms and tuned.after_ms and tuned.after is not None:
                gain = tuned.before_ms["median"] / tuned.after_ms["median"]
                said = f"{gain:.3f}x of the pass with {short(tuned.after)} for {short(tuned.before)}; {said}"
            else:
                said = f"stays {short(tuned.before)}; {said}"
            lines.append(f"  {tuned.op} {tuned.key}: {said}")
        if self.before_ms and self.after_ms:
            before, after = self.before_ms["median"], self.after_ms["median"]
            lines.append(
                f"  all together: {before:.4f} ms before, {after:.4f} ms after"
                + ("" if self.kept else "; not faster, nothing is kept")
            )
        else:
            lines.append("  nothing faster was found")
        return "\n".join(lines)


def short(entry: Mapping[str, Any]) -> str:
    """An entry in a few words."""
    if entry.get("library"):
        return "[torch's own]"
    tile = "x".join(str(value) for name, value in entry.items() if name.startswith("block"))
    rest = {name.removeprefix("num_"): value for name, value in entry.items() if not name.startswith("block") and value}
    said = [
        name if value is True else f"{name} {value}" for name, value in rest.items() if (name, value) != ("split_k", 1)
    ]
    return f"[{', '.join([tile, *said])}]"
