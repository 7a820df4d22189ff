"""A narrow valley, Rosenbrock's function: Adam with a small and with a large beta1, and AdEMAMix."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ademamix import AdamW, AdEMAMix
from ademamix.lab.config import BadInputError
from ademamix.lab.experiments import common
from ademamix.lab.experiments.common import Settings
from ademamix.lab.experiments.statistics import clearly_below, shown
from ademamix.lab.experiments.trials import Trials
from ademamix.lab.reports.claims import decide
from ademamix.lab.reports.pictures import Chart, Field, Line
from ademamix.lab.reports.report import Report, sentence

WHAT = "trajectories in a narrow valley, drawn"
START, MINIMUM = (-3.0, 5.0), (1.0, 1.0)


@dataclass(frozen=True)
class Valley(Settings):
    """Adam with a small and with a large beta1, and AdEMAMix, from the paper's starting point on Rosenbrock's function.

    Every optimizer has the same learning rate. The verdict is over starting points around that one, one for each seed.
    """

    seeds: tuple[int, ...] = tuple(range(16))
    """Seeds of the starting points around (-3, 5); the first starts at that point itself."""
    steps: int = 6000
    """Steps from each starting point."""
    lr: float = 1e-2
    """Learning rate of all."""
    small: float = 0.9
    """The smaller beta1 of Adam, and that of AdEMAMix."""
    large: float = 0.999
    """The larger beta1 of Adam, and beta3 of AdEMAMix."""
    alpha: float = 9.0
    """Weight of AdEMAMix's slow average."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise BadInputError(f"steps must be at least 1, got {self.steps}")
        try:
            for make in self.optimizers().values():
                make(torch.zeros(2))
        except ValueError as error:
            raise BadInputError(str(error)) from error

    def optimizers(self) -> dict[str, Callable[[torch.Tensor], torch.optim.Optimizer]]:
        betas = (self.small, 0.999, self.large)
        return {
            "AdamW": lambda p: AdamW([p], lr=self.lr, betas=(self.small, 0.999), weight_decay=0.0),
            f"beta1 = {self.large:g}": lambda p: AdamW([p], lr=self.lr, betas=(self.large, 0.999), weight_decay=0.0),
            "AdEMAMix": lambda p: AdEMAMix([p], lr=self.lr, betas=betas, alpha=self.alpha),
        }


PRESETS = {"cpu": Valley(), "gpu": Valley("gpu"), "paper": Valley("paper")}


def rosenbrock(x: Any, y: Any) -> Any:
    return (1.0 - x) ** 2 + 100.0 * (y - x * x) ** 2


def run(settings: Valley, trials: Trials) -> Report:
    starts = [_start(i) for i in range(len(settings.seeds))]
    paths = {name: _paths(make, starts, settings.steps) for name, make in settings.optimizers().items()}
    # The logarithm, for distances differ by orders of magnitude.
    ends = {name: [_log_distance(path[-1]) for path in of_name] for name, of_name in paths.items()}
    small, large, mixed = ends.values()
    holds = clearly_below(mixed, small) and clearly_below(mixed, large)
    names = {
        "AdamW": f"Adam, beta1 = {settings.small:g}",
        f"beta1 = {settings.large:g}": f"Adam, beta1 = {settings.large:g}",
    }
    said = ", ".join(f"{names.get(name, name)} {shown(values)}" for name, values in ends.items())
    ours = f"log10 of the distance to the minimum after {settings.steps:,} steps: {said}"
    across, up = [-4 + 0.1 * i for i in range(71)], [-3 + 0.15 * i for i in range(81)]
    values = [[math.log10(1e-3 + rosenbrock(x, y)) for x in across] for y in up]
    steps = list(range(0, settings.steps + 1, max(1, settings.steps // 300)))
    return Report(
        "Rosenbrock's valley",
        [sentence(ours)],
        [
            Chart(
                "From (-3, 5) towards the minimum at (1, 1)",
                "x",
                "y",
                [Line(name, [p[0] for p in path[0]], [p[1] for p in path[0]]) for name, path in paths.items()],
                y_range=(-3.0, 9.0),
                x_range=(-4.0, 3.0),
                field=Field(across, up, values),
            ),
            Chart(
                "Distance to the minimum, from (-3, 5)",
                "step",
                "log10 of the distance",
                [
                    common.ends(n, {s: (_log_distance(p[0][s]), math.inf) for s in steps}, "lines")
                    for n, p in paths.items()
                ],
            ),
        ],
        [[("optimizer", "log10 of the final distance"), *((names.get(n, n), shown(v)) for n, v in ends.items())]],
        common.settings_of(settings),
        [decide("valley", holds, ours, *ends.values())],
    )


def _start(number: int) -> tuple[float, float]:
    """The paper's starting point, then others around it."""
    if number == 0:
        return START
    x, y = torch.randn(2, generator=torch.Generator().manual_seed(number), dtype=torch.float64).tolist()
    return START[0] + 0.5 * x, START[1] + 0.5 * y


def _paths(
    make: Callable[[torch.Tensor], torch.optim.Optimizer], starts: list[tuple[float, float]], steps: int
) -> list[list[tuple[float, float]]]:
    """The path from each starting point, all at once: the optimizers work element by element."""
    p = torch.tensor(starts, dtype=torch.float64, requires_grad=True)
    optimizer = make(p)
    points = [p.tolist()]
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(rosenbrock(p[:, 0], p[:, 1]).sum())
        optimizer.step()
        points.append(p.tolist())
    return [list(map(tuple, path)) for path in zip(*points, strict=True)]


def _log_distance(point: tuple[float, float]) -> float:
    """log10 of the distance to the minimum; infinite, as a loss is, once the optimizer diverged."""
    distance = math.dist(point, MINIMUM)
    return math.log10(max(1e-12, distance)) if math.isfinite(distance) else math.inf
