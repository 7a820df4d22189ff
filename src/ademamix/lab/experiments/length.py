"""What AdEMAMix gains on AdamW by the length of the run, both tuned at each; and how old a gradient still helps.

Fixed before the first run:

- At each length T both are tuned over the same number of learning rates and values of beta2, with a seed of their own.
  AdEMAMix has the settings of ``suggest(T)``.
- AdamW also trains with multiples of T up to the longest that is allowed, each a full schedule, with the settings tuned
  for T. The budget that it needs for AdEMAMix's loss is interpolated within each seed. (4 T was added after the first
  runs: 3 T were not enough in one seed.)
- The trend is that of lines through each seed's values at all lengths, for the seeds that every length has.
- At the longest T, AdEMAMix trains with several values of beta3, all else as tuned. Each is compared within seeds with
  the shortest slow EMA that was tried.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated

import tyro

from ademamix import suggest
from ademamix.lab.config import PRESETS as RECIPES
from ademamix.lab.config import BadInputError, Optimizer, Recipe
from ademamix.lab.experiments import common
from ademamix.lab.experiments.common import NAMES, Candidate, Settings, changed, decide
from ademamix.lab.experiments.lm import on_gpu, small
from ademamix.lab.experiments.statistics import (
    Budgets,
    Paired,
    against,
    budgets_for,
    by_seed,
    grouped,
    mean_and_error,
    paired,
    shown,
    slopes,
)
from ademamix.lab.experiments.trials import Grid, Point, Trials
from ademamix.lab.reports.pictures import Chart, Line, Picture
from ademamix.lab.reports.report import Report, Rows, sentence
from ademamix.lab.training.loop import Result
from ademamix.schedules import half_life


@dataclass(frozen=True)
class Length(Settings):
    """AdamW against AdEMAMix in runs of several lengths, each tuned at each length."""

    lengths: tuple[int, ...] = (2000, 8000, 32_000)
    """Steps T of the runs, growing."""
    lrs: tuple[float, ...] = (1.0, 1.0, 0.5)
    """What the learning rates to try are multiplied by, at each length."""
    budgets: tuple[float, ...] = (1.5, 2.0, 3.0, 4.0)
    """Further budgets of AdamW, in T, growing."""
    longest: int = 128_000
    """AdamW's budgets that have more steps are left out."""
    seed_counts: tuple[int, ...] = (8, 8, 4)
    """How many of the seeds, the first ones, train at each length, at most."""
    adamw_lr: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    """Peak learning rates of AdamW."""
    ademamix_lr: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    """Peak learning rates of AdEMAMix."""
    beta2: tuple[float, ...] = (0.99, 0.999)
    """Values of beta2 for both."""
    beta3: tuple[float, ...] = (0.99, 0.997, 0.999, 0.9997, 0.9999)
    """Values of beta3 that AdEMAMix also trains with at the longest T, growing."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.lengths) < 2 or list(self.lengths) != sorted({t for t in self.lengths if t >= 100}):
            raise BadInputError(f"lengths must be two or more growing numbers from 100 on, got {self.lengths}")
        if list(self.budgets) != sorted({b for b in self.budgets if 1 < b < math.inf}):
            raise BadInputError(f"budgets must be growing numbers above 1, got {self.budgets}")
        if list(self.beta3) != sorted({b for b in self.beta3 if 0 < b < 1}):
            raise BadInputError(f"beta3 must be growing numbers between 0 and 1, got {self.beta3}")
        if len(self.lrs) != len(self.lengths) or not all(0 < x < math.inf for x in self.lrs):
            raise BadInputError(f"lrs must be {len(self.lengths)} positive numbers, as lengths, got {self.lrs}")
        if len(self.seed_counts) != len(self.lengths) or min(self.seed_counts) < 1:
            raise BadInputError(f"seed_counts must be {len(self.lengths)} numbers from 1 on, got {self.seed_counts}")
        if len(self.adamw_lr) != len(self.ademamix_lr) or not self.adamw_lr or not self.beta2:
            tried = f"{len(self.adamw_lr)} of AdamW, {len(self.ademamix_lr)} of AdEMAMix, {len(self.beta2)} of beta2"
            raise BadInputError(f"both must have as many learning rates, and beta2 one value or more: {tried}")

    def base(self, steps: int) -> Recipe:
        """The recipe of a length, with AdEMAMix's settings for it."""
        wanted = suggest(steps)
        warmup = max(1, steps // 20)
        recipe = dataclasses.replace(self.recipe, steps=steps, warmup=warmup, eval_every=warmup)
        return changed(recipe, "ademamix", beta3=wanted["betas"][2], alpha=wanted["alpha"], warmup=1.0)

    def candidates(self, steps: int) -> dict[Optimizer, Candidate]:
        factor = dict(zip(self.lengths, self.lrs, strict=True))[steps]
        tried = {"adamw": self.adamw_lr, "ademamix": self.ademamix_lr}
        spaces = {name: {"lr": tuple(factor * lr for lr in lrs), "beta2": self.beta2} for name, lrs in tried.items()}
        return {
            name: Candidate(f"{NAMES[name]}, T = {steps:,}", name, self.base(steps), space)
            for name, space in spaces.items()
        }

    def seeds_at(self, steps: int) -> tuple[int, ...]:
        return self.seeds[: dict(zip(self.lengths, self.seed_counts, strict=True))[steps]]

    def multiples(self, steps: int) -> tuple[float, ...]:
        """AdamW's budgets at a length, in T."""
        return (1.0, *(b for b in self.budgets if b * steps <= self.longest))


PRESETS = {
    "cpu": Length(recipe=small()),
    "overnight": Length(
        "overnight", lengths=(2000, 8000, 32_000, 128_000), lrs=(1.0, 1.0, 0.5, 0.5), seed_counts=(8, 8, 4, 4),
        longest=256_000, recipe=small(),
    ),
    "gpu": Length(
        "gpu", lengths=(1500, 6000, 24_000), adamw_lr=(1e-3, 2e-3, 4e-3), ademamix_lr=(5e-4, 1e-3, 2e-3),
        longest=72_000, recipe=on_gpu(),
    ),
    "paper": Length(
        "paper", seeds=common.SEEDS_OF_PAPER, lengths=(32_000, 128_000, 512_000), longest=1_500_000,
        adamw_lr=(3e-4, 6e-4, 1e-3), ademamix_lr=(3e-4, 6e-4, 1e-3), beta2=(0.999,),
        beta3=(0.99, 0.999, 0.9999, 0.99997), recipe=RECIPES["110m"],
    ),
}  # fmt: skip


def run(settings: Length, trials: Trials) -> Report:
    recipes: dict[int, Recipe] = {}
    tables: list[Rows] = []
    misled: list[str] = []
    ends: list[str] = []
    results: dict[Point, Result | None] = {}
    for steps in settings.lengths:
        candidates = settings.candidates(steps)
        tuned = common.search(trials, {f"{steps}-{name}": c for name, c in candidates.items()})
        recipes[steps] = settings.base(steps)
        for name, chosen in zip(candidates, tuned.best.values(), strict=True):
            recipes[steps] = changed(recipes[steps], name, **chosen)
        tables += tuned.tables
        finals, longer = trials.run(*_grids(settings, steps, recipes[steps]))
        results |= {(steps, *point): result for point, result in (*finals.items(), *longer.items())}
        misled += tuned.misled({f"{steps}-{name}": own for (name, _), own in common.sample(finals).items()})
        ends += tuned.ends
    (of_ages,) = trials.run(_ages(settings, recipes[settings.lengths[-1]]))
    found_all = Found(settings, recipes, results, of_ages)
    return Report(
        "Length: what AdEMAMix gains, by the number of steps",
        [found_all.takeaway(), *misled, sentence(found_all.trend()), *found_all.gains(), found_all.oldest(), *ends],
        found_all.charts(),
        [found_all.table(), found_all.ages_table(), found_all.by_seed(), *tables],
        common.settings_of(settings, "steps", "warmup", "eval_every"),
        [decide("length", found_all.trend(), -found_all.slope)],
    )


def _grids(settings: Length, steps: int, recipe: Recipe) -> tuple[Grid, Grid]:
    """The runs that count at one length."""
    seeds = settings.seeds_at(steps)

    def made(optimizer: Optimizer, budget: float, seed: int) -> tuple[Optimizer, Recipe]:
        longer = round(budget * steps)
        return optimizer, dataclasses.replace(recipe, steps=longer, warmup=max(1, longer // 20), seed=seed)

    return (
        Grid(f"final-{steps}", {"optimizer": tuple(NAMES), "budget": (1.0,), "seed": seeds}, made),
        Grid(
            f"longer-{steps}", {"optimizer": ("adamw",), "budget": settings.multiples(steps)[1:], "seed": seeds}, made
        ),
    )


def _ages(settings: Length, recipe: Recipe) -> Grid:
    """Runs with other half-lives at the longest T."""

    def made(beta3: float, seed: int) -> tuple[Optimizer, Recipe]:
        return "ademamix", changed(dataclasses.replace(recipe, seed=seed), "ademamix", beta3=beta3)

    return Grid("beta3", {"beta3": settings.beta3, "seed": settings.seeds_at(recipe.steps)}, made)


@dataclass(frozen=True)
class Found:
    """What the runs came to."""

    settings: Length
    recipes: Mapping[int, Recipe]  # of each length, tuned
    results: Mapping[Point, Result | None]  # by length, optimizer, budget and seed
    of_ages: Mapping[Point, Result | None]  # at the longest T, by beta3 and seed

    @cached_property
    def losses(self) -> dict[Point, list[float]]:
        return common.sample(self.results)

    @cached_property
    def above(self) -> dict[int, Paired]:
        """AdEMAMix's loss above AdamW's, by length."""
        return {t: paired(self.losses[t, "ademamix", 1.0], self.losses[t, "adamw", 1.0]) for t in self.settings.lengths}

    @cached_property
    def needed(self) -> dict[int, Budgets]:
        """AdamW's budgets for AdEMAMix's loss, by length."""
        return {
            t: budgets_for(
                {b: self.losses[t, "adamw", b] for b in self.settings.multiples(t)}, self.losses[t, "ademamix", 1.0]
            )
            for t in self.settings.lengths
        }

    @cached_property
    def common_seeds(self) -> int:
        return min(*self.settings.seed_counts, len(self.settings.seeds))

    @cached_property
    def slope(self) -> Paired:
        """By how much the logarithm of the budget grows with that of the length, within seeds."""
        return self._slope({t: [math.log(x) for x in budgets.factors] for t, budgets in self.needed.items()})

    def _slope(self, values: Mapping[int, list[float]]) -> Paired:
        few = [of_length[: self.common_seeds] for of_length in values.values()]
        return Paired(tuple(slopes([math.log(t) for t in values], few)))

    @cached_property
    def enough(self) -> bool:
        """Whether some budget of AdamW reaches AdEMAMix's loss, at each length, in each seed that every length has."""
        of_seeds = [budgets.factors[: self.common_seeds] for budgets in self.needed.values()]
        return all(math.isfinite(x) for factors in of_seeds for x in factors)

    def takeaway(self) -> str:
        grows = "grows" if self.slope.higher else "shrinks" if self.slope.lower else "does not decidedly change"
        trend = f"{grows} with the number of steps" if self.enough else "has no known trend"
        each = "; ".join(f"{self.needed[t].told(' tokens')} at {t:,} steps" for t in self.settings.lengths)
        return f"AdEMAMix's gain {trend}: for its loss AdamW needs {each}"

    def trend(self) -> str:
        """How the gain goes with the length."""
        if self.enough:
            trend = f"scales as the number of steps to the power {self.slope.told('+.3f')}"
        else:
            trend = "has no known trend, as the largest one tried is too small in some seed"
        nats = self._slope({t: [-d for d in pair.differences] for t, pair in self.above.items()})
        span = f"from {self.settings.lengths[0]:,} to {self.settings.lengths[-1]:,} steps"
        return (
            f"{span} the budget that AdamW needs for AdEMAMix's loss {trend}; the gain in nats changes by "
            f"{nats.told()} for each factor of e in steps, over the {self.common_seeds} seeds that every length has"
        )

    def gains(self) -> list[str]:
        return [
            f"At {t:,} steps {against(self.above[t], 'AdEMAMix', 'AdamW')}; "
            f"AdamW needs {self.needed[t].told(' tokens')}"
            for t in self.settings.lengths
        ]

    @cached_property
    def aged(self) -> dict[float, list[float]]:
        """Final losses at the longest T by beta3, growing, seed by seed."""
        return {float(b): values for (b,), values in sorted(common.sample(self.of_ages).items())}

    @cached_property
    def older(self) -> dict[float, Paired]:
        """At the longest T: the loss above that of the shortest slow EMA, by beta3."""
        return {b: paired(values, self.aged[min(self.aged)]) for b, values in self.aged.items()}

    def oldest(self) -> str:
        """Up to which half-life a longer slow EMA helps."""
        if not self.older:
            return "How old a gradient still helps was not tried"
        losses = self.aged
        means = {b: mean_and_error(values)[0] for b, values in losses.items()}
        best, at = min(means, key=lambda b: means[b]), f"At {self.settings.lengths[-1]:,} steps"
        if math.isinf(means[best]):
            return f"{at} AdEMAMix diverged in some seed with every beta3 that was tried"
        steps = list(zip(losses, [*losses][1:], strict=False))
        lowest = f"{at} a half-life of {half_life(best):,.0f} steps (beta3 = {best:g}) has the lowest mean loss"
        if not steps:
            return lowest
        each = grouped({f"{half_life(b):,.0f} steps": paired(losses[b], losses[a]) for a, b in steps})
        first = f"{half_life(min(losses)):,.0f} steps"
        return f"{lowest}. Each half-life compared with the next shorter one, from {first} on: {each}"

    def table(self) -> Rows:
        heads = ("AdamW", "AdEMAMix", "AdEMAMix above AdamW", "AdamW's tokens", "lr", "beta2", "beta3")
        rows = []
        for t in self.settings.lengths:
            s, m = self.recipes[t].adamw, self.recipes[t].ademamix
            losses = (shown(self.losses[t, name, 1.0]) for name in NAMES)
            lr, beta2 = f"{s.lr:g}, {m.lr:g}", f"{s.beta2:g}, {m.beta2:g}"
            rows.append((f"{t:,}", *losses, str(self.above[t]), str(self.needed[t]), lr, beta2, f"{m.beta3:g}"))
        return [("steps T", *heads), *rows]

    def ages_table(self) -> Rows:
        rows = [
            (f"{b:g}", f"{half_life(b):,.0f}", shown(self.aged[b]), str(pair) if b > min(self.older) else "")
            for b, pair in self.older.items()
        ]
        return [("beta3, at the longest T", "half-life, steps", "loss", "above the shortest's"), *rows]

    def by_seed(self) -> Rows:
        return [
            ("steps T", "optimizer", "steps", "loss by seed"),
            *(
                (f"{t:,}", NAMES[str(name)], f"{b * t:,.0f}", by_seed(values))
                for (t, name, b), values in sorted(self.losses.items())
                if isinstance(t, int) and isinstance(b, float)
            ),
        ]

    def charts(self) -> list[Picture]:
        x = self.settings.lengths
        ticks = tuple((float(t), f"{t:,}") for t in x)
        more = {float(t): -self.needed[t].above(1.0) for t in x if math.isfinite(self.needed[t].above(1.0).mean)}
        low, mean, high = (
            [100 * math.expm1(p.mean + side * (p.half if math.isfinite(p.half) else 0.0)) for p in more.values()]
            for side in (-1, 0, 1)
        )
        charts: list[Picture] = [
            Chart(
                "Extra tokens that AdamW needs for AdEMAMix's loss",
                "steps T",
                "%, with 95 % interval",
                [Line("AdamW", list(more), mean, mode="lines+markers", band=(low, high))],
                log_x=True,
                x_ticks=ticks,
            ),
            Chart(
                "AdEMAMix's loss above AdamW's",
                "steps T",
                "nats, with 95 % interval",
                [common.effects("AdEMAMix", {float(t): self.above[t] for t in x})],
                log_x=True,
                x_ticks=ticks,
                reference=((0.0, "AdamW"),),
            ),
        ]
        if self.older:
            shortest = f"half-life {half_life(min(self.older)):,.0f}"
            charts.append(
                Chart(
                    f"How old a gradient still helps, T = {x[-1]:,}",
                    "half-life of the slow EMA, steps",
                    "nats above the shortest's, with 95 % interval",
                    [common.effects("AdEMAMix", {half_life(b): pair for b, pair in self.older.items()})],
                    log_x=True,
                    x_ticks=tuple((half_life(b), f"{half_life(b):,.0f}") for b in self.older),
                    reference=((0.0, shortest),),
                )
            )
        for t in x:
            curve = {b: mean_and_error(self.losses[t, "adamw", b]) for b in self.settings.multiples(t)}
            charts.append(
                Chart(
                    f"Loss by AdamW's budget, T = {t:,}",
                    "AdamW's budget (AdEMAMix = 1)",
                    common.MEAN_LOSS,
                    [common.ends("AdamW", curve)],
                    reference=common.level("AdEMAMix's loss", self.losses[t, "ademamix", 1.0]),
                )
            )
        return charts
