"""Rows of a run by what they meet on, and the few numbers that are made of several rows."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from ..runner.results import Row, Run
from .targets import fastest, is_compiled_peer, is_ours

IMAGE_LAYERS = {
    "model": "Inference",
    "train": "Training step (forward, backward, AdamW)",
    "end_to_end": "End to end, from JPEG files to logits",
    "block": "One block",
}
"""Layers whose rows are read in images a second, in the order of the report."""

HEADLINE = "vit_base_patch16_224"
"""The model a report starts with, where the run has it."""

Contest = tuple[str, str, str, tuple[tuple[str, int], ...]]
"""What candidates meet on: layer, workload, dtype and shape."""


def contest(row: Row) -> Contest:
    """What a row's candidate was measured on."""
    return (row.layer, row.workload, row.dtype, tuple(sorted(row.shape.items())))


def contests(run: Run, layers: Iterable[str]) -> dict[Contest, list[Row]]:
    """Rows by contest: the layers in the given order, models and precisions together with the headline's first, batches
    ascending, peers before vitfast's rungs."""
    order = list(layers)
    names = {row.workload: i for i, row in enumerate(reversed(run.rows))}
    rows = sorted(
        (row for row in run.rows if row.layer in order),
        key=lambda row: (
            order.index(row.layer),
            row.workload != HEADLINE,
            -names[row.workload],
            row.dtype,
            row.shape.get("batch", 0),
            is_ours(row.candidate),
            not row.candidate.startswith("torch "),
        ),
    )
    found: dict[Contest, list[Row]] = {}
    for row in rows:
        found.setdefault(contest(row), []).append(row)
    return found


def by_workload(groups: dict[Contest, list[Row]]) -> dict[tuple[str, str], list[list[Row]]]:
    """Contests by workload and precision."""
    found: dict[tuple[str, str], list[list[Row]]] = {}
    for (_, workload, dtype, _), rows in groups.items():
        found.setdefault((workload, dtype), []).append(rows)
    return found


def by_model(groups: dict[Contest, list[Row]]) -> dict[tuple[str, str], list[list[Row]]]:
    """Kernels' contests by the model whose shapes they have, the headline's first, kernel by kernel."""
    found: dict[tuple[str, str], list[list[Row]]] = {}
    for (_, workload, dtype, _), rows in groups.items():
        found.setdefault((workload.partition("/")[2], dtype), []).append(rows)
    for contest_rows in found.values():
        names = list(dict.fromkeys(rows[0].workload for rows in contest_rows))
        contest_rows.sort(key=lambda rows: names.index(rows[0].workload))
    return dict(sorted(found.items(), key=lambda item: item[0][0] != HEADLINE))


def headline(run: Run, layers: Sequence[str] = ("model",)) -> list[Row] | None:
    """The contest that a run is best known by: the headline model, bf16 where it is there, the largest batch that
    both vitfast and a peer were timed at. None if nothing of those layers was timed."""
    best: tuple[tuple[bool, bool, bool, int], list[Row]] | None = None
    for (_, workload, dtype, shape), rows in contests(run, layers).items():
        timed = [row for row in rows if row.ms is not None]
        if not timed:
            continue
        both = len({is_ours(row.candidate) for row in timed}) == 2
        rank = (workload == HEADLINE, both, dtype == "bf16", dict(shape).get("batch", 0))
        if best is None or rank > best[0]:
            best = (rank, rows)
    return None if best is None else best[1]


def best_compiled_peer(rows: Iterable[Row]) -> Row | None:
    """The fastest timed peer that has a compiler behind it."""
    return fastest(row for row in rows if is_compiled_peer(row.candidate))


def eager(rows: Iterable[Row]) -> Row | None:
    """torch's eager row."""
    return next((row for row in rows if row.candidate == "torch eager"), None)


def worst_errors(run: Run) -> list[Row]:
    """Of every candidate the row that comes nearest to its limit, or goes farthest beyond it."""
    worst: dict[str, Row] = {}
    for rows in contests(run, [*IMAGE_LAYERS, "kernel"]).values():
        for row in rows:
            if row.error is None or not row.error_limit:
                continue
            before = worst.get(row.candidate)
            if before is None or row.error / row.error_limit > (before.error or 0.0) / (before.error_limit or 1.0):
                worst[row.candidate] = row
    return sorted(worst.values(), key=lambda row: is_ours(row.candidate))


def mfu(row: Row, run: Run) -> float | None:
    """Model FLOP utilisation: the workload's useful FLOP/s over this run's measured GEMM rate in the row's dtype."""
    rate = None if run.ceilings is None else run.ceilings.gemm_tflop_s.get(row.dtype)
    return None if rate is None or row.tflop_s is None else row.tflop_s / rate


def device_slug(environment: dict[str, Any]) -> str:
    """Device name for files and folders: `nvidia-h100-80gb-hbm3`, `intel-xeon-platinum-8481c-8-threads`."""
    name = re.sub(r"\((r|tm|c)\)|\bcpu\b|\bprocessor\b|@.*?hz", " ", str(environment.get("device", "")).lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-") or "unknown-device"


def contest_text(row: Row) -> str:
    """Workload, precision and batch."""
    batch = f", batch {row.shape['batch']}" if "batch" in row.shape else ""
    return f"{row.workload}, {row.dtype}{batch}"


def number(value: float) -> str:
    """A number with three significant digits at least, thousands set apart."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}" if abs(value) >= 1e-4 else f"{value:.2e}"
