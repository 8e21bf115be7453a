"""Charts of matplotlib as SVG text: narrow enough to be read on a phone, in the page's light or dark colours.

A chart is drawn in the light palette, whose colours are replaced by the style sheet's variables: inline it follows the
page, and as a file it brings its own style sheet. Text stays text, marks have a `<title>`, and nothing is told by
colour alone.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

try:
    import matplotlib
    from matplotlib import ticker
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError(f'charts need matplotlib: pip install "vitfast[bench]" ({error})') from error

from .rows import number

LIGHT = {
    **{"ink": "#1a1d24", "soft": "#5a6271", "line": "#dfe3ea", "card": "#fffffe", "wash": "#eef1f6"},
    **{"k0": "#2f5bd8", "k1": "#c2501a", "k2": "#7a3fb5", "k3": "#8f6a00", "k4": "#b81f74", "k5": "#0b7a6f"},
    "k6": "#5a6270",
}
DARK = {
    **{"ink": "#e8eaf0", "soft": "#a3abba", "line": "#323743", "card": "#1b1e26", "wash": "#262a35"},
    **{"k0": "#86a5ff", "k1": "#ff9d6e", "k2": "#c79bff", "k3": "#e3bb4c", "k4": "#ff8cc4", "k5": "#55cfc0"},
    "k6": "#a3abba",
}
"""Colours by name; no two of the light ones are equal, since an SVG's are found again by their value."""


def _variables(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {value};" for name, value in colours.items())


STYLE = f"""
:root {{ {_variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}
"""
"""What a chart needs of a page's style sheet."""

FAMILIES = (
    ("vitfast",),
    ("torch",),
    ("timm", "SDPA"),
    ("Transformers", "flash-attn"),
    ("torchvision", "xformers"),
    ("ONNX", "OpenVINO", "addmm", "_addmm_activation"),
)
"""First words of candidates' names, by colour; the last colour is for everyone else. No two that meet in one workload
share a colour and a dash."""

DASHES: tuple[Any, ...] = ("-", (0, (5, 3)), (0, (1.5, 2)), (0, (7, 2, 2, 2)), (0, (10, 3)), (0, (1, 3)))
MARKERS = "osD^"

WIDTH = 4.0
"""Of every chart in inches of 100 pixels."""

_RC = {
    **{"svg.fonttype": "none", "svg.hashsalt": "vitfast", "font.size": 8.6, "axes.linewidth": 0.7},
    **{"text.color": LIGHT["ink"], "axes.labelcolor": LIGHT["soft"], "axes.edgecolor": LIGHT["soft"]},
    **{"xtick.color": LIGHT["soft"], "ytick.color": LIGHT["soft"], "grid.color": LIGHT["line"]},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": "none", "figure.facecolor": "none"},
    **{"axes.formatter.min_exponent": 6, "legend.frameon": False, "lines.solid_capstyle": "round"},
}


@dataclass(frozen=True)
class Series:
    """A line of a chart: `(x, y, low y, high y)` points in the order of x."""

    name: str
    points: Sequence[tuple[float, float, float, float]]


@dataclass(frozen=True)
class Bar:
    """A bar of a chart.

    Attributes:
        name: written before it.
        value: its length; None for a row that has only a text.
        text: written behind it.
        low, high: whisker; None for none.
    """

    name: str
    value: float | None
    text: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Mark:
    """A point of a roofline: `work` is FLOP per byte, `rate` TFLOP/s."""

    name: str
    letter: str
    work: float
    rate: float
    text: str


def family(name: str) -> int:
    """Index of a candidate's colour."""
    first = name.split(" ")[0]
    return next((i for i, words in enumerate(FAMILIES) if first in words), len(FAMILIES))


def standalone(svg: str) -> str:
    """A chart as a file of its own, with its style and ground."""
    head, rest = svg.split(">", 1)
    height = re.search(r'viewBox="0 0 \S+ (\S+)"', head)
    assert height is not None
    size = f' width="{200 * WIDTH:g}" height="{200 * float(height[1]) / 72:g}"'
    return f'{head}{size}><style>{STYLE}</style><rect width="100%" height="100%" fill="var(--card)"/>{rest}\n'


def _axes(height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Figure, label: str) -> str:
    """The chart in variables for colours, without ids that another chart on the page may have too."""
    text = io.StringIO()
    FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<g id="title:([^"]*)"', r"<g><title>\1</title", svg)
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r' (?:d|transform)="[^"]*"', _rounded, svg)
    for name, value in LIGHT.items():
        svg = svg.replace(value, f"var(--{name})")
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    head = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box[0]}'
    return f'{head} role="img" aria-label="{escape(label)}">{svg[svg.index(">") + 1 :].strip()}'


def _rounded(attribute: re.Match[str]) -> str:
    """A hundredth of a point is enough."""
    return " " + " ".join(re.sub(r"(\.\d\d)\d+", r"\1", attribute[0]).split())


def _grid(axis: Any) -> None:
    low, high = axis.get_view_interval()
    axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0) if high < 300 * low else (1.0,), numticks=8))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_locator(ticker.NullLocator())


def line_chart(series: Sequence[Series], *, label: str, x_label: str, y_label: str) -> str:
    """Lines over sizes, both axes logarithmic, each line with its p20..p80 band, the highest first in the key.

    Args:
        series: at least one, each with at least one point of positive values.
        label: what a reader who does not see the chart is told.
        x_label, y_label: names of the axes, with units.
    """
    with matplotlib.rc_context(_RC):
        figure, axes = _axes(2.5 + 0.14 * ((len(series) + 1) // 2))
        axes.set(xscale="log", yscale="log")
        seen: dict[int, int] = {}
        for line in sorted(series, key=lambda line: -line.points[-1][1]):
            colour = family(line.name)
            nth = seen[colour] = seen.get(colour, -1) + 1
            marker = MARKERS[nth % len(MARKERS)]
            x, y, low, high = (list(column) for column in zip(*line.points, strict=True))
            # ours last, so that they lie above the others
            style = {"color": LIGHT[f"k{colour}"], "zorder": 4 - 0.1 * colour}
            axes.fill_between(x, low, high, alpha=0.14, linewidth=0, **style)
            dash, width = DASHES[nth % len(DASHES)], 1.8 if colour == 0 else 1.1
            axes.plot(x, y, label=line.name, linestyle=dash, linewidth=width, marker=marker, markersize=3.5, **style)
            for point in line.points:
                value, *ends = (number(y) for y in point[1:])
                title = f"title:{line.name}, {point[0]:,.10g}: {value} (p20..p80 {' to '.join(ends)})"
                axes.plot(*point[:2], marker, markersize=3.5, gid=title, **style)
        _grid(axes.yaxis)
        sizes = sorted({point[0] for line in series for point in line.points})
        axes.set_xticks(sizes, [f"{size:,.10g}" for size in sizes])
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.set_xlabel(x_label)
        axes.set_title(y_label, loc="left", fontsize=8.6, color=LIGHT["soft"])
        figure.legend(loc="outside lower center", ncols=2, fontsize=7.8, handlelength=2.6)
        return _svg(figure, label)


def bar_chart(bars: Sequence[Bar], *, label: str, x_label: str, limit: tuple[float, str] | None = None) -> str:
    """Horizontal bars with whiskers, ours set apart; a bar without a value shows its text only.

    Args:
        bars: from top to bottom.
        label: what a reader who does not see the chart is told.
        x_label: what the lengths are, with the unit.
        limit: a value to draw a line at, and its name.
    """
    with matplotlib.rc_context(_RC):
        ours = [family(bar.name) == 0 for bar in bars]
        places = [0.0]
        for before, mine in itertools.pairwise(ours):
            places.append(places[-1] + (1.0 if mine == before else 1.5))
        rows = places[-1] + (2.2 if limit else 1.2)
        height = 0.25 + 0.19 * rows
        # a letter takes about 0.068 inches, a bold one 0.077
        letter = [0.077 if mine else 0.068 for mine in ours]
        left = 0.1 + max(len(bar.name) * width for bar, width in zip(bars, letter, strict=True))
        timed = [(bar, width) for bar, width in zip(bars, letter, strict=True) if bar.value is not None]
        behind = 0.1 + max((len(bar.text) * width for bar, width in timed), default=0.0)
        figure = Figure(figsize=(WIDTH, height))
        axes = figure.add_axes((left / WIDTH, 0.0, 1 - left / WIDTH, 1 - 0.25 / height))
        ends = [value for bar in bars for value in (bar.value, bar.high) if value]
        inch = max([*ends, limit[0] if limit else 0.0], default=0.0) / max(0.5, WIDTH - left - behind) or 1.0
        axes.set(xlim=(0, inch * (WIDTH - left)), ylim=(rows - 0.6, -0.6), xticks=[], yticks=[])
        axes.spines["bottom"].set_visible(False)
        for place, bar, mine in zip(places, bars, ours, strict=True):
            style: dict[str, Any] = {"va": "center", "fontsize": 8.2, "weight": "bold" if mine else "normal"}
            axes.text(-0.05 * inch, place, bar.name, ha="right", **style)
            if bar.value is not None:
                colour, alpha = LIGHT[f"k{family(bar.name)}"], 0.92 if mine else 0.62
                axes.barh(place, bar.value, 0.7, color=colour, alpha=alpha, gid=f"title:{bar.name}: {bar.text}")
                if bar.low is not None and bar.high is not None:
                    axes.plot([bar.low, bar.high], [place] * 2, "-|", color=LIGHT["ink"], linewidth=0.9, markersize=4)
            end = max(bar.value or 0.0, bar.high or 0.0) + 0.06 * inch
            axes.text(end, place, bar.text, color=LIGHT["soft" if bar.value is None else "ink"], **style)
        axes.set_title(x_label, loc="left", fontsize=8.6, color=LIGHT["soft"])
        if limit:
            line: dict[str, Any] = {"color": LIGHT["soft"], "linewidth": 0.8, "dashes": (4, 3), "zorder": 0}
            axes.plot([limit[0]] * 2, [-0.6, places[-1] + 0.6], **line)
            axes.text(limit[0], places[-1] + 1.1, limit[1], ha="center", va="center", fontsize=8.2, color=LIGHT["soft"])
        return _svg(figure, label)


def roofline(marks: Sequence[Mark], ceiling: float, bandwidth: float, *, label: str, ours: str, others: str) -> str:
    """Rate over intensity under the measured roof: filled marks are ours, hollow ones the best peer's.

    Args:
        marks: points; `name` decides whose they are.
        ceiling: GEMM rate, TFLOP/s.
        bandwidth: copy bandwidth, GB/s.
        label: what a reader who does not see the chart is told.
        ours, others: what the two kinds of marks are, for the key.
    """
    with matplotlib.rc_context(_RC):
        figure, axes = _axes(3.2)
        ridge = ceiling * 1e3 / bandwidth
        axes.set(xscale="log", yscale="log")
        works = [ridge, *(mark.work for mark in marks)]
        low, high = axes.set_xlim(min(works) / 2, max(works) * 2.5)
        roof = [low * bandwidth / 1e3, ceiling, ceiling]
        axes.plot([low, ridge, high], roof, color=LIGHT["soft"], linewidth=1.3)
        rates = [*roof, *(mark.rate for mark in marks)]
        bottom, top = axes.set_ylim(min(rates) / 1.3, max(rates) * 1.6)
        texts = {"color": LIGHT["soft"], "fontsize": 8.2}
        text = f"GEMM {number(ceiling)} TFLOP/s"
        axes.annotate(text, (high, ceiling), (0, 4), textcoords="offset points", ha="right", **texts)
        # above the slope, where no mark can be
        x, y = low * (high / low) ** 0.02, roof[0] * (top / bottom) ** 0.08
        slope = {"rotation": math.degrees(math.atan(y / x)), "transform_rotates_text": True, "rotation_mode": "anchor"}
        axes.text(x, y, f"copy {number(bandwidth)} GB/s", **slope, **texts)
        for mark in sorted(marks, key=lambda mark: family(mark.name) == 0):
            mine = family(mark.name) == 0
            inside, edge = LIGHT["k0" if mine else "card"], LIGHT["k0" if mine else "k1"]
            face = {"markerfacecolor": inside, "markeredgecolor": edge}
            axes.plot(mark.work, mark.rate, "o", markersize=9, gid=f"title:{mark.text}", **face)
            letter = LIGHT["card" if mine else "k1"]
            axes.text(mark.work, mark.rate, mark.letter, ha="center", va="center_baseline", fontsize=7.4, color=letter)
        for name, inside, edge in ((ours, "k0", "k0"), (others, "card", "k1")):
            face = {"markerfacecolor": LIGHT[inside], "markeredgecolor": LIGHT[edge]}
            axes.plot([], [], "o", markersize=6, label=name, **face)
        for axis in (axes.xaxis, axes.yaxis):
            _grid(axis)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.set_xlabel("arithmetic intensity, FLOP per byte")
        axes.set_title("TFLOP/s", loc="left", fontsize=8.6, color=LIGHT["soft"])
        figure.legend(loc="outside lower center", ncols=2, fontsize=8.2)
        return _svg(figure, label)
