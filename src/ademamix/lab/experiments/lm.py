"""AdamW against AdEMAMix as language models, both tuned; and the tokens that AdamW needs for AdEMAMix's loss."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from ademamix.lab.config import PRESETS as RECIPES
from ademamix.lab.config import AdEMAMixSettings, BadInputError, Recipe
from ademamix.lab.experiments import common
from ademamix.lab.experiments.common import NAMES, Settings, Tuning, decide
from ademamix.lab.experiments.statistics import against, budgets_for, mean_and_error, paired, table_of
from ademamix.lab.experiments.trials import Grid, Trials
from ademamix.lab.reports.pictures import Chart, Picture
from ademamix.lab.reports.report import Report

TUNING = Tuning((4e-3, 8e-3, 16e-3), (0.95, 0.99), (1e-3, 2e-3, 4e-3), (0.998, 0.999))
GOAL = 1.5  # budgets for AdamW, at least, where about half the tokens do for AdEMAMix


@dataclass(frozen=True)
class Lm(Settings):
    """AdamW against AdEMAMix on text, each tuned with the same number of trials, then trained with fresh seeds.

    AdamW also trains with growing budgets, each a full schedule of its own, to see how many tokens it needs.
    """

    budgets: tuple[float, ...] = (1.5, 2.0)
    """AdamW's further budgets, in budgets of AdEMAMix, growing."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)
    tuning: Tuning = TUNING

    def __post_init__(self) -> None:
        super().__post_init__()
        if list(self.budgets) != sorted({b for b in self.budgets if 1 < b < math.inf}):
            raise BadInputError(f"budgets must be growing numbers above 1, got {self.budgets}")


def small(steps: int = 5000) -> Recipe:
    """The demo's Llama of 0.1M parameters, for another number of steps."""
    return dataclasses.replace(RECIPES["demo"], steps=steps, warmup=steps // 20, eval_every=steps // 20)


def on_gpu(steps: int = 3000) -> Recipe:
    """A Llama of 3M parameters."""
    return dataclasses.replace(
        RECIPES["3m"],
        batch=64,
        steps=steps,
        warmup=steps // 20,
        eval_every=steps // 20,
        ademamix=AdEMAMixSettings(lr=1e-3),
    )


PRESETS = {
    "cpu": Lm(recipe=small()),
    "gpu": Lm(
        "gpu", recipe=on_gpu(), tuning=Tuning((1e-3, 2e-3, 4e-3), (0.99, 0.999), (5e-4, 1e-3, 2e-3), (0.998, 0.999))
    ),
    # 770,000 steps of the paper's AdEMAMix at 1.3B parameters; AdamW's budget there was 1.95.
    "paper": Lm(
        "paper",
        seeds=common.SEEDS_OF_PAPER,
        recipe=RECIPES["1.3b"],
        budgets=(1.95,),
        tuning=Tuning((3e-4, 6e-4, 1e-3), (0.999,), (3e-4, 6e-4, 1e-3), (0.9999,)),
    ),
}


def run(settings: Lm, trials: Trials) -> Report:
    recipe, tuned = common.tuned(trials, settings.recipe, settings.tuning)
    seeds = settings.seeds
    final = Grid(
        "final",
        {"optimizer": tuple(NAMES), "seed": seeds},
        lambda optimizer, seed: (optimizer, dataclasses.replace(recipe, seed=seed)),
    )
    longer = Grid(
        "longer",
        {"budget": settings.budgets, "seed": seeds},
        lambda budget, seed: (
            "adamw",
            dataclasses.replace(recipe, seed=seed, steps=round(budget * recipe.steps)),
        ),
    )
    results, more = trials.run(final, longer)
    losses = {NAMES[str(name)]: values for (name,), values in common.sample(results).items()}
    budgets = {1.0: losses["AdamW"], **{float(b): values for (b,), values in sorted(common.sample(more).items())}}
    below = paired(losses["AdEMAMix"], losses["AdamW"])
    needed = budgets_for(budgets, losses["AdEMAMix"])
    gain = against(below, "AdEMAMix", "AdamW")
    tokens = f"AdamW needs {needed.told(' tokens')} for AdEMAMix's loss"
    runs = {name: common.of(results, n) for n, name in NAMES.items()}
    pictures: list[Picture] = [common.curves("Validation loss", runs, len(seeds), recipe.unit)]
    pictures.append(
        Chart(
            "AdamW's tokens to AdEMAMix's loss",
            "AdamW's budget (AdEMAMix = 1)",
            common.MEAN_LOSS,
            [common.ends("AdamW", {b: mean_and_error(values) for b, values in budgets.items()})],
            reference=common.level("AdEMAMix's loss", losses["AdEMAMix"]),
        )
    )
    of_budgets = {f"AdamW, {b:g} x the {recipe.unit}": values for b, values in budgets.items()}
    final_table = table_of({**of_budgets, "AdEMAMix": losses["AdEMAMix"]}, ("run", "final validation loss", "by seed"))
    return Report(
        "Language models: AdamW against AdEMAMix",
        [tokens, gain, *tuned.misled({n: losses[title] for n, title in NAMES.items()}), *tuned.ends],
        pictures,
        [final_table, *tuned.tables],
        common.settings_of(dataclasses.replace(settings, recipe=recipe)),
        [decide("tokens", f"{gain}; {tokens}", below, needed.above(GOAL))],
    )
