"""Memories of past gradients in Adam's and in Muon's geometry, tuned alike, at several batch sizes.

What a memory does in Muon's geometry is decided as follows. All of it was fixed before the first run whose seed counts.

- A cell is a memory in a geometry. Each is tuned over as many learning rates, with a seed of its own, at each batch
  size. All else has the values in the tables of entries and of the recipe.
- In Muon's geometry the hidden matrices take "muon", with ``adjust_lr_fn="match_rms_adamw"``. The embedding and the
  norms keep the same memory in Adam's geometry, at the learning rate that was best there. So the two cells of a memory
  differ in what becomes of the hidden matrices only, and each cell has one learning rate to tune. Weight decay is the
  same everywhere.
- One EMA is AdamW in Adam's geometry. In Muon's it is Muon as torch has it: momentum 0.95, with Nesterov's step; AdamW
  updates what is not a hidden matrix.
- Losses are compared within seeds. A memory helps if the 95 % interval of the mean difference to one EMA, by Student's
  t, is below zero, and hurts if it is above. Otherwise it is undecided.
- Memory helps at a batch size if the best of the four does; as it is the best of four, its interval is that of
  100 - 5 / 4 %.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

import torch
import tyro

from ademamix.engine.state import slot_formats, state_of
from ademamix.lab.config import PRESETS as RECIPES
from ademamix.lab.config import BadInputError, Optimizer, Recipe
from ademamix.lab.experiments import common
from ademamix.lab.experiments.common import Candidate, Settings, at_the_ends, changed
from ademamix.lab.experiments.lm import on_gpu, small
from ademamix.lab.experiments.statistics import (
    Paired,
    against,
    budgets_for,
    by_seed,
    grouped,
    jointly,
    mean_and_error,
    paired,
    shown,
)
from ademamix.lab.experiments.trials import Grid, Point, Trials
from ademamix.lab.reports.pictures import Chart, Line, Picture
from ademamix.lab.reports.report import Report, Rows
from ademamix.lab.training.loop import Result
from ademamix.lab.training.optimizers import REST_LR, arguments_of
from ademamix.lab.values import Values

GEOMETRIES = {"adam": "Adam's geometry", "muon": "Muon's geometry"}
MEMORIES = {
    "ema": "one EMA",
    "ademamix": "AdEMAMix",
    "beta1-zero": "AdEMAMix with beta1 = 0",
    "adana": "ADana",
    "kema": "KEMA",
}
OTHERS = tuple(MEMORIES)[1:]
BASELINES = {"adam-ema": "AdamW", "muon-ema": "Muon"}
SEEDS = tuple(range(101, 109))


@dataclass(frozen=True)
class Entry:
    """A memory in a geometry, and the learning rates that it is tuned over."""

    optimizer: tyro.conf.Suppress[Optimizer]
    lr: tuple[float, ...]
    """Learning rates to try, for the first batch size."""
    settings: Values = field(default_factory=dict)
    """Its other settings, where they are not those of the recipe or of its class."""


def entries(lr: float, beta2: float) -> dict[str, Entry]:
    """All cells, for a learning rate in the middle of those that AdamW is tried with."""

    def times(factor: float) -> tuple[float, ...]:
        return tuple(float(f"{x * factor * lr:.3g}") for x in (0.25, 0.5, 1.0, 2.0))

    muon = {"betas": (0.9, beta2), "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.1}
    # With this power the two long averages together weigh about 4 times the short one.
    kema = {"count": 3, "power": 0.75, "longest": "0.3T", "warmup": "1T", "beta2": beta2, "weight_decay": 0.1}
    memories: dict[str, tuple[Optimizer, float, Values]] = {  # optimizer, Adam's factor of the learning rate, settings
        "ademamix": ("ademamix", 0.7, {"beta2": beta2}),
        "beta1-zero": ("ademamix", 0.7, {"beta2": beta2, "beta1": 0.0}),
        "adana": ("adana", 0.7, {"weight_decay": 0.1}),
        "kema": ("kema", 0.7, kema),
    }
    adam = {f"adam-{key}": Entry(name, times(factor), s) for key, (name, factor, s) in memories.items()}
    # Here the size of a memory's direction drops out.
    ours = {f"muon-{key}": Entry(name, times(6.0), s) for key, (name, _, s) in memories.items()}
    one = {"adam-ema": Entry("adamw", times(1.0), {"beta2": beta2}), "muon-ema": Entry("muon", times(6.0), muon)}
    every = {**one, **adam, **ours}
    return {f"{geometry}-{key}": every[f"{geometry}-{key}"] for geometry in GEOMETRIES for key in MEMORIES}


@dataclass(frozen=True)
class Geometry(Settings):
    """Five memories in Adam's and in Muon's geometry, tuned with the same number of trials, compared within seeds.

    AdamW and Muon also train with growing budgets, each a full schedule of its own, to see how many tokens they need
    for the losses of the others.
    """

    batches: tuple[int, ...] = (1, 4, 16)
    """Batch sizes, in those of the recipe, growing."""
    lengths: tuple[float, ...] = (1.0, 0.5, 0.25)
    """Steps of a run at each batch size, in those of the recipe."""
    lrs: tuple[float, ...] = (1.0, 1.4, 2.0)
    """What the learning rates to try are multiplied by, at each batch size."""
    budgets: tuple[float, ...] = (1.25, 1.5, 2.0)
    """Further budgets of AdamW and Muon, in those of the others, growing."""
    budget_seeds: int = 3
    """How many of the seeds, the first ones, train with these."""
    entries: dict[str, Entry] = field(default_factory=dict)
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least, values in (("batches", 0, self.batches), ("budgets", 1, self.budgets)):
            if list(values) != sorted({x for x in values if least < x < math.inf}):
                raise BadInputError(f"{name} must be growing numbers above {least}, got {values}")
        for name, factors in (("lengths", self.lengths), ("lrs", self.lrs)):
            if len(factors) != len(self.batches) or not all(0 < x < math.inf for x in factors):
                raise BadInputError(f"{name} must be {len(self.batches)} positive numbers, as batches, got {factors}")
        if not 1 <= self.budget_seeds <= len(self.seeds):
            raise BadInputError(f"budget_seeds must be in [1, {len(self.seeds)}], got {self.budget_seeds}")
        if self.recipe.settings:
            raise BadInputError("settings are those of the entries here: --entries.muon-adana.settings kappa=0.9")
        if len({len(set(entry.lr)) for entry in self.entries.values()}) > 1:
            tried = ", ".join(f"{len(set(entry.lr))} of {key}" for key, entry in self.entries.items())
            raise BadInputError(f"all must have as many learning rates: {tried}")
        for size, (key, entry) in itertools.product(self.sizes(), self.entries.items()):
            for lr in entry.lr:
                try:
                    arguments_of(entry.optimizer, changed(self.base(size, key), entry.optimizer, lr=lr))
                except BadInputError as error:
                    raise BadInputError(f"{key}: {error}") from error

    def sizes(self) -> dict[int, Recipe]:
        """The recipe at each batch size, by tokens per step."""
        recipes = []
        for batch, length in zip(self.batches, self.lengths, strict=True):
            steps, warmup = (round(length * n) for n in (self.recipe.steps, self.recipe.warmup))
            recipes.append(
                dataclasses.replace(self.recipe, batch=batch * self.recipe.batch, steps=steps, warmup=warmup)
            )
        return {recipe.units_per_step: recipe for recipe in recipes}

    def base(self, size: int, key: str, **more: Any) -> Recipe:
        """The recipe of a cell, before it is tuned, with more settings of its geometry."""
        entry, recipe = self.entries[key], self.sizes()[size]
        recipe = dataclasses.replace(recipe, settings={"geometry": key.partition("-")[0], **more})
        if entry.optimizer == "ademamix":  # as `suggest` has it; the fast average is never the longer one
            recipe = changed(recipe, "ademamix", beta3=max(0.9, 1.0 - 8.0 / recipe.steps))
        return changed(recipe, entry.optimizer, **entry.settings)

    def tried(self, size: int, key: str) -> tuple[float, ...]:
        """The learning rates of a cell."""
        factor = dict(zip(self.sizes(), self.lrs, strict=True))[size]
        return tuple(float(f"{factor * lr:.3g}") for lr in self.entries[key].lr)


def _on_cpu() -> Recipe:
    """The demo's Llama with one layer, so that minutes are enough steps for a memory."""
    return dataclasses.replace(small(1000), layers=1, batch=2, eval_every=1000)


PRESETS = {
    "cpu": Geometry(seeds=SEEDS, entries=entries(2e-3, 0.99), recipe=_on_cpu()),
    "gpu": Geometry(
        "gpu",
        seeds=SEEDS[:5],
        entries=entries(2e-3, 0.99),
        recipe=dataclasses.replace(on_gpu(6000), batch=16, eval_every=6000),
    ),
    "paper": Geometry(
        "paper",
        seeds=SEEDS[:3],
        entries=entries(1e-3, 0.99),
        recipe=dataclasses.replace(RECIPES["110m"], batch=16, eval_every=256_000),
    ),
}


def run(settings: Geometry, trials: Trials) -> Report:
    chosen: dict[tuple[int, str], Recipe] = {}
    results: dict[Point, Result | None] = {}
    tables: list[Rows] = []
    for size in settings.sizes():
        recipes, rows = _tuned(settings, trials, size)
        tables.append(rows)
        chosen |= {(size, key): recipe for key, recipe in recipes.items()}
        for of_grid in trials.run(*_grids(settings, size, recipes)):
            results |= {(size, *point): result for point, result in of_grid.items()}
    found = Found(settings, chosen, results)
    return Report(
        "Any memory in any geometry",
        [*found.memory(), *found.raw_gradient(), *found.geometry(), *found.ends()],
        found.charts(),
        [*found.differences(), *found.cells(), found.by_seed(), *tables],
        common.settings_of(settings),
    )


def _tuned(settings: Geometry, trials: Trials, size: int) -> tuple[dict[str, Recipe], Rows]:
    """The recipes at one batch size with the best learning rates, and the trials as a table."""
    recipes: dict[str, Recipe] = {}
    rest: dict[str, Values] = {}  # by memory: what Adam's geometry, which comes first, gives Muon's
    rows: list[tuple[str, ...]] = []
    for geometry in GEOMETRIES:
        bases = {(key := f"{geometry}-{m}"): settings.base(size, key, **rest.get(m, {})) for m in MEMORIES}
        candidates = {
            f"{size}-{key}": Candidate(
                name(key), settings.entries[key].optimizer, base, {"lr": settings.tried(size, key)}
            )
            for key, base in bases.items()
        }
        tuned = common.search(trials, candidates)
        for (key, base), chosen, (_, *tried) in zip(bases.items(), tuned.best.values(), tuned.tables, strict=True):
            recipes[key] = changed(base, settings.entries[key].optimizer, **chosen)
            rest[key.removeprefix("adam-")] = {REST_LR: chosen["lr"]}
            rows.append((name(key), *(f"{lr:g}: {loss}" for lr, loss in tried)))
    count = len(rows[0]) - 1
    return recipes, [(f"{size:,} {settings.recipe.unit} per step", *("lr: loss, tuning",) * count), *rows]


def _grids(settings: Geometry, size: int, recipes: Mapping[str, Recipe]) -> tuple[Grid, Grid]:
    """The runs that count at one batch size: of all cells, and the longer ones of AdamW and Muon."""

    def made(entry: str, budget: float, seed: int) -> tuple[Optimizer, Recipe]:
        steps = round(budget * recipes[entry].steps)
        recipe = dataclasses.replace(recipes[entry], steps=steps, eval_every=steps, seed=seed)
        return settings.entries[entry].optimizer, recipe

    few = settings.seeds[: settings.budget_seeds]
    return (
        Grid(f"final-{size}", {"entry": tuple(recipes), "budget": (1.0,), "seed": settings.seeds}, made),
        Grid(f"longer-{size}", {"entry": tuple(BASELINES), "budget": settings.budgets, "seed": few}, made),
    )


def peak(optimizer: Optimizer, recipe: Recipe) -> float:
    """The peak learning rate of a recipe's optimizer."""
    return float(arguments_of(optimizer, recipe)[1]["lr"])


def name(key: str) -> str:
    """A cell, for people."""
    geometry, _, memory = key.partition("-")
    return BASELINES.get(key) or f"{MEMORIES[memory]}, {geometry}"


@dataclass(frozen=True)
class Found:
    """What the runs came to."""

    settings: Geometry
    recipes: Mapping[tuple[int, str], Recipe]  # of each batch size and cell, tuned
    results: Mapping[Point, Result | None]  # by batch size, cell, budget and seed

    @cached_property
    def sizes(self) -> list[int]:
        return list(self.settings.sizes())

    @cached_property
    def losses(self) -> dict[Point, list[float]]:
        """Final losses by batch size, cell and budget, seed by seed."""
        return common.sample(self.results)

    def at(self, size: int) -> str:
        return f"{size:,} {self.settings.recipe.unit} per step"

    def pair(self, size: int, a: str, b: str, level: float = 0.95) -> Paired:
        """By how much the loss of one cell lies above that of another."""
        return paired(self.losses[size, a, 1.0], self.losses[size, b, 1.0], level)

    def memory(self) -> list[str]:
        """Whether memory helps in Muon's geometry: a sentence for each batch size."""
        return [self._memory_at(size) for size in self.sizes]

    def _memory_at(self, size: int) -> str:
        best = min(OTHERS, key=lambda m: mean_and_error(self.losses[size, f"muon-{m}", 1.0])[0])
        level = jointly(len(OTHERS))
        pair = self.pair(size, f"muon-{best}", "muon-ema", level)
        decided = f"memory {pair.verdict}" if pair.lower or pair.higher else "whether memory helps is undecided"
        best_of = against(pair, f"{MEMORIES[best]}, the best of {len(OTHERS)},", "Muon")
        each = {MEMORIES[m]: self.pair(size, f"muon-{m}", "muon-ema") for m in OTHERS}
        return f"At {self.at(size)} {decided} in Muon's geometry: {best_of}. One by one: {grouped(each)}"

    def raw_gradient(self) -> list[str]:
        """Whether the gradient itself is better than a fast average of it: a sentence for each geometry."""
        return [
            f"In {text} the raw gradient in place of AdEMAMix's fast average (beta1 = 0): "
            + "; ".join(
                f"{pair.verdict} at {self.at(n)} ({pair.interval()})"
                for n in self.sizes
                for pair in [self.pair(n, f"{g}-beta1-zero", f"{g}-ademamix")]
            )
            for g, text in GEOMETRIES.items()
        ]

    def geometry(self) -> list[str]:
        """Which memories are better in Muon's geometry than in Adam's: a sentence for each batch size."""
        return [
            f"At {self.at(size)} Muon's geometry in place of Adam's, by memory: "
            + grouped({text: self.pair(size, f"muon-{m}", f"adam-{m}") for m, text in MEMORIES.items()})
            for size in self.sizes
        ]

    def ends(self) -> list[str]:
        """A sentence on the cells whose best learning rate may lie beyond what was tried."""
        cells = {(f"{name(key)} at {self.at(size)}"): (size, key) for size, key in self.recipes}
        peaks = {cell: peak(self.settings.entries[of[1]].optimizer, self.recipes[of]) for cell, of in cells.items()}
        return at_the_ends(peaks, {cell: self.settings.tried(*of) for cell, of in cells.items()})

    def differences(self) -> list[Rows]:
        """Paired differences, with the number of seeds in which the loss is lower."""
        memories = {name(f"{g}-{m}"): (f"{g}-{m}", f"{g}-ema") for g in GEOMETRIES for m in OTHERS}
        geometries = {MEMORIES[m]: (f"muon-{m}", f"adam-{m}") for m in MEMORIES}
        raw = {text: (f"{g}-beta1-zero", f"{g}-ademamix") for g, text in GEOMETRIES.items()}
        tables = {
            "loss above that of one EMA in the same geometry": memories,
            "Muon's geometry above Adam's": geometries,
            "AdEMAMix with beta1 = 0 above AdEMAMix": raw,
        }
        heads = [self.at(size) for size in self.sizes]
        return [
            [(title, *heads), *((row, *(str(self.pair(n, *of)) for n in self.sizes)) for row, of in rows.items())]
            for title, rows in tables.items()
        ]

    def cells(self) -> list[Rows]:
        """For each batch size the loss of all cells, and what it costs."""
        heads = ("loss", "lr", "AdamW's tokens", "Muon's tokens", "bytes per parameter", "in matrices", "optimizer, ms")
        return [
            [(f"{self.at(size)}, {self.settings.sizes()[size].steps:,} steps", *heads)]
            + [self._cell(size, key) for key in self.settings.entries]
            for size in self.sizes
        ]

    def _cell(self, size: int, key: str) -> tuple[str, ...]:
        optimizer, recipe = self.settings.entries[key].optimizer, self.recipes[size, key]
        runs = common.of(self.results, size, key, 1.0)
        whole = f"{runs[0].state_bytes_per_parameter:.1f}" if runs else ""
        ms = f"{mean_and_error([r.optimizer_ms for r in runs])[0]:.2f}" if runs else ""
        loss, matrices = shown(self.losses[size, key, 1.0]), f"{matrix_bytes(optimizer, recipe):.1f}"
        tokens = (self.tokens(size, key, base) for base in BASELINES)
        return (name(key), loss, f"{peak(optimizer, recipe):g}", *tokens, whole, matrices, ms)

    def tokens(self, size: int, key: str, base: str) -> str:
        """How many more tokens AdamW or Muon needs for a cell's loss, in the seeds that have longer runs."""
        few = self.settings.budget_seeds
        goal = self.losses[size, key, 1.0][:few]
        own = {x: self.losses[size, base, x][:few] for x in (1.0, *self.settings.budgets)}
        if key == base or any(map(math.isinf, goal)):
            return ""
        if mean_and_error(goal)[0] > mean_and_error(own[1.0])[0]:
            return "no more"
        return str(budgets_for(own, goal))

    def by_seed(self) -> Rows:
        rows = [(name(key), *(by_seed(self.losses[n, key, 1.0]) for n in self.sizes)) for key in self.settings.entries]
        return [("loss by seed", *map(self.at, self.sizes)), *rows]

    def charts(self) -> list[Picture]:
        def line(label: str, a: str, b: str) -> Line:
            pairs = {float(size): self.pair(size, a, b) for size in self.sizes}
            return common.ends(label, {x: (pair.mean, pair.half) for x, pair in pairs.items()})

        charts = {
            f"{text}: above one EMA": [line(MEMORIES[m], f"{g}-{m}", f"{g}-ema") for m in OTHERS]
            for g, text in GEOMETRIES.items()
        }
        charts["Muon's geometry above Adam's"] = [line(MEMORIES[m], f"muon-{m}", f"adam-{m}") for m in MEMORIES]
        charts["beta1 = 0 above beta1 = 0.9 (AdEMAMix)"] = [
            line(text, f"{g}-beta1-zero", f"{g}-ademamix") for g, text in GEOMETRIES.items()
        ]
        label = f"{self.settings.recipe.unit} per step"
        return [Chart(title, label, "nats, with 95 % interval", lines, log_x=True) for title, lines in charts.items()]


def matrix_bytes(optimizer: Optimizer, recipe: Recipe) -> float:
    """State in bytes per parameter of a large matrix."""
    kind, given = arguments_of(optimizer, recipe)
    p = torch.empty(1024, 1024, device="meta")
    made = kind([p], **given)
    slots = state_of(None, p, slot_formats(p, made.formats(made.param_groups[0]), flat=False)).values()
    return float(sum(slot.nbytes for slot in slots if slot.is_meta) / p.numel())
