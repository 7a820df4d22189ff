"""A comparison as one HTML page that needs no network, as a picture, and as tables on the terminal."""

import dataclasses
import html
import json
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from rich.table import Table

from ademamix.lab.compare import Comparison
from ademamix.lab.console import OUT, say
from ademamix.lab.train import Result

NAMES = {"adamw": "AdamW", "ademamix": "AdEMAMix"}
Cells = tuple[str, ...]


@dataclass(frozen=True)
class Line:
    """A line in a picture. Okabe and Ito's colours are told apart by all eyes, the dashes also without any colour."""

    name: str
    x: list[float]
    y: list[float]
    light: str  # colour on white
    dark: str  # colour on black
    dash: str  # as Plotly names it
    mode: str = "lines"


@dataclass(frozen=True)
class Picture:
    """Lines over one x axis; y is always the validation loss."""

    title: str
    x_label: str
    lines: list[Line]
    y_range: tuple[float, float]


def _line(name: str, x: list[float], y: list[float], mode: str = "lines") -> Line:
    if name == "adamw":
        return Line(NAMES[name], x, y, "#0072B2", "#56B4E9", "dash", mode)
    return Line(NAMES[name], x, y, "#D55E00", "#E69F00", "solid", mode)


def pictures(c: Comparison) -> list[Picture]:
    """Return what the page shows: the loss against tokens, seconds and, with --match, AdamW's budget."""

    def of(run: Result, key: str) -> list[float]:
        return [point[key] for point in run.curve]

    runs = (c.adamw, c.ademamix)
    # Without the steep start, a tenth of the budget: the ends of the curves are what one wants to tell apart.
    curves = _around([point["valid_loss"] for run in runs for point in run.curve if 10 * point["step"] >= run.steps])
    shown = [
        Picture(title, label, [_line(run.optimizer, of(run, key), of(run, "valid_loss")) for run in runs], curves)
        for key, title, label in (
            ("tokens", "Validation loss against tokens", "training tokens"),
            ("seconds", "Validation loss against seconds", "seconds of training"),
        )
    ]
    if c.matched is not None:
        budgets, losses = [x for x, _ in c.matched.trials], [y for _, y in c.matched.trials]
        goal = c.ademamix.valid_loss
        ends = [budgets[0], budgets[-1]]
        lines = [_line("adamw", budgets, losses, "lines+markers"), _line("ademamix", ends, [goal, goal])]
        title, label = "AdamW's tokens to AdEMAMix's loss", "AdamW's budget (AdEMAMix = 1)"
        shown.append(Picture(title, label, lines, _around([*losses, goal])))
    return shown


def _around(values: list[float]) -> tuple[float, float]:
    margin = 0.06 * (max(values) - min(values)) or 0.01
    return min(values) - margin, max(values) + margin


def result_table(c: Comparison) -> list[Cells]:
    """Return the comparison's table, the heads first."""

    def row(what: str, form: str, key: str) -> Cells:
        return (what, *(format(getattr(run, key), form) for run in (c.adamw, c.ademamix)))

    at = c.reached_at
    return [
        ("", *NAMES.values()),
        row("final validation loss, nats a token", ".4f", "valid_loss"),
        ("budget until AdamW's final loss", "100 %", "never there" if at is None else f"{100 * at:.1f} %"),
        row("optimizer, median ms a step", ".2f", "optimizer_ms"),
        row("optimizer state, bytes a parameter", ".1f", "state_bytes_per_parameter"),
        row("steps skipped, gradient not finite", ",", "skipped_steps"),
        row("training, seconds", ".1f", "seconds"),
    ]


def match_table(c: Comparison) -> list[Cells]:
    """Return the budgets that AdamW tried with --match and what they came to, the heads first; empty without."""
    if c.matched is None:
        return []
    tried = [(f"AdamW, {factor:g} x the tokens", f"{loss:.4f}") for factor, loss in c.matched.trials]
    return [("run", "final loss"), *tried, ("AdEMAMix", f"{c.ademamix.valid_loss:.4f}")]


def print_tables(c: Comparison) -> None:
    """Print what the page's tables say."""
    for cells in filter(None, (result_table(c), match_table(c))):
        table = Table(*cells[0])
        for row in cells[1:]:
            table.add_row(*row)
        OUT.print(table)
    for line in c.headlines():
        say(line)


def write_page(c: Comparison, path: Path) -> None:
    """Write the report."""
    from plotly.offline import get_plotlyjs

    recipe = {key: value for key, value in dataclasses.asdict(c.recipe).items() if key not in NAMES}
    about = {"parameters": f"{c.adamw.parameters:,}", "initial weights, SHA-256": c.adamw.initial_weights[:16]}
    adamw, ademamix = (dataclasses.asdict(getattr(c.recipe, name)) for name in NAMES)
    optimizers = [(key, adamw.get(key, ""), value) for key, value in ademamix.items()]
    shown = pictures(c)
    page = Template((Path(__file__).parent / "report.html").read_text(encoding="utf-8")).substitute(
        headlines="".join(f"<p>{html.escape(line)}.</p>" for line in c.headlines()),
        pictures="".join(f"<section><h2>{html.escape(p.title)}</h2><div class=picture></div></section>" for p in shown),
        results="".join(_html(table) for table in (result_table(c), match_table(c)) if table),
        commands=html.escape("\n".join(c.commands)),
        run=_html([("run", ""), *about.items(), *recipe.items()]),
        optimizers=_html([("optimizer", *NAMES.values()), *optimizers]),
        machine=_html([("machine", ""), ("", c.machine), *c.versions.items()]),
        plotly=get_plotlyjs(),
        data=json.dumps([dataclasses.asdict(picture) for picture in shown]),
    )
    aside = path.with_name(path.name + ".partial")
    aside.write_text(page, encoding="utf-8")
    aside.replace(path)


def _html(table: list[Any]) -> str:
    def row(cells: Any, tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{row(table[0], 'th')}{''.join(row(cells, 'td') for cells in table[1:])}</table>"


def write_png(c: Comparison, path: Path) -> None:
    """Write the page's pictures side by side."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    shown = pictures(c)
    figure, axes = pyplot.subplots(1, len(shown), figsize=(5 * len(shown), 3.8), layout="constrained")
    for picture, axis in zip(shown, axes, strict=True):
        for line in picture.lines:
            marker = "o" if "markers" in line.mode else ""
            dash = {"dash": "--", "solid": "-"}[line.dash]
            axis.plot(line.x, line.y, label=line.name, color=line.light, ls=dash, lw=2, marker=marker)
        axis.set(title=picture.title, xlabel=picture.x_label, ylabel="nats a token", ylim=picture.y_range)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
