"""What a run says, for readers: timm's CSV columns, Markdown, and one self-contained HTML page.

Everything here is a function of a `results.Run` and measures nothing. Ratios are between rows of one run, on the same
workload in the same precision: candidates were interleaved there, so drift fell on all alike.
"""

from __future__ import annotations

import csv
import functools
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import plots
from .plots import Bar, Mark, Series, number
from .registry import MODELS
from .results import Row, Run
from .targets import SOURCE, fastest, is_compiled_peer, is_ours, standings

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


@dataclass(frozen=True)
class Table:
    """Plain text cells; `numbers` are the columns set to the right, `bold` the rows that stand out."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: frozenset[int] = frozenset()
    bold: frozenset[int] = frozenset()

    def markdown(self) -> str:
        """As GitHub's Markdown."""
        lines = [[_md(cell) for cell in self.head]]
        lines.append(["---:" if i in self.numbers else "---" for i in range(len(self.head))])
        for position, row in enumerate(self.rows):
            cells = [_md(cell) for cell in row]
            lines.append([f"**{c}**" if c and position in self.bold else c for c in cells])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def html(self) -> str:
        """As an HTML table in a box that scrolls by itself."""

        def cell(tag: str, i: int, text: str) -> str:
            scope = ' scope="col"' if tag == "th" else ""
            return f"<{tag}{scope}{' class=number' if i in self.numbers else ''}>{escape(text)}</{tag}>"

        head = "".join(cell("th", i, text) for i, text in enumerate(self.head))
        body = "\n".join(
            f"<tr{' class=ours' if position in self.bold else ''}>"
            f"{''.join(cell('td', i, text) for i, text in enumerate(row))}</tr>"
            for position, row in enumerate(self.rows)
        )
        table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"
        return f'<div class="scroll" tabindex="0">{table}</div>'


def _md(text: str) -> str:
    text = " ".join(text.split()).replace("&", "&amp;")
    return re.sub(r"([\\|<>*`\[\]])", r"\\\1", text)


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


def mfu(row: Row, run: Run) -> float | None:
    """Model FLOP utilisation: the workload's useful FLOP/s over this run's measured GEMM rate in the row's dtype."""
    rate = None if run.ceilings is None else run.ceilings.gemm_tflop_s.get(row.dtype)
    return None if rate is None or row.tflop_s is None else row.tflop_s / rate


def best_compiled_peer(rows: Iterable[Row]) -> Row | None:
    """The fastest timed peer that has a compiler behind it."""
    return fastest(row for row in rows if is_compiled_peer(row.candidate))


def device_slug(environment: dict[str, Any]) -> str:
    """Device name for files and folders: `nvidia-h100-80gb-hbm3`, `intel-xeon-platinum-8481c-8-threads`."""
    name = re.sub(r"\((r|tm|c)\)|\bcpu\b|\bprocessor\b|@.*?hz", " ", str(environment.get("device", "")).lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-") or "unknown-device"


# --- timm's CSV files


@functools.cache
def _sizes(model: str) -> tuple[float | None, float | None]:
    """Millions of parameters, and of activations of one image as fvcore counts them for timm: the elements that
    linear layers, convolutions and attention's products put out. None for a model that this version does not know."""
    from vitfast import create_model

    try:
        with torch.device("meta"):
            net: Any = create_model(model, **MODELS.get(model, {}))
    except ValueError:
        return None, None
    patches, tokens = net.patch_embed.num_patches, net.num_prefix_tokens + net.patch_embed.num_patches
    activations = patches * net.embed_dim + net.num_classes
    for block in net.blocks:
        linears = sum(m.out_features for m in block.modules() if isinstance(m, nn.Linear))
        activations += tokens * (linears + net.embed_dim) + block.attn.num_heads * tokens * tokens
    return sum(p.numel() for p in net.parameters()) / 1e6, activations / 1e6


def _rounded(value: float | None, digits: int) -> str:
    return "" if value is None else str(round(value, digits))


def timm_csvs(run: Run) -> dict[str, str]:
    """timm's benchmark CSV files, one per candidate, precision and kind, as `{file name: text}`.

    Columns, rounding, order (fastest first) and file names are those of `results/benchmark-*.csv` in timm's
    repository, so that the two can be joined on `model` and image size. timm has one batch a model, this has a line
    per measured batch. What to know before comparing: timm's step time has a synchronisation in each step, this is a
    median without; GMACs here are torch's count (matrix products, convolutions, attention), a percent or less below
    fvcore's; a training step's optimiser is AdamW here, and there SGD with momentum if not told otherwise. Rows that
    were not timed have no line.
    """
    files: dict[tuple[str, str, str], list[Row]] = {}
    for row in run.rows:
        kind = {"model": "infer", "train": "train"}.get(row.layer)
        if kind is not None and row.ms is not None and "batch" in row.shape:
            files.setdefault((kind, row.dtype, row.candidate), []).append(row)
    return {_timm_name(run.environment, *key): _timm_csv(key[0], rows) for key, rows in files.items()}


def _timm_name(environment: dict[str, Any], kind: str, dtype: str, candidate: str) -> str:
    versions = environment.get("versions") or {}
    torch_version = re.sub(r"[^0-9]", "", str(versions.get("torch") or "").split("+")[0])
    cuda = environment.get("cuda")
    where = device_slug(environment)
    platform = f"cu{str(cuda).replace('.', '')}" if cuda else str(environment.get("kind", "cpu"))
    name = re.sub(r"[^a-z0-9]+", "-", candidate.lower()).strip("-")
    return f"benchmark-{kind}-{dtype}-nchw-pt{torch_version}-{platform}-{where}-{name}.csv"


def _timm_csv(kind: str, rows: list[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    speed = ("samples_per_sec", "step_time", "batch_size")
    if kind == "infer":
        names = ("img_size", *speed)
        writer.writerow(["model", *(f"infer_{n}" for n in names), "param_count", "infer_gmacs", "infer_macts"])
    else:
        writer.writerow(["model", *(f"train_{n}" for n in (*speed, "img_size")), "param_count"])
    for row in sorted(rows, key=lambda row: -(row.images_per_s or 0.0)):
        parameters, activations = _sizes(row.workload)
        measured = [_rounded(row.images_per_s, 2), _rounded(row.ms, 3), str(row.shape["batch"])]
        size = str(row.shape.get("width", ""))
        if kind == "infer":
            macs = _rounded(row.flops / row.shape["batch"] / 2e9, 2)
            line = [size, *measured, _rounded(parameters, 2), macs, _rounded(activations, 2)]
        else:
            line = [*measured, size, _rounded(parameters, 2)]
        writer.writerow([row.workload, *line])
    return text.getvalue()


# --- tables


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _times(slow: Row | None, row: Row) -> str:
    """How many times as fast as another row."""
    return "" if slow is None or slow.ms is None or row.ms is None else f"{slow.ms / row.ms:.2f}×"


def _rate(row: Row, ms: float | None) -> str:
    return "" if ms is None or "batch" not in row.shape else number(row.shape["batch"] * 1e3 / ms)


def _span(row: Row, text: Callable[[float], str]) -> str:
    """p20 to p80 of a quantity, ascending."""
    if row.ms_p20 is None or row.ms_p80 is None:
        return ""
    low, high = text(row.ms_p20), text(row.ms_p80)
    return f"{low} to {high}"


def _seconds(ms: float | None) -> str:
    return "" if ms is None else f"{number(ms / 1e3)} s" if ms >= 1e3 else f"{number(ms)} ms"


def _megabytes(mb: float | None) -> str:
    return "" if mb is None else f"{mb:,.1f}" if mb < 100 else f"{mb:,.0f}"


def _error(row: Row) -> str:
    if row.error is None:
        return "" if row.error_limit is None else f"not finite / {row.error_limit:.1e}"
    return f"{row.error:.1e}" + ("" if row.error_limit is None else f" / {row.error_limit:.1e}")


def _eager(rows: Iterable[Row]) -> Row | None:
    return next((row for row in rows if row.candidate == "torch eager"), None)


def _drop_empty(table: Table) -> Table:
    """Without columns that are empty in every row: peak memory on CPU, say."""
    kept = [i for i in range(len(table.head)) if any(row[i] for row in table.rows)]
    return Table(
        [table.head[i] for i in kept],
        [[row[i] for i in kept] for row in table.rows],
        frozenset(new for new, old in enumerate(kept) if old in table.numbers),
        table.bold,
    )


def _summary(run: Run, layer: str) -> Table | None:
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
                _rate(ours, ours.ms),
                number(ours.ms or 0.0),
                "" if peer is None else peer.candidate,
                "" if peer is None else _rate(peer, peer.ms),
                _times(peer, ours),
                _times(_eager(rows), ours),
                _share(ours.floor_share),
                _share(mfu(ours, run)),
            ]
        )
    head = ["model", "dtype", "batch", "best of vitfast", "img/s", "ms", "best compiled peer", "img/s"]
    head += ["× peer", "× eager", "of the floor", "MFU"]
    return _drop_empty(Table(head, lines, frozenset({2, 4, 5, 7, 8, 9, 10, 11}))) if lines else None


def _image_table(run: Run, groups: Iterable[list[Row]]) -> Table:
    """Every candidate of one workload and precision, batch by batch; what was not timed says so in the first number."""
    lines: list[list[str]] = []
    bold = set()
    for rows in groups:
        peer, eager, best = best_compiled_peer(rows), _eager(rows), fastest(rows)
        for row in rows:
            if row is best:
                bold.add(len(lines))
            ok = row.ms is not None
            lines.append(
                [
                    str(row.shape.get("batch", "")),
                    row.candidate,
                    _rate(row, row.ms) if ok else row.status,
                    # the slow end of the times is the low end of the rates
                    f"{_rate(row, row.ms_p80)} to {_rate(row, row.ms_p20)}" if row.ms_p20 and row.ms_p80 else "",
                    number(row.ms) if row.ms is not None else "",
                    _times(peer, row),
                    _times(eager, row),
                    _share(row.floor_share),
                    _share(mfu(row, run)),
                    _megabytes(row.peak_mb),
                    _seconds(row.cold_ms),
                    _error(row),
                ]
            )
    head = ["batch", "candidate", "img/s", "p20 to p80", "ms", "× peer", "× eager", "of the floor"]
    head += ["MFU", "peak MB", "first call", "error / limit"]
    return _drop_empty(Table(head, lines, frozenset({0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}), frozenset(bold)))


def _kernel_table(run: Run, groups: Iterable[list[Row]]) -> Table:
    """Every candidate of a model's kernels, the fastest of each contest in bold."""
    lines: list[list[str]] = []
    bold = set()
    for rows in groups:
        peer, best = fastest(row for row in rows if not is_ours(row.candidate)), fastest(rows)
        for row in rows:
            if row is best:
                bold.add(len(lines))
            lines.append(
                [
                    row.workload.partition("/")[0],
                    str(row.shape.get("batch", "")),
                    row.candidate,
                    number(row.ms) if row.ms is not None else row.status,
                    _span(row, number),
                    _times(peer, row),
                    number(row.gb_s) if row.gb_s is not None else "",
                    number(row.tflop_s) if row.tflop_s is not None else "",
                    _share(row.floor_share),
                    _megabytes(row.peak_mb),
                    _seconds(row.cold_ms),
                    _error(row),
                ]
            )
    head = ["kernel", "batch", "candidate", "ms", "p20 to p80", "× peer", "GB/s", "TFLOP/s", "of the floor"]
    head += ["peak MB", "first call", "error / limit"]
    return _drop_empty(Table(head, lines, frozenset({1, *range(3, 12)}), frozenset(bold)))


def _failures(run: Run) -> Table | None:
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


def _targets(run: Run) -> Table | None:
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
    return Table(head, lines, frozenset({1}), frozenset(bold)) if lines else None


def _facts(run: Run) -> list[tuple[str, str]]:
    """Device, versions, ceilings and telemetry as names and values."""
    env = run.environment
    versions = env.get("versions") or {}
    facts = [("device", env.get("device"))]
    facts += [(name, env.get(name)) for name in ("driver", "cuda")]
    capability = env.get("capability")
    facts.append(("compute capability", ".".join(map(str, capability)) if capability else None))
    facts += [(name, env.get(name)) for name in ("multiprocessors", "threads")]
    facts.append(("CPU instructions", env.get("cpu_capability") if env.get("kind") == "cpu" else None))
    facts += [(name, version) for name, version in versions.items()]
    facts += [("platform", env.get("platform")), ("commit", env.get("commit"))]
    if run.ceilings is not None:
        facts.append(("ceiling, large copy", f"{number(run.ceilings.copy_gb_s)} GB/s"))
        for dtype, rate in run.ceilings.gemm_tflop_s.items():
            facts.append((f"ceiling, torch's {dtype} GEMM", f"{number(rate)} TFLOP/s"))
    units = {"clocks.sm": "MHz", "clocks.mem": "MHz", "power.draw": "W", "temperature.gpu": "°C"}
    for field, unit in units.items():
        values = sorted(_floats(row.telemetry.get(field) for row in run.rows))
        if values:
            facts.append((f"{field} after timing", f"{values[0]:g} to {values[-1]:g} {unit}"))
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def _floats(texts: Iterable[str | None]) -> list[float]:
    found = []
    for text in texts:
        try:
            found.append(float(text or ""))
        except ValueError:
            # nvidia-smi writes "[N/A]" for what a board does not tell
            continue
    return found


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


# --- Markdown


def markdown(run: Run, *, figures_from: str | None = None, level: int = 1) -> str:
    """A run as Markdown.

    Args:
        run: what was measured.
        figures_from: start of the paths of `figures`' files, to show them; None for tables only.
        level: of the title's heading.
    """
    h = "#" * level
    parts = [f"{h} {_md(title(run))}", _lead(run), METHOD]
    targets = _targets(run)
    if targets is not None:
        parts += [f"{h}# Targets", targets.markdown(), f"Source: {SOURCE}"]
    if figures_from is not None:
        for name, (_, caption) in figures(run).items():
            parts.append(f"![{_md(caption)}]({figures_from}{name}.svg)\n\n{_md(caption)}")
    for layer, name in IMAGE_LAYERS.items():
        groups = contests(run, [layer])
        if not groups:
            continue
        parts.append(f"{h}# {name}")
        summary = _summary(run, layer)
        if summary is not None:
            parts.append(summary.markdown())
        for (workload, dtype), rows in _by_workload(groups).items():
            parts += [f"{h}## {_md(workload)}, {dtype}", _image_table(run, rows).markdown()]
    kernels = contests(run, ["kernel"])
    if kernels:
        parts.append(f"{h}# Kernels")
        for (model, dtype), rows in _by_model(kernels).items():
            parts += [f"{h}## Shapes of {_md(model)}, {dtype}", _kernel_table(run, rows).markdown()]
    failures = _failures(run)
    if failures is not None:
        parts += [f"{h}# What was not timed, and why", failures.markdown()]
    facts = Table(["what", "value"], [[name, value] for name, value in _facts(run)])
    parts += [f"{h}# Where it ran", facts.markdown()]
    return "\n\n".join(parts) + "\n"


def title(run: Run) -> str:
    """Title of a run's report."""
    return f"Vision Transformers on {run.environment.get('device', 'an unknown device')}"


def _lead(run: Run) -> str:
    ok = sum(row.ms is not None for row in run.rows)
    missing = sum(row.status == "missing" for row in run.rows)
    failed = len(run.rows) - ok - missing
    text = f"{ok} rows timed, {missing} missing"
    return text + (f", {failed} failed." if failed else ".")


def _by_workload(groups: dict[Contest, list[Row]]) -> dict[tuple[str, str], list[list[Row]]]:
    found: dict[tuple[str, str], list[list[Row]]] = {}
    for (_, workload, dtype, _), rows in groups.items():
        found.setdefault((workload, dtype), []).append(rows)
    return found


def _by_model(groups: dict[Contest, list[Row]]) -> dict[tuple[str, str], list[list[Row]]]:
    """Kernels' contests by the model whose shapes they have, the headline's first, kernel by kernel."""
    found: dict[tuple[str, str], list[list[Row]]] = {}
    for (_, workload, dtype, _), rows in groups.items():
        found.setdefault((workload.partition("/")[2], dtype), []).append(rows)
    for contest_rows in found.values():
        names = list(dict.fromkeys(rows[0].workload for rows in contest_rows))
        contest_rows.sort(key=lambda rows: names.index(rows[0].workload))
    return dict(sorted(found.items(), key=lambda item: item[0][0] != HEADLINE))


# --- charts


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


def _what(row: Row) -> str:
    batch = f", batch {row.shape['batch']}" if "batch" in row.shape else ""
    return f"{row.workload}, {row.dtype}{batch}"


def _throughput(groups: Sequence[list[Row]]) -> str | None:
    """Images a second by batch; of our rungs those that are the fastest of ours at some batch. None for one batch."""
    shown = {row.candidate for rows in groups if (row := fastest(r for r in rows if is_ours(r.candidate))) is not None}
    points: dict[str, list[tuple[float, float, float, float]]] = {}
    for rows in groups:
        for row in rows:
            if row.ms is None or "batch" not in row.shape or (is_ours(row.candidate) and row.candidate not in shown):
                continue
            images = row.shape["batch"] * 1e3
            slow, fast = row.ms_p80 or row.ms, row.ms_p20 or row.ms
            points.setdefault(row.candidate, []).append(
                (row.shape["batch"], images / row.ms, images / slow, images / fast)
            )
    if len({x for line in points.values() for x, *_ in line}) < 2:
        return None
    series = [Series(name, line) for name, line in points.items()]
    label = f"Images a second by batch, {groups[0][0].workload}, {groups[0][0].dtype}"
    return plots.line_chart(series, label=label, x_label="batch", y_label="images a second")


def _ladder(rows: Sequence[Row]) -> str:
    """Every candidate of one contest as a bar, the peers first, then ours rung by rung."""
    peer = best_compiled_peer(rows)
    bars = []
    for row in rows:
        group = "ours" if is_ours(row.candidate) else "peers"
        if row.ms is None:
            bars.append(Bar(row.candidate, None, row.status, group=group))
            continue
        rate = row.shape.get("batch", 1) * 1e3 / row.ms
        ends = [row.shape.get("batch", 1) * 1e3 / ms for ms in (row.ms_p80 or row.ms, row.ms_p20 or row.ms)]
        text = " · ".join(filter(None, (number(rate), _times(peer, row))))
        bars.append(Bar(row.candidate, rate, text, ends[0], ends[1], group))
    return plots.bar_chart(bars, label=f"Images a second, {_what(rows[0])}", x_label="images a second")


def _memory(rows: Sequence[Row]) -> str | None:
    bars = [
        Bar(r.candidate, r.peak_mb, f"{_megabytes(r.peak_mb)} MB", group="ours" if is_ours(r.candidate) else "peers")
        for r in rows
        if r.peak_mb is not None
    ]
    return plots.bar_chart(bars, label=f"Peak memory, {_what(rows[0])}", x_label="MB in one call") if bars else None


def _worst_errors(run: Run) -> list[Row]:
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


def _errors(run: Run) -> str | None:
    worst = _worst_errors(run)
    # a wrong result may be far beyond the limit; its bar ends at twice the limit, its text tells
    bars = [
        Bar(row.candidate, min(share, 2.0), f"{share:.2f}", group="ours" if is_ours(row.candidate) else "peers")
        for row in worst
        if (share := (row.error or 0.0) / (row.error_limit or 1.0)) >= 0.0
    ]
    label = "Largest error of each candidate as a share of its limit"
    return (
        plots.bar_chart(bars, label=label, x_label="largest error over its limit", limit=(1.0, "limit"))
        if bars
        else None
    )


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
        for row in (
            fastest(r for r in rows if is_ours(r.candidate)),
            fastest(r for r in rows if not is_ours(r.candidate)),
        ):
            if row is not None and row.bytes > 0 and row.flops > 0:
                found.append((name, row))
    return found


def _roofline(run: Run) -> tuple[str, str, Table] | None:
    """The chart, its caption and the table behind it."""
    rows = _roof_rows(run)
    if run.ceilings is None or not rows or rows[0][1].dtype not in run.ceilings.gemm_tflop_s:
        return None
    names = list(dict.fromkeys(name for name, _ in rows))
    letters = {name: chr(ord("a") + i) for i, name in enumerate(names)}
    marks, lines = [], []
    for name, row in rows:
        work, rate = row.flops / row.bytes, row.tflop_s or 0.0
        text = f"{name}, {row.candidate}: {number(rate)} TFLOP/s at {number(work)} FLOP per byte"
        marks.append(Mark(row.candidate, letters[name], work, rate, text))
        lines.append(
            [
                letters[name],
                name,
                row.candidate,
                number(work),
                number(rate),
                number(row.gb_s or 0.0),
                _share(row.floor_share),
            ]
        )
    first = rows[0][1]
    model = first.workload.rpartition("/")[2]
    what = f"{model}, {first.dtype}, batch {first.shape.get('batch', '')}"
    svg = plots.roofline(
        marks,
        run.ceilings.gemm_tflop_s[first.dtype],
        run.ceilings.copy_gb_s,
        label=f"Roofline, {what}",
        ours="best of vitfast",
        others="best peer",
    )
    key = ", ".join(f"{letter}: {name}" for name, letter in letters.items())
    head = ["", "work", "candidate", "FLOP per byte", "TFLOP/s", "GB/s", "of the floor"]
    return svg, f"{what} under the ceilings of this run. {key}.", Table(head, lines, frozenset({3, 4, 5, 6}))


def _kernel_charts(run: Run, groups: Sequence[list[Row]]) -> list[tuple[str, str]]:
    """A chart per kernel of one model: rate by batch, as Triton's `perf_report` draws it, or bars for one batch."""
    by_name: dict[str, list[list[Row]]] = {}
    for rows in groups:
        by_name.setdefault(rows[0].workload, []).append(rows)
    charts = []
    for workload, contest_rows in by_name.items():
        timed = [[row for row in rows if row.ms is not None] for rows in contest_rows]
        timed = [rows for rows in timed if rows]
        if not timed:
            continue
        moves = _memory_bound(run, timed[-1][0])
        unit = "GB/s" if moves else "TFLOP/s"

        def rate(row: Row, ms: float | None, moves: bool = moves) -> float:
            time = ms or row.ms or 1.0
            return row.bytes / (time * 1e6) if moves else row.flops / (time * 1e9)

        label = f"{workload.partition('/')[0]}, {unit}, shapes of {workload.partition('/')[2]}, {timed[0][0].dtype}"
        if len(timed) == 1:
            bars = [
                Bar(
                    row.candidate,
                    rate(row, row.ms),
                    number(rate(row, row.ms)),
                    rate(row, row.ms_p80),
                    rate(row, row.ms_p20),
                    "ours" if is_ours(row.candidate) else "peers",
                )
                for row in timed[0]
            ]
            batch = timed[0][0].shape.get("batch", "")
            charts.append((workload, plots.bar_chart(bars, label=label, x_label=f"{unit} at batch {batch}")))
            continue
        points: dict[str, list[tuple[float, float, float, float]]] = {}
        for rows in timed:
            for row in rows:
                line = (rate(row, row.ms), rate(row, row.ms_p80), rate(row, row.ms_p20))
                points.setdefault(row.candidate, []).append((row.shape.get("batch", 1), *line))
        series = [Series(name, line) for name, line in points.items()]
        charts.append((workload, plots.line_chart(series, label=label, x_label="batch", y_label=unit)))
    return charts


def _memory_bound(run: Run, row: Row) -> bool:
    rate = None if run.ceilings is None else run.ceilings.gemm_tflop_s.get(row.dtype)
    if run.ceilings is None or rate is None:
        # no ceilings: most machines have more than 10 FLOP for a byte
        return row.flops < 10 * row.bytes
    return row.flops / rate < row.bytes * 1e3 / run.ceilings.copy_gb_s


def figures(run: Run) -> dict[str, tuple[str, str]]:
    """The headline charts by name, each with its caption; those that the run has nothing for are left out."""
    found: dict[str, tuple[str, str]] = {}
    lead = headline(run)
    if lead is not None:
        groups = _by_workload(contests(run, ["model"]))[(lead[0].workload, lead[0].dtype)]
        svg = _throughput(groups)
        if svg is not None:
            found["throughput"] = (svg, f"Images a second by batch: {lead[0].workload}, {lead[0].dtype}.")
        found["ladder"] = (_ladder(lead), f"Every candidate: {_what(lead[0])}. × is over the best compiled peer.")
        memory = _memory(lead)
        if memory is not None:
            found["memory"] = (memory, f"Device memory of one call beyond weights and inputs: {_what(lead[0])}.")
    roof = _roofline(run)
    if roof is not None:
        found["roofline"] = (roof[0], roof[1])
    errors = _errors(run)
    if errors is not None:
        found["error"] = (errors, "Largest error of each candidate over all its rows, as a share of what is allowed.")
    return found


# --- HTML

_STYLE = (
    plots.STYLE
    + """
:root { color-scheme: light dark; --page: #f6f7f9; }
:root { --good: #14713f; --good-wash: #e5f5ec; --bad: #a3480b; --bad-wash: #fdf0e4; }
@media (prefers-color-scheme: dark) {
  :root { --page: #12141a; --good: #6fd39c; --good-wash: #17301f; --bad: #ffb27a; --bad-wash: #3a2716; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 78rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: clamp(1.7rem, 4vw, 2.4rem); line-height: 1.15; letter-spacing: -0.02em; margin: 0.3rem 0 0.6rem; }
h1 { overflow-wrap: anywhere; max-width: 30ch; }
h2 { font-size: 1.25rem; margin: 0 0 0.4rem; letter-spacing: -0.01em; }
h3 { font-size: 1rem; margin: 1.4rem 0 0; overflow-wrap: anywhere; }
p { margin: 0.4rem 0; max-width: 76ch; }
section, .tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
section { padding: 1.4rem; margin-top: 1.2rem; min-width: 0; }
.kicker, .soft, figcaption, th { color: var(--soft); }
.kicker { font-size: 0.9rem; margin: 0; overflow-wrap: anywhere; } .soft, figcaption { font-size: 0.88rem; }
nav { margin-top: 1rem; display: flex; flex-wrap: wrap; gap: 0.3rem 1.1rem; font-size: 0.92rem; }
a { color: var(--k0); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 0.8rem; margin-top: 1.4rem; }
.tile { padding: 0.9rem 1rem; }
.tile b { display: block; font-size: 1.45rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile span { display: block; font-size: 0.85rem; color: var(--soft); }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
.grid { gap: 1.6rem 2rem; margin-top: 1rem; }
.grid > * { min-width: 0; }
.wide { max-width: 60rem; }
figure { margin: 0.9rem 0 0; } .grid figure { margin: 0; }
figcaption b { color: var(--ink); } figcaption { max-width: 76ch; }
.plot { overflow-x: auto; }
.plot svg { display: block; width: 100%; min-width: 31rem; height: auto; margin-top: 0.6rem; }
.scroll { overflow-x: auto; margin-top: 0.6rem; }
table { border-collapse: collapse; width: 100%; font-size: 0.86rem; }
th { text-align: left; font-weight: 600; white-space: nowrap; vertical-align: bottom; }
th, td { padding: 0.38rem 0.9rem 0.38rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td { white-space: nowrap; } #failures td { white-space: normal; overflow-wrap: anywhere; }
#targets td:last-child { white-space: normal; min-width: 17rem; }
#failures td:first-child, #failures td:nth-child(2) { white-space: nowrap; }
tbody tr:last-child td { border-bottom: 0; } td:last-child, th:last-child { padding-right: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.ours td { font-weight: 650; }
.chip { border-radius: 99px; padding: 0.08rem 0.6rem; font-size: 0.8rem; font-weight: 600; white-space: nowrap; }
.chip { background: var(--good-wash); color: var(--good); }
.chip.bad { background: var(--bad-wash); color: var(--bad); }
details { margin-top: 0.9rem; } summary { cursor: pointer; color: var(--soft); font-size: 0.92rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.25rem 1.4rem; margin: 0.8rem 0 0; }
dl { font-size: 0.9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
footer { margin-top: 1.6rem; }
@media (max-width: 34rem) {
  section { padding: 1rem; } dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 0.5rem; }
}
@media print { details > * { display: block; } section { break-inside: avoid; } }
"""
)


def _figure(svg: str, caption: str, table: Table | None = None) -> str:
    numbers = "" if table is None else _details("The numbers", table.html())
    return f'<figure><div class="plot">{svg}</div><figcaption>{escape(caption)}</figcaption>{numbers}</figure>'


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _section(anchor: str, heading: str, *content: str) -> tuple[str, str, str]:
    return (
        anchor,
        heading,
        f'<section id="{anchor}">\n<h2>{escape(heading)}</h2>\n' + "\n".join(content) + "\n</section>",
    )


def _tile(name: str, value: str, below: str) -> str:
    return f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b><span>{escape(below)}</span></div>'


def _tiles(run: Run) -> str:
    lead = headline(run)
    if lead is None:
        return ""
    best, peer, eager = fastest(r for r in lead if is_ours(r.candidate)), best_compiled_peer(lead), _eager(lead)
    best = best or fastest(lead)
    assert best is not None
    tiles = [_tile("throughput", f"{_rate(best, best.ms)} img/s", f"{best.candidate}, {_what(best)}")]
    if peer is not None and peer is not best:
        tiles.append(
            _tile("over the best compiled peer", _times(peer, best), f"{peer.candidate}: {_rate(peer, peer.ms)} img/s")
        )
    if eager is not None and eager.ms is not None and eager is not best:
        tiles.append(_tile("over torch eager", _times(eager, best), f"{_rate(eager, eager.ms)} img/s in {eager.dtype}"))
    used = mfu(best, run)
    if used is not None:
        floor = "" if best.floor_share is None else f"{_share(best.floor_share)} of the floor"
        tiles.append(_tile("model FLOP utilisation", _share(used), floor))
    one = [
        row
        for key, rows in contests(run, ["model"]).items()
        if key[1] == best.workload and key[2] == best.dtype and best.shape.get("batch") != 1
        for row in rows
        if row.shape.get("batch") == 1 and is_ours(row.candidate)
    ]
    single = fastest(one)
    if single is not None and single.ms is not None:
        tiles.append(_tile("one image", f"{number(single.ms)} ms", f"{single.candidate}, batch 1"))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _targets_html(run: Run) -> str:
    table = _targets(run)
    if table is None:
        return ""
    marked = table.html()
    for verdict, css in (("met", "chip"), ("not met", "chip bad")):
        marked = marked.replace(f"<td>{verdict}</td>", f'<td><span class="{css}">{verdict}</span></td>')
    return marked


def html(run: Run) -> str:
    """A run as one page: no file or address beside it is needed, light and dark, and everything in it is escaped."""
    sections: list[tuple[str, str, str]] = []
    targets = _targets_html(run)
    if targets:
        source = f'<p class="soft">{escape(SOURCE)}</p>'
        sections.append(_section("targets", "Targets beside what was measured", targets, source))
    summary = _summary(run, "model")
    if summary is not None:
        sections.append(_section("summary", "In short", summary.html()))
    inference = contests(run, ["model"])
    lead = headline(run)
    throughput = [
        (f"{workload}, {dtype}", svg)
        for (workload, dtype), groups in _by_workload(inference).items()
        if (svg := _throughput(groups)) is not None
    ]
    if throughput:
        charts = "".join(_figure(svg, name) for name, svg in throughput)
        text = (
            "<p>Median with p20 to p80, both axes logarithmic."
            " Of vitfast's rungs those that are its fastest somewhere.</p>"
        )
        grid = f'<div class="{"grid" if len(throughput) > 1 else "wide"}">{charts}</div>'
        sections.append(_section("throughput", "Throughput by batch", text, grid))
    if lead is not None:
        text = (
            "<p>The peers, then vitfast rung by rung, each with one kind of replacement more. Bars are medians, "
            "whiskers p20 to p80, × is over the best compiled peer.</p>"
        )
        first = f'<div class="wide">{_figure(_ladder(lead), _what(lead[0]))}</div>'
        others = [
            _figure(_ladder(rows), _what(rows[0]))
            for rows in inference.values()
            if rows is not lead and contest(rows[0]) != contest(lead[0]) and any(row.ms is not None for row in rows)
        ]
        more = _details(f"{len(others)} more", f'<div class="grid">{"".join(others)}</div>') if others else ""
        sections.append(_section("ladder", "The ladder", text, first, more))
    roof = _roofline(run)
    if roof is not None:
        sections.append(_section("roofline", "Roofline", f'<div class="wide">{_figure(*roof)}</div>'))
    kernels = _by_model(contests(run, ["kernel"]))
    if kernels:
        blocks = []
        for position, ((model, dtype), groups) in enumerate(kernels.items()):
            charts = "".join(_figure(svg, name) for name, svg in _kernel_charts(run, groups))
            content = f'<div class="grid">{charts}</div>' if charts else ""
            content += _details("The numbers", _kernel_table(run, groups).html())
            name = f"Shapes of {model}, {dtype}"
            blocks.append(f"<h3>{escape(name)}</h3>{content}" if position == 0 else _details(name, content))
        text = (
            "<p>GB/s where memory sets the floor, TFLOP/s where arithmetic does; useful bytes and operations only.</p>"
        )
        sections.append(_section("kernels", "Kernels", text, *blocks))
    memory = None if lead is None else _memory(lead)
    if memory is not None and lead is not None:
        caption = f"Device memory of one call beyond weights and inputs: {_what(lead[0])}."
        sections.append(_section("memory", "Peak memory", f'<div class="wide">{_figure(memory, caption)}</div>'))
    errors = _errors(run)
    if errors is not None:
        lines = [[row.candidate, _what(row), _error(row)] for row in _worst_errors(run)]
        table = Table(["candidate", "its worst row", "error / limit"], lines, frozenset({2}))
        caption = "Largest error of each candidate over all its rows, as a share of what the rule allows."
        sections.append(_section("error", "Error", f'<div class="wide">{_figure(errors, caption, table)}</div>'))
    for layer, name in IMAGE_LAYERS.items():
        groups_of = _by_workload(contests(run, [layer]))
        if groups_of:
            tables = [
                _details(f"{workload}, {dtype}", _image_table(run, groups).html())
                for (workload, dtype), groups in groups_of.items()
            ]
            tables[0] = tables[0].replace("<details>", "<details open>", 1)
            sections.append(_section(f"rows-{layer}", f"Every row: {name[0].lower()}{name[1:]}", *tables))
    failures = _failures(run)
    if failures is not None:
        sections.append(_section("failures", "What was not timed, and why", failures.html()))
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in _facts(run))
    sections.append(
        _section("method", "How and where it was measured", f"<p>{escape(METHOD)}</p>", f"<dl>{facts}</dl>")
    )
    env, versions = run.environment, run.environment.get("versions") or {}
    commit = str(env.get("commit") or "unknown")
    kicker = ["vitfast benchmark", f"torch {versions.get('torch')}"]
    if versions.get("triton"):
        kicker.append(f"triton {versions['triton']}")
    kicker.append(f"commit {commit[:12]}" + ("+" if commit.endswith("+") else ""))
    links = "".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name, _ in sections)
    body = "\n\n".join(content for *_, content in sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title(run))}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<header>
<p class="kicker">{escape(" · ".join(kicker))}</p>
<h1>{escape(title(run))}</h1>
<p>{escape(_lead(run))} Every number was measured in one run on this device; ratios are between candidates that were
timed in turns.</p>
{_tiles(run)}
<nav aria-label="Contents">{links}</nav>
</header>

{body}

<footer class="soft">Written by <code>vitfast bench</code> from its results file.</footer>
</main>
</body>
</html>
"""


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
