"""Pictures as SVG, drawn with matplotlib: the same bytes for the same pictures."""

import io
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ademamix.lab.reports.pictures import (
    GRID,
    INK,
    MAP,
    OUTLINE,
    PAPER,
    SCHEMES,
    SOFT,
    Chart,
    HeatMap,
    Picture,
    Style,
    apart,
    styles_of,
)

WIDTH, HEIGHT = 4.8, 3.1  # inches of a picture: so narrow that a phone, which makes it smaller, can show its text
MANY = 2000  # points that are smaller as an image
# Text stays text, in the reader's own font. It is laid out in a wide one, so that any other fits.
MEASURED, SHOWN = "'DejaVu Sans', sans-serif", "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"


def svg(title: str, pictures: Sequence[Picture], scheme: str) -> bytes:
    """One image of all pictures.

    Args:
        title: what they show, in a sentence.
        pictures: from top to bottom.
        scheme: "light" or "dark".
    """
    which = SCHEMES.index(scheme)
    said, captions = _wrapped(title, 42), [_wrapped(picture.caption, 58) for picture in pictures]
    heights = [_height(p) + 0.3 + 0.17 * (1 + c.count("\n")) for p, c in zip(pictures, captions, strict=True)]
    with _look(which):
        figure = _figure(sum(heights) + 0.22 * (1 + said.count("\n")))
        figure.suptitle(said, x=0.02, ha="left", size=12, weight="bold", linespacing=1.3)
        parts = figure.subfigures(len(pictures), squeeze=False, height_ratios=heights)[:, 0]
        axes = [part.subplots() for part in parts]
        for picture, caption, axis in zip(pictures, captions, axes, strict=True):
            axis.set_title(_wrapped(picture.title, 48), pad=8 + 12 * _rows(picture))
            below = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "top", "size": 9}
            axis.annotate(caption, (0, 0), (-30, -38), color=SOFT[which], annotation_clip=False, **below)
        _draw(pictures, axes, styles_of(pictures), which)
        return _saved(figure, title)


def panel(picture: Picture, styles: dict[str, Style], scheme: str) -> tuple[bytes, tuple[float, float, float, float]]:
    """One picture without title and caption, and the box of its axes in parts of it: left, bottom, width, height.

    Args:
        picture: what to draw.
        styles: of the names in it.
        scheme: "light" or "dark".
    """
    which = SCHEMES.index(scheme)
    with _look(which):
        figure = _figure(_height(picture))
        axis = figure.subplots()
        _draw([picture], [axis], styles, which)
        return _saved(figure, picture.title), axis.get_position().bounds


@contextmanager
def _look(which: int) -> Iterator[None]:
    """Matplotlib's settings for a scheme."""
    import matplotlib

    paper, ink, soft, grid = (colors[which] for colors in (PAPER, INK, SOFT, GRID))
    look: Any = {
        **{"svg.fonttype": "none", "svg.hashsalt": "ademamix", "text.parse_math": False},
        **{"font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 10},
        **{"figure.facecolor": paper, "axes.facecolor": paper, "text.color": ink, "axes.edgecolor": soft},
        **{"axes.labelcolor": soft, "xtick.color": soft, "ytick.color": soft, "grid.color": grid},
        **{"axes.titlelocation": "left", "axes.titlesize": 10.5, "axes.spines.top": False, "axes.spines.right": False},
        **{"hatch.color": "#6b6000", "hatch.linewidth": 1.0, "axes.axisbelow": True, "axes.grid": True},
    }
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(look)
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a reader's font may have it
        yield


def _figure(height: float) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure((WIDTH, height), layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1))


def _draw(pictures: Sequence[Picture], axes: Sequence[Any], styles: dict[str, Style], which: int) -> None:
    for picture, axis in zip(pictures, axes, strict=True):
        axis.set(xlabel=_text(picture.x_label), ylabel=_wrapped(picture.y_label, 28))
        if isinstance(picture, Chart):
            _chart(picture, axis, styles, which)
        else:
            _heat_map(picture, axis, which)
    axes[0].get_figure(root=True).draw_without_rendering()  # only now the height of an axis is known
    for picture, axis in zip(pictures, axes, strict=True):
        if isinstance(picture, Chart):
            _label(picture, axis, styles, which)


def _saved(figure: Any, title: str) -> bytes:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Title": _text(title)}, dpi=144)
    return file.getvalue().replace(MEASURED, SHOWN).encode()


def _text(text: str) -> str:
    """On one line, of characters that there are in XML."""
    return re.sub(r"[^\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", " ".join(text.split()))


def _wrapped(text: str, letters: int) -> str:
    return "\n".join(textwrap.wrap(_text(text), letters))


def _pale(paper: str) -> Any:
    """The map's colors, halfway to the paper's. Shades that let it through would show seams where they touch."""
    import matplotlib
    import numpy as np
    from matplotlib.colors import ListedColormap, to_rgba

    return ListedColormap((matplotlib.colormaps[MAP](np.linspace(0, 1, 256)) + to_rgba(paper)) / 2)


def _height(picture: Picture) -> float:
    return HEIGHT + 0.17 * _rows(picture)


def _legend(chart: Chart) -> tuple[int, list[str]]:
    """How many columns a legend has room for, and its names, cut into lines that fit."""
    names = [_wrapped(line.name, 46) for line in chart.lines]
    longest = max((len(row) for name in names for row in name.split("\n")), default=0)
    return max(1, min(3, int(72 * WIDTH / (5.2 * longest + 44)))), names


def _rows(picture: Picture) -> int:
    """Of text in a legend."""
    if not isinstance(picture, Chart) or picture.labeled:
        return 0
    columns, names = _legend(picture)
    return -(-sum(1 + name.count("\n") for name in names) // columns)


def _chart(chart: Chart, axis: Any, styles: dict[str, Style], which: int) -> None:
    x_axis, y_axis = chart.axes()
    axis.set_xscale("log" if chart.log_x else "linear")
    axis.set_yscale("log" if chart.log_y else "linear")
    axis.set(xlim=(x_axis.low, x_axis.high), ylim=(y_axis.low, y_axis.high))  # first: none is sought then
    if chart.field is not None:
        shades = axis.contourf(chart.field.x, chart.field.y, chart.field.z, levels=24, cmap=_pale(PAPER[which]))
        shades.set_rasterized(True)
    for y, _ in chart.reference:
        axis.axhline(y, color=SOFT[which], lw=0.8, zorder=1.5)
    columns, names = _legend(chart)
    for line, name in zip(chart.lines, names, strict=True):
        color, dash = styles[line.name].colors[which], styles[line.name].dash
        if edges := chart.edges(line):
            x, low, high = zip(*edges, strict=True)
            axis.fill_between(x, low, high, color=color, alpha=0.2 + 0.05 * which, lw=0)
        marker = "o" if "markers" in line.mode else ""
        look = {"color": color, "ls": dash if "lines" in line.mode else "", "lw": 2, "marker": marker, "ms": 5}
        many = bool(marker) and len(line.x) > MANY
        axis.errorbar(line.x, line.y, line.bars, label=name, elinewidth=1.5, capsize=3, rasterized=many, **look)
    for ticks, set_ticks in (
        (chart.x_ticks or x_axis.ticks(), axis.set_xticks),
        (chart.y_ticks or y_axis.ticks(), axis.set_yticks),
    ):
        set_ticks(*zip(*ticks, strict=True))
        set_ticks([], minor=True)
    axis.tick_params(length=3)
    if not chart.labeled:
        above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": columns, "borderaxespad": 0}
        axis.legend(frameon=False, fontsize="small", handlelength=2.8, **above)


def _label(chart: Chart, axis: Any, styles: dict[str, Style], which: int) -> None:
    """Labels at the right ends of lines and above reference lines, moved apart."""
    labels = chart.labels(styles)
    points = 72 / axis.figure.dpi
    box = axis.get_window_extent()
    wide, tall = box.width * points, box.height * points
    x_axis, y_axis = chart.axes()
    at = [tall * y_axis.part(s.y) for s in labels]
    boxes = [
        (wide * x_axis.part(s.x) - s.inward * s.wide, s.wide, y + 8 * s.reference)
        for s, y in zip(labels, at, strict=True)
    ]
    for label, place, y in zip(labels, at, apart(boxes, 13.0, tall), strict=True):
        axis.annotate(
            _text(label.text),
            (label.x, label.y),
            (-6 if label.inward else 6, y - place),
            ha="right" if label.inward else "left",
            textcoords="offset points",
            color=label.colors[which],
            va="center",
            annotation_clip=False,
            bbox={"facecolor": PAPER[which], "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
        )


def _heat_map(heat_map: HeatMap, axis: Any, which: int) -> None:
    import numpy as np
    from matplotlib.patches import Rectangle

    least, most = heat_map.range()
    z = np.ma.masked_invalid(np.array(heat_map.z, float))  # None becomes NaN, which stays as the paper
    cells = axis.pcolormesh(z, cmap=MAP, vmin=least, vmax=most, edgecolors=PAPER[which], linewidth=2)
    beyond = heat_map.beyond()
    look = {"location": "top", "aspect": 40, "pad": 0.02, "extend": "max" if beyond else "neither"}
    bar = axis.figure.colorbar(cells, ax=axis, label=_text(heat_map.bar_label()), **look)
    bar.outline.set_visible(False)
    for row, column in beyond:
        axis.add_patch(Rectangle((column, row), 1, 1, fill=False, hatch="///", lw=0))
    if (best := heat_map.outlined()) is not None:
        axis.add_patch(Rectangle(best[::-1], 1, 1, fill=False, ec=OUTLINE, lw=2.5, zorder=3, clip_on=False))
    texts = heat_map.texts()
    for row, column, value in heat_map.cells():
        color = PAPER[which] if value is None else cells.to_rgba(value)
        dark = value is not None and value < (least + most) / 2
        ink = SOFT[which] if value is None else "white" if dark else "black"
        behind = {"facecolor": color, "edgecolor": "none", "pad": 1.5}
        here = (column + 0.5, row + 0.5)
        axis.text(*here, texts[row][column], ha="center", va="center", size=8.5, color=ink, bbox=behind)
    axis.set_xticks([i + 0.5 for i in range(len(heat_map.x))], map(_text, heat_map.x))
    axis.set_yticks([i + 0.5 for i in range(len(heat_map.y))], map(_text, heat_map.y))
    axis.tick_params(length=0)
    axis.grid(False)
    axis.spines[:].set_visible(False)
