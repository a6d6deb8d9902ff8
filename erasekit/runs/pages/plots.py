"""Charts as inline SVG: numbers in, coordinates and ticks out. `plots.html.j2` draws them, in the colours of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from markupsafe import Markup

from erasekit.erasures.modelcard import templates

STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
LEVELS = 10  # shades of a heat map


@dataclass(frozen=True)
class Axis:
    """A direction of a chart.

    Attributes:
        label: what it measures.
        low: value at its beginning.
        high: value at its end, above `low`.
        log: whether it is logarithmic; `low` is above 0 then.
        names: ticks of one's own, (value, text), in place of round numbers.
    """

    label: str
    low: float
    high: float
    log: bool = False
    names: Sequence[tuple[float, str]] = ()

    def at(self, value: float) -> float:
        """Where a value lies, 0 at the beginning and 1 at the end; one outside lies at the border."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        if self.log:
            value = math.log(max(value, self.low))
        return min(1.0, max(0.0, (value - low) / (high - low)))

    def ticks(self) -> list[tuple[float, str]]:
        """(where, text) of its marks."""
        if self.names:
            return [(self.at(value), text) for value, text in self.names]
        return [(self.at(v), _tick(v)) for v in self._values()]

    def _values(self) -> list[float]:
        if self.log:
            powers = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            return [10.0**k for k in powers[:: max(1, -(-len(powers) // 6))]]
        size = (self.high - self.low) / 5
        unit = 10 ** math.floor(math.log10(size))
        step = next(unit * s for s in STEPS if unit * s >= size * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _tick(value: float) -> str:
    """A round number, whole: 0.25, 1.5e-04."""
    if 1e-3 <= abs(value) < 1e5 or value == 0:
        return f"{value:.10g}"
    mantissa, exponent = f"{value:.4e}".split("e")
    return f"{float(mantissa):g}e{exponent}"


class Mark(NamedTuple):
    """One point of a series.

    Attributes:
        x: its place.
        y: its place.
        xs: an interval of x, drawn as a bar.
        ys: an interval of y, drawn as a bar.
        title: what a pointer that rests on it is told.
        label: a short text beside it.
    """

    x: float
    y: float
    xs: tuple[float, float] | None = None
    ys: tuple[float, float] | None = None
    title: str = ""
    label: str = ""


@dataclass(frozen=True)
class Series:
    """Points that belong together.

    Attributes:
        name: for the legend and for screen readers; one without a name is in neither.
        marks: its points.
        style: `line`, `faint` (a thin line behind others), `dots`, `ticks` (short upright strokes), `both`, `step` (a
            line that goes in steps, first down and then on), or `labels` (nothing but the marks' texts).
        tone: which of the page's colours it has: `erased`, `base`, or a number from 0.
    """

    name: str
    marks: Sequence[Mark]
    style: Literal["line", "faint", "dots", "ticks", "both", "step", "labels"] = "line"
    tone: str = "erased"


@dataclass(frozen=True)
class Chart:
    """What `plots.html.j2` draws.

    Attributes:
        title: what it shows, in a few words.
        series: drawn one above the other.
        x: to the right.
        y: upwards.
        width: in the units of its own drawing, of which a letter is 11 high.
        height: in the same.
        left: room for the names of the y axis.
        bottom: room for those of the x axis.
    """

    title: str
    series: Sequence[Series]
    x: Axis
    y: Axis
    width: int = 420
    height: int = 220
    left: int = 46
    right: int = 14
    top: int = 24
    bottom: int = 36
    legend: bool = field(default=True)

    def px(self, x: float) -> str:
        """The x coordinate of a value."""
        return f"{self.left + (self.width - self.left - self.right) * self.x.at(x):.1f}"

    def py(self, y: float) -> str:
        """The y coordinate of a value."""
        return f"{self.height - self.bottom - (self.height - self.top - self.bottom) * self.y.at(y):.1f}"

    def x_ticks(self) -> list[tuple[str, str]]:
        """(coordinate, text)."""
        inner = self.width - self.left - self.right
        return [(f"{self.left + inner * at:.1f}", text) for at, text in self.x.ticks()]

    def y_ticks(self) -> list[tuple[str, str]]:
        """(coordinate, text)."""
        inner = self.height - self.top - self.bottom
        return [(f"{self.height - self.bottom - inner * at:.1f}", text) for at, text in self.y.ticks()]

    def path(self, series: Series) -> str:
        """The points of a polyline; one of a `step` has its corners too."""
        points = [(self.px(m.x), self.py(m.y)) for m in series.marks]
        if series.style == "step":
            corners = [(points[i][0], points[i + 1][1]) for i in range(len(points) - 1)]
            points = [p for pair in zip(points, [*corners, points[-1]], strict=True) for p in pair]
        return " ".join(f"{x},{y}" for x, y in points)

    def told(self) -> str:
        """The chart in words, for those who do not see it."""
        return " ".join([f"{self.title}.", *(_told(s, self.x.label) for s in self.series if s.name and s.marks)])

    @property
    def named(self) -> list[Series]:
        """The series of the legend."""
        return [s for s in self.series if s.name] if self.legend else []

    def draw(self) -> Markup:
        """The drawing."""
        return Markup(templates().get_template("plots.html.j2").render(chart=self))


def _told(series: Series, along: str) -> str:
    first, last = series.marks[0], series.marks[-1]
    if len(series.marks) == 1 or series.style in ("dots", "ticks"):
        values = [m.y for m in series.marks]
        return f"{series.name}: {len(values)} points."
    return f"{series.name}: {first.y:.3g} at {along} {first.x:.3g}, {last.y:.3g} at {last.x:.3g}."


def around(values: Sequence[float], *, share: float = 0.06) -> tuple[float, float]:
    """The ends of an axis that holds some values with a little room; never empty."""
    low, high = min(values), max(values)
    room = share * (high - low) or 0.5 * abs(high) or 1.0
    return low - room, high + room


def level(value: float | None, low: float, high: float, *, log: bool = False) -> int | None:
    """The shade of a heat map's cell, 0 to `LEVELS`; None where there is no value."""
    if value is None:
        return None
    return round(LEVELS * Axis("", low, high, log=log).at(value)) if high > low else 0
