"""A narrow valley, Rosenbrock's function: Adam with a small and with a large beta1, and AdEMAMix."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ademamix import AdamW, AdEMAMix
from ademamix.lab.config import BadInputError
from ademamix.lab.experiments import common
from ademamix.lab.experiments.common import Settings, decide
from ademamix.lab.experiments.statistics import Paired, paired
from ademamix.lab.experiments.trials import Trials
from ademamix.lab.reports.pictures import Chart, Field, Line
from ademamix.lab.reports.report import Report, sentence

START, MINIMUM = (-3.0, 5.0), (1.0, 1.0)
NEAR = 0.5  # the distance to the minimum at which an optimizer has arrived


@dataclass(frozen=True)
class Valley(Settings):
    """Adam with a small and with a large beta1, and AdEMAMix, from the paper's starting point on Rosenbrock's function.

    The verdicts compare these three, at the same learning rate, from starting points around that one, one for each
    seed. Adam with a learning rate that makes its steps as long as AdEMAMix's is only shown.
    """

    seeds: tuple[int, ...] = tuple(range(201, 217))
    """Seeds of the starting points around (-3, 5)."""
    steps: int = 20_000
    """Steps from each starting point."""
    lr: float = 1e-2
    """Learning rate; one more Adam, which is only shown, has (1 + alpha) times it."""
    small: float = 0.9
    """The smaller beta1 of Adam, and that of AdEMAMix."""
    large: float = 0.999
    """The larger beta1 of Adam, and beta3 of AdEMAMix."""
    alpha: float = 9.0
    """Weight of AdEMAMix's slow EMA."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise BadInputError(f"steps must be at least 1, got {self.steps}")
        if not self.small < self.large:
            raise BadInputError(f"large must be above small, which is {self.small}, got {self.large}")
        try:
            for make in self.optimizers().values():
                make(torch.zeros(2))
        except ValueError as error:
            raise BadInputError(str(error)) from error

    def optimizers(self) -> dict[str, Callable[[torch.Tensor], torch.optim.Optimizer]]:
        betas = (self.small, 0.999, self.large)
        step = (1 + self.alpha) * self.lr  # AdEMAMix's step along gradients that do not change
        return {
            f"Adam, beta1 = {self.small}": lambda p: AdamW(
                [p], lr=self.lr, betas=(self.small, 0.999), weight_decay=0.0
            ),
            f"Adam, beta1 = {self.large}": lambda p: AdamW(
                [p], lr=self.lr, betas=(self.large, 0.999), weight_decay=0.0
            ),
            "AdEMAMix": lambda p: AdEMAMix([p], lr=self.lr, betas=betas, alpha=self.alpha),
            f"Adam, lr {step:g}": lambda p: AdamW([p], lr=step, betas=(self.small, 0.999), weight_decay=0.0),
        }


PRESETS = {"cpu": Valley(), "gpu": Valley("gpu"), "paper": Valley("paper")}


def rosenbrock(x: Any, y: Any) -> Any:
    return (1.0 - x) ** 2 + 100.0 * (y - x * x) ** 2


def run(settings: Valley, trials: Trials) -> Report:
    starts = [START, *map(_start, settings.seeds)]  # the paper's is drawn, the others decide
    paths = {name: _paths(make, starts, settings.steps) for name, make in settings.optimizers().items()}
    distances = {name: [[_distance(point) for point in path] for path in of_name] for name, of_name in paths.items()}
    arrivals = {name: [_arrival(path) for path in of_name[1:]] for name, of_name in distances.items()}
    after = {
        name: [max(path[at:]) if at < len(path) else None for path, at in zip(of_name[1:], arrivals[name], strict=True)]
        for name, of_name in distances.items()
    }
    small, large, mixed, _ = ([math.log10(at) for at in of_name] for of_name in arrivals.values())
    _, *both, _ = after.values()
    arrived = [(a, b) for a, b in zip(*both, strict=True) if a is not None and b is not None]
    farther = (
        paired([math.log10(b) for _, b in arrived], [math.log10(a) for a, _ in arrived]) if arrived else Paired(())
    )
    steps_of = "; ".join(f"{name}: {_steps(of_name)}" for name, of_name in arrivals.items())
    at_small, at_large, ours_at, faster = map(_steps, arrivals.values())
    to_small, to_large = paired(mixed, small), paired(mixed, large)
    ours = (
        f"steps until the distance to the minimum is below {NEAR:g} (median of {len(settings.seeds)} starts) - "
        f"{steps_of}; "
        f"log10 of AdEMAMix's steps minus log10 of Adam's with the small beta1: {to_small.told('+.2f')}, "
        f"with the large one: {to_large.told('+.2f')}"
    )
    largest = "; ".join(f"{name}: {_farthest(of_name)}" for name, of_name in after.items())
    overshot = (
        f"the largest distance after that (median, range) - {largest}; "
        "log10 of AdEMAMix's minus log10 of Adam's with the large beta1: "
        f"{farther.told('+.2f') if arrived else 'unknown, both arrive from no start'}"
    )
    across, up = [-4 + 0.1 * i for i in range(71)], [-3 + 0.15 * i for i in range(81)]
    values = [[math.log10(1e-3 + rosenbrock(x, y)) for x in across] for y in up]
    steps = list(range(0, settings.steps + 1, max(1, settings.steps // 300)))
    return Report(
        "Rosenbrock's valley",
        [
            f"AdEMAMix is at the minimum after {ours_at} steps and overshoots by {_farthest(after['AdEMAMix'])}; "
            f"Adam needs {at_small} or {at_large}, and {faster} at {1 + settings.alpha:g} times the learning rate",
            sentence(ours),
            sentence(overshot),
        ],
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
                "distance",
                [Line(n, [float(s) for s in steps], [path[0][s] for s in steps]) for n, path in distances.items()],
                y_range=(1e-3, 1e1),
                log_y=True,
                reference=((NEAR, "arrived"),),
            ),
        ],
        [
            [
                (
                    "optimizer",
                    "steps until it arrives, median",
                    "arrives",
                    "largest distance after that, median and range",
                ),
                *(
                    (n, _steps(of_name), f"{_count(after[n])} of {len(of_name)}", _farthest(after[n]))
                    for n, of_name in arrivals.items()
                ),
            ]
        ],
        common.settings_of(settings),
        [decide("valley-arrival", ours, to_small, to_large), decide("valley-overshoot", overshot, farther)],
    )


def _arrival(distances: list[float]) -> int:
    """The step after which the distance is first below NEAR; the one after the last if it never is."""
    return next((step for step, distance in enumerate(distances) if distance < NEAR), len(distances))


def _steps(arrivals: list[int]) -> str:
    return f"{statistics.median(arrivals):,.0f}"


def _count(after: list[float | None]) -> int:
    return sum(x is not None for x in after)


def _farthest(after: list[float | None]) -> str:
    there = [x for x in after if x is not None]
    return f"{statistics.median(there):.2f} ({min(there):.2f} to {max(there):.2f})" if there else "never arrives"


def _start(seed: int) -> tuple[float, float]:
    """A starting point around the paper's."""
    x, y = torch.randn(2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
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


def _distance(point: tuple[float, float]) -> float:
    """The distance to the minimum; infinite, as a loss is, once the optimizer diverged."""
    distance = math.dist(point, MINIMUM)
    return max(1e-12, distance) if math.isfinite(distance) else math.inf
