"""Charts of quality against size as SVG: every point a shape of its format, and a line through the best of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from quantpress.pipelines.report.axes import Axis, fitting_axis
from quantpress.pipelines.report.values import bytes_text, significant

__all__ = ["Chart", "Point", "pareto", "scatter"]

_WIDTH, _HEIGHT = 480, 340  # user units; a phone shows them at three quarters
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 44
_FONT = 13.0
_LETTER = 0.64 * _FONT  # width of a letter, about
_MAX_LABELS = 40
_MAX_TOLD = 12
_SHAPES = {  # kind -> path around the origin, about 10 units wide
    "gguf": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0z",
    "onnx": "M-4.5 -4.5h9v9h-9z",
    "safetensors": "M0 -5.8L5.6 4.6H-5.6z",
}
_OTHER = "M0 -6L6 0L0 6L-6 0z"


@dataclass(frozen=True, slots=True)
class Point:
    """One output in a chart.

    Attributes:
        size: bytes.
        value: the figure.
        label: its type.
        kind: gives the shape.
        anchor: of the row that says more.
        title: what hovering shows.
        failed: whether its proof failed.
        loss: what makes one point better than another; the smaller the better.
    """

    size: float
    value: float
    label: str
    kind: str
    anchor: str
    title: str
    failed: bool
    loss: float


@dataclass(frozen=True, slots=True)
class Chart:
    """A finished chart: the drawing, and what is said below it."""

    svg: Markup
    caption: str


def pareto(points: Sequence[Point]) -> tuple[int, ...]:
    """Gives the places of the points that no other beats: none is both smaller and better, nor one of both and equal.

    Returns:
        Places in `points`, from the smallest size on. Failed ones are never among them.
    """
    places = [place for place, point in enumerate(points) if not point.failed]
    places.sort(key=lambda place: (points[place].size, points[place].loss))
    front: list[int] = []
    best = float("inf")
    for place in places:
        if points[place].loss < best:
            front.append(place)
            best = points[place].loss
    return tuple(front)


def scatter(points: Sequence[Point], *, title: str, log: bool | None, line: float | None = None) -> Chart | None:
    """Draws figures against size.

    Args:
        points: outputs of one source.
        title: name of the figure.
        log: whether its axis is logarithmic; None where the values are far apart.
        line: a value that is marked by a line across: what the source has. Without it, steps join the best points.

    Returns:
        The chart, or None where there are fewer than two points. A point whose proof failed may lie beyond the axis;
        it is then drawn at its end.
    """
    if len(points) < 2:
        return None
    across = fitting_axis([point.size for point in points])
    judged = [point for point in points if not point.failed] or points  # one that went wrong would flatten the rest
    values = [point.value for point in judged] + ([line] if line is not None else [])
    upward = fitting_axis(values, log=log)
    front = pareto(points)
    parts = [_grid(across, upward), _axis_titles(title)]
    if line is not None:
        parts.append(_line(upward, line))
    spots = [(_x(across, point.size), _y(upward, point.value)) for point in points]
    if line is None:
        parts.append(_front_line([spots[place] for place in front]))
    parts.append(_labels(points, spots, front))
    parts.extend(
        _marker(point, spot, place in front) for place, (point, spot) in enumerate(zip(points, spots, strict=True))
    )
    label = f"{title} against file size; the same figures are in the table of outputs"
    svg = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _WIDTH, _HEIGHT, label, Markup("").join(parts)
    )
    return Chart(svg, _caption([points[place].label for place in front], line))


def _caption(best: Sequence[str], line: float | None) -> str:
    told = f"Dashed: the source, {significant(line, 4)}. " if line is not None else ""
    more = f" and {len(best) - _MAX_TOLD} more" if len(best) > _MAX_TOLD else ""
    return told + (f"Best for their size: {', '.join(best[:_MAX_TOLD])}{more}." if best else "")


def _x(axis: Axis, value: float) -> float:
    return _LEFT + axis.place(value) * (_WIDTH - _LEFT - _RIGHT)


def _y(axis: Axis, value: float) -> float:
    return _HEIGHT - _BOTTOM - axis.place(value) * (_HEIGHT - _TOP - _BOTTOM)


def _grid(across: Axis, upward: Axis) -> Markup:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for tick in across.ticks:
        x = _x(across, tick)
        parts.append(Markup('<path class="grid" d="M{:.1f} {}V{}"/>').format(x, _TOP, bottom))
        parts.append(Markup('<text x="{:.1f}" y="{}" class="mid">{}</text>').format(x, bottom + 17, _bytes_tick(tick)))
    for tick in upward.ticks:
        y = _y(upward, tick)
        parts.append(Markup('<path class="grid" d="M{} {:.1f}H{}"/>').format(_LEFT, y, right))
        parts.append(Markup('<text x="{}" y="{:.1f}" class="end">{}</text>').format(_LEFT - 6, y + 4, _tick(tick)))
    frame = Markup('<path class="frame" d="M{} {}V{}H{}"/>').format(_LEFT, _TOP, bottom, right)
    return Markup("").join([*parts, frame])


def _bytes_tick(value: float) -> str:
    return bytes_text(value) if value else "0"


def _tick(value: float) -> str:
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:,.10g}"
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")


def _axis_titles(title: str) -> Markup:
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    below = Markup('<text x="{}" y="{}" class="mid name">size of all files</text>').format(
        (_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8
    )
    return below + Markup('<text transform="translate(13 {}) rotate(-90)" class="mid name">{}</text>').format(
        middle, title
    )


def _line(upward: Axis, value: float) -> Markup:
    return Markup('<path class="source" d="M{} {:.1f}H{}"/>').format(_LEFT, _y(upward, value), _WIDTH - _RIGHT)


def _front_line(spots: Sequence[tuple[float, float]]) -> Markup:
    """Draws steps through the best points: between two of them nothing better is known."""
    if len(spots) < 2:
        return Markup("")
    steps = [f"M{spots[0][0]:.1f} {spots[0][1]:.1f}"] + [f"H{x:.1f}V{y:.1f}" for x, y in spots[1:]]
    return Markup('<path class="front" d="{}"/>').format("".join(steps))


def _marker(point: Point, spot: tuple[float, float], best: bool) -> Markup:
    shape = _SHAPES.get(point.kind, _OTHER)
    cross = Markup('<path class="cross" d="M-7 -7L7 7M-7 7L7 -7"/>') if point.failed else Markup("")
    return Markup(
        '<a href="#{}"><g transform="translate({:.1f} {:.1f})" class="{}"><title>{}</title><path d="{}"/>{}</g></a>'
    ).format(point.anchor, *spot, "best" if best else "point", point.title, shape, cross)


def _labels(points: Sequence[Point], spots: Sequence[tuple[float, float]], front: Sequence[int]) -> Markup:
    """Writes names beside points, the best ones first, where there is room; the others are in their titles."""
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in spots]
    order = [*front, *(place for place in range(len(points)) if place not in set(front))]
    parts = []
    for place in order[:_MAX_LABELS]:
        label = points[place].label[:18]
        found = _room(spots[place], _LETTER * len(label), taken, own=place)
        if found is not None:
            taken.append(found)
            parts.append(Markup('<text x="{:.1f}" y="{:.1f}">{}</text>').format(found[0] + 2, found[3] - 3, label))
    return Markup("").join(parts)


_Box = tuple[float, float, float, float]


def _room(spot: tuple[float, float], width: float, taken: Sequence[_Box], own: int) -> _Box | None:
    """Looks for a free place for a text beside a point: left, top, right and bottom, or None."""
    x, y = spot
    height = _FONT + 2
    beside, above, below = y - height / 2, y - 6 - height, y + 6
    right, middle, left_of = x + 8, x - width / 2, x - 8 - width
    places = (
        (right, beside), (left_of, beside), (middle, above - 2), (middle, below + 2),
        (right, above), (right, below), (left_of, above), (left_of, below),
    )  # fmt: skip
    for left, top in places:
        box = (left, top, left + width, top + height)
        inside = box[0] > _LEFT and box[2] < _WIDTH - 2 and box[1] > _TOP - 8 and box[3] < _HEIGHT - _BOTTOM
        if inside and not any(_overlap(box, other) for place, other in enumerate(taken) if place != own):
            return box
    return None


def _overlap(one: _Box, other: _Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
