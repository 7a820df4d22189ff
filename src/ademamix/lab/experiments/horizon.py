"""The best beta3 by the number of steps, and the rule of thumb that it gives."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import tyro

from ademamix.lab.config import PRESETS as RECIPES
from ademamix.lab.config import BadInputError, Optimizer, Recipe
from ademamix.lab.experiments import common
from ademamix.lab.experiments.common import Settings, changed, decide
from ademamix.lab.experiments.lm import on_gpu, small
from ademamix.lab.experiments.statistics import Paired, mean_and_error, paired, shown, slopes
from ademamix.lab.experiments.trials import Grid, Trials
from ademamix.lab.reports.pictures import Chart, Line
from ademamix.lab.reports.report import Report, sentence

PUBLISHED = 8.0  # beta3 = 1 - 8/T: arXiv 2602.05298


@dataclass(frozen=True)
class Horizon(Settings):
    """Runs of different lengths T, all with the same values of beta3.

    The best beta3 of each T and seed is the vertex of a parabola through the losses over log(1 - beta3).
    """

    lengths: tuple[int, ...] = (400, 1600, 6400)
    """Steps of the runs, growing."""
    beta3: tuple[float, ...] = (0.97, 0.985, 0.9925, 0.99625, 0.998125, 0.9990625)
    """Decays of the slow EMA, growing; tried at every length."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("lengths", 2), ("beta3", 3)):
            values = getattr(self, name)
            if len(values) < least or list(values) != sorted(set(values)):
                raise BadInputError(f"{name} must be {least} or more growing numbers, got {values}")
        if not self.beta3[0] > 0 or not self.beta3[-1] < 1:
            raise BadInputError(f"beta3 must be between 0 and 1, got {self.beta3}")


PRESETS = {
    "cpu": Horizon(recipe=small()),
    "gpu": Horizon("gpu", lengths=(500, 1000, 2000, 4000), recipe=on_gpu()),
    "paper": Horizon(
        "paper",
        seeds=common.SEEDS_OF_PAPER,
        lengths=(32_000, 64_000, 128_000, 256_000),
        beta3=(0.999, 0.9995, 0.9999, 0.99995),
        recipe=RECIPES["110m"],
    ),
}


def run(settings: Horizon, trials: Trials) -> Report:
    def made(steps: int, beta3: float, seed: int) -> tuple[Optimizer, Recipe]:
        warmup = max(1, steps // 20)
        recipe = dataclasses.replace(settings.recipe, steps=steps, warmup=warmup, eval_every=steps, seed=seed)
        return "ademamix", changed(recipe, "ademamix", beta3=beta3)

    space = {"steps": settings.lengths, "beta3": settings.beta3, "seed": settings.seeds}
    (results,) = trials.run(Grid("final", space, made))
    losses = common.sample(results)
    logs = [math.log10(1 - beta3) for beta3 in settings.beta3]
    # Of each length and seed: log10(1 - the best beta3), within the grid.
    chosen = {
        t: [vertex(logs, [losses[t, beta3][i] for beta3 in settings.beta3]) for i in range(len(settings.seeds))]
        for t in settings.lengths
    }
    slope = Paired(tuple(slopes([math.log10(t) for t in settings.lengths], list(chosen.values()))))
    means = {t: mean_and_error(best)[0] for t, best in chosen.items()}
    rule = 10 ** statistics.mean(mean + math.log10(t) for t, mean in means.items())
    span = f"from {settings.lengths[0]:,} to {settings.lengths[-1]:,} steps"
    ours = f"the best 1 - beta3 goes with T to the power {slope.told('+.2f')}, {span}"
    ends = {t: sum(best in (logs[0], logs[-1]) for best in of_seeds) for t, of_seeds in chosen.items()}
    at_ends = ", ".join(f"{count} at T = {t:,}" for t, count in ends.items() if count)
    lowest = {t: min(settings.beta3, key=lambda b: mean_and_error(losses[t, b])[0]) for t in settings.lengths}
    above = {t: {b: paired(losses[t, b], losses[t, lowest[t]]) for b in settings.beta3} for t in settings.lengths}
    rows = [
        (
            f"{t:,}",
            *(shown(losses[t, beta3]) for beta3 in settings.beta3),
            f"{1 - 10 ** means[t]:.4f}",
            f"{10 ** means[t] * t:.1f}",
        )
        for t in settings.lengths
    ]
    gaps = [(f"{t:,}", *(p.told() for p in of_length.values())) for t, of_length in above.items()]
    ticks = tuple((1 / (1 - beta3), f"{beta3:g}") for beta3 in settings.beta3)
    x = [float(t) for t in settings.lengths]
    return Report(
        "Horizon: the best beta3 by the number of steps",
        [
            sentence(ours),
            f"With that power set to -1: beta3 = 1 - {rule:.1f} / T (arXiv 2602.05298 has 1 - {PUBLISHED:g} / T)",
            *([f"Seeds whose best beta3 is the smallest or the largest that was tried: {at_ends}"] if at_ends else []),
        ],
        [
            Chart(
                "Loss above that of the best beta3",
                "beta3, evenly spaced by the logarithm of 1 / (1 - beta3)",
                "nats, with 95 % interval",
                [
                    common.effects(f"T = {t:,}", {1 / (1 - b): pair for b, pair in of_length.items()})
                    for t, of_length in above.items()
                ],
                log_x=True,
                x_ticks=ticks,
            ),
            Chart(
                "The best beta3",
                "steps T",
                "beta3",
                [
                    Line(
                        "best, 95 % interval",
                        x,
                        [10**-mean for mean in means.values()],
                        mode="markers",
                        band=_band(chosen),
                    ),
                    Line(f"1 - beta3 = {rule:.1f} / T", x, [t / rule for t in x]),
                    Line(f"published: {PUBLISHED:g} / T", x, [t / PUBLISHED for t in x]),
                ],
                log_x=True,
                log_y=True,
                x_ticks=tuple((t, f"{t:,.0f}") for t in x),
                y_ticks=ticks,
            ),
        ],
        [
            [("T", *(f"beta3 {beta3:g}" for beta3 in settings.beta3), "best beta3", "(1 - best) T"), *rows],
            [("T: loss above the lowest mean", *(f"beta3 {beta3:g}" for beta3 in settings.beta3)), *gaps],
        ],
        common.settings_of(settings, "steps", "warmup", "eval_every"),
        [decide("horizon", ours, slope)],
    )


def _band(chosen: Mapping[int, Sequence[float]]) -> tuple[list[float], list[float]] | None:
    """The interval of the mean of the best log10(1 - beta3), as 1 / (1 - beta3), for each length."""
    means = [Paired(tuple(best)) for best in chosen.values()]
    if any(math.isinf(mean.half) for mean in means):
        return None
    return [10 ** -(m.mean + m.half) for m in means], [10 ** -(m.mean - m.half) for m in means]


def vertex(x: list[float], y: list[float]) -> float:
    """Where a parabola through the lowest point and its neighbors is lowest; the lowest point itself at an end.

    Raises:
        BadInputError: every run diverged.
    """
    if math.isinf(min(y)):
        raise BadInputError("every run of a length and seed diverged: try a smaller learning rate")
    at = min(range(len(y)), key=lambda i: y[i])
    if at in (0, len(y) - 1) or not math.isfinite(y[at - 1] + y[at + 1]):
        return x[at]
    a, b, _ = np.polyfit(x[at - 1 : at + 2], y[at - 1 : at + 2], 2)
    return float(-b / (2 * a))
