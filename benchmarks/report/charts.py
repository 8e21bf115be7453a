"""The charts of a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..runner.results import Row, Run
from .axes import Bar, Mark, Series, bar_chart, line_chart, roofline
from .rows import (
    best_compiled_peer,
    by_workload,
    contest_text,
    contests,
    headline,
    number,
    worst_errors,
)
from .tables import Table, error_text, megabytes_text, share_text, times_text
from .targets import fastest, is_ours


@dataclass(frozen=True)
class Figure:
    """A chart with what is written beneath it, and its numbers where they stand in no other table."""

    svg: str
    caption: str
    table: Table | None = None


def _per_second(row: Row, ms: float) -> float:
    return row.shape.get("batch", 1) * 1e3 / ms


def _lines(rows: Sequence[Row], speed: Callable[[Row, float], float]) -> list[Series]:
    """Each candidate's speed by batch, with p20 and p80; `speed` is of a row and its milliseconds."""
    points: dict[str, list[tuple[float, float, float, float]]] = {}
    for row in rows:
        if row.ms is not None and "batch" in row.shape:
            ends = [speed(row, ms) for ms in (row.ms, row.ms_p80 or row.ms, row.ms_p20 or row.ms)]
            points.setdefault(row.candidate, []).append((row.shape["batch"], ends[0], ends[1], ends[2]))
    return [Series(name, line) for name, line in points.items()]


def _speed_bar(row: Row, speed: Callable[[Row, float], float], against: Row | None = None) -> Bar:
    if row.ms is None:
        return Bar(row.candidate, None, row.status)
    value, low, high = (speed(row, ms) for ms in (row.ms, row.ms_p80 or row.ms, row.ms_p20 or row.ms))
    text = " · ".join(filter(None, (number(value), times_text(against, row))))
    return Bar(row.candidate, value, text, low, high)


def throughput(groups: Sequence[list[Row]]) -> Figure | None:
    """Images a second by batch; of our rungs those that are the fastest of ours at some batch. None for one batch."""
    shown = {row.candidate for rows in groups if (row := fastest(r for r in rows if is_ours(r.candidate))) is not None}
    rows = [row for rows in groups for row in rows if not is_ours(row.candidate) or row.candidate in shown]
    if len({row.shape.get("batch") for row in rows if row.ms is not None}) < 2:
        return None
    text = f"Images a second by batch: {rows[0].workload}, {rows[0].dtype}."
    svg = line_chart(_lines(rows, _per_second), label=text, x_label="batch", y_label="images a second")
    return Figure(svg, text)


def ladder(rows: Sequence[Row]) -> Figure:
    """Every candidate of one contest as a bar, the peers first, then ours rung by rung."""
    bars = [_speed_bar(row, _per_second, best_compiled_peer(rows)) for row in rows]
    what = contest_text(rows[0])
    svg = bar_chart(bars, label=f"Images a second, {what}", x_label="images a second")
    return Figure(svg, f"Every candidate: {what}. × is over the best compiled peer.")


def memory(rows: Sequence[Row]) -> Figure | None:
    """Peak memory of one contest; None where it is not known, as on CPU."""
    bars = [
        Bar(row.candidate, row.peak_mb, f"{megabytes_text(row.peak_mb)} MB") for row in rows if row.peak_mb is not None
    ]
    if not bars:
        return None
    what = contest_text(rows[0])
    svg = bar_chart(bars, label=f"Peak memory, {what}", x_label="MB in one call")
    return Figure(svg, f"Device memory of one call beyond weights and inputs: {what}.")


def errors(run: Run) -> Figure | None:
    """The largest error of each candidate; None where none is known."""
    worst = worst_errors(run)
    shares = [(row.error or 0.0) / (row.error_limit or 1.0) for row in worst]
    # a wrong result may be far beyond the limit; its bar ends at twice the limit, its text tells
    bars = [Bar(row.candidate, min(share, 2.0), f"{share:.2f}") for row, share in zip(worst, shares, strict=True)]
    if not bars:
        return None
    label = "Largest error of each candidate as a share of its limit"
    svg = bar_chart(bars, label=label, x_label="largest error over its limit", limit=(1.0, "limit"))
    table = Table(
        ["candidate", "its worst row", "error / limit"],
        [[row.candidate, contest_text(row), error_text(row)] for row in worst],
    )
    return Figure(svg, "Largest error of each candidate over all its rows, as a share of what the rule allows.", table)


def _roof_rows(run: Run) -> list[tuple[str, Row]]:
    """Best of ours and best peer of each kernel and of the model, one model and batch, with the kernel's name."""
    lead = headline(run) or headline(run, ["kernel"])
    if lead is None:
        return []
    dtype, model = lead[0].dtype, lead[0].workload.rpartition("/")[2]
    groups = {
        key: rows
        for key, rows in contests(run, ["kernel", "model"]).items()
        if key[1].rpartition("/")[2] == model and key[2] == dtype and any(row.ms is not None for row in rows)
    }
    batches = [dict(key[3]).get("batch", 0) for key in groups]
    # the batch with most to show, the larger one of two
    batch = max(batches, key=lambda b: (batches.count(b), b), default=0)
    found = []
    for (_, workload, _, shape), rows in groups.items():
        if dict(shape).get("batch", 0) != batch:
            continue
        name = workload.partition("/")[0] if "/" in workload else "whole model"
        best = [fastest(row for row in rows if is_ours(row.candidate) == ours) for ours in (True, False)]
        found += [(name, row) for row in best if row is not None and row.bytes > 0 and row.flops > 0]
    return found


def roof(run: Run) -> Figure | None:
    """Kernels and the model under this run's ceilings; None without ceilings."""
    rows = _roof_rows(run)
    if run.ceilings is None or not rows or rows[0][1].dtype not in run.ceilings.gemm_tflop_s:
        return None
    letters = {name: chr(ord("a") + i) for i, name in enumerate(dict.fromkeys(name for name, _ in rows))}
    marks, lines = [], []
    for name, row in rows:
        work, rate = row.flops / row.bytes, row.tflop_s or 0.0
        text = f"{name}, {row.candidate}: {number(rate)} TFLOP/s at {number(work)} FLOP per byte"
        marks.append(Mark(row.candidate, letters[name], work, rate, text))
        numbers = [number(work), number(rate), number(row.gb_s or 0.0), share_text(row.floor_share)]
        lines.append([letters[name], name, row.candidate, *numbers])
    first = rows[0][1]
    what = f"{first.workload.rpartition('/')[2]}, {first.dtype}, batch {first.shape.get('batch', '')}"
    svg = roofline(
        marks,
        run.ceilings.gemm_tflop_s[first.dtype],
        run.ceilings.copy_gb_s,
        label=f"Roofline, {what}",
        ours="best of vitfast",
        others="best peer",
    )
    key = ", ".join(f"{letter}: {name}" for name, letter in letters.items())
    head = ["", "work", "candidate", "FLOP per byte", "TFLOP/s", "GB/s", "of the floor"]
    return Figure(svg, f"{what} under the ceilings of this run. {key}.", Table(head, lines))


def _memory_bound(run: Run, row: Row) -> bool:
    rate = None if run.ceilings is None else run.ceilings.gemm_tflop_s.get(row.dtype)
    if run.ceilings is None or rate is None:
        # no ceilings: most machines have more than 10 FLOP for a byte
        return row.flops < 10 * row.bytes
    return row.flops / rate < row.bytes * 1e3 / run.ceilings.copy_gb_s


def kernel_charts(run: Run, groups: Sequence[list[Row]]) -> list[Figure]:
    """A chart per kernel of one model: rate by batch, as Triton's `perf_report` draws it, or bars for one batch."""
    by_name: dict[str, list[Row]] = {}
    for rows in groups:
        by_name.setdefault(rows[0].workload, []).extend(row for row in rows if row.ms is not None)
    charts = []
    for workload, rows in by_name.items():
        if not rows:
            continue
        moves = _memory_bound(run, rows[-1])
        unit = "GB/s" if moves else "TFLOP/s"

        def speed(row: Row, ms: float, moves: bool = moves) -> float:
            return row.bytes / (ms * 1e6) if moves else row.flops / (ms * 1e9)

        label = f"{workload.partition('/')[0]}, {unit}, shapes of {workload.partition('/')[2]}, {rows[0].dtype}"
        batches = {row.shape.get("batch") for row in rows}
        if len(batches) == 1:
            bars = [_speed_bar(row, speed) for row in rows]
            svg = bar_chart(bars, label=label, x_label=f"{unit} at batch {rows[0].shape.get('batch', '')}")
        else:
            svg = line_chart(_lines(rows, speed), label=label, x_label="batch", y_label=unit)
        charts.append(Figure(svg, workload))
    return charts


def figures(run: Run) -> dict[str, Figure]:
    """The headline charts by name; those that the run has nothing for are left out."""
    lead = headline(run)
    found: dict[str, Figure | None] = {}
    if lead is not None:
        found["throughput"] = throughput(by_workload(contests(run, ["model"]))[(lead[0].workload, lead[0].dtype)])
        found["ladder"] = ladder(lead)
        found["memory"] = memory(lead)
    found["roofline"] = roof(run)
    found["error"] = errors(run)
    return {name: figure for name, figure in found.items() if figure is not None}
