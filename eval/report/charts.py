"""Charts as SVG text: curves, bars and a matrix, in the colours of the surrounding page.

Text and grid use the page's text colour, so a chart suits light and dark screens and paper. Charts are 420 units wide:
one fills a phone's screen, and two or three fit side by side on a desktop's. docs/design.md explains why matplotlib is
not used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

WIDTH = 420
"""Width of a chart. This and the other lengths are in units of the SVG, which a page scales."""
SERIES_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#7f7f7f")
"""Colours that colour-blind readers can tell apart on white and on black. Further series repeat them, dashed."""
GOOD, BAD = "#0072b2", "#d55e00"
MAX_POINTS = 300
"""Largest number of points that are drawn of a curve. Longer curves are averaged over groups of neighbours."""
SMALL_SIDE = 150
"""Side length of a small chart's square, in units."""
MAX_DOTTED_POINTS = 15
"""Curves with at most this many points mark each point with a dot."""
ROW_HEIGHT = 18
"""Height of a bar with its gap, and of a line of the legend; room for a line of FONT_SIZE."""
FONT_SIZE = 11
"""Size of all texts except titles, small enough for the names of classes beside bars."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 30, 34
"""Margins of a plot for the labels of the axes and the title."""
_PLOT_HEIGHT = 190
"""Height of a plot without its margins."""
_LETTER_WIDTH = 6.1
"""Mean width of a letter of FONT_SIZE, an estimate, because the font is known only to the reader's browser."""


Limits = tuple[tuple[float, float], tuple[float, float]]
"""(lowest, highest) of x and of y."""


@dataclass(frozen=True)
class Series:
    """One curve. A point with a non-finite y leaves a gap."""

    name: str
    points: Sequence[tuple[float, float]]
    """Points (x, y) in ascending x."""


@dataclass(frozen=True)
class Bar:
    """One row of a bar chart."""

    name: str
    value: float
    text: str
    """Text at the end of the row."""
    color: str = GOOD


@dataclass(frozen=True)
class _Axes:
    """Axes of a line chart: their ticks, and the conversion of points to positions."""

    xs: Sequence[float]
    ys: Sequence[float]

    def locate(self, x: float, y: float) -> tuple[float, float]:
        """Return the position of a point in the picture."""
        x_share = (x - self.xs[0]) / (self.xs[-1] - self.xs[0])
        y_share = (y - self.ys[0]) / (self.ys[-1] - self.ys[0])
        return _LEFT + x_share * (WIDTH - _LEFT - _RIGHT), _TOP + (1 - y_share) * _PLOT_HEIGHT

    def lines(self, x_label: str) -> list[str]:
        """Return grid lines, tick labels and the label of the x axis."""
        parts = []
        for tick in self.ys:
            y = self.locate(self.xs[0], tick)[1]
            parts.append(_line(_LEFT, y, WIDTH - _RIGHT, y))
            parts.append(_text(_LEFT - 5, y + 4, tick_label(tick, self.ys), anchor="end"))
        bottom = _TOP + _PLOT_HEIGHT
        for tick in self.xs:
            x = self.locate(tick, self.ys[0])[0]
            parts.append(_text(x, bottom + 14, tick_label(tick, self.xs), anchor="middle"))
        return [*parts, _text(WIDTH - _RIGHT, bottom + 28, x_label, anchor="end", faint=True)]

    def curve(self, line: Series, position: int) -> list[str]:
        """Return the line of a series, interrupted at gaps. `position` selects the colour."""
        parts = []
        for piece in _finite_runs(downsample(line.points)):
            located = [self.locate(x, y) for x, y in piece]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in located)
            name = f"<title>{escape(line.name)}</title>"
            parts.append(f'<polyline points="{path}" {_stroke(position)}>{name}</polyline>')
            if len(located) <= MAX_DOTTED_POINTS:
                color = series_color(position)
                parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in located]
        return parts


def line_chart(title: str, series: Sequence[Series], x_label: str, limits: Limits | None = None) -> str:
    """Return a chart of curves over a common x axis, with a legend.

    A series without points is not drawn, but keeps its colour for other charts. `limits` fixes the range of both axes,
    which otherwise covers the points.
    """
    points = [p for line in series for p in line.points if math.isfinite(p[1])]
    heading = _text(0, 14, title, weight="bold")
    if not points:
        return _svg(80, title, [heading, _text(_LEFT, 60, "no values")])
    x_values, y_values = zip(*points, strict=True)
    x_limits, y_limits = limits or ((min(x_values), max(x_values)), (min(y_values), max(y_values)))
    axes = _Axes(ticks(*x_limits), ticks(*y_limits))
    parts = [heading, *axes.lines(x_label)]
    bottom = _TOP + _PLOT_HEIGHT + _BOTTOM
    for position, line in enumerate(series):
        if line.points:
            parts += axes.curve(line, position)
            parts.append(f'<path d="M{_LEFT} {bottom + 8}h22" {_stroke(position)}/>')
            parts.append(_text(_LEFT + 28, bottom + 12, shorten(line.name, 52)))
            bottom += ROW_HEIGHT
    return _svg(bottom, title, parts)


def small_chart(title: str, note: str, series: Sequence[Series]) -> str:
    """Return a small square chart without legend, for points from 0 to 100; `note` is in the top right corner."""
    side, top = SMALL_SIDE, 20
    parts = [_text(0, 12, shorten(title, 16), size=10), _text(side, 12, note, anchor="end", size=10, faint=True)]
    for tick in (0, 50, 100):
        offset = tick / 100 * side
        parts += [_line(0, top + offset, side, top + offset), _line(offset, top, offset, top + side)]
    for position, line in enumerate(series):
        path = " ".join(f"{x / 100 * side:.1f},{top + (1 - y / 100) * side:.1f}" for x, y in line.points)
        parts.append(f'<polyline points="{path}" {_stroke(position)}><title>{escape(line.name)}</title></polyline>')
    return _svg(top + side + 4, title, parts, width=side)


def bar_chart(title: str, bars: Sequence[Bar], *, limits: tuple[float, float] | None = None) -> str:
    """Return a chart of horizontal bars from zero; negative bars extend to the left. `limits` fixes the scale."""
    label_width = min(150.0, max((len(bar.name) for bar in bars), default=0) * _LETTER_WIDTH + 8)
    value_width = max((len(bar.text) for bar in bars), default=0) * _LETTER_WIDTH + 8
    low, high = limits or (min(0.0, *(b.value for b in bars)), max(0.0, *(b.value for b in bars)))
    span = (high - low) or 1.0
    available = WIDTH - label_width - value_width
    zero = label_width + available * -low / span
    parts = [_text(0, 14, title, weight="bold")]
    for position, bar in enumerate(bars):
        top = 24 + ROW_HEIGHT * position
        length = available * abs(bar.value) / span
        left = zero if bar.value >= 0 else zero - length
        parts.append(
            _text(label_width - 6, top + 13, shorten(bar.name, round(label_width / _LETTER_WIDTH)), anchor="end")
        )
        parts.append(
            f'<rect x="{left:.1f}" y="{top + 3}" width="{max(length, 0.5):.1f}" height="{ROW_HEIGHT - 6}" rx="2" '
            f'fill="{bar.color}"><title>{escape(bar.name)}: {escape(bar.text)}</title></rect>'
        )
        parts.append(_text(WIDTH, top + 13, bar.text, anchor="end"))
    bottom = 24 + ROW_HEIGHT * len(bars)
    parts.append(f'<path d="M{zero:.1f} 22V{bottom}" stroke="currentColor" stroke-opacity="0.5"/>')
    return _svg(bottom + 4, title, parts)


def matrix_chart(
    title: str, names: Sequence[str], shares: Sequence[Sequence[float]], texts: Sequence[Sequence[str]]
) -> str:
    """Return a square matrix of shares, 0 to 1, as tinted cells. Rows and columns share `names`; `texts` are tooltips.

    Cells that are wide enough show the share in per cent.
    """
    label_width = min(110.0, max(map(len, names)) * _LETTER_WIDTH + 8)
    cell = (WIDTH - label_width) / len(names)
    top = 24 + label_width
    size = min(11.0, max(5.0, cell * 0.62))
    parts = [_text(0, 14, title, weight="bold")]
    for position, name in enumerate(names):
        middle = (position + 0.5) * cell + size / 3
        shown = shorten(name, round(label_width / _LETTER_WIDTH))
        parts.append(_text(label_width - 5, top + middle, shown, anchor="end", size=size))
        x = label_width + middle
        parts.append(_text(x, top - 5, shown, size=size, transform=f"rotate(-90 {x:.1f} {top - 5:.1f})"))
    for row, columns in enumerate(zip(shares, texts, strict=True)):
        for column, (share, text) in enumerate(zip(*columns, strict=True)):
            if share > 0:
                color = GOOD if row == column else BAD
                parts += _matrix_cell(label_width + column * cell, top + row * cell, cell, share, color, text)
    frame = 'fill="none" stroke="currentColor" stroke-opacity="0.4"'
    side = f"{cell * len(names):.1f}"
    parts.append(f'<rect x="{label_width:.1f}" y="{top:.1f}" width="{side}" height="{side}" {frame}/>')
    return _svg(top + cell * len(names) + 4, title, parts)


def stack_charts(charts: Sequence[str]) -> str:
    """Return several charts, stacked vertically, as one SVG picture on a white background."""
    parts, top = [], 10.0
    for chart in charts:
        box = re.search(r'viewBox="0 0 \d+ (\d+)"', chart)
        assert box is not None
        height = float(box[1])
        parts.append(chart.replace("<svg ", f'<svg x="10" y="{top:.0f}" width="{WIDTH}" height="{height:.0f}" ', 1))
        top += height + 14
    size = f'viewBox="0 0 {WIDTH + 20} {top:.0f}" width="{1.5 * (WIDTH + 20):.0f}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} color="#222">'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def series_color(position: int) -> str:
    """Return the colour of the series at `position`."""
    return SERIES_COLORS[position % len(SERIES_COLORS)]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers, at least two, in ascending order, that enclose [low, high]."""
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - max(0.5, abs(low) * 0.05), high + max(0.5, abs(high) * 0.05)
    rough = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def tick_label(value: float, tick_values: Sequence[float]) -> str:
    """Return the text of a tick, with as many decimals as the spacing of `tick_values` needs.

    Thousands are written as k if a tick is 10 000 or more and the spacing is at least 100.
    """
    step = tick_values[1] - tick_values[0]
    if max(map(abs, tick_values)) >= 10_000 and step >= 100:
        return f"{value / 1000:g}k"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if step * 10**decimals % 1 > 1e-6:  # a spacing of 2.5 needs one more decimal than one of 2
        decimals += 1
    return f"{value:.{decimals}f}"


def downsample(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """Reduce a curve to at most MAX_POINTS points, each the mean of a group of neighbours."""
    if len(points) <= MAX_POINTS:
        return points
    per_piece = math.ceil(len(points) / MAX_POINTS)
    pieces = [points[i : i + per_piece] for i in range(0, len(points), per_piece)]
    return [(sum(x for x, _ in piece) / len(piece), sum(y for _, y in piece) / len(piece)) for piece in pieces]


def shorten(text: str, letters: int) -> str:
    """Shorten a text to `letters` characters by cutting out the middle, because names differ at their start or end."""
    if len(text) <= letters:
        return text
    kept = max(1, letters - 2)
    return text[: math.ceil(kept / 2)] + ".." + text[len(text) - kept // 2 :]


def _finite_runs(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """Return the runs of neighbouring points with finite y."""
    return [list(piece) for finite, piece in groupby(points, lambda point: math.isfinite(point[1])) if finite]


def _stroke(position: int) -> str:
    dash = ' stroke-dasharray="6 3"' if position >= len(SERIES_COLORS) else ""
    return f'stroke="{series_color(position)}" stroke-width="2" fill="none"{dash}'


def _matrix_cell(x: float, y: float, side: float, share: float, color: str, text: str) -> list[str]:
    box = f'<rect x="{x:.1f}" y="{y:.1f}" width="{side:.1f}" height="{side:.1f}" fill="{color}"'
    opacity = 0.08 + 0.92 * min(1.0, share)
    parts = [f'{box} fill-opacity="{opacity:.2f}"><title>{escape(text)}</title></rect>']
    if side >= 17 and share >= 0.005:
        fill = "#fff" if share > 0.5 else "currentColor"
        size = min(10.0, side * 0.45)
        parts.append(
            _text(x + side / 2, y + side / 2 + 3.5, f"{100 * share:.0f}", anchor="middle", size=size, fill=fill)
        )
    return parts


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="currentColor" stroke-opacity="0.15"/>'


def _text(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    weight: str = "normal",
    size: float = FONT_SIZE,
    faint: bool = False,
    transform: str = "",
    fill: str = "currentColor",
) -> str:
    style = f' text-anchor="{anchor}"' if anchor != "start" else ""
    style += f' font-weight="{weight}"' if weight != "normal" else ""
    style += f' font-size="{size:g}"' if size != FONT_SIZE else ""
    style += ' fill-opacity="0.65"' if faint else ""
    style += f' transform="{transform}"' if transform else ""
    style += f' fill="{fill}"' if fill != "currentColor" else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{style}>{escape(text)}</text>'


def _svg(height: float, title: str, parts: Sequence[str], width: int = WIDTH) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" role="img" '
    head += (
        f'aria-label="{escape(title)}" font-family="system-ui, sans-serif" font-size="{FONT_SIZE}" fill="currentColor">'
    )
    return head + "".join(parts) + "</svg>"
