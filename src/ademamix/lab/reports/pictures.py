"""Pictures, once: as traces for Plotly, which the page draws, and with matplotlib, for files."""

import html
import io
import math
import statistics
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from ademamix.lab.config import write_whole

# Okabe and Ito's colours are told apart by all eyes, the dashes also without any colour: on white, on black, dash.
STYLES = {
    "AdamW": ("#0072B2", "#56B4E9", "dash"),
    "AdEMAMix": ("#D55E00", "#E69F00", "solid"),
    2: ("#009E73", "#2CC79B", "dot"),
    3: ("#AA4499", "#CC79A7", "dashdot"),
    4: ("#5B6570", "#A0A9B3", "longdash"),
    5: ("#8C6D00", "#F0E442", "solid"),
    6: ("#117733", "#88CCAA", "dash"),
    7: ("#882255", "#E59AB6", "dot"),
}
OTHERS = len(STYLES) - 2
DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-.", "longdash": (0, (8, 3))}  # matplotlib's
MAP = "Cividis"  # of heat maps: even and readable for all eyes


@dataclass(frozen=True)
class Line:
    """A line, or points, in a chart."""

    name: str
    x: list[float]
    y: list[float]
    error: list[float] | None = None  # half the height of the error bars
    mode: str = "lines"  # as Plotly names it

    @property
    def bars(self) -> list[float] | None:
        """The error bars, where they can be drawn: one seed has no standard error."""
        return self.error if self.error and all(map(math.isfinite, self.error)) else None


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
    reference: tuple[tuple[float, str], ...] = ()  # horizontal lines, each with its label

    def styles(self) -> list[tuple[str, str, str]]:
        """Colours and dash of each line: AdamW and AdEMAMix have theirs everywhere."""
        others = count()
        return [STYLES[s.name if s.name in STYLES else 2 + next(others) % OTHERS] for s in self.lines]

    def traces(self) -> list[dict[str, Any]]:
        """What Plotly draws; colours are pairs, for light and for dark, of which the page takes one."""
        shades = [] if self.field is None else [self.field.trace()]
        return (
            shades
            + [
                {
                    "type": "scatter",
                    "x": line.x,
                    "y": line.y,
                    "name": html.escape(line.name, quote=False),  # Plotly reads tags
                    "showlegend": True,  # Plotly would leave a line without a name if the others diverged
                    "mode": line.mode,
                    "colors": style[:2],
                    "line": {"dash": style[2], "width": 2.5},
                    "marker": {"size": 8},
                    "hovertemplate": "%{y:.3g}" if self.log_y else "%{y:.4f}",
                    **(
                        {}
                        if line.bars is None
                        else {"error_y": {"array": line.bars, "visible": True, "thickness": 1.5}}
                    ),
                }
                for line, style in zip(self.lines, self.styles(), strict=True)
            ]
        )

    def layout(self) -> dict[str, Any]:
        """Plotly's layout, but for colours."""
        x = {"title": {"text": self.x_label}, "type": "log" if self.log_x else "linear", "range": self.x_range}
        y = {"title": {"text": self.y_label}, "type": "log" if self.log_y else "linear", "range": self.y_range}
        lines = [
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": at, "y1": at, "label": {"text": label}}
            for at, label in self.reference
        ]
        return {"xaxis": x, "yaxis": y, "hovermode": "x unified" if self.field is None else "closest", "shapes": lines}

    def draw(self, axis: Any) -> None:
        """Draw on an axis of matplotlib's."""
        axis.set_xscale("log" if self.log_x else "linear")
        axis.set_yscale("log" if self.log_y else "linear")
        if self.field is not None:
            axis.contourf(self.field.x, self.field.y, self.field.z, levels=24, cmap=MAP.lower(), alpha=0.55)
        for line, (colour, _, dash) in zip(self.lines, self.styles(), strict=True):
            marker = "o" if "markers" in line.mode else ""
            style = {"color": colour, "ls": DASHES[dash] if "lines" in line.mode else "", "lw": 2, "marker": marker}
            label = line.name.replace("$", r"\$")  # it would begin a formula
            axis.errorbar(line.x, line.y, line.bars, label=label, elinewidth=1.5, capsize=3, **style)
        for at, label in self.reference:
            axis.axhline(at, color="gray", lw=1, label=label)
        axis.set(title=self.title, xlabel=self.x_label, ylabel=self.y_label, xlim=self.x_range, ylim=self.y_range)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if self.lines:
            axis.legend(frameon=False, fontsize="small")


@dataclass(frozen=True)
class Field:
    """A function of two variables behind a chart's lines: z[row of y][column of x]."""

    x: list[float]
    y: list[float]
    z: list[list[float]]

    def trace(self) -> dict[str, Any]:
        look = {"colorscale": MAP, "opacity": 0.45, "showscale": False, "hoverinfo": "skip", "ncontours": 24}
        return {"type": "contour", "x": self.x, "y": self.y, "z": self.z, "line": {"width": 0}, **look}


@dataclass(frozen=True)
class HeatMap:
    """Numbers by two settings; None where a run diverged."""

    title: str
    x_label: str
    y_label: str
    x: list[str]
    y: list[str]
    z: list[list[float | None]] = field(default_factory=list)  # [row of y][column of x]

    def _texts(self) -> list[list[str]]:
        return [["diverged" if value is None else f"{value:.4f}" for value in row] for row in self.z]

    def _range(self) -> tuple[float, float]:
        """Where colours begin and end: a few runs that went wrong must not take all of them."""
        values = [value for row in self.z for value in row if value is not None]
        least = min(values)
        usual = least + 4 * (statistics.median(values) - least)
        return least, min(max(values), usual) if usual > least else max(values)

    def traces(self) -> list[dict[str, Any]]:
        """What Plotly draws."""
        ends = dict(zip(("zmin", "zmax"), self._range(), strict=True))
        shown = {
            "text": self._texts(),
            "texttemplate": "%{text}",
            "hovertemplate": "%{x}, %{y}: %{text}<extra></extra>",
        }
        look = {"colorscale": MAP, "showscale": False, "xgap": 2, "ygap": 2}
        return [{"type": "heatmap", "x": self.x, "y": self.y, "z": self.z, **ends, **shown, **look}]

    def layout(self) -> dict[str, Any]:
        """Plotly's layout, but for colours."""
        x = {"title": {"text": self.x_label}, "type": "category"}
        return {"xaxis": x, "yaxis": {"title": {"text": self.y_label}, "type": "category"}}

    def draw(self, axis: Any) -> None:
        """Draw on an axis of matplotlib's."""
        import numpy as np

        z = np.array(self.z, float)  # None becomes NaN, which stays white
        least, most = self._range()
        axis.imshow(z, cmap=MAP.lower(), origin="lower", aspect="auto", vmin=least, vmax=most)
        for row, texts in enumerate(self._texts()):
            for column, text in enumerate(texts):
                dark = z[row, column] < (least + most) / 2
                axis.text(column, row, text, ha="center", va="center", size=8, color="white" if dark else "black")
        axis.set_xticks(range(len(self.x)), self.x)
        axis.set_yticks(range(len(self.y)), self.y)
        axis.set(title=self.title, xlabel=self.x_label, ylabel=self.y_label)


Picture = Chart | HeatMap


def around(values: list[float]) -> tuple[float, float]:
    """A range that shows all values, with a margin."""
    margin = 0.06 * (max(values) - min(values)) or 0.01
    return min(values) - margin, max(values) + margin


def write_png(pictures: list[Picture], path: Path) -> None:
    """Draw pictures into one file, two in a row."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    columns = min(2, len(pictures))
    rows = -(-len(pictures) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(5.5 * columns, 4 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(pictures) :]:
        axis.remove()
    for picture, axis in zip(pictures, axes.flat, strict=False):
        picture.draw(axis)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120)
    write_whole(path, drawn.getvalue())
    pyplot.close(figure)
