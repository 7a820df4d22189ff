"""AdEMAMix and its relatives by batch size, at equal tokens and at equal steps, each tuned at each batch size.

Fixed before the first run:

- Two lines of runs. At equal tokens, a batch k times as large has 1 / k of the steps. At equal steps all have as many
  as the fewest of that line need. What becomes of the batch size and what of the number of steps is told apart so.
- Each optimizer is tuned at each batch size, at equal tokens, over the same number of learning rates and values of one
  more setting, with a seed of its own. The runs at equal steps have the same settings.
- Two rules for beta3 as the batch grows: as many steps as at the smallest batch, or as many tokens. AdEMAMix has the
  one that gives ``suggest(T)`` on a line; the other one is an entry of its own, tuned alike.
- SimplifiedAdEMAMix has that beta1, and learning rates about AdamW's times sqrt((1 - 0.9) (1 - beta1)), its authors'.
  Its long sum weighs 1 / (1 - beta1), so it is tried with alphas that give this 4 and 8 times the gradient's weight. At
  equal steps, where its beta1 is another, both are scaled along.
- Losses are compared within seeds.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

import tyro

from ademamix.lab.config import PRESETS as RECIPES
from ademamix.lab.config import BadInputError, Optimizer, Recipe
from ademamix.lab.experiments import common
from ademamix.lab.experiments.common import Candidate, Settings, changed
from ademamix.lab.experiments.lm import on_gpu, small
from ademamix.lab.experiments.statistics import Paired, against, by_seed, jointly, mean_and_error, paired, shown
from ademamix.lab.experiments.trials import Grid, Point, Trials, Value
from ademamix.lab.reports.pictures import Chart, Picture
from ademamix.lab.reports.report import Report, Rows
from ademamix.lab.training.loop import Result

Line = Literal["tokens", "steps"]
LINES: dict[Line, str] = {"tokens": "equal tokens", "steps": "equal steps"}
OTHER_RULE: dict[Line, str] = {"tokens": "as many steps", "steps": "as many tokens"}  # as at the smallest batch
TITLES = {
    "adamw": "AdamW",
    "ademamix": "AdEMAMix",
    "other": "AdEMAMix, other beta3",
    "beta1-zero": "AdEMAMix, beta1 = 0",
    "adana": "ADana",
    "simplified": "SimplifiedAdEMAMix",
}
OPTIMIZERS: dict[str, Optimizer] = {
    "other": "ademamix",
    "beta1-zero": "ademamix",
    "simplified": "simplifiedademamix",
}
LRS = (0.25, 0.5, 1.0, 2.0)
TRIED: dict[str, tuple[str, tuple[float, float]]] = {
    "adamw": ("beta1", (0.5, 0.9)),
    "ademamix": ("alpha", (4.0, 8.0)),
    "other": ("alpha", (4.0, 8.0)),
    "beta1-zero": ("alpha", (4.0, 8.0)),
    "adana": ("kappa", (0.8, 0.9)),
    "simplified": ("alpha", (1 / 8, 1 / 4)),  # of the long sum's weight
}


@dataclass(frozen=True)
class Batch(Settings):
    """AdamW, AdEMAMix (beta1 = 0.9 and 0, two rules for beta3), ADana and SimplifiedAdEMAMix by batch size."""

    batches: tuple[int, ...] = (1, 4, 16)
    """Batch sizes, in those of the recipe, growing from 1."""
    equal_steps: int = 1000
    """Steps of the runs at equal steps; at equal tokens the smallest batch has those of the recipe."""
    lr: float = 8e-3
    """AdamW is tried with a quarter, half, once and twice this; the others with multiples of 0.35 of it."""
    beta2: float = 0.99
    """That of all but ADana, which has none."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.batches) < 2 or self.batches[0] != 1 or list(self.batches) != sorted(set(self.batches)):
            raise BadInputError(f"batches must be two or more growing numbers from 1 on, got {self.batches}")
        fewest = min(self.equal_steps, self.recipe.steps // self.batches[-1])
        if fewest < 20:
            raise BadInputError(f"every run must have 20 steps or more, got {fewest} at the largest batch")
        if not 0 < self.lr < math.inf:
            raise BadInputError(f"lr must be positive, got {self.lr}")
        if not 0 <= self.beta2 < 1:
            raise BadInputError(f"beta2 must be in [0, 1), got {self.beta2}")
        if self.recipe.settings:
            raise BadInputError("settings are those of the experiment here, and cannot be given")

    def steps(self, line: Line, batch: int) -> int:
        return self.recipe.steps // batch if line == "tokens" else self.equal_steps

    def cells(self) -> list[tuple[Line, int]]:
        """Where runs are made: all batch sizes of both lines. One that both have in common is made once."""
        lines = [("tokens", batch) for batch in self.batches]
        there = {(batch, self.steps("tokens", batch)) for batch in self.batches}
        return [*lines, *(("steps", b) for b in self.batches if (b, self.equal_steps) not in there)]  # type: ignore[list-item]

    def cell(self, line: Line, batch: int) -> tuple[Line, int]:
        """Where the runs of a line and a batch size are."""
        return (line, batch) if (line, batch) in self.cells() else ("tokens", batch)

    def keys(self, batch: int) -> list[str]:
        """What is tuned at a batch size: at the smallest, both rules for beta3 are the same."""
        return [key for key in TITLES if key != "other" or batch > 1]

    def compared(self, line: Line, batch: int) -> list[str]:
        """What is compared there. The cell that both lines have in common has the other rule of one of them."""
        return [key for key in self.keys(batch) if key != "other" or self.cell(line, batch)[0] == line]

    def beta3(self, line: Line, batch: int, other: bool = False) -> float:
        """1 - 8 / T at the smallest batch; at others by a rule. Never below AdamW's beta1."""
        grows = (line == "tokens") != other  # as many tokens: 1 - beta3 grows with the batch
        return max(0.9, 1.0 - 8.0 * (batch if grows else 1) / self.steps(line, 1))

    def base(self, line: Line, batch: int, key: str) -> Recipe:
        """The recipe of an entry, before it is tuned."""
        steps = self.steps(line, batch)
        warmup = max(1, steps // 20)
        recipe = dataclasses.replace(
            self.recipe, batch=batch * self.recipe.batch, steps=steps, warmup=warmup, eval_every=steps
        )
        beta3 = self.beta3(line, batch, key == "other")
        own: dict[str, dict[str, Any]] = {
            "adamw": {"beta2": self.beta2},
            "ademamix": {"beta2": self.beta2, "beta3": beta3},
            "other": {"beta2": self.beta2, "beta3": beta3},
            "beta1-zero": {"beta2": self.beta2, "beta3": beta3, "beta1": 0.0},
            "adana": {"weight_decay": 0.1},
            "simplified": {"betas": (beta3, self.beta2), "beta1_warmup": "1T", "weight_decay": 1.0},
        }
        return changed(recipe, OPTIMIZERS.get(key, key), **own[key])

    def candidate(self, batch: int, key: str) -> Candidate:
        """What an entry is tuned over at a batch size."""
        factor = 1.0 if key == "adamw" else 0.35
        name, values = TRIED[key]
        if key == "simplified":
            new = 1 - self.beta3("tokens", batch)
            factor, values = math.sqrt((1 - 0.9) * new), (values[0] / new, values[1] / new)
        space = {"lr": tuple(float(f"{x * factor * self.lr:.3g}") for x in LRS), name: values}
        title = f"{TITLES[key]}, batch {batch * self.recipe.batch}"
        return Candidate(title, OPTIMIZERS.get(key, key), self.base("tokens", batch, key), space)

    def own(self, line: Line, batch: int, key: str, chosen: Mapping[str, Any]) -> Mapping[str, Any]:
        """The settings of an entry's runs, from those that were best at equal tokens."""
        if key != "simplified":
            return chosen
        shorter = (1 - self.beta3(line, batch)) / (1 - self.beta3("tokens", batch))
        return {"lr": chosen["lr"] * math.sqrt(shorter), "alpha": chosen["alpha"] / shorter}


PRESETS = {
    "cpu": Batch(recipe=small(4000)),
    "gpu": Batch("gpu", lr=2e-3, beta2=0.999, recipe=on_gpu(8000)),
    "paper": Batch(
        "paper", seeds=common.SEEDS_OF_PAPER, equal_steps=16_000, lr=1e-3, beta2=0.999, recipe=RECIPES["110m"]
    ),
}


def run(settings: Batch, trials: Trials) -> Report:
    chosen: dict[tuple[int, str], Mapping[str, Value]] = {}
    tables: list[Rows] = []
    misled: list[str] = []
    ends: list[str] = []
    results: dict[Point, Result | None] = {}

    def runs(line: Line, batch: int) -> Mapping[Point, Result | None]:
        def made(entry: str, seed: int) -> tuple[Optimizer, Recipe]:
            optimizer, own = OPTIMIZERS.get(entry, entry), settings.own(line, batch, entry, chosen[batch, entry])
            return optimizer, dataclasses.replace(
                changed(settings.base(line, batch, entry), optimizer, **own), seed=seed
            )

        grid = Grid(f"final-{line}-{batch}", {"entry": settings.keys(batch), "seed": settings.seeds}, made)
        (of_cell,) = trials.run(grid)
        results.update({(line, batch, *point): result for point, result in of_cell.items()})
        return of_cell

    for batch in settings.batches:
        candidates = {key: settings.candidate(batch, key) for key in settings.keys(batch)}
        tuned = common.search(trials, {f"{batch}-{key}": c for key, c in candidates.items()})
        chosen |= {(batch, key): best for key, best in zip(candidates, tuned.best.values(), strict=True)}
        tables += tuned.tables
        finals = common.sample(runs("tokens", batch))
        misled += tuned.misled({f"{batch}-{key}": losses for (key,), losses in finals.items()})
        ends += tuned.ends
    for line, batch in settings.cells():
        if line == "steps":
            runs(line, batch)
    all_found = Found(settings, chosen, results)
    return Report(
        "Batch size: which memory of past gradients, at equal tokens and at equal steps",
        [all_found.lowest(), *misled, *all_found.best(), *all_found.raw(), *all_found.rules(), *ends],
        all_found.charts(),
        [*all_found.tables(), all_found.beta3_table(), all_found.by_seed(), *tables],
        common.settings_of(settings),
    )


@dataclass(frozen=True)
class Found:
    """What the runs came to."""

    settings: Batch
    chosen: Mapping[tuple[int, str], Mapping[str, Value]]  # of each batch size and entry, tuned
    results: Mapping[Point, Result | None]  # by line, batch size, entry and seed

    @cached_property
    def losses(self) -> dict[Point, list[float]]:
        return common.sample(self.results)

    def of(self, line: Line, batch: int, key: str) -> list[float]:
        made_on, size = self.settings.cell(line, batch)
        return self.losses[made_on, size, key]

    def pair(self, line: Line, batch: int, a: str, b: str) -> Paired:
        """By how much the loss of one entry lies above that of another."""
        return paired(self.of(line, batch, a), self.of(line, batch, b))

    def at(self, line: Line, batch: int) -> str:
        tokens = batch * self.settings.recipe.units_per_step
        return f"{tokens:,} {self.settings.recipe.unit} per step, {self.settings.steps(line, batch):,} steps"

    def order(self, line: Line, batch: int) -> list[str]:
        """The entries, the lowest mean loss first."""
        return sorted(self.settings.keys(batch), key=lambda k: mean_and_error(self.of(line, batch, k))[0])

    def lowest(self) -> str:
        """Which is nowhere decidedly above the lowest."""
        above = {
            key
            for cell in self.settings.cells()
            for key, pair in self._from_lowest(*cell).items()
            if pair.lower or not math.isfinite(pair.mean)
        }
        above.add("other")  # which not all cells have
        level = [title for key, title in TITLES.items() if key not in above]
        if not level:
            return "No memory is the lowest, or level with it, at every batch size and length"
        return f"At every batch size and length lowest, or level with the lowest: {', '.join(level)}"

    def _from_lowest(self, line: Line, batch: int) -> dict[str, Paired]:
        """By how much the lowest lies above each of the others; it is the best of several."""
        first, *others = self.order(line, batch)
        return {k: dataclasses.replace(self.pair(line, batch, first, k), level=jointly(len(others))) for k in others}

    def best(self) -> list[str]:
        """Which is best, where."""
        said = []
        for line, batch in self.settings.cells():
            first, second = self.order(line, batch)[:2]
            than = [k for k in dict.fromkeys((second, "ademamix", "adamw")) if k != first]
            pairs = {k: pair for k, pair in self._from_lowest(line, batch).items() if k in than}
            gaps = "; ".join(against(pair, "it", TITLES[k]) for k, pair in pairs.items())
            said.append(f"At {self.at(line, batch)} {TITLES[first]} is lowest: {gaps}")
        return said

    def raw(self) -> list[str]:
        """Whether the raw gradient is better than a fast average of it."""
        return [
            f"At {text} the loss with beta1 = 0 minus that with beta1 = 0.9: "
            + "; ".join(
                f"{self.pair(line, b, 'beta1-zero', 'ademamix')} at a batch of {b * self.settings.recipe.batch}"
                for b in self.settings.batches
            )
            for line, text in LINES.items()
        ]

    def rules(self) -> list[str]:
        """Which rule for beta3 is better."""
        return [
            f"At {text} a slow EMA of {OTHER_RULE[line]} as at the smallest batch, in place of suggest(T)'s: "
            + "; ".join(
                f"{self.pair(line, b, 'other', 'ademamix')} at a batch of {b * self.settings.recipe.batch}"
                for b in self.settings.batches
                if "other" in self.settings.compared(line, b)
            )
            for line, text in LINES.items()
        ]

    def tables(self) -> list[Rows]:
        """The losses of each line, and the differences to AdamW's."""
        tables: list[Rows] = []
        for line, text in LINES.items():
            heads = [self.at(line, batch) for batch in self.settings.batches]
            losses: Rows = [
                (title, *(self._cell(line, batch, key) for batch in self.settings.batches))
                for key, title in TITLES.items()
            ]
            gaps: Rows = [
                (title, *(self._gap(line, batch, key) for batch in self.settings.batches))
                for key, title in TITLES.items()
                if key != "adamw"
            ]
            tables += [[(f"loss, {text}", *heads), *losses], [(f"above AdamW's, {text}", *heads), *gaps]]
        return tables

    def _cell(self, line: Line, batch: int, key: str) -> str:
        if key not in self.settings.compared(line, batch):
            return ""
        own = self.settings.own(line, batch, key, self.chosen[batch, key])
        tuned = ", ".join(f"{name} {value:g}" for name, value in own.items())
        return f"{shown(self.of(line, batch, key))} ({tuned})"

    def _gap(self, line: Line, batch: int, key: str) -> str:
        return str(self.pair(line, batch, key, "adamw")) if key in self.settings.compared(line, batch) else ""

    def beta3_table(self) -> Rows:
        """The values of beta3."""
        batches = self.settings.batches
        rows = [
            (
                f"{text}: {name}",
                *(f"{self.settings.beta3(line, b, other):.4g}" for b in batches),
            )
            for line, text in LINES.items()
            for other, name in ((False, "suggest(T)"), (True, OTHER_RULE[line]))
        ]
        return [("beta3", *(f"batch {b * self.settings.recipe.batch}" for b in batches)), *rows]

    def by_seed(self) -> Rows:
        return [
            ("batch, steps", "entry", "loss by seed"),
            *(
                (f"{b * self.settings.recipe.batch}, {self.settings.steps(line, b):,}", TITLES[k], by_seed(values))
                for line, b in self.settings.cells()
                for k in self.settings.keys(b)
                for values in [self.of(line, b, k)]
            ),
        ]

    def charts(self) -> list[Picture]:
        batches = self.settings.batches
        size = self.settings.recipe.units_per_step
        ticks = tuple((float(b * size), f"{b * size:,}") for b in batches)
        return [
            Chart(
                f"Loss above AdamW's, {text}",
                f"{self.settings.recipe.unit} per step",
                "nats, with 95 % interval",
                [
                    common.effects(
                        title,
                        {
                            float(b * size): self.pair(line, b, key, "adamw")
                            for b in batches
                            if key in self.settings.compared(line, b)
                        },
                    )
                    for key, title in TITLES.items()
                    if key != "adamw"
                ],
                log_x=True,
                x_ticks=ticks,
                reference=((0.0, "AdamW"),),
            )
            for line, text in LINES.items()
        ]
