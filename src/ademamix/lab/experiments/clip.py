"""How hard to clip the gradient's norm, for AdamW and for AdEMAMix: the loss, and how many steps are clipped."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from ademamix.lab.config import PRESETS as RECIPES
from ademamix.lab.config import BadInputError, Recipe
from ademamix.lab.experiments import common
from ademamix.lab.experiments.common import NAMES, Settings
from ademamix.lab.experiments.lm import on_gpu, small
from ademamix.lab.experiments.statistics import Paired, by_seed, grouped, mean_and_error, paired, shown
from ademamix.lab.experiments.trials import Grid, Trials, Value
from ademamix.lab.reports.pictures import Chart
from ademamix.lab.reports.report import Report, Rows
from ademamix.lab.training.loop import Result


@dataclass(frozen=True)
class Clip(Settings):
    """AdamW and AdEMAMix with several largest norms of the gradient, all else as in the recipe.

    Apertus was trained with 0.1 (arXiv 2509.14233), the runs of arXiv 2509.01440 with 0.5 and 0.1. Each norm is
    compared with the first one, within seeds.
    """

    norms: tuple[float, ...] = (1.0, 0.5, 0.1, math.inf)
    """Largest norms of the gradient; inf for no clipping. The others are compared with the first."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.norms) < 2 or len(set(self.norms)) < len(self.norms) or not all(norm > 0 for norm in self.norms):
            raise BadInputError(f"norms must be two or more different positive numbers, got {self.norms}")


PRESETS = {
    "cpu": Clip(recipe=small(4000)),
    "gpu": Clip("gpu", recipe=on_gpu()),
    "paper": Clip("paper", seeds=common.SEEDS_OF_PAPER, recipe=RECIPES["110m"]),
}


def run(settings: Clip, trials: Trials) -> Report:
    space: dict[str, Sequence[Value]] = {
        "optimizer": tuple(NAMES),
        "clip": tuple(map(str, settings.norms)),
        "seed": settings.seeds,
    }
    (results,) = trials.run(
        Grid(
            "final",
            space,
            lambda optimizer, clip, seed: (
                optimizer,
                dataclasses.replace(settings.recipe, clip=float(clip), seed=seed, eval_every=settings.recipe.steps),
            ),
        )
    )
    first, *others = settings.norms
    places = _places(settings.norms)
    losses = {(str(o), float(clip)): values for (o, clip), values in common.sample(results).items()}
    shares = {(o, norm): _share(common.of(results, o, str(norm))) for o in NAMES for norm in settings.norms}
    above = {(o, norm): paired(losses[o, norm], losses[o, first]) for o in NAMES for norm in others}
    gains = {norm: paired(losses["ademamix", norm], losses["adamw", norm]) for norm in settings.norms}
    said = [
        f"{title}, compared with a norm of {told(first)}: "
        + "; ".join(f"{told(norm)} {above[o, norm]}" for norm in others)
        for o, title in NAMES.items()
    ]
    clipped = "; ".join(
        f"{title} " + ", ".join(f"{_percent(shares[o, norm], '.0f')} at {told(norm)}" for norm in settings.norms)
        for o, title in NAMES.items()
    )
    named = {f"{told(norm, 'no clipping')} with {NAMES[o]}": pair for (o, norm), pair in above.items()}
    decided = {name: pair for name, pair in named.items() if pair.lower or pair.higher}
    rest = "; no other difference is decided" if 0 < len(decided) < len(named) else ""
    return Report(
        "Clipping the gradient's norm",
        [
            f"In place of a norm of {told(first)}: {grouped(decided) or 'no norm helps or hurts'}{rest}",
            *said,
            f"Share of steps clipped: {clipped}",
        ],
        [
            _chart(
                f"Loss above that with a norm of {told(first)}",
                "nats, with 95 % interval",
                {title: {norm: above[o, norm] for norm in others} for o, title in NAMES.items()},
                places,
            ),
            Chart(
                "Share of steps clipped",
                "largest norm",
                "%",
                [
                    common.ends(title, {places[n]: (100 * shares[o, n], math.inf) for n in settings.norms}, "markers")
                    for o, title in NAMES.items()
                ],
                log_x=True,
                x_ticks=tuple((at, told(norm)) for norm, at in places.items()),
            ),
        ],
        [_table(settings, losses, shares, above, gains)],
        common.settings_of(settings, "clip", "eval_every"),
    )


def told(norm: float, off: str = "off") -> str:
    return off if math.isinf(norm) else f"{norm:g}"


def _places(norms: Sequence[float]) -> dict[float, float]:
    """Where norms stand on an axis of logarithms: no clipping beyond all others."""
    beyond = 10 * max(norm for norm in norms if norm < math.inf)
    return {norm: min(norm, beyond) for norm in norms}


def _share(runs: Sequence[Result]) -> float:
    """The mean share of steps clipped, of the runs that did not diverge; infinite if all did."""
    return mean_and_error([run.clipped_share for run in runs])[0] if runs else math.inf


def _percent(share: float, form: str) -> str:
    return "diverged" if math.isinf(share) else f"{100 * share:{form}} %"


def _chart(title: str, label: str, pairs: Mapping[str, Mapping[float, Paired]], places: Mapping[float, float]) -> Chart:
    return Chart(
        title,
        "largest norm",
        label,
        [
            dataclasses.replace(common.effects(name, {places[norm]: p for norm, p in of_name.items()}), mode="markers")
            for name, of_name in pairs.items()
        ],
        log_x=True,
        x_ticks=tuple((at, told(norm)) for norm, at in places.items()),
        reference=((0.0, told(next(iter(places)))),),
    )


def _table(
    settings: Clip,
    losses: Mapping[tuple[str, float], Sequence[float]],
    shares: Mapping[tuple[str, float], float],
    above: Mapping[tuple[str, float], Paired],
    gains: Mapping[float, Paired],
) -> Rows:
    first = f"above {told(settings.norms[0])}"
    heads = ("optimizer", "norm", "loss", "steps clipped", first, "above AdamW's at this norm", "by seed")
    return [
        heads,
        *(
            (
                title,
                told(norm),
                shown(losses[o, norm]),
                _percent(shares[o, norm], ".1f"),
                str(above.get((o, norm), "")),
                "" if o == "adamw" else str(gains[norm]),
                by_seed(losses[o, norm]),
            )
            for o, title in NAMES.items()
            for norm in settings.norms
        ),
    ]
