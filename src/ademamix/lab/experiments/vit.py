"""AdamW against AdEMAMix on vision transformers, with more and with fewer images."""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from ademamix.lab.config import AdamWSettings, AdEMAMixSettings, BadInputError, ImageRecipe
from ademamix.lab.experiments import common
from ademamix.lab.experiments.common import NAMES, Settings, Tuning
from ademamix.lab.experiments.statistics import (
    clearly_below,
    difference,
    diverged,
    mean_and_error,
    plus_minus,
    table_of,
)
from ademamix.lab.experiments.trials import Grid, Trials
from ademamix.lab.reports.claims import decide
from ademamix.lab.reports.pictures import Chart, Picture
from ademamix.lab.reports.report import Report, sentence

WHAT = "AdamW against AdEMAMix on a vision transformer, with more and with fewer images"
TUNING = Tuning((1e-3, 2e-3, 4e-3), (0.99,), (5e-4, 1e-3, 2e-3), (0.996,))


@dataclass(frozen=True)
class Vit(Settings):
    """AdamW against AdEMAMix on a vision transformer, as long on few images as on many.

    Each is tuned, with as many trials, on the most images. Images are drawn here, or come from a folder or the hub.
    """

    images: tuple[int, ...] = (1000, 5000, 30_000)
    """Numbers of training images, growing."""
    recipe: Annotated[ImageRecipe, tyro.conf.arg(name="")] = field(default_factory=ImageRecipe)
    tuning: Tuning = TUNING

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.images) < 2 or list(self.images) != sorted({n for n in self.images if n > 0}):
            raise BadInputError(f"images must be two or more growing numbers above 0, got {self.images}")


def _recipe(steps: int, **settings: int | str) -> ImageRecipe:
    return ImageRecipe(
        steps=steps,
        warmup=steps // 20,
        eval_every=steps // 20,
        adamw=AdamWSettings(beta2=0.99),
        ademamix=AdEMAMixSettings(beta2=0.99, alpha=8.0),
        **settings,  # type: ignore[arg-type]
    )


def _paper(width: int, layers: int, data: str, steps: int) -> ImageRecipe:
    """Sizes of the paper's models; batch, steps, patches and learning rates are not confirmed."""
    recipe = _recipe(steps, batch=4096, size=224, patch=16, width=width, layers=layers, data=data, eval_images=50_000)
    betas = dataclasses.replace(recipe.ademamix, beta2=0.999, beta3=0.9999)
    return dataclasses.replace(recipe, adamw=AdamWSettings(beta2=0.999), ademamix=betas)


PRESETS = {
    "cpu": Vit(
        recipe=_recipe(2000, batch=16),
    ),
    "gpu": Vit(
        "gpu",
        images=(10_000, 100_000, 1_000_000),
        recipe=_recipe(4000, batch=256, size=32, layers=6, width=192),
        tuning=Tuning((5e-4, 1e-3, 2e-3), (0.99,), (3e-4, 5e-4, 1e-3), (0.998,)),
    ),
    "paper": Vit(
        "paper",
        images=(1_281_167, 11_000_000),
        recipe=_paper(384, 12, "hf:timm/imagenet-22k-wds", 320_000),
        tuning=Tuning((3e-4, 1e-3), (0.999,), (3e-4, 1e-3), (0.9999,)),
    ),
}


def run(settings: Vit, trials: Trials) -> Report:
    most = max(settings.images)
    recipe, tables = common.tuned(trials, dataclasses.replace(settings.recipe, examples=most), settings.tuning)
    (results,) = trials.run(
        Grid(
            "final",
            {"optimizer": tuple(NAMES), "images": settings.images, "seed": settings.seeds},
            lambda optimizer, images, seed: (optimizer, dataclasses.replace(recipe, examples=images, seed=seed)),
        )
    )
    losses = {(NAMES[str(name)], int(n)): values for (name, n), values in common.sample(results).items()}
    gains = {n: difference(losses["AdEMAMix", n], losses["AdamW", n]) for n in settings.images}
    few = min(settings.images)
    # The difference of the two gains: its error is that of four means.
    grows = gains[most][0] - gains[few][0] > 2 * (gains[most][1] ** 2 + gains[few][1] ** 2) ** 0.5
    holds = clearly_below(losses["AdEMAMix", most], losses["AdamW", most]) and grows
    said = [f"{plus_minus(*gain, '+.4f')} nats with {n:,} images" for n, gain in gains.items()]
    named = {f"{name}, {n:,} images": values for (name, n), values in losses.items()}
    ours = diverged(named) or f"the loss is lower with AdEMAMix by {', '.join(said)}"
    pictures: list[Picture] = [
        Chart(
            "Final validation loss by the number of images",
            "training images",
            common.LOSS,
            [
                common.ends(name, {n: mean_and_error(losses[name, n]) for n in settings.images})
                for name in NAMES.values()
            ],
            log_x=True,
        ),
    ]
    pictures += [
        common.curves(
            f"Validation loss with {count:,} images",
            {name: common.of(results, n, count) for n, name in NAMES.items()},
            len(settings.seeds),
            recipe.unit,
        )
        for count in (few, most)
    ]
    samples = [losses[name, n] for name in NAMES.values() for n in (few, most)]
    return Report(
        "Vision transformers: AdamW against AdEMAMix",
        [sentence(ours)],
        pictures,
        [table_of(named, ("run", "final validation loss", "by seed")), *tables],
        common.settings_of(dataclasses.replace(settings, recipe=recipe)),
        [decide("vit", holds, ours, *samples)],
    )
