"""Small charts as inline SVG: text in, text out, no library.

Colours are CSS variables (`STYLE`), so a chart follows the page's light or dark mode; `standalone` makes a file of one.
Every mark has a `<title>`, every series is labelled where it ends, and nothing is told by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
:root {
  --ink: #1a1d24; --soft: #5a6270; --line: #dfe3ea; --card: #ffffff; --wash: #eef1f6;
  --k0: #2f5bd8; --k1: #c2501a; --k2: #7a3fb5; --k3: #8f6a00; --k4: #b81f74; --k5: #0b7a6f; --k6: #5a6270;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e8eaf0; --soft: #a3abba; --line: #323743; --card: #1b1e26; --wash: #262a35;
    --k0: #86a5ff; --k1: #ff9d6e; --k2: #c79bff; --k3: #e3bb4c; --k4: #ff8cc4; --k5: #55cfc0; --k6: #a3abba;
  }
}
.k0 { color: var(--k0); } .k1 { color: var(--k1); } .k2 { color: var(--k2); } .k3 { color: var(--k3); }
.k4 { color: var(--k4); } .k5 { color: var(--k5); } .k6 { color: var(--k6); }
svg { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
svg text { fill: var(--ink); font-size: 13px; } svg .axis { fill: var(--soft); font-size: 12px; }
svg .name { fill: currentColor; font-size: 12px; } svg .ours { font-weight: 650; }
svg .inside { font-size: 11px; font-weight: 650; fill: var(--card); }
svg .over { paint-order: stroke; stroke: var(--card); stroke-width: 4px; stroke-linejoin: round; }
svg .grid { stroke: var(--line); stroke-width: 1; } svg .edge { stroke: var(--soft); stroke-width: 1; }
svg .hollow { fill: var(--card); stroke: currentColor; stroke-width: 1.8; }
"""
"""What the charts need of a page's style sheet."""

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

_DASHES = ("", "7 4", "2 4", "9 3 2 3", "14 4", "1 3")


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
        group: a gap is left where it changes.
    """

    name: str
    value: float | None
    text: str
    low: float | None = None
    high: float | None = None
    group: str = ""


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


def number(value: float) -> str:
    """A number with three significant digits at least, thousands set apart."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}" if abs(value) >= 1e-4 else f"{value:.2e}"


def _tick(value: float) -> str:
    return f"{value:,.10g}"


def _svg(width: float, height: float, label: str, parts: Iterable[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def standalone(svg: str) -> str:
    """A chart as a file of its own, with its style and ground."""
    head, rest = svg.split(">", 1)
    ground = '<rect width="100%" height="100%" fill="var(--card)"/>'
    return f"{head}><style>{STYLE}</style>{ground}{rest}\n"


def _text(x: float, y: float, text: str, css: str = "", anchor: str = "start", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}"{extra}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, css: str, extra: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"{extra}/>'


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers, as few to a decade as give three at least: powers of ten; 1, 2, 5; or finer."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    found: list[float] = []
    for steps in (
        (1.0,),
        (1.0, 2.0, 5.0),
        (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0),
        tuple(i / 10 for i in range(10, 100)),
    ):
        ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
        found = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
        if len(found) >= 3:
            break
    # the finest steps are many where the range is not narrow after all
    return found[:: math.ceil(len(found) / 8)]


def _apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions as near to the wanted ones as a gap between neighbours allows."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    floor = low
    for i in order:
        placed[i] = max(wanted[i], floor)
        floor = placed[i] + gap
    ceiling = high
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


def _marker(x: float, y: float, css: str, shape: int, title: str) -> str:
    r = 4.2
    outline = (
        f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z",
        f"M{x - r:.1f} {y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}z",
        f"M{x:.1f} {y - r - 1:.1f}l{r + 1:g} {r + 1:g}l{-r - 1:g} {r + 1:g}l{-r - 1:g} {-r - 1:g}z",
        f"M{x:.1f} {y - r - 1:.1f}l{r + 1:g} {2 * r + 0.5:g}h{-2 * r - 2:g}z",
    )[shape % 4]
    return f'<path d="{outline}" class="{css}" fill="currentColor"><title>{escape(title)}</title></path>'


def line_chart(series: Sequence[Series], *, label: str, x_label: str, y_label: str) -> str:
    """Lines over sizes, both axes logarithmic, each line with its p20..p80 band and its name at its end.

    Args:
        series: at least one, each with at least one point of positive values.
        label: what a reader who does not see the chart is told.
        x_label, y_label: names of the axes, with units.
    """
    xs = sorted({x for s in series for x, *_ in s.points})
    values = [value for s in series for _, *ys in s.points for value in ys]
    low, high = min(values) / 1.15, max(values) * 1.15
    names = max(len(s.name) for s in series) * 7.2 + 18
    left, top, width, height = 58.0, 26.0, 590.0 - 58 - names, max(240.0, 16.0 * len(series))
    right, bottom = left + width, top + height

    def at_x(x: float) -> float:
        if len(xs) == 1:
            return left + width / 2
        return left + 14 + (width - 28) * math.log(x / xs[0]) / math.log(xs[-1] / xs[0])

    def at_y(y: float) -> float:
        return bottom - height * math.log(y / low) / math.log(high / low)

    parts = [_text(0, 12, y_label, "axis")]
    for tick in _log_ticks(low, high):
        parts.append(_line(left, at_y(tick), right, at_y(tick), "grid"))
        parts.append(_text(left - 8, at_y(tick) + 4, _tick(tick), "axis", "end"))
    for x in xs:
        parts.append(_line(at_x(x), bottom, at_x(x), bottom + 5, "edge"))
        parts.append(_text(at_x(x), bottom + 19, _tick(x), "axis", "middle"))
    parts.append(_line(left, bottom, right, bottom, "edge"))
    parts.append(_text(left + width / 2, bottom + 38, x_label, "axis", "middle"))
    seen: dict[int, int] = {}
    styles = []
    for s in series:
        colour = family(s.name)
        styles.append((colour, seen.get(colour, 0)))
        seen[colour] = seen.get(colour, 0) + 1
    ends = _apart([at_y(s.points[-1][1]) for s in series], 15, top + 4, bottom + 4)
    # ours last, so that they lie above the others
    for i in sorted(range(len(series)), key=lambda i: -styles[i][0]):
        s, (colour, nth) = series[i], styles[i]
        css, dash = f"k{colour}", _DASHES[nth % len(_DASHES)]
        thick = 2.6 if colour == 0 else 1.7
        if len(s.points) > 1:
            band = [f"{at_x(x):.1f},{at_y(p[1]):.1f}" for x, *p in s.points]
            band += [f"{at_x(x):.1f},{at_y(p[2]):.1f}" for x, *p in reversed(s.points)]
            parts.append(f'<polygon points="{" ".join(band)}" class="{css}" fill="currentColor" opacity="0.14"/>')
            path = " ".join(f"{at_x(x):.1f},{at_y(p[0]):.1f}" for x, *p in s.points)
            parts.append(
                f'<polyline points="{path}" class="{css}" fill="none" stroke="currentColor" stroke-width="{thick}"'
                f"{f' stroke-dasharray={chr(34)}{dash}{chr(34)}' if dash else ''}/>"
            )
        for x, *p in s.points:
            parts.append(_line(at_x(x), at_y(p[1]), at_x(x), at_y(p[2]), css, ' stroke="currentColor"'))
            title = f"{s.name}, {_tick(x)}: {number(p[0])} (p20..p80 {number(p[1])} to {number(p[2])})"
            parts.append(_marker(at_x(x), at_y(p[0]), css, nth, title))
        last_x, last_y = at_x(s.points[-1][0]), at_y(s.points[-1][1])
        # grey and dotted, so that it is not taken for data where a line ends early
        parts.append(_line(last_x + 7, last_y, right + 4, ends[i], "edge", ' stroke-dasharray="1 3"'))
        parts.append(_text(right + 8, ends[i] + 4, s.name, f"{css} name" + (" ours" if colour == 0 else "")))
    return _svg(590, bottom + 46, label, parts)


def bar_chart(bars: Sequence[Bar], *, label: str, x_label: str, limit: tuple[float, str] | None = None) -> str:
    """Horizontal bars with whiskers; a bar without a value shows its text only.

    Args:
        bars: from top to bottom.
        label: what a reader who does not see the chart is told.
        x_label: what the lengths are, with the unit.
        limit: a value to draw a line at, and its name.
    """
    ends = [value for bar in bars for value in (bar.value, bar.high) if value is not None]
    most = max([*ends, *([limit[0]] if limit else [])], default=1.0) or 1.0
    # ours are bold and so wider
    left = max(len(bar.name) * (8.3 if family(bar.name) == 0 else 7.7) for bar in bars) + 16
    texts = max([len(bar.text) for bar in bars if bar.value is not None], default=0) * 7.7 + 16
    total = 760.0
    width = max(140.0, total - left - texts)
    step, y = 25.0, 24.0
    parts = [_text(left, 12, x_label, "axis")]
    group = bars[0].group
    for bar in bars:
        if bar.group != group:
            y, group = y + 9, bar.group
        colour = family(bar.name)
        css = f"k{colour}"
        parts.append(_text(left - 10, y + 14, bar.name, "ours" if colour == 0 else "", "end"))
        if bar.value is None:
            parts.append(_text(left + 8, y + 14, bar.text, "axis"))
            y += step
            continue
        length = max(1.0, width * bar.value / most)
        title = f"<title>{escape(f'{bar.name}: {bar.text}')}</title>"
        parts.append(
            f'<rect x="{left:.1f}" y="{y + 2:.1f}" width="{length:.1f}" height="17" rx="2" class="{css}" '
            f'fill="currentColor" opacity="{0.92 if colour == 0 else 0.62}">{title}</rect>'
        )
        end = length
        if bar.low is not None and bar.high is not None:
            first, last, middle = left + width * bar.low / most, left + width * bar.high / most, y + 10.5
            end = max(end, last - left)
            parts.append(_line(first, middle, last, middle, "", ' stroke="var(--ink)" stroke-width="1.4"'))
            parts += [
                _line(x, middle - 5, x, middle + 5, "", ' stroke="var(--ink)" stroke-width="1.4"')
                for x in (first, last)
            ]
        parts.append(_text(left + end + 8, y + 15, bar.text, "over ours" if colour == 0 else "over"))
        y += step
    if limit:
        x = left + width * limit[0] / most
        # beneath the bars' texts
        parts.insert(0, _line(x, 18, x, y + 2, "edge", ' stroke-dasharray="4 3"'))
        parts.append(_text(x, y + 16, limit[1], "axis", "middle"))
        y += 16
    else:
        parts.append(_line(left, 20, left, y, "edge"))
    return _svg(total, y + 8, label, parts)


def roofline(marks: Sequence[Mark], ceiling: float, bandwidth: float, *, label: str, ours: str, others: str) -> str:
    """Rate over intensity under the measured roof: filled marks are ours, hollow ones the best peer's.

    Args:
        marks: points; `name` decides whose they are.
        ceiling: GEMM rate, TFLOP/s.
        bandwidth: copy bandwidth, GB/s.
        label: what a reader who does not see the chart is told.
        ours, others: what the two kinds of marks are, for the key.
    """
    ridge = ceiling * 1e3 / bandwidth
    works, rates = [m.work for m in marks], [m.rate for m in marks]
    x_low, x_high = min([*works, ridge]) / 2, max([*works, ridge]) * 2.5
    y_low, y_high = min([*rates, x_low * bandwidth / 1e3]) / 1.3, max([*rates, ceiling]) * 1.6
    left, top, right, bottom = 62.0, 44.0, 742.0, 380.0

    def at_x(x: float) -> float:
        return left + (right - left) * math.log(x / x_low) / math.log(x_high / x_low)

    def at_y(y: float) -> float:
        return bottom - (bottom - top) * math.log(y / y_low) / math.log(y_high / y_low)

    parts = [_text(0, 12, "TFLOP/s", "axis")]
    for tick in _log_ticks(y_low, y_high):
        parts.append(_line(left, at_y(tick), right, at_y(tick), "grid"))
        parts.append(_text(left - 8, at_y(tick) + 4, _tick(tick), "axis", "end"))
    for tick in _log_ticks(x_low, x_high):
        parts.append(_line(at_x(tick), bottom, at_x(tick), bottom + 5, "edge"))
        parts.append(_text(at_x(tick), bottom + 19, _tick(tick), "axis", "middle"))
    parts.append(_line(left, bottom, right, bottom, "edge"))
    parts.append(_text((left + right) / 2, bottom + 38, "arithmetic intensity, FLOP per byte", "axis", "middle"))
    corners = ((at_x(x_low), at_y(x_low * bandwidth / 1e3)), (at_x(ridge), at_y(ceiling)), (right, at_y(ceiling)))
    roof = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    parts.append(f'<polyline points="{roof}" fill="none" stroke="var(--soft)" stroke-width="2"/>')
    parts.append(_text(right, at_y(ceiling) - 8, f"GEMM {number(ceiling)} TFLOP/s", "axis", "end"))
    # the slope's name goes above the slope, where no mark can be
    middle = math.sqrt(x_low * ridge)
    slope = math.degrees(
        math.atan2(
            at_y(x_low * bandwidth / 1e3) - at_y(ceiling),
            at_x(ridge) - at_x(x_low),
        )
    )
    x, y = at_x(middle), at_y(middle * bandwidth / 1e3) - 9
    parts.append(
        _text(
            x,
            y,
            f"copy {number(bandwidth)} GB/s",
            "axis",
            "middle",
            f' transform="rotate({-slope:.1f} {x:.1f} {y:.1f})"',
        )
    )
    parts.append(f'<circle cx="{left + 8}" cy="26" r="7.5" class="k0" fill="currentColor"/>')
    parts.append(_text(left + 21, 30, ours, "axis"))
    offset = left + 21 + len(ours) * 6.4 + 24
    parts.append(f'<circle cx="{offset:.1f}" cy="26" r="7.5" class="k1 hollow"/>')
    parts.append(_text(offset + 13, 30, others, "axis"))
    for mark in sorted(marks, key=lambda m: family(m.name) == 0):
        mine = family(mark.name) == 0
        x, y = at_x(mark.work), at_y(mark.rate)
        css = 'class="k0" fill="currentColor"' if mine else 'class="k1 hollow"'
        parts.append(f'<g><title>{escape(mark.text)}</title><circle cx="{x:.1f}" cy="{y:.1f}" r="8.5" {css}/>')
        parts.append(_text(x, y + 4, mark.letter, "inside" if mine else "axis ours", "middle") + "</g>")
    return _svg(760, bottom + 46, label, parts)
