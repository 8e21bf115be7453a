"""Two runs side by side: which differences are real, and which are noise.

A bootstrap tells. A results file holds of each row the median, the 20th and 80th percentile and the number of samples,
so medians are drawn anew from the distribution through these three quantiles: log-normal on each side of the median,
wider by chance the fewer the samples are that it is known from. It assumes that the samples of a row are independent;
those of one process are less so than they look, which the next two rules are for.

- Where device and versions are equal, the peers are a control: their code did not change, so how the speed of a
  workload's peers moved is what the machine does on its own. The median of their moves, drawn anew too, is taken out of
  each row, and how far the peers of one workload move apart, over the whole run, is added as noise.
- At least `FLOOR` is noise whatever the samples say: two processes differ in memory layout and clocks.

A row is slower or faster if the range that holds `LEVEL` of its draws lies beyond `FLOOR`. Without peers nothing tells
a busy hour from slower code; such a comparison is not `controlled`. The draws are seeded: the same two files give the
same verdicts.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vitfast.table import text_table

from ..runner.results import Row, Run
from .targets import is_ours

FLOOR = 0.02
"""Smallest relative difference of two processes' medians that is ever called real."""

LEVEL = 0.998
"""Share of the draws that lies within a row's range."""

DRAWS = 4000

UNSTEADY = 0.2
"""Share of rows, and relative width of a range, above which a machine is said to be unsteady."""

CONTROLS = 5
"""Fewest peers' rows that tell how far apart peers move."""

_P80 = statistics.NormalDist().inv_cdf(0.8)

VERDICTS = ("broken", "slower", "fixed", "faster", "no difference")
"""What a pair can be, worst first. "broken" ran in A and fails in B, "fixed" is the other way round."""

_FAILED = ("failed parity", "out of memory", "error")


@dataclass(frozen=True)
class Pair:
    """One candidate on one workload in both runs.

    Attributes:
        a, b: its rows.
        ratio: speed of B over that of A, the move of the workload's peers taken out: above 1 is faster. None unless
            both were timed.
        ratio_range: where `LEVEL` of the draws of it lie; from 0 to infinity where one sample tells no spread.
    """

    a: Row
    b: Row
    ratio: float | None = None
    ratio_range: tuple[float, float] = (0.0, math.inf)

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`."""
        if self.ratio is None:
            if self.a.status == "ok" and self.b.status in _FAILED:
                return "broken"
            return "fixed" if self.b.status == "ok" and self.a.status in _FAILED else "no difference"
        if self.ratio_range[1] < 1 / (1 + FLOOR):
            return "slower"
        return "faster" if self.ratio_range[0] > 1 + FLOOR else "no difference"


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; `str()` is its report.

    Attributes:
        pairs: rows of both runs, in A's order. Rows that were timed in neither are left out, unless one of them failed.
        only_a, only_b: rows that the other run lacks, or where a peer is missing in the other.
        differences: what differs in the two environments, as `(what, in A, in B)`.
        ceilings: B's measured ceilings over A's, by name.
        controls: how many peers' rows were a control.
        drift: median of the ratios of their speeds, B over A; 1 without a control.
    """

    pairs: tuple[Pair, ...]
    only_a: tuple[Row, ...]
    only_b: tuple[Row, ...]
    differences: tuple[tuple[str, str, str], ...]
    ceilings: dict[str, float]
    controls: int = 0
    drift: float = 1.0

    @property
    def controlled(self) -> bool:
        """Whether there is a control."""
        return self.controls > 0

    def regressions(self, threshold: float = 0.05) -> list[Pair]:
        """What a gate should stop: rows that broke, and rows slower by more than `threshold` and more than noise.

        An unsteady machine makes much noise and so lets much pass.

        Args:
            threshold: relative loss of speed that is put up with: 0.05 lets a row fall to 0.95 of its speed.

        Raises:
            ValueError: a threshold outside [0, 1).
        """
        if not 0.0 <= threshold < 1.0:
            raise ValueError(f"threshold {threshold!r}; expected a share of speed, at least 0 and below 1")
        return [
            pair
            for pair in self.pairs
            if pair.verdict == "broken"
            or (pair.verdict == "slower" and pair.ratio is not None and pair.ratio < 1.0 - threshold)
        ]

    def __str__(self) -> str:
        lines = [f"{what} differs: {a} in A, {b} in B" for what, a, b in self.differences]
        if any(what in ("device", "kind", "threads") for what, _, _ in self.differences):
            lines.append("These are two machines: the ratios compare them, not only the code.")
        if self.ceilings:
            lines.append("B's ceilings over A's: " + ", ".join(f"{n} {r:.3f}" for n, r in self.ceilings.items()))
        if self.controls:
            lines.append(
                f"The peers are the control: the speed of their {self.controls} rows, whose code is the same in both, "
                f"moved by {self.drift - 1:+.1%} in the median. What a workload's peers moved by is taken out."
            )
        else:
            lines.append("There is no control: no peers' rows in both, or other versions.")
        timed = [pair for pair in self.pairs if pair.ratio is not None]
        wide = sum(pair.ratio_range[1] > (1 + UNSTEADY) * pair.ratio_range[0] for pair in timed)
        if wide > UNSTEADY * len(timed):
            lines.append(
                f"That is too unsteady to tell much: {wide} of {len(timed)} ranges are wider than {UNSTEADY:.0%}; "
                "repeat on a quiet machine."
            )
        counts = Counter(pair.verdict for pair in self.pairs)
        summary = ", ".join(f"{counts[v]} {v}" for v in VERDICTS if counts[v]) or "none in common"
        lines += [f"Rows: {summary}.", ""]
        if self.pairs:
            lines += [_table(sorted(self.pairs, key=lambda pair: VERDICTS.index(pair.verdict))), ""]
        for name, rows in (("A", self.only_a), ("B", self.only_b)):
            if rows:
                lines += [f"Only in {name}:", *(f"  {_name(row)}" for row in rows), ""]
        return "\n".join(lines).rstrip()


def compare(a: Run, b: Run) -> Comparison:
    """Compare run B with run A, row by row; see the module's docstring for what counts as noise."""
    rows_b = {row.key: row for row in b.rows}
    keys_a = {row.key for row in a.rows}
    both: list[tuple[Row, Row]] = []
    only_a, only_b = [], []
    for row in a.rows:
        other = rows_b.get(row.key)
        if other is None or (other.status == "missing" and row.status != "missing"):
            if row.status != "missing":
                only_a.append(row)
        elif row.status == "missing":
            if other.status != "missing":
                only_b.append(other)
        elif "ok" in (row.status, other.status) or row.status != other.status:
            both.append((row, other))
    only_b += [row for row in b.rows if row.key not in keys_a and row.status != "missing"]
    differences = _differences(a.environment, b.environment)
    draw = np.random.default_rng(0)
    # logarithms of how much faster B is
    moves = {x.key: _medians(x, draw) - _medians(y, draw) for x, y in both if x.ms and y.ms}
    points = {x.key: math.log(x.ms / y.ms) for x, y in both if x.ms and y.ms}
    peers: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
    if all(what == "commit" for what, _, _ in differences):
        for key in moves:
            if not is_ours(key[-1]):
                peers.setdefault(key[:-1], []).append(key)
    peer_points = {workload: [points[key] for key in keys] for workload, keys in peers.items()}
    apart = _apart(list(peer_points.values()))
    controls = {workload: np.median([moves[key] for key in keys], axis=0) for workload, keys in peers.items()}
    pairs = []
    for x, y in both:
        pair = Pair(x, y)
        if x.key in moves:
            net = moves[x.key] - controls.get(x.key[:-1], 0.0) + apart * draw.standard_normal(DRAWS)
            low, high = (float(value) for value in np.exp(np.quantile(net, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))))
            ratio = math.exp(points[x.key] - statistics.median(peer_points.get(x.key[:-1], [0.0])))
            pair = Pair(x, y, ratio, (low, high) if (x.samples or 1) + (y.samples or 1) > 2 else (0.0, math.inf))
        pairs.append(pair)
    known = [point for group in peer_points.values() for point in group]
    drift = math.exp(statistics.median(known)) if known else 1.0
    return Comparison(tuple(pairs), tuple(only_a), tuple(only_b), differences, _ceilings(a, b), len(known), drift)


def _medians(row: Row, draw: np.random.Generator) -> np.ndarray[Any, Any]:
    """Logarithms of medians (ms) that as many samples as the row has could have had."""
    assert row.ms is not None
    n, middle = max(2, row.samples or 1), math.log(row.ms)
    # the median of n uniform samples has this distribution
    share = torch.from_numpy(draw.beta((n + 1) / 2, (n + 1) / 2, DRAWS))
    normal = torch.special.ndtri(share).numpy() / _P80 * np.sqrt((n - 1) / draw.chisquare(n - 1, DRAWS))
    above, below = math.log(row.ms_p80 or row.ms) - middle, middle - math.log(row.ms_p20 or row.ms)
    return middle + normal * np.where(normal > 0, above, below)


def _apart(moves: list[list[float]]) -> float:
    """Standard deviation of a peer's move about its workload's, by p20..p80: a few that did change count little."""
    found = []
    for group in moves:
        if len(group) > 1:
            middle, wider = statistics.median(group), math.sqrt(len(group) / (len(group) - 1))
            found += [wider * (move - middle) for move in group]
    if len(found) < CONTROLS:
        return 0.0
    fifths = statistics.quantiles(found, n=5, method="inclusive")
    return (fifths[3] - fifths[0]) / (2 * _P80)


def _flat(environment: dict[str, Any]) -> dict[str, Any]:
    flat = {name: value for name, value in environment.items() if name != "versions"}
    versions = environment.get("versions")
    return {**flat, **(versions if isinstance(versions, dict) else {})}


def _differences(a: dict[str, Any], b: dict[str, Any]) -> tuple[tuple[str, str, str], ...]:
    flat_a, flat_b = _flat(a), _flat(b)
    names = list(dict.fromkeys([*flat_a, *flat_b]))
    return tuple(
        (name, str(flat_a.get(name)), str(flat_b.get(name))) for name in names if flat_a.get(name) != flat_b.get(name)
    )


def _ceilings(a: Run, b: Run) -> dict[str, float]:
    if a.ceilings is None or b.ceilings is None:
        return {}
    ratios = {"copy": b.ceilings.copy_gb_s / a.ceilings.copy_gb_s}
    for dtype, rate in a.ceilings.gemm_tflop_s.items():
        if dtype in b.ceilings.gemm_tflop_s:
            ratios[f"{dtype} GEMM"] = b.ceilings.gemm_tflop_s[dtype] / rate
    return ratios


def _name(row: Row) -> str:
    batch = f" b{row.shape['batch']}" if "batch" in row.shape else ""
    return f"{row.layer} {row.workload}{batch} {row.dtype}: {row.candidate}"


def _time(row: Row) -> str:
    if row.ms is None:
        return row.status
    return f"{row.ms:.4g} ({row.ms_p20 or row.ms:.4g}..{row.ms_p80 or row.ms:.4g})"


def _said(pair: Pair) -> str:
    if pair.ratio is None:
        return f"{pair.verdict}: {pair.b.note or pair.b.status}" if pair.verdict == "broken" else pair.verdict
    if pair.verdict == "no difference":
        return pair.verdict
    return f"{abs(pair.ratio - 1):.1%} {pair.verdict}"


def _table(pairs: list[Pair]) -> str:
    header = ["row", "A: ms (p20..p80)", "B: ms (p20..p80)", f"speed B/A ({LEVEL:.1%} range)", "verdict"]
    rows = []
    for pair in pairs:
        low, high = pair.ratio_range
        ratio = "" if pair.ratio is None else f"{pair.ratio:.3f} ({low:.3f}..{high:.3f})"
        rows.append([_name(pair.a), _time(pair.a), _time(pair.b), ratio, _said(pair)])
    return text_table(header, rows)
