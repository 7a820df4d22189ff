"""What a reader sees who points at a picture of the page: places in it, each with the values there."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ademamix.lab.reports.pictures import MINUS, Axis, Chart, HeatMap, Line, Picture, numbers

MOST = 300  # places of a chart: about as many as a phone has pixels across
NEAR = 0.01  # points of a path that are nearer to each other, as parts of the axes, count as one


class Stop(NamedTuple):
    """A place in a picture."""

    x: float  # from 0 at the left end of the axes to 1 at the right one
    y: float | None  # from 0 at the bottom to 1 at the top; None: at any height
    head: str  # where that is, in words
    values: list[str | None]  # of each line there; None where it has none


def stops_of(picture: Picture) -> list[Stop]:
    """From left to right; where lines are paths over a field, along each in turn; in a heat map cell by cell."""
    if isinstance(picture, HeatMap):
        return list(_cells(picture))
    return list(_columns(picture) if picture.field is None else _points(picture))


def _cells(shown: HeatMap) -> Iterator[Stop]:
    for row, texts in enumerate(shown.texts()):
        for column, text in enumerate(texts):
            head = f"{shown.x_label} {shown.x[column]}, {shown.y_label} {shown.y[row]}"
            yield Stop(_part((column + 0.5) / len(texts)), _part((row + 0.5) / len(shown.z)), head, [text])


def _columns(chart: Chart) -> Iterator[Stop]:
    x_axis, y_axis = chart.axes()
    there = sorted({x for line in chart.lines for x in line.x if x_axis.can_show(x) and x_axis.shows(x)})
    at = _some(there, MOST)
    form, names = ".3g" if chart.log_y else ".4f", dict(chart.x_ticks)
    values = [[_number(v, form) for v in _heights(line, at, x_axis, y_axis)] for line in chart.lines]
    for i, x in enumerate(at):
        head = f"{chart.x_label}: {names.get(x) or numbers([x])[0]}"
        yield Stop(_part(x_axis.part(x)), None, head, [of_line[i] for of_line in values])


def _points(chart: Chart) -> Iterator[Stop]:
    x_axis, y_axis = chart.axes()
    for number, line in enumerate(chart.lines):
        last = math.inf, math.inf
        for x, y in zip(line.x, line.y, strict=True):
            here = x_axis.part(x), y_axis.part(y)
            if x_axis.shows(x) and y_axis.shows(y) and math.dist(here, last) >= NEAR:
                last = here
                values: list[str | None] = [None] * len(chart.lines)
                values[number] = f"{chart.x_label} {_number(x, '.2f')}, {chart.y_label} {_number(y, '.2f')}"
                yield Stop(_part(here[0]), _part(here[1]), "", values)


def _heights(line: Line, at: Sequence[float], x_axis: Axis, y_axis: Axis) -> list[float]:
    """Of a line as it is drawn: straight between its points. NaN where it is not."""
    import numpy as np

    known = {x: y for x, y in zip(line.x, line.y, strict=True) if x_axis.can_show(x) and y_axis.can_show(y)}
    if not known or "lines" not in line.mode:
        return [known.get(x, math.nan) for x in at]
    x, y = np.array(sorted((x_axis.place(x), y_axis.place(y)) for x, y in known.items())).T
    found = np.interp(list(map(x_axis.place, at)), x, y, left=math.nan, right=math.nan)
    return [known.get(x, 10.0**y if y_axis.log else y) for x, y in zip(at, found.tolist(), strict=True)]


def _some(values: list[float], most: int) -> list[float]:
    """At most so many of them, evenly, with both ends."""
    every = (len(values) - 1) / (most - 1)
    return values if every <= 1 else [values[round(i * every)] for i in range(most)]


def _part(value: float) -> float:
    return round(value, 4)


def _number(value: float, form: str) -> str | None:
    return None if math.isnan(value) else f"{value:{form}}".replace("-", MINUS)
