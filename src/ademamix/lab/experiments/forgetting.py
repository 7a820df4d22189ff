"""How long a batch that was seen once stays learned: its loss in a run that saw it, and in a twin that never did."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from ademamix.lab.config import PRESETS as RECIPES
from ademamix.lab.config import BadInputError, Optimizer, Recipe
from ademamix.lab.experiments import common
from ademamix.lab.experiments.common import NAMES, Settings, decide
from ademamix.lab.experiments.lm import on_gpu, small
from ademamix.lab.experiments.statistics import Paired, paired, shown
from ademamix.lab.experiments.trials import Grid, Point, Trials
from ademamix.lab.reports.pictures import Chart, Line
from ademamix.lab.reports.report import Report, sentence
from ademamix.lab.training.loop import Result

Drops = dict[int, float]  # by the steps since the batch was seen: how much lower its loss is than in the twin


@dataclass(frozen=True)
class Forgetting(Settings):
    """Batches of validation text are trained on once, at several times; their losses are followed.

    A twin run, alike in all else, never sees them: the difference of the two losses is what the batch's one step did.
    """

    at: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7)
    """The parts of the run after which a batch is seen, growing."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.at or list(self.at) != sorted({x for x in self.at if 0 < x < 1}):
            raise BadInputError(f"at must be growing numbers between 0 and 1, got {self.at}")
        common.steps_at("at", self.at, self.recipe.steps)


PRESETS = {
    "cpu": Forgetting(recipe=small(4000)),
    "gpu": Forgetting("gpu", recipe=on_gpu()),
    "paper": Forgetting("paper", seeds=common.SEEDS_OF_PAPER, at=(0.2, 0.4, 0.6), recipe=RECIPES["110m"]),
}


def run(settings: Forgetting, trials: Trials) -> Report:
    steps = common.steps_at("at", settings.at, settings.recipe.steps)
    recipe = dataclasses.replace(settings.recipe, held_out=steps)

    def made(optimizer: Optimizer, insert: str, seed: int) -> tuple[Optimizer, Recipe]:
        return optimizer, dataclasses.replace(recipe, insert=insert == "seen", seed=seed)

    space = {"optimizer": tuple(NAMES), "insert": ("seen", "twin"), "seed": settings.seeds}
    (results,) = trials.run(Grid("final", space, made))
    found = _whole(results, settings.seeds)
    if not found:
        raise BadInputError("in every seed a run diverged: try smaller learning rates")
    # Of each optimizer and seed: the mean over the batches, at the times that all of them were looked at.
    drops = {name: [_drops(*of_seed[name], steps) for of_seed in found] for name in NAMES}
    window = max(next(iter(drops["adamw"])))
    peaks = {name: [max(d.values()) for d in drops[name]] for name in NAMES}
    late = [n for n in drops["adamw"][0] if n >= window / 4]
    left = {name: [statistics.mean(d[n] for n in late) / max(d.values()) for d in drops[name]] for name in NAMES}
    less = paired(left["adamw"], left["ademamix"])
    rows = [
        (
            NAMES[name],
            shown(peaks[name]),
            f"{statistics.mean(_time_of_peak(d) for d in drops[name]):.0f}",
            shown(left[name]),
            ", ".join(f"{x:.3f}" for x in left[name]),
        )
        for name in NAMES
    ]
    kept = (
        f"of a batch's largest drop in loss, {100 * statistics.mean(left['adamw']):.0f} % is left under AdamW and "
        f"{100 * statistics.mean(left['ademamix']):.0f} % under AdEMAMix, {late[0]:,} to {window:,} steps later"
    )
    ours = f"{kept}: more by {(-less).told('+.3f')}"
    if lost := len(settings.seeds) - len(found):
        ours += f"; {lost} of {len(settings.seeds)} seeds left out: a run diverged"
    lines = []
    for name in NAMES:
        at = [n for n in drops[name][0] if n > 0]
        effects = [Paired(tuple(d[n] for d in drops[name])) for n in at]
        band = [(e.mean - e.half, e.mean + e.half) for e in effects] if len(found) > 1 else []
        edges = ([low for low, _ in band], [high for _, high in band]) if band else None
        lines.append(
            Line(NAMES[name], [float(n) for n in at], [e.mean for e in effects], band=edges, mode="lines+markers")
        )
    heads = ("optimizer", "largest drop, nats", "steps until then", "left at the end", "left, by seed")
    return Report(
        "Forgetting: the loss of a batch that was seen once",
        [sentence(kept), sentence(ours)],
        [
            Chart(
                "What one step on a batch did to its loss: mean and 95 % interval",
                "steps since",
                "drop of the loss, nats",
                lines,
                log_x=True,
            ),
            _example(results, settings.seeds[0], steps),
        ],
        [[heads, *rows]],
        common.settings_of(settings),
        [decide("forgetting", ours, less)],
    )


def _whole(
    results: Mapping[Point, Result | None], seeds: Sequence[int]
) -> list[dict[Optimizer, tuple[Result, Result]]]:
    """Each optimizer's run and its twin, for every seed of which no run diverged."""
    found = []
    for seed in seeds:
        runs = {name: (results[name, "seen", seed], results[name, "twin", seed]) for name in NAMES}
        there = {name: (seen, twin) for name, (seen, twin) in runs.items() if seen is not None and twin is not None}
        found += [there] if len(there) == len(NAMES) else []
    return found


def _drops(seen: Result, twin: Result, steps: Sequence[int]) -> Drops:
    by_batch = [
        {step - at: twin.held_out[i][step] - loss for step, loss in seen.held_out[i].items()}
        for i, at in enumerate(steps)
    ]
    common_times = set.intersection(*map(set, by_batch))
    return {n: statistics.mean(d[n] for d in by_batch) for n in sorted(common_times)}


def _time_of_peak(drops: Drops) -> int:
    return max(drops, key=lambda n: drops[n])


def _example(results: Mapping[Point, Result | None], seed: int, steps: Sequence[int]) -> Chart:
    """The loss of one batch itself, in the runs of one seed."""
    middle = len(steps) // 2
    lines = []
    for name in NAMES:
        for kind in ("seen", "twin"):
            if (result := results[name, kind, seed]) is not None:
                losses = result.held_out[middle]
                label = NAMES[name] if kind == "seen" else f"{NAMES[name]}, never seen"
                lines.append(Line(label, [float(s) for s in losses], list(losses.values()), mode="lines+markers"))
    return Chart(
        f"The loss of one batch, seen at step {steps[middle]:,}",
        "step",
        common.LOSS,
        lines,
    )
