"""What `beyond` trains and what it concludes; that it runs from end to end is in test_experiments.py."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from ademamix.lab.cli import PROGRAM
from ademamix.lab.experiments import beyond, common
from ademamix.lab.experiments.beyond import Entry, Found
from ademamix.lab.experiments.trials import Trials
from ademamix.lab.reports.pictures import Line
from ademamix.lab.training.loop import Result
from ademamix.lab.training.optimizers import arguments_of

CPU = beyond.PRESETS["cpu"]
RULE = """\
def mine(p, g, m, *, lr=0.1, leak=0.5):
    m = m + leak * (g - m)
    return p - lr * m, m
"""


@pytest.mark.parametrize("preset", beyond.PRESETS)
def test_all_have_as_many_trials_and_a_learning_rate_that_is_not_at_an_end(preset: str) -> None:
    for entry in beyond.PRESETS[preset].entries.values():
        assert math.prod(map(len, entry.tried.values())) == 6
        assert len(set(entry.tried["lr"])) == 3


@pytest.mark.parametrize("fraction", CPU.fractions)
@pytest.mark.parametrize("key", CPU.entries)
def test_an_optimizers_own_schedules_keep_to_the_planned_steps(key: str, fraction: float) -> None:
    entry = CPU.entries[key]
    tried = {name: values[0] for name, values in entry.tried.items()}
    base = common.changed(CPU.base(entry), entry.optimizer, **tried)
    whole, cut = (CPU.of_length(base, x, seed=5) for x in (1.0, fraction))
    assert cut.steps == fraction * whole.steps
    assert (cut.warmup, cut.schedule, cut.seed) == (100, "wsd", 5)
    assert arguments_of(entry.optimizer, cut) == arguments_of(entry.optimizer, whole)


# --------------------------------------------------------------------------------- conclusions


def curve(loss: float) -> list[dict[str, float]]:
    return [{"step": 9, "tokens": 9, "seconds": 9.0, "valid_loss": loss}]


def found(losses: dict[str, dict[float, list[float]]], sizes: dict[str, float]) -> Found:
    """Of runs with these final losses by length and seed, and these bytes per parameter."""
    kinds = {key: ("adamw" if key == "adamw" else "ademamix") for key in losses}
    entries = {key: Entry(key.upper(), kinds[key], {"lr": (1e-3,)}) for key in losses}
    fractions = tuple(sorted({x for of_key in losses.values() for x in of_key}))
    seeds = tuple(range(len(losses["adamw"][1.0])))
    settings = dataclasses.replace(CPU, entries=entries, seeds=seeds, fractions=fractions, budgets=())
    results = {
        (key, x, seed): Result("", 0, 0, 0.0, loss, 1.5, sizes.get(key, 12.0), 0, 0.0, 0, "", "", curve(loss), [])
        for key, of_key in losses.items()
        for x, values in of_key.items()
        for seed, loss in enumerate(values)
    }
    return Found(settings, {key: settings.base(entry) for key, entry in entries.items()}, results)


T_OF_TWO = 12.7062  # Student's t for two seeds, whose mean has an error of half their distance


def interval_of_budgets(*powers: float, unit: str = "") -> str:
    """Of two seeds that need these powers of two, in percent more."""
    mean, half = sum(powers) / 2, T_OF_TWO * abs(powers[0] - powers[1]) / 2
    percent = (100 * (2**x - 1) for x in (mean, mean - half, mean + half))
    return "{:.0f} % more{} ({:.0f} to {:.0f})".format(next(percent), unit, *percent)


def interval(a: float, b: float, form: str = "+.4f", t: float = T_OF_TWO) -> str:
    """Of two differences."""
    mean, half = (a + b) / 2, t * abs(a - b) / 2
    return f"{mean - half:{form}} to {mean + half:{form}}"


ADAMW = {0.5: [2.2, 2.3], 1.0: [2.0, 2.1], 2.0: [1.8, 1.9]}


def test_adamw_needs_the_tokens_at_which_it_has_the_same_loss_seed_by_seed() -> None:
    some = found(
        {
            "adamw": ADAMW,
            "ademamix": {1.0: [1.9, 1.9], 0.5: [2.2, 2.2], 2.0: [1.8, 1.8]},
            "far": {1.0: [1.79, 1.9], 0.5: [2.2, 2.2], 2.0: [1.8, 1.8]},
            "mixed": {1.0: [2.1, 1.9], 0.5: [2.2, 2.2], 2.0: [1.8, 1.8]},
            "above": {1.0: [2.1, 2.2], 0.5: [2.2, 2.2], 2.0: [1.8, 1.8]},
        },
        {},
    )
    # Halfway between 1 and 2 in the logarithm; the second seed is just there at 2.
    assert some.tokens("ademamix") == interval_of_budgets(0.5, 1.0)
    assert some.tokens("far") == "at least 100 % more, over 100 % more in 1 of 2 seeds"
    # In the first seed AdamW has that loss, and a lower one, after T steps.
    assert some.tokens("mixed") == f"{interval_of_budgets(0.0, 1.0)}, no more in 1 of 2 seeds"
    assert some.tokens("above") == "its loss is above AdamW's"
    assert some.tokens("adamw") == ""


def short(**losses: list[float]) -> dict[str, dict[float, list[float]]]:
    return {key: {1.0: values} for key, values in losses.items()}


@pytest.mark.parametrize(
    ("lean", "size", "said"),
    [
        (
            [1.5, 1.51],
            8.0,
            "With at most AdEMAMix's memory (12.0 bytes per parameter), decidedly below it (95 % intervals): LEAN "
            f"(8.0), -0.4200 ({interval(-0.4, -0.44)}; signs --)",
        ),
        ([1.5, 1.51], 12.0, "decidedly below it (95 % intervals): LEAN (12.0), "),
        ([1.5, 1.51], 16.0, "No rule with at most AdEMAMix's memory (12.0 bytes per parameter) is decidedly below it"),
        ([1.5, 1.7], 8.0, "No rule with at most"),  # below it in both seeds, by 0.4 and 0.25
        ([2.5, 2.6], 8.0, "No rule with at most"),
    ],
)
def test_a_rule_with_no_more_memory_than_ademamix_is_better_or_none_is(
    lean: list[float], size: float, said: str
) -> None:
    some = found(short(adamw=[2.0, 2.1], ademamix=[1.9, 1.95], lean=lean), {"adamw": 8.0, "lean": size})
    assert said in some.lean()


def test_one_seed_does_not_tell() -> None:
    some = found(short(adamw=[2.0], ademamix=[1.9], lean=[1.5]), {"lean": 8.0})
    assert some.lean().startswith("One seed does not tell")
    lowest, by = some.lowest()
    assert lowest.startswith("After T = 2,000 steps LEAN is lowest; AdamW needs over ")
    assert by == (
        "After T = 2,000 steps LEAN ends 0.4000 nats below ADEMAMIX (one seed); it ends 0.5000 nats below ADAMW "
        "(one seed)"
    )


def test_the_sentences_and_tables_follow_the_losses() -> None:
    mixed = {0.5: [2.5, 2.6], 1.0: [1.9, 1.95], 2.0: [1.85, 1.9]}
    some = found({"adamw": ADAMW, "ademamix": mixed}, {"adamw": 8.0})
    assert some.lowest() == [
        "After T = 2,000 steps ADEMAMIX is lowest; AdamW needs "
        f"{interval_of_budgets(0.5, 0.75, unit=' tokens')} to reach its loss",
        "After T = 2,000 steps ADEMAMIX ends 0.1250 nats below ADAMW "
        f"(95 % interval {interval(0.1, 0.15, '.4f')}; lower in 2 of 2 seeds)",
    ]
    early, late = some.stopped()
    assert early == (
        "Stopped at 0.5 T, ADAMW is lowest: it ends 0.3000 nats below ADEMAMIX (95 % interval 0.3000 to 0.3000; "
        "lower in 2 of 2 seeds); the next is ADEMAMIX"
    )
    assert late.startswith(
        "Extended to 2 T, ADAMW is lowest: it ends 0.0250 nats below ADEMAMIX (95 % interval "
        f"{interval(0.0, 0.05, '.4f')}; lower in 1 of 2 seeds)"
    )
    heads, adamw, ademamix = some.table()
    assert adamw[:4] == ("ADAMW", "2.0500 ± 0.0500", "2.0000, 2.1000", "")
    assert ademamix[-3:] == ("12.0", "1.50", 3)
    assert len(heads) == len(adamw)
    means, gaps = some.by_length()
    assert means[0] == ("final loss of a run of", "0.5 T", "1 T", "2 T")
    assert means[2] == ("ADEMAMIX", "2.5500 ± 0.0500", "1.9250 ± 0.0250", "1.8750 ± 0.0250")
    assert gaps[1] == (
        "ADEMAMIX",
        "hurts: +0.3000 (+0.3000 to +0.3000; signs ++)",
        f"undecided: -0.1250 ({interval(-0.1, -0.15)}; signs --)",
        f"undecided: +0.0250 ({interval(0.05, 0.0)}; signs +0)",
    )


def test_intervals_of_the_lowest_of_several_hold_together() -> None:
    losses = short(adamw=[2.0, 2.1], ademamix=[1.9, 1.95], lean=[1.5, 1.54], next=[1.6, 1.7])
    some = found(losses, {"lean": 8.0, "next": 8.0})
    # With one degree of freedom Student's t is Cauchy's distribution, whose quantiles are tangents.
    of_three, of_two = (math.tan(math.pi * (0.5 - 0.05 / count / 2)) for count in (3, 2))
    assert some.lowest()[1].endswith(
        " ends 0.4050 nats below ADEMAMIX "
        f"(98.33 % interval {interval(0.4, 0.41, '.4f', of_three)}; lower in 2 of 2 seeds); it ends 0.5300 nats below "
        f"ADAMW (98.33 % interval {interval(0.5, 0.56, '.4f', of_three)}; lower in 2 of 2 seeds)"
    )
    assert some.lean() == (  # and not NEXT, by 0.3 and 0.25
        "With at most AdEMAMix's memory (12.0 bytes per parameter), decidedly below it (97.5 % intervals): LEAN (8.0), "
        f"-0.4050 ({interval(-0.4, -0.41, t=of_two)}; signs --)"
    )


def test_a_run_that_diverged_is_worse_than_all_and_is_not_drawn() -> None:
    some = found(short(adamw=[2.0, 2.1], ademamix=[1.9, 1.95], wild=[1.0, 1.0]), {"wild": 8.0})
    some = dataclasses.replace(some, results={**some.results, ("wild", 1.0, 1): None})
    assert some.lean().startswith("No rule")
    assert "ADEMAMIX is lowest" in some.lowest()[0]
    means, gaps = some.by_length()
    assert means[3] == ("WILD", "diverged in 1 of 2 seeds")
    assert gaps[2] == ("WILD", "undecided: (diverged in some seed; signs -+)")
    assert some.charts()[1].lines[2].y == []


def test_a_best_learning_rate_at_an_end_is_named() -> None:
    tried = {"A": (1.0, 2.0, 3.0), "B": (3.0, 1.0, 2.0), "C": (2.0,)}
    assert common.at_the_ends({"A": 2.0, "B": 2.0, "C": 2.0}, tried) == []  # of one value there are no ends
    assert common.at_the_ends({"A": 3.0, "B": 1.0, "C": 2.0}, tried) == [
        "The best learning rate is the smallest that was tried: B",
        "The best learning rate is the largest that was tried: A",
    ]


def candidates(preset: str, **recipe: int) -> dict[str, common.Candidate]:
    settings = beyond.PRESETS[preset]
    settings = dataclasses.replace(settings, recipe=dataclasses.replace(settings.recipe, **recipe))
    return {
        key: common.Candidate(e.title, e.optimizer, settings.base(e), e.tried) for key, e in settings.entries.items()
    }


@pytest.mark.parametrize("preset", beyond.PRESETS)
def test_no_slow_average_of_the_presets_is_too_long_for_its_run(preset: str) -> None:
    assert common.too_long(candidates(preset)) == []


def test_slow_averages_too_long_for_a_shorter_run_are_named() -> None:
    mixed, zero = common.too_long(candidates("cpu", steps=800, warmup=40))  # 0.995 reaches back 200 steps, 0.998 500
    assert mixed == "AdEMAMix is tried with slow EMAs too long for 800 steps: beta3 = 0.998 (500 steps)"
    assert zero.startswith("AdEMAMix, beta1 = 0 is tried")
    assert common.too_long(candidates("cpu", steps=1200)) == []
    assert common.too_long(candidates("cpu", steps=800, warmup=40, planned=2000)) == []


def test_a_chart_of_logarithms_leaves_out_what_is_a_millionth_of_its_largest_weight() -> None:
    lines = [Line("a", [1.0, 2.0, 3.0], [4.0, 5e-6, 0.0]), Line("b", [1.0, 2.0], [3e-6, -1.0])]
    assert beyond._strong(lines) == [Line("a", [1.0, 2.0], [4.0, 5e-6]), Line("b", [], [])]


# --------------------------------------------------------------------------------- the user's own


@pytest.fixture
def own(cli: Any, tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """A command that lets a rule of the user's take part, one trial each, and stops where the runs would begin."""

    def none(trials: Trials, *grids: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trials, "run", none)
    Path("mine.py").write_text(RULE)
    model = dict(zip(tiny[::2], tiny[1::2], strict=True))
    size = [word for name in model if name not in ("--log-every", "--save-every") for word in (name, model[name])]
    for key in CPU.entries:
        size += [f"--entries.{key}.tried", "lr=1e-3"]
    return ("run", "beyond", *size, "--entries.kema.settings", "longest=1T", "--own", "mine.py:mine")


def test_a_rule_of_the_users_takes_part_and_is_refused_once_it_is_another(
    cli: Any, own: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(*own, "--own-tried", "lr=0.1", "--own-settings", "leak=0.25", "--out", "out") == 128 + 2
    stored = json.loads(Path("out/config.json").read_text())
    assert stored["own"].startswith("mine.py:mine@")
    assert (stored["own_tried"], stored["own_settings"]) == ({"lr": [0.1]}, {"leak": 0.25})
    again = ("run", "beyond", "--resume", "out", "--own", "mine.py:mine")
    capsys.readouterr()
    assert cli(*again) == 128 + 2
    how = capsys.readouterr().err.partition("resume with: ")[2]
    assert how.strip() == f"{PROGRAM} run beyond --resume out --own mine.py:mine"
    assert cli(*again, "--own-tried", "lr=0.2") == 2
    assert "own_tried.lr ([0.1] there, [0.2] here)" in capsys.readouterr().err
    Path("mine.py").write_text(RULE.replace("leak *", "2.0 * leak *"))
    assert cli(*again) == 2
    assert "mine.py:mine has changed since" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "all must have the same number of trials, lr among what is tried: 1 of adamw"),
        (("--own-tried", "leak=0.5"), "all must have the same number of trials, lr among what is tried"),
        (("--own-tried", "lr=0.1,0.2"), "2 of own"),
        (("--own-tried", "lr=0.1", "--own-settings", "leek=0.5"), "own: Mine has no setting leek; it has lr, leak,"),
    ],
)
def test_what_an_own_rule_cannot_be_tried_with_is_refused(
    words: tuple[str, ...], message: str, cli: Any, own: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(*own, *words, "--out", "out") == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()
