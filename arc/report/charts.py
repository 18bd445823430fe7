"""Line charts as inline SVG, for the report: no script, no network, colours from the page's style.

The page defines --s0 ... --s3 (series), --muted (text, axes) and --rule (grid lines) for light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

MAX_POINTS = 300  # a chart is about that many pixels wide
WIDTH, HEIGHT = 360.0, 190.0
LEFT, RIGHT, TOP, BOTTOM = 50.0, 10.0, 8.0, 32.0
MARKED = 40  # a series of at most so many points gets a dot on each

CSS = """
.chart { margin: 0; }
.chart figcaption { font-weight: 600; }
.chart svg { display: block; width: 100%; height: auto; }
.chart text { font: 11px system-ui, sans-serif; fill: var(--muted); }
.chart .rule { stroke: var(--rule); fill: none; }
.chart .zero { stroke: var(--muted); fill: none; }
.chart .line { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.chart .band { stroke: none; opacity: .2; }
.legend { font-size: .85rem; color: var(--muted); }
.legend span { white-space: nowrap; margin-right: .9em; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .35em; }
""" + "".join(
    f".s{k} .line {{ stroke: var(--s{k}); }} .s{k} .band, .s{k} circle {{ fill: var(--s{k}); }} "
    f".legend .s{k} {{ background: var(--s{k}); }}\n"
    for k in range(4)
)


@dataclass(frozen=True)
class Series:
    """One line: its name, and (x, y) in the order of x. Points whose y is None or not finite are left out."""

    label: str
    points: Sequence[tuple[float, float | None]]


@dataclass(frozen=True)
class Bucket:
    """Neighbouring points drawn as one: mean x, and mean, least and greatest y."""

    x: float
    mean: float
    low: float
    high: float


def downsample(points: Sequence[tuple[float, float | None]], limit: int = MAX_POINTS) -> list[Bucket]:
    """At most `limit` buckets of equally many neighbours (the last may be smaller); no point's y is lost to sight,
    since each bucket keeps its least and greatest."""
    usable = [(x, y) for x, y in points if y is not None and math.isfinite(x) and math.isfinite(y)]
    size = max(1, math.ceil(len(usable) / limit))
    buckets = []
    for start in range(0, len(usable), size):
        xs, ys = zip(*usable[start : start + size], strict=True)
        low, high = min(ys), max(ys)
        mean = min(max(math.fsum(ys) / len(ys), low), high)  # rounding must not push it out of the band
        buckets.append(Bucket(math.fsum(xs) / len(xs), mean, low, high))
    return buckets


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) in [low, high], low < high."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def number(value: float) -> str:
    """A number as short as an axis needs it."""
    if 1000 <= abs(value) < 1e6:
        return f"{value:.0f}"
    text = f"{value:.3g}"
    if "e" in text:
        mantissa, _, exponent = text.partition("e")
        return f"{mantissa}e{int(exponent)}"
    return text


def line_chart(
    title: str, series: Sequence[Series], *, x_label: str = "batch", log: bool = False, zero: bool = True
) -> str:
    """A chart as one HTML `<figure>`, at most four series; where there are no points, a line says so.

    `log` asks for a logarithmic axis, which is used where all values are positive. A linear axis shows zero, unless
    `zero` is off.
    """
    lines = [(one.label, downsample(one.points)) for one in series]
    lines = [(label, buckets) for label, buckets in lines if buckets]
    caption = f"<figcaption>{escape(title)}</figcaption>"
    if not lines:
        return f'<figure class="chart">{caption}<p class="legend">nothing recorded yet</p></figure>'
    every = [bucket for _, buckets in lines for bucket in buckets]
    axes = Axes.around(every, log=log, zero=zero)
    body = axes.draw(x_label) + "".join(_draw_line(axes, k, *line, x_label) for k, line in enumerate(lines))
    legend = "".join(
        f'<span><i class="s{k}"></i>{escape(label)} {number(buckets[-1].mean)}</span>'
        for k, (label, buckets) in enumerate(lines)
    )
    return (
        f'<figure class="chart">{caption}<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" '
        f'aria-label="{escape(title)}">{body}</svg><div class="legend">{legend}</div></figure>'
    )


@dataclass(frozen=True)
class Axes:
    """Maps values to places in the picture."""

    x: tuple[float, float]
    y: tuple[float, float]  # of log10 of the values if `log`
    log: bool

    @classmethod
    def around(cls, buckets: Sequence[Bucket], *, log: bool, zero: bool) -> Axes:
        """Axes that show all of `buckets` (not empty)."""
        x = min(b.x for b in buckets), max(b.x for b in buckets)
        y = min(b.low for b in buckets), max(b.high for b in buckets)
        log = log and y[0] > 0
        if log:
            y = math.log10(y[0]), math.log10(y[1])
        elif zero:
            y = min(0.0, y[0]), max(0.0, y[1])
        return cls(_widen(x), _widen(y, 0.04), log)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Picture coordinates of a point."""
        y = math.log10(y) if self.log else y
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def draw(self, x_label: str) -> str:
        """Grid lines and numbers."""
        parts = []
        for value in self.y_ticks():
            _, y = self.at(self.x[0], value)
            kind = "zero" if value == 0 else "rule"
            parts.append(
                f'<path class="{kind}" d="M{LEFT:g} {y:.1f}H{WIDTH - RIGHT:g}"/>'
                f'<text x="{LEFT - 5:g}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>'
            )
        for value in (tick for tick in ticks(*self.x, 5) if tick == int(tick)):  # batches and epochs are whole
            x, _ = self.at(value, 1.0)
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 17:g}" text-anchor="middle">{value:.0f}</text>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text x="{middle:g}" y="{HEIGHT - 3:g}" text-anchor="middle">{escape(x_label)}</text>')
        return "".join(parts)

    def y_ticks(self) -> list[float]:
        """The values that get a grid line: powers of ten, if the axis is logarithmic and spans two of them."""
        if not self.log:
            return ticks(*self.y)
        low, high = math.ceil(self.y[0]), math.floor(self.y[1])
        if high > low:
            return [10.0**k for k in range(low, high + 1, 1 + (high - low) // 5)]
        return [value for value in ticks(10 ** self.y[0], 10 ** self.y[1]) if value > 0]


def _widen(span: tuple[float, float], margin: float = 0.0) -> tuple[float, float]:
    """The span with a share of its width added on both sides; a single value gets room around it."""
    low, high = span
    if high - low < 1e-9 * max(1e-9, abs(low), abs(high)):
        room = abs(low) / 2 or 0.5
        return low - room, high + room
    room = (high - low) * margin
    return low - room, high + room


def _draw_line(axes: Axes, k: int, label: str, buckets: Sequence[Bucket], x_label: str) -> str:
    places = [axes.at(b.x, b.mean) for b in buckets]
    parts = [f'<path class="line" d="M{_path(places)}"/>']
    if any(b.low < b.high for b in buckets):
        outline = [axes.at(b.x, b.high) for b in buckets] + [axes.at(b.x, b.low) for b in reversed(buckets)]
        parts.insert(0, f'<path class="band" d="M{_path(outline)}z"/>')
    if len(buckets) <= MARKED:
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6"><title>'
            f"{escape(label)}, {escape(x_label)} {b.x:g}: {number(b.mean)}</title></circle>"
            for b, (x, y) in zip(buckets, places, strict=True)
        ]
    return f'<g class="s{k}">{"".join(parts)}</g>'


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
