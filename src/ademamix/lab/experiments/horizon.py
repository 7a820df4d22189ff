"""The best beta3 by the number of steps, and the rule of thumb that it gives."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import tyro

from ademamix.lab.claims import decide, mean_and_error
from ademamix.lab.config import PRESETS as RECIPES
from ademamix.lab.config import BadInputError, Optimizer, Recipe
from ademamix.lab.experiments import common
from ademamix.lab.experiments.common import Settings, changed
from ademamix.lab.experiments.lm import on_gpu, small
from ademamix.lab.pictures import Chart, Line
from ademamix.lab.report import Report, sentence
from ademamix.lab.trials import Grid, Trials

WHAT = "the best beta3 by the number of steps, as a rule of thumb"
PUBLISHED = 8.0  # beta3 = 1 - 8/T: arXiv 2602.05298


@dataclass(frozen=True)
class Horizon(Settings):
    """Runs of different lengths T, each with slow averages of different lengths: beta3 = 1 - c / T.

    The best c of each T and seed is the vertex of a parabola through the losses over log c.
    """

    lengths: tuple[int, ...] = (400, 800, 1600, 3200)
    """Steps of the runs, growing."""
    c: tuple[float, ...] = (2.0, 4.0, 8.0, 16.0, 32.0)
    """Values of c, growing: the slow average reaches back T / c steps."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("lengths", 2), ("c", 3)):
            values = getattr(self, name)
            if len(values) < least or list(values) != sorted(set(values)):
                raise BadInputError(f"{name} must be {least} or more growing numbers, got {values}")
        if not self.c[0] > 0 or not self.c[-1] < self.lengths[0]:
            raise BadInputError(f"c must be between 0 and the fewest steps, {self.lengths[0]}, got {self.c}")


PRESETS = {
    "cpu": Horizon(recipe=small()),
    "gpu": Horizon("gpu", lengths=(500, 1000, 2000, 4000), recipe=on_gpu()),
    "paper": Horizon(
        "paper", lengths=(32_000, 64_000, 128_000, 256_000), c=(2.0, 8.0, 25.6, 80.0), recipe=RECIPES["110m"]
    ),
}


def run(settings: Horizon, trials: Trials) -> Report:
    def made(steps: int, c: float, seed: int) -> tuple[Optimizer, Recipe]:
        recipe = dataclasses.replace(
            settings.recipe, steps=steps, warmup=max(1, steps // 20), eval_every=steps, seed=seed
        )
        return "ademamix", changed(recipe, "ademamix", beta3=1.0 - c / steps)

    space = {"steps": settings.lengths, "c": settings.c, "seed": settings.seeds}
    (results,) = trials.run(Grid("final", space, made))
    losses = common.sample(results)
    logs = [math.log(c) for c in settings.c]
    # Of each seed and length: log of the best c, within the grid.
    chosen = {
        steps: [vertex(logs, [losses[steps, c][i] for c in settings.c]) for i in range(len(settings.seeds))]
        for steps in settings.lengths
    }
    of_steps = [math.log(steps) for steps in settings.lengths]
    # log(1 - beta3) = log c - log T
    slopes = [
        float(np.polyfit(of_steps, [chosen[t][i] - math.log(t) for t in settings.lengths], 1)[0])
        for i in range(len(settings.seeds))
    ]
    slope, error = mean_and_error(slopes)
    means = {t: math.exp(mean_and_error(chosen[t])[0]) for t in settings.lengths}
    rule = math.exp(sum(map(math.log, means.values())) / len(means))
    span = f"from {settings.lengths[0]:,} to {settings.lengths[-1]:,} steps"
    ours = f"the best 1 - beta3 goes with T to the power {slope:.2f} ± {error:.2f}, {span}"
    lines = []
    for t in settings.lengths:
        values = [mean_and_error(losses[t, c]) for c in settings.c]
        low = min(m for m, _ in values)
        above = [m - low for m, _ in values]
        lines.append(Line(f"T = {t:,}", list(settings.c), above, [e for _, e in values], "lines+markers"))
    x = [float(t) for t in settings.lengths]
    rows = [
        (
            f"{t:,}",
            *(f"{mean_and_error(losses[t, c])[0]:.4f}" for c in settings.c),
            f"{means[t]:.1f}",
            f"{1 - means[t] / t:.5f}",
        )
        for t in settings.lengths
    ]
    return Report(
        "Horizon: the best beta3 by the number of steps",
        [
            sentence(ours),
            f"With that power set to -1: beta3 = 1 - {rule:.1f} / T (arXiv 2602.05298 has 1 - {PUBLISHED:g} / T)",
        ],
        [
            Chart("Loss above the lowest, by c = (1 - beta3) T", "c", "nats", lines, log_x=True),
            Chart(
                "The best 1 - beta3",
                "steps T",
                "log10 of 1 - beta3",
                [
                    Line("best, mean of the seeds", x, [math.log10(m / t) for t, m in means.items()], mode="markers"),
                    Line(f"1 - beta3 = {rule:.1f} / T", x, [math.log10(rule / t) for t in x]),
                    Line(f"published: {PUBLISHED:g} / T", x, [math.log10(PUBLISHED / t) for t in x]),
                ],
                log_x=True,
            ),
        ],
        [[("T", *(f"loss, c = {c:g}" for c in settings.c), "best c", "best beta3"), *rows]],
        common.settings_of(settings),
        [decide("horizon", slope + 2 * error < 0, ours, slopes)],
    )


def vertex(x: list[float], y: list[float]) -> float:
    """Where a parabola through the lowest point and its neighbours is lowest; the lowest point itself at an end."""
    at = min(range(len(y)), key=lambda i: y[i])
    if at in (0, len(y) - 1) or not math.isfinite(y[at - 1] + y[at + 1]):
        return x[at]
    a, b, _ = np.polyfit(x[at - 1 : at + 2], y[at - 1 : at + 2], 2)
    return float(-b / (2 * a))
