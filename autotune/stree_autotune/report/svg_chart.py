"""Small charts as inline SVG: axes, lines, bands, points; colours come from the page.

Drawn by hand and not by a plotting library: a page holds some twenty charts a profile, follows its
reader's dark mode through CSS, says in words what each chart shows and runs no script. plotly would
bring 4.7 MB of script per file, matplotlib fixed colours and text as outlines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from markupsafe import Markup

WIDTH, HEIGHT = 340, 216
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 20, 36
TICKS = 5
NEAR_LABELS = 32

XY = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Axis:
    """One direction of a chart: a range, its ticks, and how a value becomes a place from 0 to 1."""

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    bend: Callable[[float], float] = float

    def place(self, value: float) -> float:
        """Return where `value` lies between the ends, clamped to them."""
        low, high = self.bend(self.low), self.bend(self.high)
        return min(1.0, max(0.0, (self.bend(value) - low) / (high - low)))


def linear_axis(label: str, values: Iterable[float], *, ends_round: bool = True) -> Axis:
    """Return an axis from 0 to the largest value, or to the round number above it."""
    top = max((value for value in values if math.isfinite(value)), default=1.0) or 1.0
    rough = top / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    count = math.ceil(top / step - 1e-9) if ends_round else math.floor(top / step)
    ticks = tuple((i * step, short(i * step)) for i in range(count + 1))
    return Axis(label, 0.0, count * step if ends_round else top, ticks)


def log_axis(label: str, values: Iterable[float]) -> Axis:
    """Return a logarithmic axis over values above 0, with ticks at 1, 2 and 5."""
    above = [value for value in values if value > 0] or [1.0]
    low, high = 0.9 * min(above), 1.1 * max(above)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    candidates = [m * 10.0**power for power in range(first, last + 1) for m in (1, 2, 5)]
    ticks = tuple((value, short(value)) for value in candidates if low <= value <= high)
    return Axis(label, low, high, ticks, math.log10)


def nodes_axis(label: str, most: int) -> Axis:
    """Return an axis of node counts from 0, by doublings of the tokens that a tree verifies."""
    sizes = [2**k - 1 for k in range(10) if 2**k - 1 <= most]
    ticks = tuple((float(size), str(size)) for size in sizes)
    return Axis(label, 0.0, float(max(1, most)), ticks, lambda size: math.log2(size + 1))


def short(value: float) -> str:
    """Return a number as an axis shows it: 0.25, 4, 12k, 1.5M."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


class Chart:
    """A chart under construction; `svg` closes it."""

    def __init__(self, x: Axis, y: Axis, description: str, height: int = HEIGHT) -> None:
        self._x, self._y, self._height = x, y, height
        self._ray_ends: list[XY] = []
        self._root = svg_root(WIDTH, height, description)
        self._draw_axes()

    def line(self, points: Sequence[XY], style: str, *, stairs: bool = False) -> None:
        """Join the points, straight or as steps that last until the next point."""
        if points:
            self._path(self._polyline(points, stairs=stairs), style)

    def band(self, lower: Sequence[XY], upper: Sequence[XY], style: str) -> None:
        """Fill between two lines."""
        if lower:
            back = self._polyline([*reversed(upper)]).replace("M", "L", 1)
            self._path(self._polyline(lower) + back + "Z", style)

    def cloud(self, points: Iterable[XY], style: str) -> None:
        """Draw many points as one path; points that fall on each other are drawn once."""
        spots = dict.fromkeys(f"M{x:.0f} {y:.0f}h0" for x, y in map(self._at, points))
        if spots:
            self._path("".join(spots), style)

    def dot(self, point: XY, style: str, title: str, radius: float = 2.4) -> None:
        """Draw one point that says what it is when pointed at."""
        x, y = self._at(point)
        place = {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": f"{radius:g}", "class": style}
        circle = ElementTree.SubElement(self._root, "circle", place)
        ElementTree.SubElement(circle, "title").text = title

    def whisker(self, x: float, low: float, high: float, style: str) -> None:
        """Draw a vertical interval with caps."""
        across, bottom = self._at((x, low))
        _, top = self._at((x, high))
        caps = f"M{across - 4:.1f} {bottom:.1f}h8M{across - 4:.1f} {top:.1f}h8"
        self._path(f"M{across:.1f} {bottom:.1f}V{top:.1f}{caps}", style)

    def ray(self, slope: float, style: str, text: str) -> None:
        """Draw y = slope * x from the origin to the edge of the chart, with its name there.

        Where that stands too near to a ray drawn before, the name is left out.
        """
        x = min(self._x.high, self._y.high / slope)
        self._path(self._polyline([(0.0, 0.0), (x, slope * x)]), style)
        across, down = self._at((x, slope * x))
        at_top = down < TOP + 12
        near = any(math.dist((across, down), other) < NEAR_LABELS for other in self._ray_ends)
        if not near:
            self._ray_ends.append((across, down))
            self._text(across - 3, down - 3 if at_top else down + 11, text, "tick", "end")

    def level(self, y: float, style: str) -> None:
        """Draw a horizontal rule."""
        _, down = self._at((self._x.low, y))
        self._path(f"M{LEFT} {down:.1f}H{WIDTH - RIGHT}", style)

    def upright(self, x: float, style: str, text: str) -> None:
        """Draw a vertical rule with its name at the top."""
        across, _ = self._at((x, self._y.low))
        self._path(f"M{across:.1f} {TOP}V{self._height - BOTTOM}", style)
        right = across > WIDTH / 2
        anchor, shift = ("end", -4) if right else ("start", 4)
        self._text(across + shift, TOP + 8, text, "tick", anchor)

    def svg(self) -> Markup:
        """Return the chart as markup."""
        return to_markup(self._root)

    def _at(self, point: XY) -> XY:
        x = LEFT + self._x.place(point[0]) * (WIDTH - LEFT - RIGHT)
        y = self._height - BOTTOM - self._y.place(point[1]) * (self._height - TOP - BOTTOM)
        return x, y

    def _polyline(self, points: Sequence[XY], *, stairs: bool = False) -> str:
        places = [self._at(point) for point in points]
        words = [f"M{places[0][0]:.1f} {places[0][1]:.1f}"]
        for x, y in places[1:]:
            words.append(f"H{x:.1f}V{y:.1f}" if stairs else f"L{x:.1f} {y:.1f}")
        return "".join(words)

    def _text(self, x: float, y: float, text: str, style: str, anchor: str) -> None:
        add_text(self._root, x, y, text, style, anchor)

    def _path(self, path: str, style: str) -> None:
        ElementTree.SubElement(self._root, "path", {"d": path, "class": style})

    def _draw_axes(self) -> None:
        base = self._height - BOTTOM
        for value, text in self._y.ticks:
            _, y = self._at((self._x.low, value))
            self._path(f"M{LEFT} {y:.1f}H{WIDTH - RIGHT}", "grid")
            add_text(self._root, LEFT - 6, y + 3.5, text, "tick", "end")
        for value, text in self._x.ticks:
            x, _ = self._at((value, self._y.low))
            self._path(f"M{x:.1f} {base}v4", "axis")
            add_text(self._root, x, base + 15, text, "tick", "middle")
        self._path(f"M{LEFT} {base}H{WIDTH - RIGHT}", "axis")
        middle = (LEFT + WIDTH - RIGHT) / 2
        add_text(self._root, middle, self._height - 4, self._x.label, "name", "middle")
        add_text(self._root, 2, 8, self._y.label, "name", "start")


def svg_root(width: float, height: float, description: str) -> ElementTree.Element:
    """Return an empty drawing that assistive technology reads as one picture."""
    size = {"width": f"{width:g}", "height": f"{height:g}"}
    view = {"viewBox": f"0 0 {width:g} {height:g}", "role": "img", "aria-label": description}
    return ElementTree.Element("svg", size | view)


def add_text(
    root: ElementTree.Element, x: float, y: float, text: str, style: str, anchor: str
) -> None:
    """Write a text into a drawing."""
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "class": style, "text-anchor": anchor}
    ElementTree.SubElement(root, "text", place).text = text


def to_markup(root: ElementTree.Element) -> Markup:
    """Return a drawing as markup; ElementTree has escaped every text and attribute."""
    return Markup(ElementTree.tostring(root, encoding="unicode"))
