"""Draw the report's charts as inline SVG: no script, colours from the style sheet, a hover title on every mark."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import numpy as np
from markupsafe import Markup

WIDTH, HEIGHT = 440, 256
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 30, 40
MAX_POINTS = 240
MAX_HOVERS = 60
SMALLEST = 1e-300  # of what an axis of powers of ten can hold: half of the smallest number is zero

Point = tuple[float, float]
Interval = tuple[float, float, float]


@dataclass(frozen=True)
class Axis:
    """A scale: data range [low, high], its label, and whether it is logarithmic (base 10)."""

    low: float
    high: float
    label: str
    log: bool = False

    def share(self, value: float) -> float:
        """Return where a value lies between low (0) and high (1), clipped to that range."""
        low, high, at = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return min(1.0, max(0.0, (at - low) / (high - low)))

    def ticks(self) -> list[float]:
        """Return three to seven round values inside the range."""
        return log_ticks(self.low, self.high) if self.log else nice_ticks(self.low, self.high)

    def labelled_ticks(self) -> list[tuple[float, str]]:
        """Return the ticks with their texts."""
        ticks = self.ticks()
        return list(zip(ticks, tick_texts(ticks, log=self.log), strict=True))


@dataclass(frozen=True)
class Series:
    """A line of a chart: points in data units, the style class, and the band of lowest and highest values around it."""

    name: str
    points: list[Point]
    style: str = "main"
    band: list[tuple[float, float, float]] = field(default_factory=list)


def nice_ticks(low: float, high: float, target: int = 5) -> list[float]:
    """Return about `target` multiples of 1, 2, 2.5 or 5 times a power of ten inside [low, high]."""
    raw = (high - low) / target
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten inside the range, with 2 and 5 times them where those alone are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [f * 10.0**p for p in powers for f in factors if low * 0.999 <= f * 10.0**p <= high * 1.001]
        if len(found) >= 3:
            break
    return found or [low, high]


def tick_texts(ticks: Sequence[float], *, log: bool = False) -> list[str]:
    """Return the texts of an axis, all with the same decimals ("0.25", "0.50"), or all scientific where tiny."""
    if max(abs(t) for t in ticks) < 0.01:
        return [_scientific(t) for t in ticks]
    if log:
        return [f"{t:,.6g}" for t in ticks]
    digits = next((d for d in range(6) if all(abs(round(t, d) - t) < 1e-9 for t in ticks)), 6)
    return [f"{t:,.{digits}f}" for t in ticks]


def _scientific(value: float) -> str:
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def span(values: Sequence[float], label: str, *, log: bool = False) -> Axis:
    """Return an axis that holds all values with a little air around them."""
    low, high = min(values), max(values)
    if log and low > SMALLEST:
        low, high = (low / 1.1, high * 1.1) if low < high else (low / 2, high * 2)
        return Axis(low, high, label, log=True)
    air = 0.06 * (high - low) or max(abs(high) * 0.1, 1e-6)
    return Axis(0.0 if 0 <= low < 0.35 * high else low - air, high + air, label)


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> tuple[list[Point], list[tuple[float, float, float]], int]:
    """Return at most `limit` points (means of equal runs of points), their band (x, low, high) and the run's length."""
    stride = math.ceil(len(points) / limit)
    if stride <= 1:
        return list(points), [], 1
    parts = [np.asarray(points[i : i + stride]) for i in range(0, len(points), stride)]
    means = [(float(p[:, 0].mean()), float(p[:, 1].mean())) for p in parts]
    band = [(float(p[:, 0].mean()), float(p[:, 1].min()), float(p[:, 1].max())) for p in parts]
    return means, band, stride


def line_chart(
    title: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    marks: Sequence[tuple[float, str]] = (),
    best: tuple[float, float, str] | None = None,
) -> Markup:
    """Draw lines over shared axes; `marks` are dotted vertical lines with a hover title, `best` is a ringed point."""
    place = _placer(x, y)
    parts = [_frame(x, y)]
    for at, text in marks:
        px, _ = place(at, y.low)
        parts.append(f'<line class="mark" x1="{px}" x2="{px}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">{_title(text)}</line>')
    for one in series:
        parts += [_band(one, place), _line(one, place)]
    parts += [_hovers(one, place, x, y) for one in series]
    if best is not None:
        parts.append(_best(best, place))
    return _svg(title, parts)


def histogram(title: str, values: Sequence[float], label: str, unit: str, *, num_bins: int = 20) -> Markup:
    """Draw the counts of values in [0, 1] in equal bins, with a line at the median."""
    counts, edges = np.histogram(np.clip(values, 0, 1), bins=num_bins, range=(0, 1))
    x, y = Axis(0, 1, label), Axis(0, max(1.0, float(counts.max()) * 1.04), unit)
    place = _placer(x, y)
    parts = [_frame(x, y)]
    for number, low, high in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        (x0, y0), (x1, base) = place(low, number), place(high, 0)
        bar = f'x="{_n(x0 + 0.8)}" y="{y0}" width="{_n(x1 - x0 - 1.6)}" height="{_n(base - y0)}" rx="1.5"'
        parts.append(f'<rect class="bar" {bar}>{_title(f"{low:.2f} to {high:.2f}: {number:,} {unit}")}</rect>')
    middle = float(np.median(values))
    px, _ = place(middle, 0)
    # Near the right end the label is aligned to its end, or it would leave the chart.
    anchor, shift = ("end", 5) if middle > 0.8 else ("middle", 0)
    parts.append(f'<line class="median" x1="{px}" x2="{px}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    parts.append(
        f'<text class="note" x="{_n(px + shift)}" y="{TOP - 4}" text-anchor="{anchor}">median {middle:.3f}</text>'
    )
    return _svg(title, parts)


def scatter(
    title: str, points: Sequence[tuple[float, float, str]], x: Axis, y: Axis, *, styles: Sequence[str] = ()
) -> Markup:
    """Draw one translucent dot a point, with its own hover title and, if `styles` has one for each, its own style."""
    place = _placer(x, y)
    parts = [_frame(x, y)]
    for (px, py, text), style in zip(points, styles or [""] * len(points), strict=True):
        cx, cy = place(px, py)
        name = f"dot {style}".rstrip()
        parts.append(f'<circle class="{name}" cx="{cx}" cy="{cy}" r="3">{_title(text)}</circle>')
    return _svg(title, parts)


def intervals(title: str, rows: Sequence[tuple[str, float, float, float]], label: str) -> Markup:
    """Draw a value and its interval for each row (name, low, mean, high), names on the left."""
    x = span([v for _, low, mean, high in rows for v in (low, mean, high)], label)
    height, left, right = 30 * len(rows) + 44, 190, 30
    reach = 640 - left - right
    parts = []
    for tick, text in x.labelled_ticks():
        px = _n(left + reach * x.share(tick))
        parts.append(f'<line class="grid" x1="{px}" x2="{px}" y1="6" y2="{height - 38}"/>')
        parts.append(f'<text class="tick" x="{px}" y="{height - 22}" text-anchor="middle">{text}</text>')
    for i, (name, low, mean, high) in enumerate(rows):
        cy = 22 + 30 * i
        x0, x1, at = (_n(left + reach * x.share(v)) for v in (low, high, mean))
        text = f"{name}: {mean:.3f} ({low:.3f} to {high:.3f})"
        short = name if len(name) <= 26 else name[:25] + "…"
        parts.append(f'<text class="row" x="{left - 14}" y="{cy + 4}" text-anchor="end">{escape(short)}</text>')
        parts.append(f'<g>{_title(text)}<line class="whisker" x1="{x0}" x2="{x1}" y1="{cy}" y2="{cy}"/>')
        parts.append(f'<circle class="centre" cx="{at}" cy="{cy}" r="4.5"/></g>')
    parts.append(
        f'<text class="label" x="{_n(left + reach / 2)}" y="{height - 4}" text-anchor="middle">{escape(label)}</text>'
    )
    return _svg(title, parts, 640, height)


def forest(
    title: str, names: Sequence[str], panels: Sequence[tuple[str, Mapping[str, Interval]]], label: str
) -> Markup:
    """Draw differences and their intervals (low, value, high) around zero: a line a name, a column a panel, one scale.

    A name that a panel lacks leaves a gap there. Intervals above zero, below it and around it look unlike each other.
    """
    x = span([0.0, *(v for _, found in panels for interval in found.values() for v in interval)], label)
    left, top, row, reach, gap = 28 + 7 * max(map(len, names), default=0), 34, 19, 270, 28
    bottom = top + row * len(names)
    parts = [
        f'<text class="row" x="{left - 14}" y="{top + row * i + 13}" text-anchor="end">{escape(name)}</text>'
        for i, name in enumerate(names)
    ]
    for number, (head, found) in enumerate(panels):
        start = left + number * (reach + gap)
        parts.append(f'<text class="note" x="{start}" y="20">{escape(head)}</text>')
        for tick, text in x.labelled_ticks():
            px, style = _n(start + reach * x.share(tick)), "axis" if tick == 0 else "grid"
            parts.append(f'<line class="{style}" x1="{px}" x2="{px}" y1="{top}" y2="{bottom}"/>')
            parts.append(f'<text class="tick" x="{px}" y="{bottom + 16}" text-anchor="middle">{text}</text>')
        middle = _n(start + reach / 2)
        parts.append(f'<text class="label" x="{middle}" y="{bottom + 34}" text-anchor="middle">{escape(label)}</text>')
        for name, (low, value, high) in found.items():
            cy = top + row * names.index(name) + 9
            x0, at, x1 = (_n(start + reach * x.share(v)) for v in (low, value, high))
            side = "above" if low > 0 else "below" if high < 0 else "around"
            parts.append(f'<g class="{side}">{_title(f"{name}: {value:+.2f} ({low:+.2f} to {high:+.2f})")}')
            parts.append(f'<line class="whisker" x1="{x0}" x2="{x1}" y1="{cy}" y2="{cy}"/>')
            parts.append(f'<circle class="centre" cx="{at}" cy="{cy}" r="4"/></g>')
    return _svg(title, parts, left + len(panels) * (reach + gap), bottom + 44)


def standalone(chart: Markup) -> str:
    """Return a chart as an SVG file of its own: its colours with it, in light and dark, on a ground of its own."""
    css = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    ground = f'<style>{escape(css, quote=False)}</style><rect width="100%" height="100%" fill="var(--paper)"/>'
    head, _, rest = str(chart).partition(">")
    width, height = head.split('viewBox="0 0 ')[1].split('"')[0].split()
    look = f'width="{width}" height="{height}" font-family="system-ui, \'Liberation Sans\', Arial, sans-serif"'
    # The style sheet makes what has the class as wide as the page it stands on; a file has a size of its own.
    named = head.replace('<svg class="chart"', f'<svg xmlns="http://www.w3.org/2000/svg" {look}', 1)
    return f'{named}>{ground}<g class="chart">{rest.removesuffix("</svg>")}</g></svg>\n'


def _svg(title: str, parts: Sequence[str], width: int = WIDTH, height: int = HEIGHT) -> Markup:
    head = f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
    return Markup(head + "".join(parts) + "</svg>")  # noqa: S704 - every text in it went through escape


def _placer(x: Axis, y: Axis) -> Callable[[float, float], Point]:
    def place(at_x: float, at_y: float) -> Point:
        px = LEFT + (WIDTH - LEFT - RIGHT) * x.share(at_x)
        return round(px, 1), round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * y.share(at_y), 1)

    return place


def _frame(x: Axis, y: Axis) -> str:
    place, base, end = _placer(x, y), HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for tick, text in y.labelled_ticks():
        _, py = place(x.low, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{end}" y1="{py}" y2="{py}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{_n(py + 3.5)}" text-anchor="end">{text}</text>')
    for tick, text in x.labelled_ticks():
        px, _ = place(tick, y.low)
        parts.append(f'<text class="tick" x="{px}" y="{base + 15}" text-anchor="middle">{text}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{end}" y1="{base}" y2="{base}"/>')
    centre = _n((LEFT + end) / 2)
    parts.append(f'<text class="label" x="{centre}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x.label)}</text>')
    # Above the axis and level: it reads without turning the head and cannot run into the ticks.
    parts.append(f'<text class="label" x="0" y="11">{escape(y.label)}</text>')
    return "".join(parts)


def _line(one: Series, place: Callable[[float, float], Point]) -> str:
    points = [place(*p) for p in one.points]
    if len(points) == 1:
        return f'<circle class="point {one.style}" cx="{points[0][0]}" cy="{points[0][1]}" r="3"/>'
    return f'<polyline class="line {one.style}" points="{" ".join(f"{_n(px)},{_n(py)}" for px, py in points)}"/>'


def _band(one: Series, place: Callable[[float, float], Point]) -> str:
    if len(one.band) < 2:
        return ""
    edge = [place(x, high) for x, _, high in one.band] + [place(x, low) for x, low, _ in reversed(one.band)]
    return f'<polygon class="band {one.style}" points="{" ".join(f"{_n(px)},{_n(py)}" for px, py in edge)}"/>'


def _hovers(one: Series, place: Callable[[float, float], Point], x: Axis, y: Axis) -> str:
    stride = max(1, math.ceil(len(one.points) / MAX_HOVERS))
    dots = []
    for at_x, at_y in one.points[::stride]:
        px, py = place(at_x, at_y)
        text = f"{one.name}: {at_y:.4g} at {x.label.lower()} {at_x:.4g}"
        dots.append(f'<circle class="hover {one.style}" cx="{px}" cy="{py}" r="5">{_title(text)}</circle>')
    return "".join(dots)


def _best(best: tuple[float, float, str], place: Callable[[float, float], Point]) -> str:
    px, py = place(best[0], best[1])
    # The text stands above the plot, where no line can cross it, clear of the axis label on the left.
    anchor, at = ("end", min(px + 6, WIDTH - RIGHT)) if px > WIDTH * 0.55 else ("start", max(px - 6, 110.0))
    text = f'<text class="note" x="{_n(at)}" y="{TOP - 11}" text-anchor="{anchor}">{escape(best[2])}</text>'
    leader = f'<line class="leader" x1="{px}" x2="{px}" y1="{TOP - 7}" y2="{_n(py - 4.5)}"/>'
    return f'{leader}<circle class="best" cx="{px}" cy="{py}" r="4.5"/>{text}'


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>"


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
