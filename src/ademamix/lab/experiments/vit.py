"""AdamW against AdEMAMix on vision transformers, with more and with fewer images."""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from ademamix.lab.config import AdamWSettings, AdEMAMixSettings, BadInputError, ImageRecipe
from ademamix.lab.experiments import common
from ademamix.lab.experiments.common import NAMES, Settings, Tuning, decide
from ademamix.lab.experiments.statistics import grouped, mean_and_error, paired, table_of
from ademamix.lab.experiments.trials import Grid, Trials
from ademamix.lab.reports.pictures import Chart, Picture
from ademamix.lab.reports.report import Report, sentence

TUNING = Tuning((5e-4, 1e-3, 2e-3, 4e-3), (0.99,), (2.5e-4, 5e-4, 1e-3, 2e-3), (0.998,))


@dataclass(frozen=True)
class Vit(Settings):
    """AdamW against AdEMAMix on a vision transformer, as long on few images as on many.

    Each is tuned, with the same number of trials, on the most images. Images are drawn here, or come from a folder or
    the hub.
    """

    images: tuple[int, ...] = (2000, 30_000)
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
        recipe=_recipe(4000, batch=32),
    ),
    "gpu": Vit(
        "gpu",
        images=(10_000, 100_000, 1_000_000),
        recipe=_recipe(4000, batch=256, size=32, layers=6, width=192),
        tuning=Tuning((5e-4, 1e-3, 2e-3), (0.99,), (3e-4, 5e-4, 1e-3), (0.998,)),
    ),
    "paper": Vit(
        "paper",
        seeds=common.SEEDS_OF_PAPER,
        images=(1_281_167, 11_000_000),
        recipe=_paper(384, 12, "hf:timm/imagenet-22k-wds", 320_000),
        tuning=Tuning((3e-4, 1e-3), (0.999,), (3e-4, 1e-3), (0.9999,)),
    ),
}


def run(settings: Vit, trials: Trials) -> Report:
    most = max(settings.images)
    recipe, tuned = common.tuned(trials, dataclasses.replace(settings.recipe, examples=most), settings.tuning)
    (results,) = trials.run(
        Grid(
            "final",
            {"optimizer": tuple(NAMES), "images": settings.images, "seed": settings.seeds},
            lambda optimizer, images, seed: (optimizer, dataclasses.replace(recipe, examples=images, seed=seed)),
        )
    )
    losses = {(NAMES[str(name)], int(n)): values for (name, n), values in common.sample(results).items()}
    few = min(settings.images)
    above = {n: paired(losses["AdEMAMix", n], losses["AdamW", n]) for n in settings.images}
    said = ", ".join(f"{pair.told()} with {n:,} images" for n, pair in above.items())
    ours = f"AdEMAMix's loss minus AdamW's: {said}"
    shrinks = paired(above[most].differences, above[few].differences)
    shrunk = f"gain with {few:,} images minus gain with {most:,}: {shrinks.told()}"
    named = {f"{name}, {n:,} images": values for (name, n), values in losses.items()}
    pictures: list[Picture] = [
        Chart(
            "Final validation loss by the number of images",
            "images in the data set",
            common.MEAN_LOSS,
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
    return Report(
        "Vision transformers: AdamW against AdEMAMix",
        [
            f"AdEMAMix {grouped({f'with {n:,} images': pair for n, pair in above.items()}, link=' ')}",
            ours,
            sentence(shrunk),
            *tuned.misled({n: losses[title, most] for n, title in NAMES.items()}),
            *tuned.ends,
        ],
        pictures,
        [table_of(named, ("run", "final validation loss", "by seed")), *tuned.tables],
        common.settings_of(dataclasses.replace(settings, recipe=recipe), "examples"),
        [decide("vit", ours, above[most]), decide("vit-few", shrunk, shrinks)],
    )
