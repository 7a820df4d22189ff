"""What a report's pictures show, and how. `svg.py` draws them, `stops.py` says what a reader sees who points at one."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise

# Light and dark. As text, each has a contrast of at least 4.5 to its paper, and so has every color of a line.
Colors = tuple[str, str]
SCHEMES = ("light", "dark")
PAPER, INK, SOFT, GRID = ("#ffffff", "#0d1117"), ("#1c2126", "#e8ebee"), ("#5b6570", "#a0a9b3"), ("#dfe3e8", "#323a43")

# After Okabe and Ito, whose colors are told apart by all eyes, on white a little darker; the dashes tell without any.
ADAMW, ADEMAMIX = ("#0072B2", "#56B4E9"), ("#BF5200", "#E69F00")
OTHERS = (
    ("#007D5A", "#2CC79B"),
    ("#AA4499", "#CC79A7"),
    ("#5B6570", "#A0A9B3"),
    ("#806300", "#F0E442"),
    ("#117733", "#88CCAA"),
    ("#882255", "#E59AB6"),
)
Dash = str | tuple[int, tuple[int, ...]]  # as matplotlib has it
DASHES: tuple[Dash, ...] = (":", "-.", (0, (8, 3)), "-", "--")  # 5, which has no divisor with 6 colors: 30 pairs
MAP = "cividis"  # of heat maps: even and readable for all eyes
OUTLINE = "#D55E00"  # of the best cell: seen on both ends of the map

MOST, LONGEST = 7, 14  # labeled lines, and letters of a label: beyond them a legend is easier to read
ROOM = 250.0  # pixels of an axis, on a phone
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Style:
    """How a line looks in all pictures of a report."""

    colors: Colors
    dash: Dash


@dataclass(frozen=True)
class Line:
    """A line, or points, in a chart."""

    name: str
    x: list[float]
    y: list[float]
    error: list[float] | None = None  # half the height of the error bars; the y label or the caption says of what
    mode: str = "lines"  # or "markers", or "lines+markers"
    band: tuple[list[float], list[float]] | None = None  # its lower and its upper edge, as for `error`

    @property
    def bars(self) -> list[float] | None:
        """The error bars, where they can be drawn: one seed has no standard error."""
        return self.error if self.error and all(map(math.isfinite, self.error)) else None

    def edges(self) -> list[tuple[float, float, float]]:
        """x, lower and upper edge of the band, where they are numbers."""
        points = zip(self.x, *(self.band or ([], [])), strict=False)
        return [point for point in points if all(map(math.isfinite, point))]


@dataclass(frozen=True)
class Axis:
    """What an axis shows."""

    low: float
    high: float
    log: bool = False

    def can_show(self, value: float) -> bool:
        """Whether a value is anywhere on such an axis."""
        return math.isfinite(value) and (value > 0 or not self.log)

    def shows(self, value: float) -> bool:
        return self.low <= value <= self.high

    def place(self, value: float) -> float:
        """Where a value is, in the coordinates that the axis is even in."""
        return math.log10(value) if self.log else value

    def part(self, value: float) -> float:
        """Where a value is: from 0 at the low end to 1 at the high one."""
        low, high = self.place(self.low), self.place(self.high)
        return (self.place(min(max(value, self.low), self.high)) - low) / (high - low)

    def ticks(self) -> list[tuple[float, str]]:
        """Round numbers with their texts: as many as have room on a phone."""
        for values in self._candidates():
            shown = list(filter(self.shows, (float(f"{v:.12g}") for v in values)))  # 2.3, not 2.3000000000000003
            ticks = [(v, text) for v, text in zip(shown, numbers(shown, even=not self.log), strict=True)]
            rooms = [max(38.0, 7 * len(text) + 8) for _, text in ticks]
            gaps = [ROOM * (self.part(b[0]) - self.part(a[0])) for a, b in pairwise(ticks)]
            wanted = [(a + b) / 2 for a, b in pairwise(rooms)]
            if len(ticks) > 1 and all(gap >= room for gap, room in zip(gaps, wanted, strict=True)):
                return ticks
        return list(zip((self.low, self.high), numbers([self.low, self.high]), strict=True))

    def _candidates(self) -> Iterator[list[float]]:
        """Finer ones first."""
        from matplotlib.ticker import MaxNLocator

        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for factors in ((1, 2, 5), (1,)):
                yield [float(f"{f}e{p}") for p in powers for f in factors]
            for every in (2, 3, 5, 10):
                yield [float(f"1e{p}") for p in powers if p % every == 0]
        for most in (6, 5, 4, 3, 2):
            yield list(map(float, MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high)))


@dataclass(frozen=True)
class Label:
    """What stands to the right of a point, or above a reference line at one of its ends."""

    text: str
    x: float
    y: float
    colors: Colors
    reference: bool = False  # of a reference line
    inward: bool = False  # to the left of its point

    @property
    def wide(self) -> float:
        """About how wide it is, in points."""
        return 6.4 * len(self.text) + 6


@dataclass(frozen=True)
class Chart:
    """Lines over one x axis, perhaps above a field that is drawn as shades."""

    title: str
    x_label: str
    y_label: str
    lines: list[Line]
    y_range: tuple[float, float] | None = None
    x_range: tuple[float, float] | None = None
    log_x: bool = False
    log_y: bool = False
    field: "Field | None" = None
    reference: tuple[tuple[float, str], ...] = ()  # horizontal lines and their labels: nothing measured
    x_ticks: tuple[tuple[float, str], ...] = ()  # in place of round numbers
    y_ticks: tuple[tuple[float, str], ...] = ()
    caption: str = ""

    def axes(self) -> tuple[Axis, Axis]:
        """Of x and of y."""
        edges = [point for line in self.lines for point in line.edges()]
        x = [v for line in self.lines for v in line.x] + [tick for tick, _ in self.x_ticks]
        y = [v for line in self.lines for v in line.y] + [v for v, _ in (*self.reference, *self.y_ticks)]
        y += [v for _, low, high in edges for v in (low, high)]
        for line in self.lines:
            y += [y + side * bar for y, bar in zip(line.y, line.bars or [], strict=False) for side in (-1, 1)]
        return _axis(x, self.log_x, self.x_range, 0.02), _axis(y, self.log_y, self.y_range, 0.06)

    def edges(self, line: Line) -> list[tuple[float, float, float]]:
        """Of a line's band: x, lower and upper edge, as far as they can be drawn."""
        least = self.axes()[1].low if self.log_y else -math.inf
        return [(x, max(low, least), max(high, least)) for x, low, high in line.edges()]

    @property
    def described(self) -> str:
        """What is drawn, for those who do not see it."""
        return f"Chart of {self.y_label} by {self.x_label}: {', '.join(line.name for line in self.lines)}"

    @property
    def labeled(self) -> bool:
        """Whether the lines are labeled at their ends, or in a legend: labels would hide a field, for one."""
        return self.field is None and len(self.lines) <= MOST and all(len(s.name) <= LONGEST for s in self.lines)

    def labels(self, styles: dict[str, Style]) -> list[Label]:
        """Of lines at their right ends, as far as they are shown, and of reference lines."""
        x_axis, y_axis = self.axes()
        found = []
        for y, text in self.reference:
            inward = self._is_freer_at_the_right(y)
            found.append(Label(text, x_axis.high if inward else x_axis.low, y, SOFT, True, inward))
        for line in self.lines if self.labeled else ():
            points = [p for p in zip(line.x, line.y, strict=True) if x_axis.shows(p[0]) and y_axis.can_show(p[1])]
            # The last point that is seen. A line above or below the axis all along is named at its edge.
            if points := [p for p in points if y_axis.shows(p[1])] or points:
                x, y = max(reversed(points), key=lambda point: point[0])
                x = x_axis.high if x_axis.part(x) > 0.9 else x  # so that labels stand in line
                found.append(Label(line.name, x, min(max(y, y_axis.low), y_axis.high), styles[line.name].colors))
        return found

    def _is_freer_at_the_right(self, level: float) -> bool:
        """Whether what is measured stays farther away from a reference line's right end than from its left end."""
        x_axis, y_axis = self.axes()
        every = [p for line in self.lines for p in zip(line.x, line.y, strict=True) if y_axis.can_show(p[1])]
        places = [(x_axis.part(x), abs(y_axis.part(y) - y_axis.part(level))) for x, y in every]
        left, right = (min((gap for x, gap in places if abs(x - end) < 0.4), default=1.0) for end in (0.0, 1.0))
        return right > left


@dataclass(frozen=True)
class Field:
    """A function of two variables behind a chart's lines: z[row of y][column of x]."""

    x: list[float]
    y: list[float]
    z: list[list[float]]


@dataclass(frozen=True)
class HeatMap:
    """Numbers by two settings; None where a run diverged."""

    title: str
    x_label: str
    y_label: str
    x: list[str]
    y: list[str]
    z: list[list[float | None]] = field(default_factory=list)  # [row of y][column of x]
    best: tuple[int, int] | None = None  # row and column of the cell that is outlined: the lowest by itself
    z_label: str = "validation loss, nats"
    caption: str = ""

    @property
    def described(self) -> str:
        """What is drawn, for those who do not see it."""
        return f"Heat map of {self.z_label} by {self.x_label} and {self.y_label}"

    def cells(self) -> Iterator[tuple[int, int, float | None]]:
        """Row, column and value."""
        return ((row, column, v) for row, values in enumerate(self.z) for column, v in enumerate(values))

    def texts(self) -> list[list[str]]:
        return [["diverged" if value is None else f"{value:.4f}" for value in row] for row in self.z]

    def outlined(self) -> tuple[int, int] | None:
        """Row and column of the best cell; none if all runs diverged."""
        there = [(value, row, column) for row, column, value in self.cells() if value is not None]
        return self.best or (min(there)[1:] if there else None)

    def beyond(self) -> list[tuple[int, int]]:
        """Rows and columns of cells whose value has no color of its own, and which are hatched."""
        most = self.range()[1]
        return [(row, column) for row, column, value in self.cells() if value is not None and value > most]

    def range(self) -> tuple[float, float]:
        """Where colors begin and end: a few runs that went wrong must not take all of them."""
        values = [value for row in self.z for value in row if value is not None] or [0.0]
        least = min(values)
        usual = least + 4 * (statistics.median(values) - least)
        return least, min(max(values), usual) if usual > least else max(values)

    def bar_label(self) -> str:
        return self.z_label + (" (hatched: above the scale)" if self.beyond() else "")


Picture = Chart | HeatMap


def around(values: list[float]) -> tuple[float, float]:
    """A range that shows all values, with a margin."""
    margin = 0.06 * (max(values) - min(values)) or 0.01
    return min(values) - margin, max(values) + margin


def styles_of(pictures: Sequence[Picture]) -> dict[str, Style]:
    """The style of each name, one and the same in all of a report's pictures; AdamW and AdEMAMix have theirs anywhere.

    Thirty other names are told apart.
    """
    styles = {"AdamW": Style(ADAMW, "--"), "AdEMAMix": Style(ADEMAMIX, "-")}
    others = count()
    for picture in pictures:
        for line in picture.lines if isinstance(picture, Chart) else ():
            if line.name not in styles:
                number = next(others)
                styles[line.name] = Style(OTHERS[number % len(OTHERS)], DASHES[number % len(DASHES)])
    return styles


def apart(boxes: Sequence[tuple[float, float, float]], tall: float, room: float) -> list[float]:
    """New heights of labels, of which none covers another: each as near to its own as the others let it.

    Args:
        boxes: left side, width and height of the middle, each above 0.
        tall: how tall a label is.
        room: the height that there is.
    """
    heights = [y for _, _, y in boxes]
    for group in _groups([(left, left + width) for left, width, _ in boxes]):
        group.sort(key=lambda i: heights[i])
        # Least squares under the order: those that would overlap form blocks, each around its mean.
        blocks: list[list[float]] = []
        for place, i in enumerate(group):
            blocks.append([heights[i] - place * tall])
            while len(blocks) > 1 and statistics.mean(blocks[-2]) > statistics.mean(blocks[-1]):
                blocks[-2:] = [blocks[-2] + blocks[-1]]
        lows = [statistics.mean(block) for block in blocks for _ in block]
        highest = room - (len(group) - 1) * tall
        for place, (i, low) in enumerate(zip(group, lows, strict=True)):
            heights[i] = max(0.0, min(low, highest)) + place * tall
    return heights


def _groups(spans: Sequence[tuple[float, float]]) -> list[list[int]]:
    """The numbers of those that overlap, directly or through others."""
    groups: list[list[int]] = []
    reached = -math.inf
    for i in sorted(range(len(spans)), key=lambda i: spans[i]):
        if not groups or spans[i][0] >= reached:
            groups.append([])
        groups[-1].append(i)
        reached = max(reached, spans[i][1])
    return groups


def numbers(values: Sequence[float], even: bool = False) -> list[str]:
    """Round numbers for people: 20,000; 1.5M; 0.02; 10⁻⁵. Where even, all with as many decimals."""
    size, sign = next(((z, s) for z, s in ((1e9, "B"), (1e6, "M")) if max(map(abs, values), default=0) >= z), (1, ""))
    texts = [f"{v / size:,.10g}" for v in values]
    if any("e" in text for text in texts):
        return [_power(v) for v in values]
    decimals = max((len(text.partition(".")[2]) for text in texts), default=0)
    texts = [f"{v / size:,.{decimals}f}" for v in values] if even else texts
    return [(text + sign if float(text.replace(",", "")) else "0").replace("-", MINUS) for text in texts]


def _power(value: float) -> str:
    if abs(value) >= 1 or not value:
        return f"{value:,.10g}".replace("-", MINUS)
    factor, _, power = f"{value:.3e}".partition("e")
    raised = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{float(factor):g}·10{raised}".removeprefix("1·").replace("-", MINUS)


def _axis(values: list[float], log: bool, given: tuple[float, float] | None, margin: float) -> Axis:
    if given is not None:
        return Axis(*given, log)
    values = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    if not values:
        return Axis(1.0, 10.0, log) if log else Axis(0.0, 1.0)
    if log:
        more = (max(values) / min(values)) ** margin if max(values) > min(values) else 1.1
        return Axis(min(values) / more, max(values) * more, log)
    more = margin * (max(values) - min(values)) or 0.01 * abs(max(values)) or 0.01
    return Axis(min(values) - more, max(values) + more)
