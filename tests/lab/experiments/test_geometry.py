"""What `geometry` trains and what it concludes; that it runs from end to end is in test_experiments.py."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import pytest
from scipy import stats

from ademamix.lab.config import Recipe
from ademamix.lab.experiments import geometry
from ademamix.lab.experiments.common import TUNING_SEED, changed
from ademamix.lab.experiments.geometry import BASELINES, GEOMETRIES, MEMORIES, SEEDS, Found
from ademamix.lab.experiments.trials import Grid, Point
from ademamix.lab.training.loop import Result
from ademamix.lab.training.optimizers import arguments_of

CPU = geometry.PRESETS["cpu"]
KEYS = [f"{g}-{m}" for g in GEOMETRIES for m in MEMORIES]


@pytest.mark.parametrize("preset", geometry.PRESETS)
def test_every_memory_is_tried_in_both_geometries_as_often(preset: str) -> None:
    settings = geometry.PRESETS[preset]
    assert list(settings.entries) == KEYS
    assert {len(settings.tried(size, key)) for size in settings.sizes() for key in KEYS} == {4}
    assert set(settings.seeds) <= set(SEEDS)
    assert TUNING_SEED not in SEEDS


def test_runs_are_shorter_where_batches_are_larger_and_schedules_are_scaled_with_them() -> None:
    sizes = CPU.sizes()
    assert {size: (r.steps, r.warmup) for size, r in sizes.items()} == {
        128: (1000, 50),
        512: (500, 25),
        2048: (250, 12),
    }
    for size, recipe in sizes.items():
        _, mixed = arguments_of("ademamix", CPU.base(size, "muon-ademamix"))
        assert mixed["betas"] == (0.9, 0.99, pytest.approx(1 - 8 / recipe.steps))
        assert mixed["alpha_warmup"] == mixed["beta3_warmup"] == recipe.steps
        _, kema = arguments_of("kema", CPU.base(size, "adam-kema"))
        assert (kema["warmup"], kema["longest"]) == (recipe.steps, 0.3 * recipe.steps)


@pytest.mark.parametrize("memory", list(MEMORIES)[1:])
def test_a_memory_has_the_same_settings_in_both_geometries(memory: str) -> None:
    both = {}
    for g in GEOMETRIES:
        kind, given = arguments_of(CPU.entries[f"{g}-{memory}"].optimizer, CPU.base(512, f"{g}-{memory}"))
        assert (given.pop("geometry"), given["weight_decay"]) == (g, 0.1)
        both[g] = kind, {key: value for key, value in given.items() if key != "lr"}
    assert both["adam"] == both["muon"]


class Pretended:
    """Runs whose final loss is a function of the optimizer, the recipe and the grid."""

    def __init__(self, loss: Any) -> None:
        self.loss = loss
        self.recipes: dict[tuple[str, Point], Recipe] = {}

    def run(self, *grids: Grid) -> list[dict[Point, Result | None]]:
        return [self._of(grid) for grid in grids]

    def _of(self, grid: Grid) -> dict[Point, Result | None]:
        points: list[Point] = [()]
        for values in grid.space.values():
            points = [(*point, value) for point in points for value in values]
        found: dict[Point, Result | None] = {}
        for point in points:
            optimizer, recipe = grid.run(**dict(zip(grid.space, point, strict=True)))
            assert isinstance(recipe, Recipe)
            self.recipes[grid.name, point] = recipe
            found[point] = result(self.loss(optimizer, recipe))
        return found


def result(loss: float) -> Result | None:
    return None if math.isinf(loss) else Result("", 0, 0, 0.0, loss, 1.5, 8.0, 0, 0.0, 0, "", "", [], [])


def test_in_muons_geometry_the_rest_has_the_learning_rate_that_was_best_in_adams() -> None:
    settings = dataclasses.replace(CPU, seeds=(101, 102), budget_seeds=1)

    def loss(optimizer: str, recipe: Recipe) -> float:
        """Lowest at the second largest of what was tried."""
        lr = arguments_of(optimizer, recipe)[1]["lr"]
        key = next(
            k for k in KEYS if lr in settings.tried(recipe.units_per_step, k) and k.startswith(_geometry(recipe))
        )
        return abs(math.log(lr / settings.tried(recipe.units_per_step, key)[2]))

    trials = Pretended(loss)
    report = geometry.run(settings, trials)  # type: ignore[arg-type]
    for size, key in ((size, key) for size in settings.sizes() for key in KEYS):
        recipe = trials.recipes[f"final-{size}", (key, 1.0, 102)]
        assert (recipe.seed, recipe.steps, recipe.eval_every) == (102, *[settings.sizes()[size].steps] * 2)
        assert arguments_of(settings.entries[key].optimizer, recipe)[1]["lr"] == settings.tried(size, key)[2]
        best = settings.tried(size, key.replace("muon", "adam"))[2]
        assert recipe.settings.get("rest_lr") == (best if key.startswith("muon") else None)
    longer = {(name, point): recipe.steps for (name, point), recipe in trials.recipes.items() if "longer" in name}
    assert len(longer) == 3 * len(BASELINES) * 3 * 1
    assert longer["longer-512", ("muon-ema", 1.5, 101)] == 750
    assert not any("best learning rate" in line for line in report.headlines)


def _geometry(recipe: Recipe) -> str:
    return str(recipe.settings["geometry"])


# --------------------------------------------------------------------------------- conclusions


def found(losses: Mapping[str, list[float]], longer: Mapping[float, list[float]] | None = None) -> Found:
    """Of runs with these final losses at each batch size, by cell and seed: 2 where none are given."""
    count = len(next(iter(losses.values())))
    settings = dataclasses.replace(CPU, seeds=SEEDS[:count], budget_seeds=min(3, count))
    results: dict[Point, Result | None] = {}
    for size in settings.sizes():
        for key in KEYS:
            for seed, loss in zip(settings.seeds, losses.get(key, [2.0] * count), strict=True):
                results[size, key, 1.0, seed] = result(loss)
        for x, key in ((x, key) for x in settings.budgets for key in BASELINES):
            for i, seed in enumerate(settings.seeds[: settings.budget_seeds]):
                results[size, key, x, seed] = result((longer or {}).get(x, [1.9] * count)[i])
    recipes = {
        (size, key): changed(settings.base(size, key), entry.optimizer, lr=settings.tried(size, key)[1])
        for size in settings.sizes()
        for key, entry in settings.entries.items()
    }
    return Found(settings, recipes, results)


NOISE = [0.0, 0.1, -0.1, 0.2]


def near(loss: float, spread: float = 0.0) -> list[float]:
    """Losses by seed, which differ by far more between seeds than the differences to others of the same seed do."""
    return [loss + noise + spread * (-1) ** i for i, noise in enumerate(NOISE)]


def test_memory_helps_hurts_or_is_undecided_by_the_best_of_four_within_seeds() -> None:
    muon = {
        "muon-ema": near(2.0),
        "muon-ademamix": near(2.1),
        "muon-beta1-zero": near(2.02, 0.1),
        "muon-kema": near(2.3),
    }
    helped = found({**muon, "muon-adana": near(1.9, 0.01)}).memory()[0]
    # Differences of -0.09, -0.11, -0.09, -0.11: a standard error of 0.01 / sqrt(3).
    half = stats.t.isf(0.05 / 8, 3) * 0.01 / math.sqrt(3)
    assert helped.startswith(
        "At 128 tokens per step memory helps in Muon's geometry: ADana, the best of 4, ends 0.1000 nats below Muon "
        f"(98.75 % interval {0.1 - half:.4f} to {0.1 + half:.4f}; lower in 4 of 4 seeds). One by one: helps: "
        "ADana; hurts: AdEMAMix, KEMA; undecided: AdEMAMix with beta1 = 0 ("
    )
    hurt = found({**muon, "muon-beta1-zero": near(2.2), "muon-adana": near(2.3)}).memory()[0]
    assert "memory hurts in Muon's geometry: AdEMAMix, the best of 4, ends 0.1000 nats above Muon (" in hurt
    unsure = found({**muon, "muon-adana": near(1.99, 0.1)}).memory()[0]
    assert (
        "whether memory helps is undecided in Muon's geometry: ADana, the best of 4, ends 0.0100 nats below" in unsure
    )


def test_the_raw_gradient_is_compared_with_the_fast_average() -> None:
    adam, muon = found(
        {"adam-beta1-zero": near(1.9), "adam-ademamix": near(2.0)}
        | {"muon-ademamix": near(1.9)}
        | {key: near(2.0) for key in ("adam-ema", "muon-beta1-zero")}
    ).raw_gradient()
    assert adam.startswith(
        "In Adam's geometry the raw gradient in place of AdEMAMix's fast average (beta1 = 0): helps at"
    )
    assert muon.endswith("; hurts at 2,048 tokens per step (+0.1000 to +0.1000)")


def test_geometries_are_compared_for_each_memory() -> None:
    said = found({"adam-ema": near(2.0), "muon-ema": near(1.8), "adam-adana": near(1.5), "muon-adana": near(1.6)})
    assert said.geometry()[2] == (
        "At 2,048 tokens per step Muon's geometry in place of Adam's, by memory: helps: one EMA; hurts: ADana; "
        "undecided: AdEMAMix (+0.0000 to +0.0000), AdEMAMix with beta1 = 0 (+0.0000 to +0.0000), "
        "KEMA (+0.0000 to +0.0000)"
    )


def test_adamw_and_muon_need_the_tokens_at_which_they_have_the_same_loss_in_the_first_seeds() -> None:
    longer = {1.25: [1.9] * 3, 1.5: [1.8] * 3, 2.0: [1.7] * 3}
    some = found({"adam-ema": [2.0] * 4, "muon-ema": [2.0] * 4, "muon-adana": [1.9] * 3 + [9.9]}, longer)
    assert some.tokens(128, "muon-adana", "adam-ema") == "25 % more (25 to 25)"
    some = found({"adam-ema": [2.0] * 4, "muon-ema": [1.85] * 4, "muon-adana": [1.6] * 4}, longer)
    assert some.tokens(128, "muon-adana", "muon-ema") == "over 100 % more in 3 of 3 seeds"
    assert some.tokens(128, "adam-ema", "muon-ema") == "no more"
    assert some.tokens(128, "adam-ema", "adam-ema") == ""


def test_the_tables_have_every_cell_at_every_batch_size() -> None:
    some = found({key: near(2.0 + i) for i, key in enumerate(KEYS)})
    memories, geometries, raw = some.differences()
    assert [len(rows) for rows in (memories, geometries, raw)] == [1 + 8, 1 + 5, 1 + 2]
    assert all(len(row) == 1 + 3 for rows in (memories, geometries, raw) for row in rows)
    assert geometries[1] == ("one EMA", *["hurts: +5.0000 (+5.0000 to +5.0000; signs ++++)"] * 3)
    for rows, size in zip(some.cells(), some.sizes, strict=True):
        assert rows[0][0].startswith(f"{size:,} tokens per step, ")
        assert [row[0] for row in rows[1:]] == [geometry.name(key) for key in KEYS]
        assert {row[6] for row in rows[1:6]} == {"8.0", "12.0", "16.0"}  # in Adam's geometry, in matrices
        assert [row[6] for row in rows[6:]] == ["4.0", "8.0", "4.0", "4.0", "12.0"]  # in Muon's
    assert some.by_seed()[1][1] == "2.0000, 2.1000, 1.9000, 2.2000"
    assert [len(chart.lines) for chart in some.charts()] == [4, 4, 5, 2]


def test_learning_rates_at_an_end_are_named() -> None:
    some = found({"adam-ema": near(2.0)})
    assert some.ends() == []
    base = some.recipes[128, "muon-adana"]
    ends = {lr: changed(base, "adana", lr=lr) for lr in (some.settings.tried(128, "muon-adana")[i] for i in (0, 3))}
    for which, recipe in zip(("smallest", "largest"), ends.values(), strict=True):
        (said,) = dataclasses.replace(some, recipes={**some.recipes, (128, "muon-adana"): recipe}).ends()
        assert said == f"The best learning rate is the {which} that was tried: ADana, muon at 128 tokens per step"


def test_a_run_that_diverged_decides_nothing_and_is_not_drawn() -> None:
    some = found({"muon-adana": [1.0, math.inf, 1.0, 1.0], "muon-ema": near(2.0)})
    assert "ADana (diverged in some seed)" in some.memory()[0]
    assert some.tokens(128, "muon-adana", "muon-ema") == ""
    assert some.charts()[1].lines[2].y == []
    every = found({f"muon-{m}": [math.inf] * 2 for m in MEMORIES} | {"adam-ema": [2.0] * 2})
    assert "whether memory helps is undecided" in every.memory()[0]
    assert "ends below Muon in 0 of 2 seeds; some runs diverged" in every.memory()[0]
