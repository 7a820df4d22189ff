"""AdamW first, then AdEMAMix, its slow EMA zero: at several times, against both from start to end."""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from ademamix.lab.config import PRESETS as RECIPES
from ademamix.lab.config import BadInputError, Optimizer, Recipe
from ademamix.lab.experiments import common
from ademamix.lab.experiments.common import Settings, decide
from ademamix.lab.experiments.lm import on_gpu, small
from ademamix.lab.experiments.statistics import grouped, paired, table_of
from ademamix.lab.experiments.trials import Grid, Trials
from ademamix.lab.reports.pictures import Chart
from ademamix.lab.reports.report import Report, sentence


@dataclass(frozen=True)
class Switch(Settings):
    """AdamW until some step, then AdEMAMix with its slow EMA at zero, against both from start to end.

    The warmups of alpha and beta3 begin at the switch and end with the run.
    """

    after: tuple[float, ...] = (0.25, 0.5, 0.75)
    """The parts of the run after which AdEMAMix takes over, growing."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.after or list(self.after) != sorted({x for x in self.after if 0 < x < 1}):
            raise BadInputError(f"after must be growing numbers between 0 and 1, got {self.after}")
        common.steps_at("after", self.after, self.recipe.steps)


PRESETS = {
    "cpu": Switch(recipe=small(4000)),
    "gpu": Switch("gpu", recipe=on_gpu()),
    "paper": Switch("paper", seeds=common.SEEDS_OF_PAPER, after=(0.2, 0.4, 0.6, 0.8), recipe=RECIPES["110m"]),
}


def run(settings: Switch, trials: Trials) -> Report:
    recipe = settings.recipe

    def made(after: float, seed: int) -> tuple[Optimizer, Recipe]:
        at = round(after * recipe.steps) if after < 1 else 0
        return "adamw" if after == 1 else "ademamix", dataclasses.replace(recipe, seed=seed, switch_at=at)

    points = (0.0, *settings.after, 1.0)
    (results,) = trials.run(Grid("final", {"after": points, "seed": settings.seeds}, made))
    losses = {float(after): values for (after,), values in common.sample(results).items()}
    names = {0.0: "AdEMAMix", 1.0: "AdamW"} | {x: f"AdEMAMix after {100 * x:.0f} %" for x in settings.after}
    to_adamw = {x: paired(losses[x], losses[1.0]) for x in (0.0, *settings.after)}
    to_next = {a: paired(losses[a], losses[b]) for a, b in zip(settings.after, settings.after[1:], strict=False)}
    said = ", ".join(f"{pair.told()} after {100 * x:.0f} %" for x, pair in to_adamw.items() if x)
    ours = f"final loss minus AdamW's: {said} of the run, {to_adamw[0.0].told()} with AdEMAMix from the start"
    earlier = ", ".join(f"{pair.told()} after {100 * x:.0f} %" for x, pair in to_next.items())
    ordered = f"final loss minus that of the next later switch: {earlier} of the run" if to_next else "one switch only"
    parts = {f"after {100 * x:.0f} %": pair for x, pair in to_adamw.items() if x}
    runs = {names[x]: common.of(results, x) for x in points}
    return Report(
        "From AdamW to AdEMAMix in the middle of a run",
        [
            f"A switch from AdamW to AdEMAMix {grouped(parts, link=' ')} of the run",
            sentence(ours),
            *([sentence(ordered)] if to_next else []),
        ],
        [
            common.curves("Validation loss", runs, len(settings.seeds), recipe.unit),
            Chart(
                "Final loss above AdamW's by the time of the switch",
                "part of the run with AdamW",
                "nats, with 95 % interval",
                [common.effects("after a switch", to_adamw)],
                reference=((0.0, "AdamW"),),
            ),
        ],
        [
            table_of({names[x]: losses[x] for x in points}, ("run", "final validation loss", "by seed")),
            [
                ("after", "above AdamW", "above the next later switch"),
                *((f"{100 * x:.0f} %", str(p), to_next.get(x, "")) for x, p in to_adamw.items()),
            ],
        ],
        common.settings_of(settings),
        [
            decide("switch", ours, *(to_adamw[x] for x in settings.after)),
            decide("switch-early", ordered, *to_next.values()),
        ],
    )
