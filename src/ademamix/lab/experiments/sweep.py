"""alpha and beta3 as a heat map; then what the warmups, beta1 = 0, and a larger beta1 in AdamW are worth."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from ademamix.lab.config import PRESETS as RECIPES
from ademamix.lab.config import BadInputError, Optimizer, Recipe
from ademamix.lab.experiments import common
from ademamix.lab.experiments.common import TUNING_SEED, Settings, at_the_ends, changed, decide
from ademamix.lab.experiments.lm import on_gpu, small
from ademamix.lab.experiments.statistics import mean_and_error, paired, table_of
from ademamix.lab.experiments.trials import Grid, Point, Trials, best
from ademamix.lab.reports.pictures import HeatMap, Picture
from ademamix.lab.reports.report import Report, Rows, sentence
from ademamix.lab.training.loop import Result

CLOSE = 0.01  # nats: about the spread of seeds


@dataclass(frozen=True)
class Sweep(Settings):
    """A grid of alpha and beta3, one of AdamW's beta1 and learning rate, and one of beta3 for beta1 = 0.

    Grids run with one seed of their own; the best of each, and runs without warmups, then with the seeds that count.
    """

    alpha: tuple[float, ...] = (2.0, 4.0, 8.0, 16.0)
    """Weights of the slow EMA."""
    beta3: tuple[float, ...] = (0.98, 0.99, 0.995, 0.998, 0.9999)
    """Decays of the slow EMA, growing."""
    adamw_beta1: tuple[float, ...] = (0.95, 0.98, 0.99, 0.999, 0.9999)
    """Values of AdamW's beta1 besides that of the recipe."""
    adamw_lr: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    """AdamW's learning rates for all of its values of beta1."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "beta3", "adamw_beta1", "adamw_lr"):
            values = getattr(self, name)
            if not values or list(values) != sorted(set(values)):
                raise BadInputError(f"{name} must be growing numbers, got {values}")


PRESETS = {
    "cpu": Sweep(recipe=small(2000)),
    "gpu": Sweep("gpu", beta3=(0.99, 0.996, 0.998, 0.9995, 0.9999), adamw_lr=(1e-3, 2e-3), recipe=on_gpu(1500)),
    "paper": Sweep(
        "paper",
        seeds=common.SEEDS_OF_PAPER,
        beta3=(0.999, 0.9995, 0.9999, 0.99995),
        adamw_lr=(5e-4, 1e-3),
        recipe=RECIPES["110m"],
    ),
}


def run(settings: Sweep, trials: Trials) -> Report:
    base = dataclasses.replace(settings.recipe, seed=TUNING_SEED, eval_every=settings.recipe.steps)
    beta1 = (settings.recipe.adamw.beta1, *settings.adamw_beta1)
    mixed, momentum, zero = trials.run(
        Grid(
            "alpha-beta3",
            {"alpha": settings.alpha, "beta3": settings.beta3},
            lambda **point: ("ademamix", changed(base, "ademamix", **point)),
        ),
        Grid(
            "adamw-beta1",
            {"beta1": beta1, "lr": settings.adamw_lr},
            lambda **point: ("adamw", changed(base, "adamw", **point)),
        ),
        Grid(
            "beta1-zero",
            {"beta3": settings.beta3},
            lambda **point: ("ademamix", changed(base, "ademamix", beta1=0.0, **point)),
        ),
    )
    alpha, beta3 = best(mixed)
    longest = max(settings.beta3)
    usual = {point: result for point, result in momentum.items() if point[0] == beta1[0]}
    larger = {point: result for point, result in momentum.items() if point[0] != beta1[0]}
    recipe = settings.recipe
    (own, lr), (other, other_lr), (zero_beta3,) = best(usual), best(larger), best(zero)
    at_longest = {"alpha": alpha, "beta3": longest}
    kinds: dict[str, tuple[Optimizer, Recipe]] = {
        f"AdamW, beta1 {own}": ("adamw", changed(recipe, "adamw", beta1=own, lr=lr)),
        f"AdamW, beta1 {other}": ("adamw", changed(recipe, "adamw", beta1=other, lr=other_lr)),
        "AdEMAMix": ("ademamix", changed(recipe, "ademamix", alpha=alpha, beta3=beta3)),
        "AdEMAMix, beta1 0": ("ademamix", changed(recipe, "ademamix", beta3=zero_beta3, beta1=0.0)),
        "AdEMAMix, no warmups": (
            "ademamix",
            changed(recipe, "ademamix", alpha=alpha, beta3=beta3, warmup=0.0),
        ),
        f"AdEMAMix, beta3 {longest}": ("ademamix", changed(recipe, "ademamix", **at_longest)),
        f"AdEMAMix, beta3 {longest}, no warmups": ("ademamix", changed(recipe, "ademamix", **at_longest, warmup=0.0)),
    }

    def made(run: str, seed: int) -> tuple[Optimizer, Recipe]:
        optimizer, of_kind = kinds[run]
        return optimizer, dataclasses.replace(of_kind, seed=seed)

    (final,) = trials.run(Grid("final", {"run": tuple(kinds), "seed": settings.seeds}, made))
    losses = {str(name): values for (name,), values in common.sample(final).items()}
    adamw, large, mix, without_fast, cold, long, long_cold = (losses[name] for name in kinds)
    warm, long_warm, momentous, lean = (
        paired(mix, cold), paired(long, long_cold), paired(mix, large), paired(without_fast, adamw),
    )  # fmt: skip
    of_warmups = "loss with warmups minus loss without, at"
    said_warm = f"{of_warmups} alpha = {alpha:g}, beta3 = {beta3:g}: {warm.told()}"
    said_long = f"{of_warmups} alpha = {alpha:g}, beta3 = {longest:g}: {long_warm.told()}"
    best_warm = paired(_lower(mix, long), _lower(cold, long_cold))
    said_beta1 = f"AdEMAMix's loss minus that of AdamW with its best larger beta1, {other:g}: {momentous.told()}"
    said_zero = (
        f"loss of AdEMAMix with beta1 = 0 minus AdamW's: {lean.told()}; minus that of AdEMAMix with beta1 = 0.9: "
        f"{paired(without_fast, mix).told()}"
    )
    maps: list[Picture] = [
        _map("Final loss of AdEMAMix", "beta3", "alpha", settings.beta3, settings.alpha, mixed),
        _map("Final loss of AdamW", "learning rate", "beta1", settings.adamw_lr, beta1, momentum),
    ]
    return Report(
        "Sweep: alpha, beta3, warmups and beta1",
        [
            f"Over {recipe.steps:,} steps, with the seed of the grids, alpha = {alpha:g}, beta3 = {beta3:g} has the "
            f"lowest loss; {_close(mixed)} of {len(mixed)} settings are within {CLOSE:g} nats of it",
            sentence(said_warm),
            sentence(said_long),
            f"Loss at the better beta3 with warmups minus loss at the better beta3 without: {best_warm.told()}",
            said_beta1,
            sentence(said_zero),
            *at_the_ends(
                {f"AdamW, beta1 = {own:g}": lr, f"AdamW, beta1 = {other:g}": other_lr},
                dict.fromkeys((f"AdamW, beta1 = {own:g}", f"AdamW, beta1 = {other:g}"), settings.adamw_lr),
            ),
        ],
        maps,
        [
            table_of({name: losses[name] for name in kinds}, ("run", "final validation loss", "by seed")),
            *(_table(shown) for shown in maps if isinstance(shown, HeatMap)),
            [
                ("AdEMAMix, beta1 = 0: beta3", "loss, seed of the grids"),
                *((p[0], common.final_loss(r)) for p, r in sorted(zero.items())),
            ],
        ],
        common.settings_of(settings),
        [
            decide("warmup", said_warm, warm),
            decide("warmup-longest", said_long, long_warm),
            decide("beta1", said_beta1, momentous),
            decide("beta1-zero", said_zero, lean),
        ],
    )


def _lower(a: Sequence[float], b: Sequence[float]) -> Sequence[float]:
    """The sample with the lower mean."""
    return min(a, b, key=lambda values: mean_and_error(values)[0])


def _close(results: Mapping[Point, Result | None]) -> int:
    """How many settings have a loss close to the lowest."""
    losses = [result.valid_loss for result in results.values() if result is not None]
    return sum(loss <= min(losses) + CLOSE for loss in losses)


def _table(shown: HeatMap) -> Rows:
    """The numbers of a heat map."""
    rows = zip(shown.y, shown.texts(), strict=True)
    return [(f"{shown.title}: {shown.y_label}, {shown.x_label}", *shown.x), *((y, *texts) for y, texts in rows)]


def _map(
    title: str,
    x_label: str,
    y_label: str,
    x: tuple[float, ...],
    y: tuple[float, ...],
    results: Mapping[Point, Result | None],
) -> HeatMap:
    losses = {point: None if result is None else result.valid_loss for point, result in results.items()}
    z = [[losses[row, column] for column in x] for row in y]
    return HeatMap(title, x_label, y_label, [f"{v:g}" for v in x], [f"{v:g}" for v in y], z)
