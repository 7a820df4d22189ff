"""What `clip` trains and what it concludes, from losses that are known; test_experiments.py runs it for real."""

import dataclasses
import math
from typing import Any

from scipy import stats

from ademamix.lab.experiments import clip

CPU = dataclasses.replace(clip.PRESETS["cpu"], seeds=(201, 202, 203))
OFF = {
    "adamw": {1.0: 0.0, 0.5: -0.1, 0.1: 0.2, math.inf: 0.0},
    "ademamix": {1.0: 0.0, 0.5: 0.1, 0.1: 0.3, math.inf: 0.5},
}
TILT = {201: 0.01, 202: -0.01, 203: 0.0}  # with the smallest norm


def loss(optimizer: str, recipe: Any, _: object) -> float:
    start = {"adamw": 3.0, "ademamix": 2.9}[optimizer]
    tilt = TILT[recipe.seed] * (recipe.clip == 0.1)
    return start + OFF[optimizer][recipe.clip] + tilt + 0.3 * math.sin(recipe.seed)


def share(optimizer: str, recipe: Any, _: object) -> float:
    """Of the steps, the part that is clipped: 2 % more or less by seed."""
    part = {1.0: 0.3, 0.5: 0.6, 0.1: 0.9, math.inf: 0.0}[recipe.clip]
    return part + 2 * TILT[recipe.seed] * (recipe.clip < 1) + 0.05 * (optimizer == "ademamix") * (recipe.clip == 0.5)


def test_each_norm_is_compared_with_the_first_within_seeds(pretended: Any) -> None:
    trials = pretended(loss, share)
    report = clip.run(CPU, trials)
    assert {r.clip for r in trials.recipes.values()} == {1.0, 0.5, 0.1, math.inf}
    assert len(trials.recipes) == 2 * 4 * 3
    edge = stats.sem(list(TILT.values())) * stats.t.isf(0.025, 2)
    grouped, adamw, ademamix, clipped = report.headlines
    assert grouped == (
        "In place of a norm of 1: helps: 0.5 with AdamW; hurts: 0.1 with AdamW, 0.5 with AdEMAMix, 0.1 with AdEMAMix, "
        "no clipping with AdEMAMix; no other difference is decided"
    )
    assert adamw == (
        "AdamW, compared with a norm of 1: 0.5 helps: -0.1000 (-0.1000 to -0.1000; signs ---); "
        f"0.1 hurts: +0.2000 ({0.2 - edge:+.4f} to {0.2 + edge:+.4f}; signs +++); "
        "off undecided: +0.0000 (+0.0000 to +0.0000; signs 000)"
    )
    assert ademamix.endswith("off hurts: +0.5000 (+0.5000 to +0.5000; signs +++)")
    assert clipped == (
        "Share of steps clipped: AdamW 30 % at 1, 60 % at 0.5, 90 % at 0.1, 0 % at off; "
        "AdEMAMix 30 % at 1, 65 % at 0.5, 90 % at 0.1, 0 % at off"
    )
    rows = {row[:2]: row[2:] for row in report.tables[0]}
    assert rows["AdEMAMix", "0.5"][1:4] == (
        "65.0 %", "hurts: +0.1000 (+0.1000 to +0.1000; signs +++)", "hurts: +0.1000 (+0.1000 to +0.1000; signs +++)",
    )  # fmt: skip
    assert rows["AdEMAMix", "1"][2:4] == ("", "helps: -0.1000 (-0.1000 to -0.1000; signs ---)")
    assert rows["AdamW", "off"][3] == ""


def test_no_clipping_stands_beyond_all_norms_in_the_charts(pretended: Any) -> None:
    settings = dataclasses.replace(CPU, norms=(1.0, 10.0, 20.0, math.inf))
    report = clip.run(settings, pretended(lambda *_: 3.0, lambda _, recipe, __: 0.5 / recipe.clip))
    above, shares = report.pictures
    assert [text for _, text in above.x_ticks] == ["1", "10", "20", "off"]
    assert [x for x, _ in above.x_ticks] == shares.lines[0].x == sorted({x for x, _ in above.x_ticks})
    assert above.lines[0].x == shares.lines[0].x[1:]
    assert shares.lines[1].y == [50.0, 5.0, 2.5, 0.0]


def test_where_every_run_diverged_no_share_is_known(pretended: Any) -> None:
    report = clip.run(CPU, pretended(lambda *of: math.inf if of[1].clip == math.inf else loss(*of), share))
    assert report.headlines[-1].endswith("AdEMAMix 30 % at 1, 65 % at 0.5, 90 % at 0.1, diverged at off")
    assert ("AdamW", "off", "diverged in 3 of 3 seeds", "diverged") in {row[:4] for row in report.tables[0]}
    assert len(report.pictures[1].lines[0].x) == 3
