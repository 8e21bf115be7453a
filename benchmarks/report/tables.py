"""The tables of a report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vitfast.table import markdown_table

from ..runner.results import Row, Run
from .rows import best_compiled_peer, contests, eager, mfu, number
from .targets import fastest, is_ours, standings

NUMBERS = (
    *("batch", "img/s", "p20 to p80", "ms", "× peer", "× eager", "GB/s", "TFLOP/s", "FLOP per byte", "of the floor"),
    *("MFU", "peak MB", "first call", "error / limit"),
)
"""Columns that are set to the right."""


@dataclass(frozen=True)
class Table:
    """Plain text cells; `bold` are the positions of the rows that stand out."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    bold: frozenset[int] = frozenset()

    @property
    def right(self) -> frozenset[int]:
        """Columns that are set to the right."""
        return frozenset(i for i, name in enumerate(self.head) if name in NUMBERS)

    def markdown(self) -> str:
        """As GitHub's Markdown."""
        return markdown_table(self.head, self.rows, right=self.right, bold=self.bold)

    def without_empty_columns(self) -> Table:
        """Without what is empty in every row: peak memory on CPU, say."""
        kept = [i for i in range(len(self.head)) if any(row[i] for row in self.rows)]
        return Table([self.head[i] for i in kept], [[row[i] for i in kept] for row in self.rows], self.bold)


def share_text(value: float | None) -> str:
    """In percent."""
    return "" if value is None else f"{100 * value:.1f} %"


def times_text(slow: Row | None, row: Row) -> str:
    """How many times as fast as another row."""
    return "" if slow is None or slow.ms is None or row.ms is None else f"{slow.ms / row.ms:.2f}×"


def rate_text(row: Row, ms: float | None) -> str:
    """Images a second."""
    return "" if ms is None or "batch" not in row.shape else number(row.shape["batch"] * 1e3 / ms)


def megabytes_text(mb: float | None) -> str:
    """With one digit behind the point below 100."""
    return "" if mb is None else f"{mb:,.1f}" if mb < 100 else f"{mb:,.0f}"


def error_text(row: Row) -> str:
    """Largest error beside what is allowed."""
    limit = "" if row.error_limit is None else f" / {row.error_limit:.1e}"
    if row.error is None:
        return limit and f"not finite{limit}"
    return f"{row.error:.1e}{limit}"


def _number_text(value: float | None) -> str:
    return "" if value is None else number(value)


def _seconds_text(ms: float | None) -> str:
    return "" if ms is None else f"{number(ms / 1e3)} s" if ms >= 1e3 else f"{number(ms)} ms"


def summary_table(run: Run, layer: str) -> Table | None:
    """Best of ours, best compiled peer and what lies between them, a line per model, precision and batch."""
    lines = []
    for (_, workload, dtype, shape), rows in contests(run, [layer]).items():
        ours, peer = fastest(r for r in rows if is_ours(r.candidate)), best_compiled_peer(rows)
        if ours is None:
            continue
        lines.append(
            [
                workload,
                dtype,
                str(dict(shape).get("batch", "")),
                ours.candidate,
                rate_text(ours, ours.ms),
                _number_text(ours.ms),
                "" if peer is None else peer.candidate,
                "" if peer is None else rate_text(peer, peer.ms),
                times_text(peer, ours),
                times_text(eager(rows), ours),
                share_text(ours.floor_share),
                share_text(mfu(ours, run)),
            ]
        )
    head = ["model", "dtype", "batch", "best of vitfast", "img/s", "ms", "best compiled peer", "img/s"]
    head += ["× peer", "× eager", "of the floor", "MFU"]
    return Table(head, lines).without_empty_columns() if lines else None


def image_table(run: Run, groups: Iterable[list[Row]]) -> Table:
    """Every candidate of one workload and precision, batch by batch, the fastest of each contest in bold."""
    names = ["batch", "candidate", "img/s", "p20 to p80", "ms", "× peer", "× eager", "of the floor", "MFU", "peak MB"]
    return _row_table(run, groups, [*names, "first call", "error / limit"])


def kernel_table(run: Run, groups: Iterable[list[Row]]) -> Table:
    """Every candidate of a model's kernels, the fastest of each contest in bold."""
    names = ["kernel", "batch", "candidate", "ms", "p20 to p80", "× peer", "GB/s", "TFLOP/s", "of the floor", "peak MB"]
    return _row_table(run, groups, [*names, "first call", "error / limit"])


def _row_table(run: Run, groups: Iterable[list[Row]], names: Sequence[str]) -> Table:
    lines: list[list[str]] = []
    bold = set()
    for rows in groups:
        kernel = rows[0].layer == "kernel"
        best, first = fastest(rows), eager(rows)
        peer = fastest(r for r in rows if not is_ours(r.candidate)) if kernel else best_compiled_peer(rows)
        for row in rows:
            if row is best:
                bold.add(len(lines))
            # the slow end of the times is the low end of the rates
            ends = [rate_text(row, row.ms_p80), rate_text(row, row.ms_p20)]
            if kernel:
                ends = [_number_text(row.ms_p20), _number_text(row.ms_p80)]
            cells = {
                "kernel": row.workload.partition("/")[0],
                "batch": str(row.shape.get("batch", "")),
                "candidate": row.candidate,
                "img/s": rate_text(row, row.ms),
                "p20 to p80": " to ".join(filter(None, ends)),
                "ms": _number_text(row.ms),
                "× peer": times_text(peer, row),
                "× eager": times_text(first, row),
                "GB/s": _number_text(row.gb_s),
                "TFLOP/s": _number_text(row.tflop_s),
                "of the floor": share_text(row.floor_share),
                "MFU": share_text(mfu(row, run)),
                "peak MB": megabytes_text(row.peak_mb),
                "first call": _seconds_text(row.cold_ms),
                "error / limit": error_text(row),
            }
            if row.ms is None:
                # what was not timed says so in the first number
                cells["ms" if kernel else "img/s"] = row.status
            lines.append([cells[name] for name in names])
    return Table(names, lines, frozenset(bold)).without_empty_columns()


def failure_table(run: Run) -> Table | None:
    """What was not timed and why, a line per candidate and reason."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in run.rows:
        if row.status != "ok":
            batch = f" b{row.shape['batch']}" if "batch" in row.shape else ""
            layer = "" if row.layer in ("model", "kernel") else f"{row.layer} "
            found.setdefault((row.status, row.candidate, row.note), []).append(
                f"{layer}{row.workload}{batch} {row.dtype}"
            )
    order = ("failed parity", "error", "out of memory", "missing")
    lines = [
        [status, candidate, note, ", ".join(where[:3]) + (f" and {len(where) - 3} more" if len(where) > 3 else "")]
        for (status, candidate, note), where in sorted(
            found.items(), key=lambda item: order.index(item[0][0]) if item[0][0] in order else len(order)
        )
    ]
    return Table(["status", "candidate", "reason", "where"], lines) if lines else None


def target_table(run: Run) -> Table | None:
    """The targets of this device beside what was measured."""
    lines: list[Any] = []
    bold = set()
    for standing in standings(run):
        target = standing.target
        sign = "at most" if target.kind == "ms" else "at least"
        unit = {"img/s": " img/s", "ms": " ms", "x": "× the best compiled peer"}[target.kind]
        value = f"{target.value:.2f}" if target.kind != "img/s" else f"{target.value:,.0f}"
        measured = "not measured"
        if standing.measured is not None:
            text = number(standing.measured) if target.kind != "x" else f"{standing.measured:.2f}"
            measured = text + ("×" if target.kind == "x" else unit)
        by = standing.candidate + (f" against {standing.against}" if standing.against else "")
        verdict = {True: "met", False: "not met", None: ""}[standing.met]
        if standing.met:
            bold.add(len(lines))
        lines.append([target.model, str(target.batch), target.dtype, f"{sign} {value}{unit}", measured, verdict, by])
    head = ["model", "batch", "dtype", "target", "measured", "", "by"]
    return Table(head, lines, frozenset(bold)) if lines else None


def machine_facts(run: Run) -> list[tuple[str, str]]:
    """Device, versions, ceilings and telemetry as names and values."""
    env = run.environment
    versions = env.get("versions") or {}
    found = [("device", env.get("device"))]
    found += [(name, env.get(name)) for name in ("driver", "cuda")]
    capability = env.get("capability")
    found.append(("compute capability", ".".join(map(str, capability)) if capability else None))
    found += [(name, env.get(name)) for name in ("multiprocessors", "threads")]
    found.append(("CPU instructions", env.get("cpu_capability") if env.get("kind") == "cpu" else None))
    found += [(name, version) for name, version in versions.items()]
    found += [("platform", env.get("platform")), ("commit", env.get("commit"))]
    if run.ceilings is not None:
        found.append(("ceiling, large copy", f"{number(run.ceilings.copy_gb_s)} GB/s"))
        for dtype, rate in run.ceilings.gemm_tflop_s.items():
            found.append((f"ceiling, torch's {dtype} GEMM", f"{number(rate)} TFLOP/s"))
    units = {"clocks.sm": "MHz", "clocks.mem": "MHz", "power.draw": "W", "temperature.gpu": "°C"}
    for field, unit in units.items():
        values = sorted(_floats(row.telemetry.get(field) for row in run.rows))
        if values:
            found.append((f"{field} after timing", f"{values[0]:g} to {values[-1]:g} {unit}"))
    return [(name, str(value)) for name, value in found if value not in (None, "")]


def _floats(texts: Iterable[str | None]) -> list[float]:
    found = []
    for text in texts:
        try:
            found.append(float(text or ""))
        except ValueError:
            # nvidia-smi writes "[N/A]" for what a board does not tell
            continue
    return found
