"""What the experiments share: their settings, tuning, and the comparison of two tuned optimizers."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

import tyro

from ademamix.lab.config import SEEDS, BadInputError, NewFolder, Optimizer, RunFolder, Training, is_settings, used
from ademamix.lab.console import say
from ademamix.lab.experiments.statistics import Paired, loss_of, mean_and_error, too_low
from ademamix.lab.experiments.trials import Grid, Point, Trials, Value, best
from ademamix.lab.reports.claims import Finding, Verdict
from ademamix.lab.reports.pictures import Chart, Line, around
from ademamix.lab.reports.report import Rows
from ademamix.lab.training.loop import Result
from ademamix.lab.training.optimizers import SECTIONS, title
from ademamix.lab.values import typed

Preset = Literal["cpu", "overnight", "gpu", "paper"]
TUNING_SEED = 200  # no result comes from the seed that settings were chosen by
SEEDS_OF_PAPER = (201, 202, 203)  # a run of its sizes takes days
NAMES = {"adamw": "AdamW", "ademamix": "AdEMAMix"}
LOSS, MEAN_LOSS = "validation loss, nats", "validation loss, nats; bars: standard error"


@dataclass(frozen=True)
class Workplace:
    """Where and how an experiment is carried out; nothing here changes what it is about."""

    out: NewFolder = None
    """Folder for everything that is written; must not exist yet."""
    resume: RunFolder = None
    """Resume the experiment in this folder, with the settings that it was started with."""
    device: str = "auto"
    """Device to train on: auto takes the accelerators that are there, else the cpu."""
    workers: int = 0
    """Runs at a time; 0: one per CPU core, or per GPU four with the preset gpu and one with the preset paper."""
    dry_run: bool = False
    """Only list the runs and estimate how long they take, from 50 steps of each kind of run; write nothing."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise BadInputError(f"workers must not be negative, got {self.workers}")


@dataclass(frozen=True)
class Settings:
    """Settings that every experiment has."""

    preset: Preset = "cpu"
    """Where the other defaults come from: cpu (minutes on 2 cores), overnight, gpu (one large), paper (a cluster)."""
    seeds: tuple[int, ...] = tuple(range(201, 209))
    """Seeds of the runs that count: initial weights and batches."""
    job: Annotated[Workplace, tyro.conf.arg(name="")] = field(default_factory=Workplace)

    def __post_init__(self) -> None:
        if (
            not self.seeds
            or len(set(self.seeds)) < len(self.seeds)
            or not 0 <= min(self.seeds) <= max(self.seeds) < SEEDS
        ):
            raise BadInputError(f"seeds must be different numbers in [0, 2**63), got {self.seeds}")
        if TUNING_SEED in self.seeds:
            raise BadInputError(f"seeds must not have {TUNING_SEED}, that of the tuning")


@dataclass(frozen=True)
class Tuning:
    """The settings that both optimizers are tried with: every combination, the same number for both."""

    adamw_lr: tuple[float, ...]
    """Peak learning rates of AdamW."""
    adamw_beta2: tuple[float, ...]
    """Values of beta2 of AdamW."""
    ademamix_lr: tuple[float, ...]
    """Peak learning rates of AdEMAMix."""
    ademamix_beta3: tuple[float, ...]
    """Values of beta3 of AdEMAMix."""

    def __post_init__(self) -> None:
        for name in ("adamw_lr", "adamw_beta2", "ademamix_lr", "ademamix_beta3"):
            if len(set(values := getattr(self, name))) < len(values):
                raise BadInputError(f"{name} must be different numbers, got {values}")
        sizes = [len(self.adamw_lr) * len(self.adamw_beta2), len(self.ademamix_lr) * len(self.ademamix_beta3)]
        if sizes[0] != sizes[1] or not sizes[0]:
            raise BadInputError(
                f"both optimizers must have the same number of trials: {sizes[0]} of AdamW, {sizes[1]} of AdEMAMix"
            )

    def spaces(self) -> dict[Optimizer, dict[str, tuple[float, ...]]]:
        return {
            "adamw": {"lr": self.adamw_lr, "beta2": self.adamw_beta2},
            "ademamix": {"lr": self.ademamix_lr, "beta3": self.ademamix_beta3},
        }


def steps_at(name: str, parts: Sequence[float], steps: int) -> tuple[int, ...]:
    """The steps after which parts of a run are over.

    Raises:
        BadInputError: they are not different steps within the run.
    """
    at = tuple(round(x * steps) for x in parts)
    if len(set(at)) < len(at) or not 0 < min(at) <= max(at) < steps:
        raise BadInputError(f"{name} must be different steps within the {steps} of the run, got {parts}: {at}")
    return at


R = TypeVar("R", bound=Training)


def changed(recipe: R, optimizer: Optimizer, **settings: Any) -> R:
    """The recipe with other settings of one optimizer.

    Raises:
        BadInputError: its section in the recipe has no such setting.
    """
    if optimizer not in SECTIONS:
        return dataclasses.replace(recipe, settings={**recipe.settings, **settings})
    section = getattr(recipe, optimizer)
    names = [field.name for field in dataclasses.fields(section)]
    for name in settings:
        if name not in names:
            raise BadInputError(f"{title(optimizer)} has no setting {name}; it has {', '.join(names)}")
    return dataclasses.replace(recipe, **{optimizer: dataclasses.replace(section, **settings)})


@dataclass(frozen=True)
class Candidate:
    """An optimizer to be tuned."""

    title: str
    optimizer: Optimizer
    recipe: Training  # with its other settings
    space: Mapping[str, Sequence[Value]]  # of each setting the values to try, in all combinations

    def grid(self, name: str) -> Grid:
        base = dataclasses.replace(self.recipe, seed=TUNING_SEED, eval_every=self.recipe.steps)
        return Grid(name, self.space, lambda **point: (self.optimizer, changed(base, self.optimizer, **point)))


def too_long(candidates: Mapping[str, Candidate]) -> list[str]:
    """A sentence on each candidate whose slow EMA, as tried, reaches back more than half of the planned steps."""
    said = []
    for c in candidates.values():
        steps = c.recipe.horizon
        long = [x for x in c.space.get("beta3", ()) if isinstance(x, float) and 2 > steps * (1 - x) > 0]
        if long:
            reach = ", ".join(f"{x:g} ({1 / (1 - x):,.0f} steps)" for x in long)
            said.append(f"{c.title} is tried with slow EMAs too long for {steps:,} steps: beta3 = {reach}")
    return said


@dataclass(frozen=True)
class Tuned:
    """What a search for the best settings of some candidates came to.

    Attributes:
        best: settings of each candidate.
        losses: theirs, with the tuning seed.
        tables: all trials.
        ends: sentences on the learning rates that are at an end of those that were tried.
    """

    candidates: Mapping[str, Candidate]
    best: Mapping[str, Mapping[str, Value]]
    losses: Mapping[str, float]
    tables: list[Rows]
    ends: list[str]

    def misled(self, losses: Mapping[str, Sequence[float]]) -> list[str]:
        """A sentence on each candidate whose losses with the same settings and other seeds belie the search."""
        return [
            f"{self.candidates[key].title}: tuning was misled. With other seeds its settings end "
            f"{mean_and_error(own)[0] - found:.4f} nats higher, more than seeds differ (99 % prediction interval)"
            for key, own in losses.items()
            if too_low(found := self.losses[key], own)
        ]


def search(trials: Trials, candidates: Mapping[str, Candidate]) -> Tuned:
    """Try every combination of each candidate's values."""
    for line in too_long(candidates):
        say(line)
    results = trials.run(*(candidate.grid(f"tune-{key}") for key, candidate in candidates.items()))
    found: dict[str, dict[str, Value]] = {}
    lowest: dict[str, float] = {}
    tables: list[Rows] = []
    for (key, candidate), losses in zip(candidates.items(), results, strict=True):
        chosen = best(losses)
        result = losses[chosen]
        assert result is not None  # the best of all has not diverged
        found[key] = dict(zip(candidate.space, chosen, strict=True))
        lowest[key] = result.valid_loss
        points = itertools.product(*candidate.space.values())
        rows = [(*point, f"{final_loss(losses[point])}{' (chosen)' if point == chosen else ''}") for point in points]
        tables.append([(*(f"{candidate.title}: {name}" for name in candidate.space), "loss, tuning"), *rows])
    lrs = {c.title: found[key]["lr"] for key, c in candidates.items()}
    ends = at_the_ends(lrs, {c.title: c.space["lr"] for c in candidates.values()})
    return Tuned(candidates, found, lowest, tables, ends)


def tuned(trials: Trials, recipe: R, tuning: Tuning) -> tuple[R, Tuned]:
    """The recipe with the best settings of AdamW and of AdEMAMix, and how they were found."""
    spaces = tuning.spaces()
    found = search(trials, {name: Candidate(NAMES[name], name, recipe, space) for name, space in spaces.items()})
    for name, chosen in found.best.items():
        recipe = changed(recipe, name, **chosen)
    return recipe, found


def at_the_ends(chosen: Mapping[str, Value], tried: Mapping[str, Sequence[Any]]) -> list[str]:
    """A sentence on what has its best learning rate at an end of those that were tried: the best may lie beyond.

    Args:
        chosen: by name, the best learning rate.
        tried: by name, all of them.
    """
    said = []
    for which, end in (("smallest", min), ("largest", max)):
        names = [name for name, lr in chosen.items() if lr == end(tried[name]) and len(set(tried[name])) > 1]
        if names:
            said.append(f"The best learning rate is the {which} that was tried: {', '.join(names)}")
    return said


def decide(claim: str, ours: str, *effects: Paired) -> Finding:
    """A finding on a claim that holds if every effect is below zero; without two seeds nothing is decided.

    Args:
        claim: its key in CLAIMS.
        ours: our figures, with their intervals.
        effects: differences within seeds.
    """
    verdict: Verdict = "undecided"
    if any(effect.count < 2 for effect in effects) or not effects:
        verdict = "not tested at this size"
    elif any(effect.higher for effect in effects):
        verdict = "contradicted"
    elif all(effect.lower for effect in effects):
        verdict = "reproduced"
    return Finding(claim, verdict, ours)


def final_loss(result: Result | None) -> str:
    """A final loss for a table."""
    return loss_of(math.inf if result is None else result.valid_loss)


def sample(results: Mapping[Point, Result | None], *, without: float = float("inf")) -> dict[Point, list[float]]:
    """Final losses by all of the point but its last value, the seed; `without` stands for a run that diverged."""
    losses: dict[Point, list[float]] = {}
    for point, result in sorted(results.items(), key=lambda item: item[0][-1]):
        losses.setdefault(point[:-1], []).append(without if result is None else result.valid_loss)
    return losses


def of(results: Mapping[Point, Result | None], *values: Any) -> list[Result]:
    """The runs whose points begin with these values, that did not diverge."""
    return [r for point, r in sorted(results.items(), key=lambda i: i[0][-1]) if r and point[: len(values)] == values]


def mean_curves(runs: Mapping[str, Sequence[Result]], unit: str) -> list[Line]:
    """The mean over seeds of the validation curves of each name's runs, and their range; none where all diverged."""
    lines = []
    for name, of_name in runs.items():
        points = list(zip(*(run.curve for run in of_name), strict=True))
        of_seeds = [[point["valid_loss"] for point in together] for together in points]
        if points:
            band = (list(map(min, of_seeds)), list(map(max, of_seeds))) if len(of_name) > 1 else None
            lines.append(Line(name, [t[0][unit] for t in points], list(map(statistics.mean, of_seeds)), band=band))
    return lines


def ends(name: str, means: Mapping[float, tuple[float, float]], mode: str = "lines+markers") -> Line:
    """Means and errors by what they depend on, where no run diverged."""
    there = {x: mean for x, mean in means.items() if math.isfinite(mean[0])}
    return Line(name, list(there), [m for m, _ in there.values()], [e for _, e in there.values()], mode)


def level(name: str, losses: Sequence[float]) -> tuple[tuple[float, str], ...]:
    """The mean of a sample as a horizontal line of a chart; none if a run diverged."""
    mean, _ = mean_and_error(losses)
    return ((mean, name),) if math.isfinite(mean) else ()


def effects(name: str, pairs: Mapping[float, Paired]) -> Line:
    """Mean differences and their intervals by what they depend on, where no run diverged."""
    return ends(name, {x: (pair.mean, pair.half) for x, pair in pairs.items()})


def curves(title: str, runs: Mapping[str, Sequence[Result]], seeds: int, unit: str) -> Chart:
    """Mean validation curves without the steep start, a tenth of the run: one wants to tell their ends apart."""
    lines = mean_curves(runs, unit)
    longest = max((x for line in lines for x in line.x), default=0.0)
    shown = [y for line in lines for x, y in zip(line.x, line.y, strict=True) if 10 * x >= longest]
    which = "" if all(len(of_name) == seeds for of_name in runs.values()) else ", without those that diverged"
    title = f"{title}: mean and range of {seeds} seeds{which}"
    return Chart(title, f"training {unit}", LOSS, lines, around(shown) if shown else None)


def settings_of(settings: Any, *decided: str) -> list[Rows]:
    """Settings that have an effect, as tables: those of the experiment, then those of each part of it.

    Args:
        settings: the experiment's.
        decided: settings of its recipe that the experiment decides itself, besides the seed.
    """
    return list(_tables(settings, ("job",), ("seed", *decided)))


def _tables(part: Any, without: Sequence[str] = (), without_below: Sequence[str] = ()) -> Iterator[Rows]:
    if isinstance(part, Mapping):
        rows = [(key, *map(_cell, used(value).values())) for key, value in part.items()]
        first = next(iter(part.values()))
        yield [(type(first).__name__, *used(first)), *rows]
        return
    values = {key: value for key, value in used(part).items() if key not in without}
    yield [(type(part).__name__, ""), *((key, _cell(v)) for key, v in values.items() if not is_settings(v))]
    for value in filter(is_settings, values.values()):
        yield from _tables(value, without_below)


def _cell(value: Any) -> Any:
    return typed(value) if isinstance(value, Mapping) else value
