"""AdamW first, then AdEMAMix, its slow average zero: at several times, against both from start to end."""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from ademamix.lab.config import PRESETS as RECIPES
from ademamix.lab.config import BadInputError, Optimizer, Recipe
from ademamix.lab.experiments import common
from ademamix.lab.experiments.common import Settings
from ademamix.lab.experiments.lm import on_gpu, small
from ademamix.lab.experiments.statistics import clearly_below, diverged, mean_and_error, table_of
from ademamix.lab.experiments.trials import Grid, Trials
from ademamix.lab.reports.claims import decide
from ademamix.lab.reports.pictures import Chart
from ademamix.lab.reports.report import Report, sentence

WHAT = "AdEMAMix takes over a training from AdamW, at several times"


@dataclass(frozen=True)
class Switch(Settings):
    """AdamW until some step, then AdEMAMix with its slow average at zero, against both from start to end.

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
    "paper": Switch("paper", after=(0.2, 0.4, 0.6, 0.8), recipe=RECIPES["110m"]),
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
    ends = {x: mean_and_error(losses[x]) for x in points}
    helped = all(clearly_below(losses[x], losses[1.0]) for x in settings.after)
    pairs = zip(settings.after, settings.after[1:], strict=False)
    ordered = not any(clearly_below(losses[later], losses[earlier]) for earlier, later in pairs)
    said = ", ".join(f"{ends[1.0][0] - ends[x][0]:+.4f} after {100 * x:.0f} %" for x in settings.after)
    ours = diverged({names[x]: losses[x] for x in points}) or (
        f"the final loss is lower than AdamW's by {said} of the run, {ends[1.0][0] - ends[0.0][0]:+.4f} from the start"
    )
    runs = {names[x]: common.of(results, x) for x in points}
    return Report(
        "From AdamW to AdEMAMix in the middle of a training",
        [sentence(ours)],
        [
            common.curves("Validation loss", runs, len(settings.seeds), recipe.unit),
            Chart(
                "Final loss by the time of the switch",
                "part of the run with AdamW",
                common.LOSS,
                [common.ends("final loss", ends)],
            ),
        ],
        [table_of({names[x]: losses[x] for x in points}, ("run", "final validation loss", "by seed"))],
        common.settings_of(settings),
        [decide("switch", helped and ordered, ours, *losses.values())],
    )
