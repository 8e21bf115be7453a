"""Two runs side by side: which differences are real, and which are noise.

A difference between two rows counts only if it is larger than all that is known to move a median without a change of
code, which is three things:

1. The p20..p80 intervals of the two runs overlap: a sample of one would not look odd in the other.
2. Medians of few samples wander. For about normal samples the standard error of a median is 1.25 sigma / sqrt(n), and
   p20..p80 spans 1.68 sigma, which gives sigma. A difference below three standard errors of the difference is noise;
   three is widened by Student's first correction, since sigma itself comes from few samples. (With many samples the
   first rule is the stricter one, and is meant to be: samples of one process share its memory layout and its clocks,
   so they are fewer than they look.)
3. Two processes differ by more than samples within one. At least `FLOOR` is noise whatever the samples say. Where
   device and versions are equal, the peers are a control: their code did not change, so how their speed moved is what
   the machine does on its own. On each workload the median move of its peers, which were timed in turns with ours, is
   noise and comes on top of what the first two rules allow. Over the whole run so are the median move of all peers and
   three standard deviations (sigma from p20..p80 again, so that a few peers which did change count for nothing). If
   everything is slower, that is the machine. Without peers nothing tells a busy hour from slower code, and the first
   two rules alone call one row in four of a busy machine slower or faster; such a comparison is not `controlled`.

`tests/benchmarks/test_compare.py` holds the rule by simulation.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from dataclasses import dataclass
from typing import Any

from ..runner.results import Row, Run
from .targets import is_ours

FLOOR = 0.02
"""Smallest relative difference of two processes' medians that is ever called real."""

UNSTEADY = 0.2
"""Floor, share of rows, and spread of a row over its median, above which a machine is said to be unsteady."""

STANDARD_ERRORS = 3.0

SPAN = 1.683
"""p20..p80 of a normal distribution, in standard deviations."""

CONTROLS = 5
"""Fewest peers' rows that make a control."""

VERDICTS = ("broken", "slower", "fixed", "faster", "no difference")
"""What a pair can be, worst first. "broken" ran in A and fails in B, "fixed" is the other way round."""

_FAILED = ("failed parity", "out of memory", "error")


@dataclass(frozen=True)
class Pair:
    """One candidate on one workload in both runs.

    Attributes:
        a, b: its rows.
        noise: relative difference that is noise for this pair.
        overlap: whether the p20..p80 intervals overlap.
    """

    a: Row
    b: Row
    noise: float = math.inf
    overlap: bool = True

    @property
    def ratio(self) -> float | None:
        """Speed of B over that of A: above 1 is faster. None unless both were timed."""
        return None if self.a.ms is None or self.b.ms is None else self.a.ms / self.b.ms

    @property
    def ratio_range(self) -> tuple[float, float] | None:
        """`ratio` from A's p20 over B's p80 to A's p80 over B's p20."""
        a, b = _interval(self.a), _interval(self.b)
        return None if a is None or b is None else (a[0] / b[1], a[1] / b[0])

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`."""
        if self.ratio is None:
            if self.a.status == "ok" and self.b.status in _FAILED:
                return "broken"
            return "fixed" if self.b.status == "ok" and self.a.status in _FAILED else "no difference"
        if self.overlap or abs(math.log(self.ratio)) <= math.log1p(self.noise):
            return "no difference"
        return "faster" if self.ratio > 1 else "slower"


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; `str()` is its report.

    Attributes:
        pairs: rows of both runs, in A's order. Rows that were timed in neither are left out, unless one of them failed.
        only_a, only_b: rows that the other run lacks, or where a peer is missing in the other.
        differences: what differs in the two environments, as `(what, in A, in B)`.
        ceilings: B's measured ceilings over A's, by name.
        floor: relative difference that counted as noise for every pair; one whose own peers moved has more.
        controls: how many peers' rows were a control; 0 where there were too few.
        controlled: whether there is a control at all, of the run or of single workloads.
        drift, wobble: median and standard deviation of the logarithms of their ratios; 0 without a control.
        unsteady: share of the rows of A and of B with a p20..p80 wider than `UNSTEADY` of the median.
    """

    pairs: tuple[Pair, ...]
    only_a: tuple[Row, ...]
    only_b: tuple[Row, ...]
    differences: tuple[tuple[str, str, str], ...]
    ceilings: dict[str, float]
    floor: float = FLOOR
    controls: int = 0
    drift: float = 0.0
    wobble: float = 0.0
    unsteady: tuple[float, float] = (0.0, 0.0)
    controlled: bool = False

    def regressions(self, threshold: float = 0.05) -> list[Pair]:
        """What a gate should stop: rows that broke, and rows slower by more than `threshold` and more than noise.

        An unsteady machine makes much noise and so lets much pass; `floor` and `unsteady` tell how much.

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
        least = f"{self.floor:.1%}" if self.floor < 10 else f"a factor of {1 + self.floor:,.0f}"
        lines.append(f"Noise: overlapping p20..p80, or below {least}, or what the workload's own peers moved by.")
        if self.controls:
            lines.append(
                f"The peers are the control: the speed of their {self.controls} rows, whose code is the same in both, "
                f"moved by {math.expm1(self.drift):+.1%} in the median, with a standard deviation of {self.wobble:.1%}."
            )
        else:
            lines.append("There is no control for the whole run: too few peers' rows in both, or other versions.")
        unsteady = [
            f"{share:.0%} of the rows in {name}"
            for name, share in zip("AB", self.unsteady, strict=True)
            if share > UNSTEADY
        ]
        if self.floor > UNSTEADY or unsteady:
            spread = f" ({' and '.join(unsteady)} spread by more than {UNSTEADY:.0%})" if unsteady else ""
            lines.append(f"That is too unsteady to tell much{spread}: repeat on a quiet machine.")
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
    same = all(what == "commit" for what, _, _ in differences)
    moves, controls = [], dict[tuple[Any, ...], list[tuple[float, float]]]()
    for x, y in both:
        if same and not is_ours(x.candidate) and x.ms and y.ms:
            moves.append(math.log(x.ms / y.ms))
            controls.setdefault(x.key[:-1], []).append((moves[-1], _error(x, y)))
    floor, drift, wobble = FLOOR, 0.0, 0.0
    if len(moves) >= CONTROLS:
        fifths = statistics.quantiles(moves, n=5, method="inclusive")
        drift, wobble = statistics.median(moves), (fifths[3] - fifths[0]) / SPAN
        floor = max(FLOOR, math.expm1(abs(drift) + STANDARD_ERRORS * wobble))
    return Comparison(
        tuple(_pair(x, y, floor, controls.get(x.key[:-1], [])) for x, y in both),
        tuple(only_a),
        tuple(only_b),
        differences,
        _ceilings(a, b),
        floor,
        len(moves) if len(moves) >= CONTROLS else 0,
        drift,
        wobble,
        (_unsteady(a), _unsteady(b)),
        bool(controls),
    )


def _pair(a: Row, b: Row, floor: float, controls: list[tuple[float, float]]) -> Pair:
    """Two rows with what is noise between them; `controls` are the moves of their workload's peers and their errors."""
    first, second = _interval(a), _interval(b)
    # one sample each: nothing is known of the spread
    if first is None or second is None or (a.samples or 1) + (b.samples or 1) <= 2:
        return Pair(a, b)
    drift = statistics.median([move for move, _ in controls] or [0.0])
    error = math.hypot(_error(a, b), statistics.median([error for _, error in controls] or [0.0]))
    overlap = first[0] <= second[1] and second[0] <= first[1]
    return Pair(a, b, max(floor, math.expm1(abs(drift) + math.log1p(max(FLOOR, error)))), overlap)


def _error(a: Row, b: Row) -> float:
    """How far the ratio of two medians may be from the truth, relative, by their samples alone."""
    samples = max(3, (a.samples or 1) + (b.samples or 1))
    widened = STANDARD_ERRORS * (1 + (STANDARD_ERRORS**2 + 1) / (4 * (samples - 2)))
    return widened * math.hypot(_standard_error(a), _standard_error(b))


def _spread(row: Row) -> float:
    """p20..p80 over the median."""
    interval = _interval(row)
    return 0.0 if interval is None or not row.ms else (interval[1] - interval[0]) / row.ms


def _standard_error(row: Row) -> float:
    """Of the median, relative to it."""
    return 1.2533 * _spread(row) / SPAN / math.sqrt(row.samples or 1)


def _unsteady(run: Run) -> float:
    spreads = [_spread(row) for row in run.rows if row.ms is not None]
    return sum(spread > UNSTEADY for spread in spreads) / max(1, len(spreads))


def _interval(row: Row) -> tuple[float, float] | None:
    if row.ms is None:
        return None
    return (row.ms if row.ms_p20 is None else row.ms_p20, row.ms if row.ms_p80 is None else row.ms_p80)


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
    interval = _interval(row)
    if interval is None:
        return row.status
    return f"{row.ms:.4g} ({interval[0]:.4g}..{interval[1]:.4g})"


def _said(pair: Pair) -> str:
    if pair.ratio is None:
        return f"{pair.verdict}: {pair.b.note or pair.b.status}" if pair.verdict == "broken" else pair.verdict
    if pair.verdict == "no difference":
        return pair.verdict
    return f"{abs(pair.ratio - 1):.1%} {pair.verdict}"


def _table(pairs: list[Pair]) -> str:
    head = ["row", "A: ms (p20..p80)", "B: ms (p20..p80)", "speed B/A", "verdict"]
    cells = [head]
    for pair in pairs:
        span = pair.ratio_range
        ratio = "" if pair.ratio is None or span is None else f"{pair.ratio:.3f} ({span[0]:.3f}..{span[1]:.3f})"
        cells.append([_name(pair.a), _time(pair.a), _time(pair.b), ratio, _said(pair)])
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)
