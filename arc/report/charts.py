"""Line charts as inline SVG, for the report: no script, no network, colours from the page's style.

The page defines --s0 ... --s3 (series), --muted (text, axes) and --rule (grid lines) for light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from arc.report.templates import part

MAX_POINTS = 300  # a chart is about that many pixels wide
WIDTH, HEIGHT = 360.0, 190.0
LEFT, RIGHT, TOP, BOTTOM = 50.0, 10.0, 8.0, 32.0
MARKED = 40  # a series of at most so many points gets a dot on each


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
) -> Markup:
    """A chart as one HTML `<figure>`, at most four series; where there are no points, a line says so.

    `log` asks for a logarithmic axis, which is used where all values are positive. A linear axis shows zero, unless
    `zero` is off.
    """
    drawn = [(one.label, buckets) for one in series if (buckets := downsample(one.points))]
    if not drawn:
        return part("empty_chart", title=title)
    axes = Axes.around([bucket for _, buckets in drawn for bucket in buckets], log=log, zero=zero)
    lines = [Line.of(axes, label, buckets) for label, buckets in drawn]
    frame = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT}
    return part("chart", title=title, x_label=x_label, frame=frame, axes=axes, lines=lines)


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

    def y_marks(self) -> list[tuple[float, str]]:
        """Height in the picture, and the number there, of each grid line."""
        return [(self.at(self.x[0], value)[1], number(value)) for value in self.y_ticks()]

    def x_marks(self) -> list[tuple[float, str]]:
        """Place across the picture, and the number there; batches and epochs are whole."""
        whole = [tick for tick in ticks(*self.x, 5) if tick == int(tick)]
        return [(self.at(value, 1.0)[0], f"{value:.0f}") for value in whole]

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


@dataclass(frozen=True)
class Line:
    """A series as it is drawn: `path` through the means and `band` around it (SVG path data; "" where nothing was
    averaged), `dots` of a short series (x and y in the picture, batch, value), and its last value for the legend."""

    label: str
    path: str
    band: str
    dots: list[tuple[float, float, str, str]]
    last: str

    @classmethod
    def of(cls, axes: Axes, label: str, buckets: Sequence[Bucket]) -> Line:
        """The series of these buckets (not empty)."""
        places = [axes.at(b.x, b.mean) for b in buckets]
        outline = [axes.at(b.x, b.high) for b in buckets] + [axes.at(b.x, b.low) for b in reversed(buckets)]
        dots = [(x, y, f"{b.x:g}", number(b.mean)) for b, (x, y) in zip(buckets, places, strict=True)]
        return cls(
            label=label,
            path=f"M{_path(places)}",
            band=f"M{_path(outline)}z" if any(b.low < b.high for b in buckets) else "",
            dots=dots if len(buckets) <= MARKED else [],
            last=number(buckets[-1].mean),
        )


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
