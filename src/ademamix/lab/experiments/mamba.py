"""AdamW against AdEMAMix on Mamba, both tuned."""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from ademamix.lab.config import PRESETS as RECIPES
from ademamix.lab.config import Recipe
from ademamix.lab.experiments import common
from ademamix.lab.experiments.common import NAMES, Settings, Tuning, decide
from ademamix.lab.experiments.lm import on_gpu, small
from ademamix.lab.experiments.statistics import against, paired, table_of
from ademamix.lab.experiments.trials import Grid, Trials
from ademamix.lab.reports.report import Report

TUNING = Tuning((2e-3, 4e-3, 8e-3), (0.99,), (1e-3, 2e-3, 4e-3), (0.997,))


@dataclass(frozen=True)
class Mamba(Settings):
    """AdamW against AdEMAMix on Mamba, each tuned with the same number of trials, then trained with fresh seeds."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)
    tuning: Tuning = TUNING


PRESETS = {
    "cpu": Mamba(
        recipe=dataclasses.replace(small(2500), architecture="mamba", context=32),
    ),
    "gpu": Mamba(
        "gpu",
        recipe=dataclasses.replace(on_gpu(1500), architecture="mamba", layers=8),
        tuning=Tuning((1e-3, 2e-3, 4e-3), (0.99,), (1e-3, 2e-3, 4e-3), (0.998,)),
    ),
    # The paper's Mamba has 168M parameters; its layers and width are not confirmed, these give 130M to 170M.
    "paper": Mamba(
        "paper",
        seeds=common.SEEDS_OF_PAPER,
        recipe=dataclasses.replace(RECIPES["110m"], architecture="mamba", layers=24),
        tuning=Tuning((5e-4, 1e-3, 2e-3), (0.999,), (5e-4, 1e-3, 2e-3), (0.9999,)),
    ),
}


def run(settings: Mamba, trials: Trials) -> Report:
    recipe, tuned = common.tuned(trials, settings.recipe, settings.tuning)
    (results,) = trials.run(
        Grid(
            "final",
            {"optimizer": tuple(NAMES), "seed": settings.seeds},
            lambda optimizer, seed: (optimizer, dataclasses.replace(recipe, seed=seed)),
        )
    )
    losses = {NAMES[str(name)]: values for (name,), values in common.sample(results).items()}
    below = paired(losses["AdEMAMix"], losses["AdamW"])
    gain = against(below, "AdEMAMix", "AdamW")
    runs = {name: common.of(results, n) for n, name in NAMES.items()}
    return Report(
        "Mamba: AdamW against AdEMAMix",
        [gain, *tuned.misled({n: losses[title] for n, title in NAMES.items()}), *tuned.ends],
        [common.curves("Mamba, validation loss", runs, len(settings.seeds), recipe.unit)],
        [table_of(losses, ("optimizer", "final validation loss", "by seed")), *tuned.tables],
        common.settings_of(dataclasses.replace(settings, recipe=recipe)),
        [decide("mamba", gain, below)],
    )
