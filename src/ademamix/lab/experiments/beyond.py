"""Other memories of past gradients, tuned alike: what they gain and cost, stopped early too, and what they remember."""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated

import tyro

from ademamix.lab.config import PRESETS as RECIPES
from ademamix.lab.config import BadInputError, Optimizer, Recipe
from ademamix.lab.experiments import common
from ademamix.lab.experiments.common import Candidate, Settings, changed
from ademamix.lab.experiments.kernels import ages, memory
from ademamix.lab.experiments.lm import on_gpu, small
from ademamix.lab.experiments.statistics import (
    Paired,
    against,
    budgets_for,
    by_seed,
    jointly,
    mean_and_error,
    paired,
    shown,
)
from ademamix.lab.experiments.trials import Grid, Point, Trials, Value
from ademamix.lab.reports.pictures import Chart, Line, Picture
from ademamix.lab.reports.report import Report, Rows
from ademamix.lab.training.loop import Result
from ademamix.lab.training.optimizers import arguments_of, buffers_of, pinned, title
from ademamix.lab.values import Lists, Values

FAINT = 1e-6  # of the largest weight in a chart: fainter ones are left out


@dataclass(frozen=True)
class Entry:
    """An optimizer, and what it is tuned over."""

    title: tyro.conf.Suppress[str]
    optimizer: tyro.conf.Suppress[Optimizer]
    tried: Lists
    """Values of the learning rate and of another setting, tried in all combinations."""
    settings: Values = field(default_factory=dict)
    """Its other settings, where they are not those of the recipe or of its class."""


def entries(lr: float, beta2: tuple[float, ...], beta3: tuple[float, ...]) -> dict[str, Entry]:
    """What is compared, for the learning rate that is best for AdamW.

    The others are tried about 0.35 of it: 0.42 to 0.46 is best for AdEMAMix and 0.33 to 0.19 for ADana in the fits of
    arXiv 2602.05298, from 1e7 to 2.6e9 parameters; about 0.25 was in pilot runs of ours.
    """

    def times(factor: float) -> tuple[float, ...]:
        return tuple(float(f"{x * factor * lr:.6g}") for x in (0.5, 1.0, 2.0))

    b2 = beta2[-1]
    mixed = {"lr": times(0.35), "beta3": beta3}
    log_time = {"beta3_schedule": "log-time", "kappa": 0.85}  # as `suggest(None)` has it, whose alpha is 1
    # Of a sum, not an average, lr is smaller and the decay that it multiplies larger. Both sqrt((1 - 0.9) (1 - 0.99)) =
    # 0.032, its authors' factor of AdamW's lr, and 1 - 0.99 are within what is tried.
    summed = tuple(float(f"{factor * lr:.6g}") for factor in (0.007, 0.018, 0.045))
    total = {"betas": (0.99, b2), "beta1_warmup": "1T", "weight_decay": 1.0}
    # With this power the two long averages together weigh about 4 times the short one.
    three = {"count": 3, "power": 0.75, "warmup": "1T", "beta2": b2, "weight_decay": 0.1}
    return {
        "adamw": Entry("AdamW", "adamw", {"lr": times(1.0), "beta2": beta2}),
        "ademamix": Entry("AdEMAMix", "ademamix", mixed),
        "beta1-zero": Entry("AdEMAMix, beta1 = 0", "ademamix", mixed, {"beta1": 0.0}),
        "log-time": Entry("AdEMAMix, log-time", "ademamix", {"lr": times(0.35), "alpha": (0.5, 1.0)}, log_time),
        "simplified": Entry("SimplifiedAdEMAMix", "simplifiedademamix", {"lr": summed, "alpha": (10, 20)}, total),
        "adana": Entry("ADana", "adana", {"lr": times(0.35), "kappa": (0.85, 0.9)}, {"weight_decay": 0.1}),
        "kema": Entry("KEMA, K = 3", "kema", {"lr": times(0.35), "longest": ("0.15T", "0.3T")}, three),
    }


@dataclass(frozen=True)
class Beyond(Settings):
    """AdamW, AdEMAMix and other memories of past gradients, tuned with the same number of trials, then on fresh seeds.

    The learning rate stays at its peak and falls over the last fifth. Every optimizer is also stopped early and
    extended: trained for parts and multiples of the T steps that it was tuned for, while its own schedules keep to T.
    """

    fractions: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 2.0)
    """Lengths of the runs, in T, growing; 1 must be among them."""
    budgets: tuple[float, ...] = (1.25, 1.5)
    """Further lengths of AdamW's runs, in T, growing: how many tokens it needs for the others' losses."""
    own: Annotated[Optimizer | None, tyro.conf.arg(metavar="FILE.py:NAME", help_behavior_hint="(default: none)")] = None
    """A rule of your own that takes part."""
    own_tried: Lists = field(default_factory=dict)
    """What it is tuned over, as many combinations as the others have: lr=1e-3,2e-3,4e-3 alpha=2,4"""
    own_settings: Values = field(default_factory=dict)
    """Its other settings, where they are not its defaults."""
    entries: dict[str, Entry] = field(default_factory=dict)
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.own is not None:  # as it is recorded, so that it does not change when a run is resumed
            object.__setattr__(self, "own", pinned(self.own))
        for name, least in (("fractions", 0.0), ("budgets", 1.0)):
            values = getattr(self, name)
            if list(values) != sorted({x for x in values if least < x < math.inf}):
                raise BadInputError(f"{name} must be growing numbers above {least:g}, got {values}")
        if 1.0 not in self.fractions:
            raise BadInputError(f"fractions must have 1, that of T steps, got {self.fractions}")
        self.of_length(self.recipe, self.fractions[0], self.seeds[0])
        every = self.every()
        sizes = {key: math.prod(map(len, entry.tried.values())) for key, entry in every.items()}
        if len(set(sizes.values())) > 1 or not all("lr" in entry.tried for entry in every.values()):
            tried = ", ".join(f"{size} of {key}" for key, size in sizes.items())
            raise BadInputError(f"all must have the same number of trials, lr among what is tried: {tried}")
        for key, entry in every.items():
            for point in itertools.product(*entry.tried.values()):
                self._check(key, entry, dict(zip(entry.tried, point, strict=True)))

    def _check(self, key: str, entry: Entry, point: Mapping[str, float]) -> None:
        try:
            arguments_of(entry.optimizer, changed(self.base(entry), entry.optimizer, **point))
        except BadInputError as error:
            raise BadInputError(f"{key}: {error}") from error

    @property
    def unused(self) -> tuple[str, ...]:
        """The settings that have no effect, given the others."""
        return () if self.own else ("own", "own_tried", "own_settings")

    def every(self) -> dict[str, Entry]:
        """The entries, with the user's own."""
        if self.own is None:
            return self.entries
        return {**self.entries, "own": Entry(f"{title(self.own)} (own)", self.own, self.own_tried, self.own_settings)}

    def base(self, entry: Entry) -> Recipe:
        """The recipe of an entry, before it is tuned."""
        return changed(dataclasses.replace(self.recipe, planned=self.recipe.horizon), entry.optimizer, **entry.settings)

    def of_length(self, recipe: Recipe, fraction: float, seed: int) -> Recipe:
        """A run of some length; the loss is followed in those of T steps."""
        steps = round(fraction * recipe.steps)
        every = recipe.eval_every if fraction == 1.0 else max(1, steps)
        return dataclasses.replace(recipe, steps=steps, seed=seed, eval_every=every)


PRESETS = {
    "cpu": Beyond(
        entries=entries(4e-3, (0.95, 0.99), (0.995, 0.998)), recipe=dataclasses.replace(small(2000), schedule="wsd")
    ),
    "gpu": Beyond(
        "gpu",
        entries=entries(2e-3, (0.99, 0.999), (0.998, 0.999)),
        recipe=dataclasses.replace(on_gpu(), schedule="wsd"),
    ),
    "paper": Beyond(
        "paper",
        seeds=common.SEEDS_OF_PAPER,
        entries=entries(1e-3, (0.99, 0.999), (0.9998, 0.9999)),
        recipe=dataclasses.replace(RECIPES["110m"], schedule="wsd"),
    ),
}


def run(settings: Beyond, trials: Trials) -> Report:
    every = settings.every()
    candidates = {key: Candidate(e.title, e.optimizer, settings.base(e), e.tried) for key, e in every.items()}
    tuned = common.search(trials, candidates)
    chosen = tuned.best
    recipes = {key: changed(settings.base(e), e.optimizer, **chosen[key]) for key, e in every.items()}

    def made(entry: str, fraction: float, seed: int) -> tuple[Optimizer, Recipe]:
        return every[entry].optimizer, settings.of_length(recipes[entry], fraction, seed)

    lengths = [x for x in settings.budgets if x not in settings.fractions]
    results, longer = trials.run(
        Grid("final", {"entry": tuple(every), "fraction": settings.fractions, "seed": settings.seeds}, made),
        Grid("longer", {"entry": ("adamw",), "fraction": lengths, "seed": settings.seeds}, made),
    )
    found = Found(settings, recipes, {**results, **longer})
    return Report(
        "Beyond AdEMAMix: other memories of past gradients",
        [
            *found.lowest(),
            *tuned.misled({key: found.final(key) for key in every}),
            found.lean(),
            *found.stopped(),
            *tuned.ends,
            *common.too_long(candidates),
        ],
        [*found.charts(), *_kernels(every, recipes, chosen)],
        [found.table(), *found.by_length(), *tuned.tables],
        common.settings_of(settings),
    )


@dataclass(frozen=True)
class Found:
    """What the runs came to."""

    settings: Beyond
    recipes: Mapping[str, Recipe]  # of each entry, tuned
    results: Mapping[Point, Result | None]  # by entry, length in T, and seed

    @cached_property
    def titles(self) -> dict[str, str]:
        return {key: entry.title for key, entry in self.settings.every().items()}

    @cached_property
    def losses(self) -> dict[tuple[str, float], list[float]]:
        """Final losses by entry and length in T, seed by seed."""
        return {(str(key), float(x)): values for (key, x), values in common.sample(self.results).items()}

    def final(self, key: str) -> list[float]:
        """The losses after T steps."""
        return self.losses[key, 1.0]

    def lost(self, key: str, x: float = 1.0) -> bool:
        """Whether a run of this entry and length diverged, in any seed."""
        return any(map(math.isinf, self.losses[key, x]))

    def bytes_of(self, key: str) -> float:
        runs = common.of(self.results, key)
        return runs[0].state_bytes_per_parameter if runs else math.inf

    def lowest(self) -> list[str]:
        """Which is lowest after T steps, and by how much."""
        key = min(self.titles, key=lambda k: mean_and_error(self.final(k))[0])
        if self.lost(key):
            return ["After T steps none is lowest: each diverged in some seed"]
        first, *more = (k for k in ("ademamix", "adamw") if k != key)
        than = "; ".join([self.against(key, first, subject=self.titles[key]), *(self.against(key, k) for k in more)])
        tokens = "" if key == "adamw" else f"; AdamW needs {self.tokens(key, ' tokens')} to reach its loss"
        at = f"After T = {self.settings.recipe.steps:,} steps"
        return [f"{at} {self.titles[key]} is lowest{tokens}", f"{at} {than}"]

    def lean(self) -> str:
        """Whether a rule with no more memory than AdEMAMix's is better."""
        mixed, most = self.final("ademamix"), self.bytes_of("ademamix")
        no_larger = [k for k in self.titles if k not in ("adamw", "ademamix") and self.bytes_of(k) <= most]
        better = [k for k in no_larger if paired(self.final(k), mixed, jointly(len(no_larger))).lower]
        if math.isinf(most):
            return "AdEMAMix diverged in every run, so its memory is not known"
        held = f"AdEMAMix's memory ({most:.1f} bytes per parameter)"
        if len(mixed) < 2:
            return f"One seed does not tell whether a rule with at most {held} beats it"
        if not better:
            return f"No rule with at most {held} is decidedly below it"
        level = jointly(len(no_larger))
        said = [
            f"{self.titles[k]} ({self.bytes_of(k):.1f}), {paired(self.final(k), mixed, level).told()}" for k in better
        ]
        return f"With at most {held}, decidedly below it ({100 * level:.4g} % intervals): {'; '.join(said)}"

    def against(self, key: str, other: str, x: float = 1.0, subject: str = "it") -> str:
        """How far the best of all entries, as the sentence calls it, ends from another in runs of one length."""
        pair = paired(self.losses[key, x], self.losses[other, x], jointly(len(self.titles) - 1))
        return against(pair, subject, self.titles[other])

    def stopped(self) -> list[str]:
        """The sentences on the shortest and the longest run."""
        ends = [x for x in (min(self.settings.fractions), max(self.settings.fractions)) if x != 1.0]
        said = []
        for x in ends:
            how = "Stopped at" if x < 1.0 else "Extended to"
            first, second = sorted(self.titles, key=lambda k: mean_and_error(self.losses[k, x])[0])[:2]
            if self.lost(first, x):
                said.append(f"{how} {x:g} T, each diverged in some seed")
                continue
            other = second if first == "adamw" else "adamw"
            than = self.against(first, other, x)
            said.append(f"{how} {x:g} T, {self.titles[first]} is lowest: {than}; the next is {self.titles[second]}")
        return said

    def tokens(self, key: str, unit: str = "") -> str:
        """How many more tokens AdamW needs for an entry's loss, by its runs of all lengths."""
        if key == "adamw" or self.lost(key):
            return ""
        if mean_and_error(self.final(key))[0] > mean_and_error(self.final("adamw"))[0]:
            return "its loss is above AdamW's"
        adamw = {x: of_length for (k, x), of_length in self.losses.items() if k == "adamw" and x >= 1.0}
        return budgets_for(adamw, self.final(key)).told(unit)

    def table(self) -> Rows:
        heads = ("loss after T steps", "by seed", "AdamW's tokens", "bytes per parameter", "optimizer, ms", "buffers")
        rows = []
        for key, entry in self.settings.every().items():
            runs = common.of(self.results, key, 1.0)
            ms = f"{mean_and_error([r.optimizer_ms for r in runs])[0]:.2f}" if runs else ""
            buffers = len(buffers_of(entry.optimizer, self.recipes[key]))
            size = f"{self.bytes_of(key):.1f}" if math.isfinite(self.bytes_of(key)) else ""
            rows.append(
                (entry.title, shown(self.final(key)), by_seed(self.final(key)), self.tokens(key), size, ms, buffers)
            )
        return [("rule", *heads), *rows]

    def by_length(self) -> list[Rows]:
        """The loss at each length, and its difference to AdamW's."""
        lengths = self.settings.fractions
        heads = [f"{x:g} T" for x in lengths]
        means: Rows = [(name, *(shown(self.losses[key, x]) for x in lengths)) for key, name in self.titles.items()]
        gaps: Rows = [
            (name, *(str(self._above_adamw(key, x)) for x in lengths))
            for key, name in self.titles.items()
            if key != "adamw"
        ]
        return [[("final loss of a run of", *heads), *means], [("above AdamW's", *heads), *gaps]]

    def _above_adamw(self, key: str, x: float) -> Paired:
        return paired(self.losses[key, x], self.losses["adamw", x])

    def charts(self) -> list[Picture]:
        unit, count = self.settings.recipe.unit, len(self.settings.seeds)
        runs = {name: common.of(self.results, key, 1.0) for key, name in self.titles.items()}
        losses, gaps = [], []
        for key, name in self.titles.items():
            means = {x: mean_and_error(self.losses[key, x]) for x in self.settings.fractions}
            losses.append(common.ends(name, means))
            if key != "adamw":
                gaps.append(common.effects(name, {x: self._above_adamw(key, x) for x in self.settings.fractions}))
        label = "steps, in T"
        return [
            common.curves("Validation loss, T steps", runs, count, unit),
            Chart("Stopped early and extended: final loss", label, common.MEAN_LOSS, losses),
            Chart("The same, above AdamW's of that length", label, "nats, with 95 % interval", gaps),
        ]


def _kernels(
    every: Mapping[str, Entry], recipes: Mapping[str, Recipe], chosen: Mapping[str, Mapping[str, Value]]
) -> list[Picture]:
    """What each optimizer remembers after T steps, and those without a T of their own at other times."""

    def kernel(key: str, part: float, label: str) -> Line:
        steps = max(1, round(part * recipes[key].steps))
        kind, given = arguments_of(every[key].optimizer, recipes[key])
        weights, lr = memory(kind, given, steps, ages(steps)), float(chosen[key]["lr"])
        return Line(label, [float(age + 1) for age in ages(steps)], [lr * weight for weight in weights])

    growing = [key for key, entry in every.items() if "kappa" in {**entry.tried, **entry.settings}]
    parts = {0.25: "T / 4", 1.0: "T", 2.0: "2 T"}
    charts = {
        "What is remembered after T steps": [kernel(key, 1.0, entry.title) for key, entry in every.items()],
        "Memories that grow, as they are at other times": [
            kernel(key, part, f"{every[key].title}, {at}") for key in growing for part, at in parts.items()
        ],
    }
    label = "weight x learning rate"
    return [
        Chart(text, "age of the gradient, 1 for the newest", label, _strong(lines), log_x=True, log_y=True)
        for text, lines in charts.items()
        if lines
    ]


def _strong(lines: list[Line]) -> list[Line]:
    """The lines without what no axis of logarithms can show."""
    least = FAINT * max(y for line in lines for y in line.y)
    kept = []
    for line in lines:
        points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if y > least]
        kept.append(dataclasses.replace(line, x=[x for x, _ in points], y=[y for _, y in points]))
    return kept
