"""What `batch` trains and what it concludes, from losses that are known; test_experiments.py runs it for real."""

import dataclasses
import math
import random
from collections.abc import Mapping
from typing import Any

import pytest
from scipy import stats

from ademamix.lab.experiments import batch
from ademamix.lab.experiments.batch import TITLES
from ademamix.lab.training.optimizers import arguments_of

CPU = dataclasses.replace(batch.PRESETS["cpu"], seeds=(201, 202, 203))
KEYS = list(TITLES)
CELLS = {("tokens", 1): 4000, ("tokens", 4): 1000, ("tokens", 16): 250, ("steps", 1): 1000, ("steps", 16): 1000}
# 1 - 8 / T at the smallest batch; then with as many steps, or as many tokens, to look back on. Never below 0.9.
BY_STEPS = {"tokens": {1: 0.998, 4: 0.998, 16: 0.998}, "steps": {1: 0.992, 4: 0.992, 16: 0.992}}
BY_TOKENS = {"tokens": {1: 0.998, 4: 0.992, 16: 0.968}, "steps": {1: 0.992, 4: 0.968, 16: 0.9}}
GAPS = {  # to AdamW's loss: with batches of 16 another order
    "adamw": (0.0, 0.0), "ademamix": (-0.3, 0.1), "other": (-0.2, 0.3), "beta1-zero": (-0.1, -0.2),
    "adana": (0.05, 0.2), "simplified": (0.4, 0.5),
}  # fmt: skip
TILT = {201: 0.01, 202: -0.01, 203: 0.0}  # of AdEMAMix with beta1 = 0


def loss(optimizer: str, recipe: Any, point: Mapping[str, Any]) -> float:
    if "entry" not in point:  # tuned: any order
        return random.Random(f"{optimizer} {sorted(point.items())} {recipe.batch} {recipe.ademamix}").random()
    gap = GAPS[point["entry"]][recipe.batch == 64]
    tilt = TILT[recipe.seed] * (point["entry"] == "beta1-zero")
    return 3.0 + gap + tilt + 0.3 * math.sin(recipe.seed) + 0.01 * (recipe.steps == 1000)


@pytest.fixture(scope="module")
def done(pretended: Any) -> tuple[Any, Any]:
    trials = pretended(loss)
    return batch.run(CPU, trials), trials


def of_cell(trials: Any, line: str, size: int) -> dict[tuple[str, int], Any]:
    return {point: recipe for (grid, point), recipe in trials.recipes.items() if grid == f"final-{line}-{size}"}


def test_all_cells_of_both_lines_are_trained_and_the_one_they_share_once(done: Any) -> None:
    _, trials = done
    finals = {grid for grid, _ in trials.recipes if grid.startswith("final")}
    assert finals == {f"final-{line}-{size}" for line, size in CELLS}
    for (line, size), steps in CELLS.items():
        runs = of_cell(trials, line, size)
        assert set(runs) == {(key, seed) for key in KEYS if key != "other" or size > 1 for seed in CPU.seeds}
        for (_, seed), recipe in runs.items():
            assert (recipe.batch, recipe.steps, recipe.warmup, recipe.seed) == (4 * size, steps, steps // 20, seed)
    assert CPU.cell("steps", 4) == ("tokens", 4)


def test_beta3_goes_by_suggest_and_by_the_other_rule(done: Any) -> None:
    _, trials = done
    for line, size in CELLS:
        usual, other = (BY_TOKENS, BY_STEPS) if line == "tokens" else (BY_STEPS, BY_TOKENS)
        for (key, _), recipe in of_cell(trials, line, size).items():
            given = arguments_of(batch.OPTIMIZERS.get(key, key), recipe)[1]
            if key in ("ademamix", "other", "beta1-zero"):
                beta3 = (other if key == "other" else usual)[line][size]
                assert given["betas"] == (0.0 if key == "beta1-zero" else 0.9, 0.99, pytest.approx(beta3))
                assert given["alpha_warmup"] == given["beta3_warmup"] == recipe.steps
            if key == "simplified":
                assert given["betas"] == (pytest.approx(usual[line][size]), 0.99)
                assert given["beta1_warmup"] == recipe.steps


@pytest.mark.parametrize("preset", batch.PRESETS)
def test_every_entry_is_tuned_over_as_many_trials_at_each_batch_size(preset: str) -> None:
    settings = batch.PRESETS[preset]
    sizes = {
        math.prod(len(set(values)) for values in settings.candidate(b, key).space.values())
        for b in settings.batches
        for key in settings.keys(b)
    }
    assert sizes == {8}


def test_runs_have_what_was_best_at_equal_tokens(done: Any) -> None:
    _, trials = done
    for line, size in CELLS:
        for (key, _), recipe in of_cell(trials, line, size).items():
            tried = {point: x for (grid, point), x in trials.losses.items() if grid == f"tune-{size}-{key}"}
            assert len(tried) == 8
            tuned = {trials.recipes[f"tune-{size}-{key}", point].steps for point in tried}
            assert tuned == {CELLS["tokens", size]}
            lr, other = min(tried, key=lambda point: tried[point])
            given = arguments_of(batch.OPTIMIZERS.get(key, key), recipe)[1]
            name = batch.TRIED[key][0]
            # 1 - beta1 of the long sum: at equal steps 8 / 1,000, at equal tokens 8 / 4,000 and 16 times that.
            shorter = {("steps", 1): 4.0, ("steps", 16): 0.25}.get((line, size), 1.0) if key == "simplified" else 1.0
            assert given["lr"] == pytest.approx(lr * math.sqrt(shorter))
            assert (given["betas"][0] if name == "beta1" else given[name]) == pytest.approx(other / shorter)


@pytest.mark.parametrize(("size", "beta1"), [(1, 0.998), (4, 0.992), (16, 0.968)])
def test_the_long_sum_weighs_4_and_8_times_the_gradient_as_ademamixs_average_does(done: Any, size, beta1) -> None:
    _, trials = done
    alphas = sorted({point[1] for grid, point in trials.recipes if grid == f"tune-{size}-simplified"})
    assert [1 / (1 - beta1) / alpha for alpha in alphas] == pytest.approx([8.0, 4.0])


def test_learning_rates_are_parts_of_adamws(done: Any) -> None:
    _, trials = done

    def lrs(key: str, size: int) -> list[float]:
        return sorted({point[0] for grid, point in trials.recipes if grid == f"tune-{size}-{key}"})

    assert lrs("adamw", 4) == pytest.approx([2e-3, 4e-3, 8e-3, 16e-3])
    assert lrs("adana", 4) == lrs("other", 16) == pytest.approx([7e-4, 1.4e-3, 2.8e-3, 5.6e-3])
    # sqrt((1 - 0.9) (1 - 0.968)) = 0.0566; three digits are kept.
    assert lrs("simplified", 16) == pytest.approx([8e-3 * x * 0.0566 for x in (0.25, 0.5, 1, 2)], rel=2e-3)


def test_sentences_follow_the_losses(done: Any) -> None:
    report, _ = done
    (small,) = [line for line in report.headlines if line.startswith("At 256 tokens per step, 4,000 steps")]
    error = stats.sem(list(TILT.values()))
    edge = error * stats.t.isf(0.05 / 4 / 2, 2)  # it is the lowest of five: four intervals hold together
    assert small == (
        "At 256 tokens per step, 4,000 steps AdEMAMix is lowest: it ends 0.2000 nats below AdEMAMix, beta1 = 0 "
        f"(98.75 % interval {0.2 - edge:.4f} to {0.2 + edge:.4f}; lower in 3 of 3 seeds); "
        "it ends 0.3000 nats below AdamW (98.75 % interval 0.3000 to 0.3000; lower in 3 of 3 seeds)"
    )
    large = [line for line in report.headlines if line.startswith("At 4,096 tokens per step")]
    assert [line.partition(": ")[0] for line in large] == [
        "At 4,096 tokens per step, 250 steps AdEMAMix, beta1 = 0 is lowest",
        "At 4,096 tokens per step, 1,000 steps AdEMAMix, beta1 = 0 is lowest",
    ]
    edge = error * stats.t.isf(0.05 / 5 / 2, 2)  # the lowest of six
    assert large[0].endswith(
        f": it ends 0.2000 nats below AdamW (99 % interval {0.2 - edge:.4f} to {0.2 + edge:.4f}; lower in 3 of 3 "
        f"seeds); it ends 0.3000 nats below AdEMAMix (99 % interval {0.3 - edge:.4f} to {0.3 + edge:.4f}; lower in 3 "
        "of 3 seeds)"
    )
    assert report.headlines[0] == "No memory is the lowest, or level with it, at every batch size and length"
    edge = error * stats.t.isf(0.025, 2)  # one comparison, settled beforehand
    raw = [line for line in report.headlines if "beta1 = 0 minus" in line]
    assert len(raw) == 2
    for line in raw:
        assert line.count("hurts: +0.2000 (") == 2  # at batches of 4 and 16
        assert f"helps: -0.3000 ({-0.3 - edge:+.4f} to {-0.3 + edge:+.4f}; signs ---) at a batch of 64" in line


def test_the_other_rule_is_compared_where_it_was_trained(done: Any) -> None:
    """The runs of the cell that both lines share have the other rule of equal tokens."""
    report, _ = done
    tokens, steps = (line for line in report.headlines if "in place of suggest(T)'s" in line)
    assert tokens == (
        "At equal tokens a slow EMA of as many steps as at the smallest batch, in place of suggest(T)'s: "
        "hurts: +0.1000 (+0.1000 to +0.1000; signs +++) at a batch of 16; "
        "hurts: +0.2000 (+0.2000 to +0.2000; signs +++) at a batch of 64"
    )
    assert steps == (
        "At equal steps a slow EMA of as many tokens as at the smallest batch, in place of suggest(T)'s: "
        "hurts: +0.2000 (+0.2000 to +0.2000; signs +++) at a batch of 64"
    )
    of_tokens, gaps_tokens, of_steps, gaps_steps, *_ = ({row[0]: row[1:] for row in rows} for rows in report.tables)
    title = TITLES["other"]
    assert (
        [bool(cell) for cell in of_tokens[title]] == [bool(cell) for cell in gaps_tokens[title]] == [False, True, True]
    )
    assert (
        [bool(cell) for cell in of_steps[title]] == [bool(cell) for cell in gaps_steps[title]] == [False, False, True]
    )
    by_title = [{line.name: line.x for line in chart.lines} for chart in report.pictures]
    assert [lines[title] for lines in by_title] == [[1024.0, 4096.0], [4096.0]]


def test_tables_have_losses_gaps_and_values_of_beta3(done: Any) -> None:
    report, trials = done
    of_tokens, gaps, of_steps, _, beta3, by_seed, *tuning = report.tables
    assert of_tokens[0] == (
        "loss, equal tokens", "256 tokens per step, 4,000 steps", "1,024 tokens per step, 1,000 steps",
        "4,096 tokens per step, 250 steps",
    )  # fmt: skip
    noise = [0.3 * math.sin(seed) for seed in CPU.seeds]
    recipe = trials.recipes["final-tokens-16", ("adana", 201)]
    given = arguments_of("adana", recipe)[1]
    mean = f"{3.2 + sum(noise) / 3:.4f} ± {stats.sem(noise):.4f}"
    rows = {row[0]: row for row in of_tokens}
    assert rows["ADana"][3] == f"{mean} (lr {given['lr']:g}, kappa {given['kappa']:g})"
    assert {row[0]: row[3] for row in gaps}["ADana"] == "hurts: +0.2000 (+0.2000 to +0.2000; signs +++)"
    assert {row[0]: row[2] for row in of_steps}["ADana"] == rows["ADana"][2]  # the shared cell
    for row, rule, line in zip(
        beta3[1:], (BY_TOKENS, BY_STEPS, BY_STEPS, BY_TOKENS), ("tokens", "tokens", "steps", "steps"), strict=True
    ):
        assert row[1:] == tuple(f"{x:.4g}" for x in rule[line].values())
    assert len(by_seed) == 1 + 5 + 6 + 6 + 5 + 6
    assert len(tuning) == 5 + 6 + 6


def test_the_title_names_those_that_are_nowhere_above_the_lowest(pretended: Any) -> None:
    def level(optimizer: str, recipe: Any, point: Mapping[str, Any]) -> float:
        tilt = 0.1 * (recipe.seed - 202)  # sums to nothing over the seeds
        return {"adana": 1.0, "beta1-zero": 1.0 + tilt}.get(point.get("entry", ""), 2.0)

    report = batch.run(CPU, pretended(level))
    expected = "At every batch size and length lowest, or level with the lowest: AdEMAMix, beta1 = 0, ADana"
    assert report.headlines[0] == expected


def test_a_setting_that_only_the_tuning_seed_likes_is_named(pretended: Any) -> None:
    def lucky(optimizer: str, recipe: Any, point: Mapping[str, Any]) -> float:
        wild = optimizer == "adamw" and recipe.adamw.lr == 0.016 and recipe.batch == 4 and recipe.seed == 200
        return 1.5 if wild else 2.0 + 0.01 * (recipe.seed - 202)

    assert [line for line in batch.run(CPU, pretended(lucky)).headlines if "misled" in line] == [
        "AdamW, batch 4: tuning was misled. With other seeds its settings end 0.5000 nats higher, more than seeds "
        "differ (99 % prediction interval)"
    ]


def test_an_entry_that_diverged_is_never_lowest(pretended: Any) -> None:
    def lost(optimizer: str, recipe: Any, point: Mapping[str, Any]) -> float:
        wild = point.get("entry") == "ademamix" and recipe.seed == 202
        return math.inf if wild else loss(optimizer, recipe, point)

    report = batch.run(CPU, pretended(lost))
    assert "256 tokens per step, 4,000 steps AdEMAMix, beta1 = 0 is lowest" in "; ".join(report.headlines)
    assert "it ends below AdEMAMix in 1 of 3 seeds; some runs diverged" in "; ".join(report.headlines)


def test_the_tables_show_the_settings_of_the_runs(done: Any) -> None:
    report, trials = done
    losses = report.tables[2]
    row = next(row for row in losses if row[0] == TITLES["simplified"])
    for column, (line, size) in enumerate((("steps", 1), ("tokens", 4), ("steps", 16)), 1):
        recipe = next(r for (key, _), r in of_cell(trials, line, size).items() if key == "simplified")
        given = arguments_of("simplifiedademamix", recipe)[1]
        assert row[column].endswith(f"(lr {given['lr']:g}, alpha {given['alpha']:g})")
