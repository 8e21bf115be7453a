"""A run as one self-contained HTML page, and all of its reports as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from ..runner.results import Row, Run
from .axes import STYLE
from .charts import errors, kernel_charts, ladder, memory, roof, throughput
from .markdown import METHOD, markdown, row_counts, title
from .rows import (
    IMAGE_LAYERS,
    best_compiled_peer,
    by_model,
    by_workload,
    contest_text,
    contests,
    eager,
    headline,
    mfu,
    number,
)
from .tables import (
    failure_table,
    image_table,
    kernel_table,
    machine_facts,
    rate_text,
    share_text,
    summary_table,
    target_table,
    times_text,
)
from .targets import SOURCE, fastest, is_ours
from .timm_csv import timm_csvs


def html(run: Run) -> str:
    """A run as one page: no file or address beside it is needed, light and dark, and everything in it is escaped."""
    inference = contests(run, ["model"])
    lead = headline(run)
    lines = {name: throughput(groups) for name, groups in by_workload(inference).items()}
    kernels = [
        (f"Shapes of {model}, {dtype}", kernel_charts(run, groups), kernel_table(run, groups))
        for (model, dtype), groups in by_model(contests(run, ["kernel"])).items()
    ]
    every_row = {
        layer: (name, [(", ".join(of), image_table(run, groups)) for of, groups in by_workload(rows).items()])
        for layer, name in IMAGE_LAYERS.items()
        if (rows := contests(run, [layer]))
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html.j2").render(
        title=title(run),
        kicker=_kicker(run.environment),
        counts=row_counts(run),
        tiles=[] if lead is None else _tiles(run, lead),
        style=STYLE,
        targets=target_table(run),
        source=SOURCE,
        summary=summary_table(run, "model"),
        throughput=[figure for figure in lines.values() if figure is not None],
        ladder=None if lead is None else ladder(lead),
        other_ladders=[
            ladder(rows)
            for rows in inference.values()
            if lead is not None and rows[0].key[:-1] != lead[0].key[:-1] and any(row.ms is not None for row in rows)
        ],
        roofline=roof(run),
        kernels=kernels,
        memory=None if lead is None else memory(lead),
        errors=errors(run),
        every_row=every_row,
        failures=failure_table(run),
        method=METHOD,
        facts=machine_facts(run),
    )


def _kicker(environment: dict[str, Any]) -> str:
    versions = environment.get("versions") or {}
    commit = str(environment.get("commit") or "unknown")
    parts = ["vitfast benchmark", f"torch {versions.get('torch') or 'unknown'}"]
    parts += [f"triton {versions['triton']}"] if versions.get("triton") else []
    parts.append(f"commit {commit[:12]}" + ("+" if commit.endswith("+") else ""))
    return " · ".join(parts)


def _tiles(run: Run, lead: list[Row]) -> list[tuple[str, str, str]]:
    """The headline's numbers: what, how much, and whose."""
    best = fastest(row for row in lead if is_ours(row.candidate)) or fastest(lead)
    assert best is not None
    peer, first = best_compiled_peer(lead), eager(lead)
    tiles = [("throughput", f"{rate_text(best, best.ms)} img/s", f"{best.candidate}, {contest_text(best)}")]
    if peer is not None and peer is not best:
        below = f"{peer.candidate}: {rate_text(peer, peer.ms)} img/s"
        tiles.append(("over the best compiled peer", times_text(peer, best), below))
    if first is not None and first.ms is not None and first is not best:
        below = f"{rate_text(first, first.ms)} img/s in {first.dtype}"
        tiles.append(("over torch eager", times_text(first, best), below))
    used = mfu(best, run)
    if used is not None:
        floor = "" if best.floor_share is None else f"{share_text(best.floor_share)} of the floor"
        tiles.append(("model FLOP utilisation", share_text(used), floor))
    single = fastest(
        row
        for row in run.rows
        if (row.layer, row.workload, row.dtype, row.shape.get("batch")) == ("model", best.workload, best.dtype, 1)
        and is_ours(row.candidate)
    )
    if single is not None and single.ms is not None and best.shape.get("batch") != 1:
        tiles.append(("one image", f"{number(single.ms)} ms", f"{single.candidate}, batch 1"))
    return tiles


def write(run: Run, folder: Path) -> list[Path]:
    """Write every report of a run.

    Args:
        run: what was measured.
        folder: made if need be; gets `index.html`, `report.md` and `timm/*.csv`.

    Returns:
        The files written, the page first.
    """
    files = {"index.html": html(run), "report.md": markdown(run)}
    files |= {f"timm/{name}": text for name, text in timm_csvs(run).items()}
    written = []
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written
