"""What a reader sees who points at a picture."""

import itertools
import math

import pytest

from ademamix.lab.reports.pictures import Chart, Field, HeatMap, Line
from ademamix.lab.reports.stops import MOST, NEAR, stops_of


def test_a_chart_has_the_values_of_all_lines_at_each_x() -> None:
    lines = [Line("a", [1.0, 3.0], [2.0, 4.0]), Line("b", [3.0, 2.0], [0.5, -1.0], mode="lines+markers")]
    stops = stops_of(Chart("", "steps", "", [*lines, Line("c", [2.0], [9.0], mode="markers")], x_range=(1.0, 3.0)))
    assert stops == [
        (0.0, None, "steps: 1", ["2.0000", None, None]),
        (0.5, None, "steps: 2", ["3.0000", "\N{MINUS SIGN}1.0000", "9.0000"]),
        (1.0, None, "steps: 3", ["4.0000", "0.5000", None]),
    ]


def test_between_points_of_a_line_it_is_as_straight_as_it_is_drawn() -> None:
    lines = [Line("a", [1.0, 100.0], [1.0, 1e-4]), Line("b", [10.0], [1.0])]
    _, middle, _ = stops_of(Chart("", "age", "", lines, log_x=True, log_y=True, x_range=(1.0, 100.0)))
    assert middle == (0.5, None, "age: 10", ["0.01", "1"])


def test_what_cannot_be_drawn_has_no_value() -> None:
    line = Line("a", [-1.0, 0.0, 1.0, 2.0, 3.0, 4.0], [1.0, 1.0, math.inf, 2.0, 3.0, math.nan])
    stops = stops_of(Chart("", "x", "", [line], log_x=True))
    assert [(stop.head, stop.values) for stop in stops][1:] == [
        ("x: 2", ["2.0000"]),
        ("x: 3", ["3.0000"]),
        ("x: 4", [None]),
    ]
    assert stops_of(Chart("", "", "", [Line("a", [], []), Line("b", [1.0], [math.nan])]))[0].values == [None, None]
    assert stops_of(Chart("", "", "", [Line("a", [], [])])) == []


def test_ticks_that_are_names_name_their_places() -> None:
    chart = Chart("", "clip", "", [Line("a", [0.0, 1.0], [2.0, 3.0])], x_ticks=((0.0, "none"), (1.0, "0.1")))
    assert [stop.head for stop in stops_of(chart)] == ["clip: none", "clip: 0.1"]


def test_a_long_line_is_thinned_evenly_with_both_ends() -> None:
    x = [float(i) for i in range(10_001)]
    stops = stops_of(Chart("", "step", "", [Line("a", x, [v / 10_000 for v in x])], x_range=(0.0, 1e4)))
    assert len(stops) == MOST
    assert (stops[0].head, stops[-1].head) == ("step: 0", "step: 10,000")
    assert [float(str(stop.values[0])) for stop in stops] == pytest.approx([stop.x for stop in stops], abs=1e-4)
    assert max(b.x - a.x for a, b in itertools.pairwise(stops)) < 1.1 / (MOST - 1)


def test_a_path_has_stops_all_along_and_no_two_in_one_place() -> None:
    turns = [2 * math.pi * i / 10_000 for i in range(20_000)]
    path = Line("a", [math.cos(t) for t in turns], [math.sin(t) for t in turns])
    beyond = Line("b", [5.0], [0.0])
    field = Field([0.0, 1.0], [0.0, 1.0], [[0.0, 1.0], [1.0, 2.0]])
    chart = Chart("", "x", "y", [path, beyond], x_range=(-2.0, 2.0), y_range=(-2.0, 2.0), field=field)
    stops = stops_of(chart)
    length = 2 * 2 * math.pi / 4  # two turns, in parts of the axes
    assert 0.9 * length / NEAR < len(stops) <= length / NEAR
    assert stops[0] == (0.75, 0.5, "", ["x 1.00, y 0.00", None])


def test_a_heat_map_has_a_stop_in_each_cell() -> None:
    assert stops_of(HeatMap("", "beta3", "alpha", ["0.9", "0.99"], ["8"], [[1.25, None]])) == [
        (0.25, 0.5, "beta3 0.9, alpha 8", ["1.2500"]),
        (0.75, 0.5, "beta3 0.99, alpha 8", ["diverged"]),
    ]
