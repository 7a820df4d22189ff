"""What a run shows while it works: a progress bar on a terminal, plain lines elsewhere."""

import textwrap
import time
from types import TracebackType

from rich.console import Console, RenderableType
from rich.constrain import Constrain
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ademamix.lab.config import Training

OUT = Console()
PLAIN_EVERY = 10.0  # seconds between two plain lines


def say(text: str) -> None:
    """Print a line; on a terminal it wraps between words, of which none is cut or colored: people copy paths."""
    if OUT.is_terminal:
        text = textwrap.fill(text, OUT.width, break_long_words=False, break_on_hyphens=False)
    OUT.print(text, highlight=False, markup=False, soft_wrap=True)


class _Bars(Progress):
    """Bars that leave room for the ^C that a terminal shows: if it went to the next line, rich would draw below it."""

    def get_renderable(self) -> RenderableType:
        return Constrain(super().get_renderable(), OUT.width - len("^C") - 1)


class Show:
    """The progress of one run, a context manager.

    Args:
        name: the run's, for people.
        recipe: the run's.
        start: the step from which it resumes.
        quiet: show nothing.
        below: the progress of a run that is under way at the same time; the new bar is drawn below.
    """

    def __init__(
        self, name: str, recipe: Training, start: int, *, quiet: bool = False, below: "Show | None" = None
    ) -> None:
        self.name, self.recipe, self.steps, self.start, self.quiet = name, recipe, recipe.steps, start, quiet
        self.began = self.said = time.perf_counter()
        self.valid = ""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
        )
        disable = quiet or not OUT.is_terminal
        self.bar: Progress = below.bar if below else _Bars(*columns, console=OUT, disable=disable)
        self.task = self.bar.add_task(f"{name:<10}", total=self.steps, completed=start, numbers="")

    def __enter__(self) -> "Show":
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.stop()

    def update(self, step: int, loss: float, valid_loss: float | None = None, *, rate: float | None = None) -> None:
        """Show where the run is; it is `rate` steps per second fast, by default as fast as since the start."""
        if self.quiet:
            return
        if valid_loss is not None:
            self.valid = f"  validation {valid_loss:.4f}"
        now = time.perf_counter()
        rate = rate or (step - self.start) / (now - self.began)
        per_second = f"{rate * self.recipe.units_per_step:,.0f} {self.recipe.unit}/s"
        numbers = f"loss {loss:.4f}{self.valid}  {per_second}"
        self.bar.update(self.task, completed=step, numbers=numbers)
        if not OUT.is_terminal and (now - self.said >= PLAIN_EVERY or (step == self.steps and valid_loss is not None)):
            self.said = now
            left = (self.steps - step) / rate
            say(f"{self.name:<10} step {step:,} of {self.steps:,}  {numbers}  {left:,.0f} s left")
