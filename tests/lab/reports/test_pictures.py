"""What the pictures of a report show."""

import itertools
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import memory_picture
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ademamix import suggest
from ademamix.lab.reports.pictures import (
    ADAMW,
    ADEMAMIX,
    INK,
    OTHERS,
    OUTLINE,
    PAPER,
    SCHEMES,
    SOFT,
    Axis,
    Chart,
    Field,
    HeatMap,
    Line,
    apart,
    numbers,
    styles_of,
)
from ademamix.lab.reports.svg import panel, svg

TALL = 17.0
STEPS = [100.0, 200.0, 300.0]
BAND = ([1.9, 1.5, 1.2], [2.1, 1.7, 1.4])
BANDED = Line("AdamW", STEPS, [2.0, 1.6, 1.3], band=BAND)
MIX = Line("AdEMAMix", STEPS, [2.0, 1.6, 1.29])
CURVES = Chart("Loss", "steps", "nats, 95 % interval", [BANDED, MIX], reference=((1.5, "AdamW, twice the tokens"),))
# Of one cell the loss is far above the others': the colors end at 1.0 + 4 (1.2 - 1.0).
MAP = HeatMap("Sweep", "beta3", "alpha", ["1", "2", "3"], ["8", "9"], [[1.2, 1.1, 1.0], [1.3, 9.0, None]])
SHADED = Chart("Valley", "x", "y", [MIX], field=Field([0.0, 1.0], [0.0, 1.0], [[0.0, 1.0], [1.0, 2.0]]))


def texts(drawn: bytes) -> list[str]:
    found = ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")
    return ["".join(text.itertext()).strip() for text in found]


def size(drawn: bytes) -> tuple[float, float]:
    """Width and height."""
    ((wide, tall),) = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawn.decode())
    return float(wide), float(tall)


def contrast(a: str, b: str) -> float:
    """As WCAG 2 defines it."""

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(map(luminance, (a, b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("which", [0, 1], ids=SCHEMES)
def test_every_text_can_be_read_on_its_paper(which):
    for colors in (ADAMW, ADEMAMIX, *OTHERS, INK, SOFT):
        assert contrast(colors[which], PAPER[which]) >= 4.5, colors[which]


def test_the_page_has_the_same_colors():
    page = (Path(__file__).parents[3] / "src/ademamix/lab/reports/page.html").read_text()
    light, dark = re.findall(r":root \{ (.*?) \}", page)
    for which, told in enumerate((light, dark)):
        for name, colors in {"paper": PAPER, "ink": INK, "soft": SOFT}.items():
            assert f"--{name}: {colors[which]};" in told


def test_a_name_looks_the_same_in_all_pictures_of_a_report():
    first = Chart("", "", "", [Line("KEMA", [0.0], [1.0]), Line("AdEMAMix", [0.0], [1.0])])
    second = Chart("", "", "", [Line(name, [0.0], [1.0]) for name in ("ADana", "AdamW", "KEMA")])
    styles = styles_of([first, MAP, second])
    assert styles["KEMA"] != styles["ADana"]
    assert (styles["AdamW"].dash, styles["AdEMAMix"].dash) == ("--", "-")
    for which, scheme in enumerate(SCHEMES):
        stroke = f"stroke: {styles['KEMA'].colors[which]}".lower()
        assert svg("", [first, second], scheme).decode().count(stroke) == 2
        assert [panel(chart, styles, scheme)[0].decode().count(stroke) for chart in (first, second)] == [1, 1]


def test_many_names_are_told_apart():
    lines = [Line(str(i), [0.0], [1.0]) for i in range(30)]
    styles = styles_of([Chart("", "", "", lines)])
    assert len({(style.colors, style.dash) for style in styles.values()}) == 32
    for colors in zip(*(style.colors for style in styles.values()), strict=True):
        assert len(set(colors)) == 8


def places(drawn: str, part: str) -> list[tuple[float, float]]:
    """The corners of the paths in a group of an SVG."""
    (group,) = re.findall(rf'<g id="{part}.*?</g>', drawn, re.DOTALL)
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", group)]


BAND_OF = "(?:FillBetween)?PolyCollection"  # by the version of matplotlib


def test_a_band_is_drawn_in_the_color_of_its_line():
    styles = styles_of([CURVES])
    for which, scheme in enumerate(SCHEMES):
        drawn = svg("", [CURVES], scheme).decode()
        (style,) = re.findall(rf'id="{BAND_OF}.*?style="(.*?)"', drawn, re.DOTALL)
        assert f"fill: {styles['AdamW'].colors[which]}".lower() in style
        assert float(re.findall(r"fill-opacity: ([\d.]+)", style)[0]) < 0.3


def test_edges_of_a_band_that_are_no_numbers_are_left_out():
    line = Line("AdamW", STEPS, [2.0, 1.0, 1.0], band=([1.0, -math.inf, math.nan], [3.0, math.inf, 2.0]))
    chart = Chart("", "", "", [line])
    assert chart.edges(line) == [(100.0, 1.0, 3.0)]
    assert len({x for x, _ in places(svg("", [chart], "light").decode(), BAND_OF)}) == 1


def test_a_band_stays_on_an_axis_of_logarithms():
    line = Line("AdamW", STEPS, [1.0, 1.0, 1.0], band=([-1.0, 0.0, 0.5], [2.0, 2.0, 2.0]))
    chart = Chart("", "", "", [line], log_y=True)
    assert min(low for _, low, _ in chart.edges(line)) > 0
    drawn, (_, bottom, _, _) = panel(chart, styles_of([chart]), "light")
    tall = size(drawn)[1]
    lowest = tall + max(y for _, y in places(drawn.decode(), BAND_OF))  # which begins at the lower edge
    assert lowest == pytest.approx(tall * (1 - bottom), abs=0.01)


def test_a_reference_line_is_thin_neutral_and_labeled():
    (label,) = [a for a in CURVES.labels(styles_of([CURVES])) if a.reference]
    assert (label.text, label.y, label.colors) == ("AdamW, twice the tokens", 1.5, SOFT)
    for which, scheme in enumerate(SCHEMES):
        drawn = svg("", [CURVES], scheme)
        assert "AdamW, twice the tokens" in texts(drawn)
        assert f"stroke: {SOFT[which]}; stroke-width: 0.8".encode() in drawn.replace(b"\n", b" ")


@pytest.mark.parametrize("falls", [True, False])
def test_a_reference_line_is_labeled_where_no_line_is_near(falls):
    ends = [2.0, 1.7, 1.0] if falls else [1.0, 1.7, 2.0]
    chart = Chart("", "", "", [Line("AdamW", STEPS, ends)], reference=((1.9, "AdEMAMix's loss"),))
    (label,) = [a for a in chart.labels(styles_of([chart])) if a.reference]
    assert label.x == (chart.axes()[0].high if falls else chart.axes()[0].low)
    (anchor,) = re.findall(r"text-anchor: (\w+)[^>]*>AdEMAMix's loss", svg("", [chart], "light").decode())
    assert anchor == ("end" if falls else "start")  # it stands inside


def test_lines_are_labeled_at_their_ends_in_their_color():
    styles = styles_of([CURVES])
    named = {a.text: a for a in CURVES.labels(styles) if not a.reference}
    assert named.keys() == {"AdamW", "AdEMAMix"}
    assert named["AdamW"].y == 1.3
    for which, scheme in enumerate(SCHEMES):
        drawn = svg("", [CURVES], scheme).decode()
        for name in named:
            (color,) = re.findall(rf'fill: (#\w+)"[^>]*>{name}</text>', drawn)
            assert color == styles[name].colors[which].lower()
        assert 'id="legend' not in drawn


def test_a_line_that_ends_early_is_labeled_there():
    early = Line("KEMA", STEPS[:2], [2.0, 1.8])
    (label,) = [
        s
        for s in Chart("", "", "", [BANDED, early]).labels(styles_of([Chart("", "", "", [BANDED, early])]))
        if s.text == "KEMA"
    ]
    assert (label.x, label.y) == (200.0, 1.8)


def test_a_line_that_leaves_the_picture_is_labeled_where_it_is_last_seen():
    chart = Chart("", "", "", [Line("a", [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 9.0, math.inf])], y_range=(0.0, 5.0))
    (label,) = chart.labels(styles_of([chart]))
    assert (label.x, label.y) == (2.0, 2.0)


@pytest.mark.parametrize(
    "chart",
    [
        Chart("", "", "", [Line(f"line {i}", [0.0, 1.0], [0.0, float(i)]) for i in range(8)]),
        Chart("", "", "", [Line("a name that is longer than what has room", [0.0, 1.0], [0.0, 1.0])]),
        SHADED,
    ],
    ids=["many", "long", "field"],
)
def test_where_labels_have_no_room_there_is_a_legend(chart):
    assert chart.labels(styles_of([chart])) == []
    drawn = svg("", [chart], "light")
    for name in (line.name for line in chart.lines):
        assert name in " ".join(texts(drawn))  # perhaps on two lines
    assert b'id="legend' in drawn


@pytest.mark.parametrize("count", [1, 12])
def test_a_legend_stays_in_its_picture(count):
    name = "a name so long that not even one of it, let alone two, has room in the legend of a picture"
    chart = Chart("", "", "", [Line(f"{name} {i}", [0.0, 1.0], [0.0, float(i)]) for i in range(count)])
    drawn, (left, _, width, _) = panel(chart, styles_of([chart]), "light")
    assert width > 0.7  # a wider legend would take room from the axes
    assert left + width < 1
    heights = [float(y) for y in re.findall(r"translate\([\d.]+ ([\d.]+)\)", drawn.decode())]
    assert 5 < min(heights) < max(heights) < size(drawn)[1]


@given(
    st.lists(st.tuples(st.floats(0, 300), st.floats(10, 200), st.floats(-50, 350)), min_size=1, max_size=8),
)
def test_no_label_covers_another(boxes):
    found = apart(boxes, TALL, 300.0)
    for (a, up), (b, down) in itertools.combinations(zip(boxes, found, strict=True), 2):
        beside = a[0] + a[1] <= b[0] or b[0] + b[1] <= a[0]
        assert beside or abs(up - down) >= TALL - 1e-9
    assert all(-1e-9 <= y <= 300.0 + 1e-9 for y in found)


def test_a_label_that_is_alone_stays_where_it_is():
    assert apart([(0, 10, 50.0), (0, 10, 90.0), (40, 10, 55.0)], TALL, 300.0) == [50.0, 90.0, 55.0]
    assert apart([(0, 10, 50.0), (0, 10, 50.0)], 10.0, 300.0) == [45.0, 55.0]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_labels_in_a_file_are_apart(scheme):
    lines = [Line(f"line {i}", [0.0, 1.0], [0.0, 1.0 + 0.001 * i]) for i in range(6)]
    drawn = svg("", [Chart("", "", "", lines)], scheme).decode()
    heights = sorted(float(y) for y in re.findall(r'y="([\d.]+)"[^>]*>line \d</text>', drawn))
    if not heights:  # where it is a transformation
        heights = sorted(float(y) for y in re.findall(r"translate\([\d.]+ ([\d.]+)\)[^>]*>line \d</text>", drawn))
    assert len(heights) == 6
    assert min(b - a for a, b in itertools.pairwise(heights)) > 12  # of 10 points


def test_the_best_cell_is_outlined_and_what_the_colors_do_not_reach_is_hatched():
    assert (MAP.outlined(), MAP.beyond()) == ((0, 2), [(1, 1)])
    assert "hatched" in MAP.bar_label()
    for scheme in SCHEMES:
        drawn, (left, bottom, width, height) = panel(MAP, {}, scheme)
        assert {"9.0000", "diverged", "1.0000", MAP.bar_label()} <= set(texts(drawn))
        wide, tall = size(drawn)
        (hatch,) = re.findall(r'<path d="([^"]+)"[^>]*style="fill: url', drawn.decode())
        (outline,) = re.findall(rf'<path d="([^"]+)"[^>]*stroke: {OUTLINE.lower()}', drawn.decode())
        for path, row, column in ((hatch, 1, 1), (outline, 0, 2)):
            x, y = zip(*(map(float, p) for p in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path)), strict=True)
            assert (min(x) / wide, max(x) / wide) == pytest.approx(
                (left + column * width / 3, left + (column + 1) * width / 3), abs=1e-3
            )
            assert (1 - max(y) / tall, 1 - min(y) / tall) == pytest.approx(
                (bottom + row * height / 2, bottom + (row + 1) * height / 2), abs=1e-3
            )


def test_a_cell_can_be_outlined_by_choice_and_nothing_is_hatched_without_need():
    chosen = HeatMap("", "", "", ["a"], ["b", "c"], [[1.0], [1.1]], (1, 0), "seconds")
    assert chosen.outlined() == (1, 0)
    assert chosen.bar_label() == "seconds"
    drawn = svg("", [chosen], "light")
    assert "seconds" in texts(drawn)
    assert b"<pattern" not in drawn


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_map_of_runs_that_all_diverged_is_drawn(scheme):
    lost = HeatMap("", "", "", ["a"], ["b"], [[None]])
    assert lost.outlined() is None
    assert "diverged" in texts(svg("", [lost], scheme))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_file_has_the_same_bytes_each_time(scheme):
    pictures = [CURVES, MAP, SHADED]
    assert svg("A finding", pictures, scheme) == svg("A finding", pictures, scheme)
    drawn = svg("A finding", [CURVES], scheme)
    assert b"<dc:date>" not in drawn
    assert PAPER[SCHEMES.index(scheme)].encode() in drawn
    assert PAPER[1 - SCHEMES.index(scheme)].encode() not in drawn


def test_fields_and_clouds_of_points_keep_a_file_small():
    across = [i / 80 for i in range(81)]
    field = Field(across, across, [[math.sin(9 * x) + y for x in across] for y in across])
    path = [i / 20_000 for i in range(20_000)]
    waves = [0.5 + 0.4 * math.sin(3e4 * x) for x in path]
    cloud = Line("points", path, waves, mode="markers")
    drawn = svg("", [Chart("", "", "", [cloud], field=field)], "light")
    assert len(drawn) < 300_000
    assert b"data:image/png;base64" in drawn


@pytest.mark.parametrize(
    ("axis", "wanted"),
    [
        (Axis(1.0, 1000.0, True), "1 10 100 1,000"),
        (Axis(180.0, 1700.0, True), "200 500 1,000"),
        (Axis(1e-6, 2.0, True), "10⁻⁶ 10⁻⁵ 10⁻⁴ 10⁻³ 10⁻² 10⁻¹ 1"),
        (Axis(0.0, 20_000.0), "0 5,000 10,000 15,000 20,000"),
        (Axis(0.0, 2e7), "0 5M 10M 15M 20M"),
        (Axis(1.7, 2.3), "1.7 1.8 1.9 2.0 2.1 2.2 2.3"),
        (Axis(-0.2, 0.1), "-0.2 -0.1 0 0.1"),
    ],
    ids=lambda v: "" if isinstance(v, str) else f"{v.low:g}-{v.high:g}",
)
def test_ticks_are_round_numbers(axis, wanted):
    assert [text.replace("\N{MINUS SIGN}", "-") for _, text in axis.ticks()] == wanted.split()


@given(st.floats(-9, 9), st.floats(0.001, 12), st.booleans())
def test_ticks_do_not_collide(low, wide, log):
    axis = Axis(10**low, 10 ** (low + wide), True) if log else Axis(low, low + wide)
    ticks = axis.ticks()
    assert len(ticks) >= 2
    for (a, left), (b, right) in itertools.pairwise(ticks):
        assert 250 * (axis.part(b) - axis.part(a)) > 7 * (len(left) + len(right)) / 2  # pixels, on a phone


def test_ticks_can_be_given():
    ticks = ((100.0, "T / 2"), (200.0, "T"))
    chart = Chart("", "steps", "loss", [MIX], x_ticks=ticks)
    shown = texts(svg("", [chart], "light"))
    assert {"T / 2", "T"} <= set(shown)
    assert not {"100", "200"} & set(shown)


def test_numbers_are_written_for_people():
    assert numbers([1234567.0, 2e6]) == ["1.234567M", "2M"]
    assert numbers([0.5, 1.0], even=True) == ["0.5", "1.0"]
    assert numbers([]) == []


def test_a_range_on_an_axis_of_logarithms_is_in_the_numbers_of_the_data():
    chart = Chart("", "", "", [MIX], y_range=(0.1, 100.0), log_y=True)
    assert chart.axes()[1] == Axis(0.1, 100.0, True)
    assert chart.axes()[1].part(1.0) == pytest.approx(1 / 3)


def test_a_chart_of_one_point_under_ticks_is_drawn():
    line = Line("AdamW", [0.1], [0.5], mode="markers")
    drawn = svg("", [Chart("", "", "", [line], log_x=True, x_ticks=((0.1, "a tenth"), (1.0, "off")))], "light")
    assert {"a tenth", "off"} <= set(texts(drawn))


@pytest.mark.parametrize("log", [False, True])
def test_a_chart_without_a_point_is_drawn(log):
    chart = Chart("", "", "", [Line("AdamW", [], []), Line("KEMA", [1.0], [math.inf])], log_x=log, log_y=log)
    assert chart.labels(styles_of([chart])) == []
    for scheme in SCHEMES:
        ElementTree.fromstring(svg("", [chart], scheme))


@pytest.mark.parametrize("name", ["$x_1^$", "\ud800", "a\x00b\x0b", "<b>&", "多", "a\nb"])
def test_any_name_makes_a_whole_file(name):
    chart = Chart(name, name, name, [Line(name, [1.0, 2.0], [1.0, 2.0])], caption=name)
    assert svg(name, [chart], "light").count(b"</svg>") == 1
    ElementTree.fromstring(svg(name, [chart], "light"))


def test_the_picture_of_memories_shows_what_its_title_says():
    lines = {line.name: line for line in memory_picture.picture(100).lines}
    adamw = lines["AdamW"]
    # eps = 1e-8 next to a second moment of 1 takes that part; 0.9^100 is left out of the sum of weights.
    assert adamw.y == pytest.approx([0.1 * 0.9 ** (age - 1) / (1 - 0.9**100) for age in adamw.x], rel=1e-7)
    settings = suggest(memory_picture.STEPS)
    slow, alpha = settings["betas"][2], settings["alpha"]
    assert f"alpha = {alpha:g} and beta3 = {slow:g}" in memory_picture.CAPTION
    # The newest gradient weighs 0.1 with both. Below a hundredth of that:
    assert 10 < math.log(0.01) / math.log(0.9) < 100
    assert math.log(0.001 / (alpha * (1 - slow))) / math.log(slow) > 2000


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_picture_of_memories_says_what_readme_says(scheme):
    root = Path(__file__).parents[3]
    readme = (root / "README.md").read_text()
    assert f'"docs/images/memory-{scheme}.svg"' in readme
    drawn = (root / "docs" / "images" / f"memory-{scheme}.svg").read_bytes()
    assert len(drawn) < 300_000
    assert {"AdamW", "AdEMAMix", "ADana", "KEMA"} <= set(texts(drawn))
