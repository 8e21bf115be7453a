"""A run as Markdown."""

from __future__ import annotations

from collections.abc import Mapping

from vitfast.table import escape_markdown

from ..runner.results import Run
from .rows import IMAGE_LAYERS, by_model, by_workload, contests
from .tables import Table, failure_table, image_table, kernel_table, machine_facts, summary_table, target_table
from .targets import SOURCE

METHOD = (
    "Candidates of one workload are timed in turns, in a fresh random order each round, on inputs that rotate past the "
    "last-level cache, after a warm-up; a number is the median over rounds, with the 20th and 80th percentile. Who "
    "fails the parity rule (error against float64 at most twice that of plain PyTorch in the same precision) is not "
    "timed. The floor is max(FLOPs / GEMM rate, bytes / copy bandwidth) and MFU is FLOP/s over GEMM rate, both by "
    "ceilings measured in the same run: the fastest samples of a large copy and of torch's own large GEMM. A training "
    "step is forward, backward and fused AdamW. From files, as many threads as torch has decode and resize while the "
    "model runs; the files are in the system's cache, and the floor is that of the model alone. × peer is speed over "
    "the fastest compiled peer (neither vitfast nor eager; for kernels the fastest peer of all), × eager is speed over "
    "torch eager. Peak memory is what one call holds beyond weights and inputs."
)
"""How to read the numbers; stands on every report."""


def markdown(run: Run, *, pictures: Mapping[str, str] | None = None, level: int = 1) -> str:
    """A run as Markdown.

    Args:
        run: what was measured.
        pictures: paths of charts to show, with their captions.
        level: of the title's heading.
    """
    h = "#" * level
    parts = [f"{h} {escape_markdown(title(run))}", row_counts(run), METHOD]
    targets = target_table(run)
    if targets is not None:
        parts += [f"{h}# Targets", targets.markdown(), f"Source: {SOURCE}"]
    for path, text in (pictures or {}).items():
        caption = escape_markdown(text)
        parts.append(f"![{caption}]({path})\n\n{caption}")
    for layer, name in IMAGE_LAYERS.items():
        groups = contests(run, [layer])
        if not groups:
            continue
        parts.append(f"{h}# {name}")
        summary = summary_table(run, layer)
        if summary is not None:
            parts.append(summary.markdown())
        for (workload, dtype), rows in by_workload(groups).items():
            parts += [f"{h}## {escape_markdown(workload)}, {dtype}", image_table(run, rows).markdown()]
    kernels = contests(run, ["kernel"])
    if kernels:
        parts.append(f"{h}# Kernels")
        for (model, dtype), rows in by_model(kernels).items():
            parts += [f"{h}## Shapes of {escape_markdown(model)}, {dtype}", kernel_table(run, rows).markdown()]
    failures = failure_table(run)
    if failures is not None:
        parts += [f"{h}# What was not timed, and why", failures.markdown()]
    facts = Table(["what", "value"], machine_facts(run))
    parts += [f"{h}# Where it ran", facts.markdown()]
    return "\n\n".join(parts) + "\n"


def title(run: Run) -> str:
    """Title of a run's report."""
    return f"Vision Transformers on {run.environment.get('device', 'an unknown device')}"


def row_counts(run: Run) -> str:
    """How many rows were timed, are missing and failed."""
    ok = sum(row.ms is not None for row in run.rows)
    missing = sum(row.status == "missing" for row in run.rows)
    failed = len(run.rows) - ok - missing
    text = f"{ok} rows timed, {missing} missing"
    return text + (f", {failed} failed." if failed else ".")
