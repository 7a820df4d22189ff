"""What an experiment would train and how long that takes, from a few steps of each kind of run; nothing is kept."""

import dataclasses
import heapq
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ademamix.engine.arguments import OF_GEOMETRY
from ademamix.lab.config import AdamWSettings, AdEMAMixSettings, BadInputError, Optimizer, Recipe, Training
from ademamix.lab.console import say
from ademamix.lab.experiments.common import Settings
from ademamix.lab.experiments.trials import Grid, Point, Trials
from ademamix.lab.reports.report import Report
from ademamix.lab.training.loop import RESULT, Result, looked_at
from ademamix.lab.training.optimizers import buffers_of, settings_of

PROBE, LAP = 50, 5  # steps; the first half, in which kernels are compiled, is not counted
GOLDEN = (math.sqrt(5) - 1) / 2  # the parts of its multiples after the point are all different


@dataclass(frozen=True)
class Planned:
    """A run that is not finished."""

    optimizer: Optimizer
    recipe: Training

    @cached_property
    def kind(self) -> str:
        """The same for runs whose steps take equally long."""
        settings = settings_of(self.optimizer, self.recipe)
        # Of its numbers, those count that decide how many buffers it has, and Muon's number of iterations.
        named = {k: v for k, v in settings.items() if isinstance(v, str | bool | Mapping) or k in OF_GEOMETRY}
        images = {} if isinstance(self.recipe, Recipe) else {"examples": 1}
        off = {"planned": 0, "adamw": AdamWSettings(), "ademamix": AdEMAMixSettings(), "settings": {}, **images}
        alike = dataclasses.replace(self.probe, **off)  # type: ignore[arg-type]
        return repr((self.optimizer, buffers_of(self.optimizer, self.recipe), named, alike))

    @property
    def probe(self) -> Training:
        """A few steps of it, with none of what differs between runs of a kind but settings of the optimizer."""
        short = {"steps": PROBE, "warmup": PROBE - 1, "eval_every": LAP, "planned": self.recipe.horizon}
        off = {"seed": 0, "switch_at": 0, "held_out": (), "insert": True, self.of_validation: self.recipe.batch}
        return dataclasses.replace(self.recipe, **short, **off)  # type: ignore[arg-type]

    @property
    def of_validation(self) -> str:
        """The setting that says how many examples the validation set has."""
        return "eval_sequences" if isinstance(self.recipe, Recipe) else "eval_images"

    def seconds(self, step: float, optimizer: float) -> float:
        """How long it takes, with the seconds of a step, and of the optimizer's part of that."""
        looks = math.ceil(self.recipe.steps / self.recipe.eval_every)
        examples: int = getattr(self.recipe, self.of_validation)
        forward = (step - optimizer) / 3  # the backward pass has twice the arithmetic of the forward pass
        return self.recipe.steps * step + looks * examples / self.recipe.batch * forward


class Rehearsal:
    """Takes the place of `Trials`: lists the runs, and answers with made-up results, all losses different.

    Args:
        out: the folder of an experiment to resume, where the results of finished runs are (one that diverged has none,
            and is listed as a run that is left); None for a new one.
    """

    def __init__(self, out: Path | None) -> None:
        self.out = out
        self.calls: list[dict[str, list[Planned | None]]] = []  # by grid, None for a run that is finished
        self.answered = 0

    def run(self, *grids: Grid) -> list[dict[Point, Result | None]]:
        """For each grid a result of each point, as `Trials.run`."""
        self.calls.append({grid.name: [] for grid in grids})
        return [dict(self._answers(grid)) for grid in grids]

    def _answers(self, grid: Grid) -> Iterable[tuple[Point, Result]]:
        for point in grid.points():
            planned, folder = Planned(*grid.run(**point)), self.out and self.out / grid.folder(point)
            done = folder is not None and (folder / RESULT).exists()
            self.calls[-1][grid.name].append(None if done else planned)
            yield tuple(point.values()), Result.read(folder) if folder and done else self._made_up(planned)

    def _made_up(self, planned: Planned) -> Result:
        self.answered += 1
        end, recipe = 3.0 + self.answered * GOLDEN % 1.0, planned.recipe

        def loss(step: int) -> float:
            return end + 1.0 - step / recipe.steps

        looks = [*range(recipe.eval_every, recipe.steps, recipe.eval_every), recipe.steps]
        curve = [
            {"step": n, recipe.unit: n * recipe.units_per_step, "seconds": float(n), "valid_loss": loss(n)}
            for n in looks
        ]
        held_out = [{n: loss(n) for n in range(1, recipe.steps + 1) if looked_at(n - at)} for at in recipe.held_out]
        seen = recipe.steps * recipe.units_per_step
        return Result(planned.optimizer, recipe.steps, seen, 1.0, end, 1.0, 1.0, 0, 0.0, 1, "", "", curve, held_out)


def rehearsed(run: Callable[[Any, Any], Report], settings: Settings, per_gpu: int) -> Report:
    """What an experiment would train, as a table, and how long that would take.

    Raises:
        BadInputError: the data cannot be used, or a probe diverged.
    """
    rehearsal, began = Rehearsal(settings.job.resume), time.perf_counter()
    run(settings, rehearsal)
    own = time.perf_counter() - began  # what the experiment itself computes, for its report
    every = [planned for call in rehearsal.calls for grid in call.values() for planned in grid]
    left = [planned for planned in every if planned is not None]
    counted = f"{len(every)} runs" + (f", {len(every) - len(left)} of them finished" if len(left) < len(every) else "")
    if not left:
        return Report("", [counted], [], [], [])
    seconds, workers = _probed(left, settings, per_gpu)
    calls = [[seconds(p) for grid in call.values() for p in grid if p is not None] for call in rehearsal.calls]
    whole = own + sum(_together(call, workers) for call in calls)
    rows = [_row(name, runs, seconds) for call in rehearsal.calls for name, runs in call.items()]
    heads = ("grid", "runs", "steps", left[0].recipe.unit, "s for one", "min in all")
    said = f"{counted}, about {_duration(whole)} with {workers} worker{'s' * (workers > 1)} on this machine"
    return Report("", [f"{said} (from {PROBE}-step probes; a busy machine is slower)"], [], [[heads, *rows]], [])


def _probed(left: Iterable[Planned], settings: Settings, per_gpu: int) -> tuple[Callable[[Planned], float], int]:
    """A function that gives the seconds of a run, from probes at as many workers as the runs have; and how many."""
    kinds = list({planned.kind: planned for planned in left}.items())
    with (
        tempfile.TemporaryDirectory() as folder,
        Trials(Path(folder), settings.job.device, settings.job.workers, per_gpu) as trials,
    ):
        say(f"{PROBE} steps of each kind of run, {len(kinds)} in all")

        def made(number: int) -> tuple[Optimizer, Training]:
            planned = kinds[number % len(kinds)][1]
            return planned.optimizer, planned.probe

        # As many as there are workers, or more: runs at the same time slow each other down.
        (results,) = trials.run(Grid("probe", {"number": range(max(len(kinds), trials.workers))}, made))
    speeds: dict[str, list[tuple[float, float]]] = {}
    for (number,), result in results.items():
        kind, planned = kinds[int(number) % len(kinds)]
        if result is None:
            raise BadInputError(
                f"a probe of {planned.optimizer} diverged within {PROBE} steps: try smaller learning rates"
            )
        clock = [point["seconds"] for point in result.curve if point["step"] >= PROBE / 2]
        step = statistics.median(later - earlier for earlier, later in itertools.pairwise(clock)) / LAP
        speeds.setdefault(kind, []).append((step, result.optimizer_ms / 1e3))
    means = {kind: tuple(map(statistics.mean, zip(*of_kind, strict=True))) for kind, of_kind in speeds.items()}
    return lambda planned: planned.seconds(*means[planned.kind]), trials.workers


def _together(seconds: Iterable[float], workers: int) -> float:
    """How long runs take that are begun in this order, each as soon as a worker is free."""
    ends = [0.0] * workers
    for one in seconds:
        heapq.heapreplace(ends, ends[0] + one)
    return max(ends)


def _row(name: str, runs: list[Planned | None], seconds: Callable[[Planned], float]) -> tuple[str, ...]:
    left = [planned for planned in runs if planned is not None]
    each = [seconds(planned) for planned in left]
    steps, seen = [p.recipe.steps for p in left], [p.recipe.steps * p.recipe.units_per_step for p in left]
    count = f"{len(runs)}" + (f", {len(left)} left" if len(left) < len(runs) else "")
    return (name, count, _span(steps), _span(seen), _span(each), f"{sum(each) / 60:.1f}")


def _span(values: Sequence[float]) -> str:
    """The smallest and the largest of some numbers, for people."""
    ends = dict.fromkeys(f"{value:,.0f}" for value in (min(values), max(values))) if values else ()
    return " to ".join(ends)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
