"""The paper's experiments at a size of seconds: what they train, what they conclude, and that a kill loses nothing."""

import dataclasses
import html
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, get_args

import pytest

from ademamix.lab.config import BadInputError, Job
from ademamix.lab.experiments import EXPERIMENTS, beyond, forgetting, geometry, horizon, lm, sweep, trials, valley
from ademamix.lab.experiments.common import Preset, Tuning, settings_of
from ademamix.lab.experiments.trials import Grid, Trials
from ademamix.lab.reports.claims import CLAIMS
from ademamix.lab.reports.pictures import Chart, HeatMap, Line
from ademamix.lab.reports.svg import svg
from ademamix.lab.training.loop import Result, train
from ademamix.lab.training.optimizers import arguments_of

SEEDS = ("--seeds", "0", "1")
IMAGES = ("--steps", "6", "--warmup", "1", "--eval-every", "3", "--eval-images", "20", "--images", "20", "40")
TINY = {  # of each experiment its settings, after those of a tiny language model
    "lm": ("--tuning.adamw-beta2", "0.99", "--tuning.ademamix-beta3", "0.9", "--budgets", "1.5"),
    "forgetting": ("--at", "0.3", "0.5"),
    "switch": ("--after", "0.3", "0.6"),
    "sweep": ("--alpha", "2", "8", "--beta3", "0.9", "0.99", "0.999", "--adamw-beta1", "0.95", "--adamw-lr", "0.01"),
    "horizon": ("--lengths", "12", "24", "--beta3", "0.5", "0.8", "0.9"),
    "vit": (*IMAGES, "--examples", "40", "--size", "8", "--patch", "4", "--layers", "1", "--width", "32"),
    "mamba": ("--tuning.adamw-lr", "0.01", "--tuning.ademamix-lr", "0.01"),
    "length": (
        *("--lengths", "100", "120", "--lrs", "1", "1", "--seed-counts", "2", "2", "--budgets", "1.5"),
        *("--adamw-lr", "0.01", "--ademamix-lr", "0.01", "--beta2", "0.99", "--beta3", "0.9", "0.95"),
    ),
    "batch": ("--steps", "40", "--batches", "1", "2", "--equal-steps", "20"),
    "clip": ("--norms", "1", "0.1"),
    "valley": ("--steps", "50"),
    "beyond": (
        *(word for key in beyond.PRESETS["cpu"].entries for word in (f"--entries.{key}.tried", "lr=1e-3")),
        *("--entries.kema.settings", "longest=1T", "warmup=1T"),
        *("--fractions", "0.5", "1", "--budgets", "1.5"),
    ),
    "geometry": (
        *(word for key in geometry.PRESETS["cpu"].entries for word in (f"--entries.{key}.lr", "1e-3")),
        *("--batches", "1", "--lengths", "1", "--lrs", "1", "--budgets", "1.5", "--budget-seeds", "1"),
        *("--entries.adam-kema.settings", "longest=1T", "--entries.muon-kema.settings", "longest=1T"),
    ),
}


class Inline:
    """An executor that works at once and here: starting processes takes seconds."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future

    def shutdown(self, **kwargs: object) -> None:
        pass


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """What carries out a run, or copies what became of the same one in an earlier test of this module."""
    folder, known = tmp_path_factory.mktemp("runs"), {}
    carry_out = trials._train

    def run(optimizer, recipe, out):
        key = (optimizer, repr(recipe))
        if key not in known:
            loss = carry_out(optimizer, recipe, out)
            known[key] = loss, shutil.copytree(out, folder / str(len(known)))
        elif not out.exists():
            shutil.copytree(known[key][1], out)
        return known[key][0]

    return run


@pytest.fixture
def inline(monkeypatch, once):
    monkeypatch.setattr("ademamix.lab.experiments.workers.ProcessPoolExecutor", Inline)
    monkeypatch.setattr("ademamix.lab.experiments.trials._train", once)
    monkeypatch.setattr("ademamix.lab.data.images.VALID_GLYPHS", 30)
    monkeypatch.setattr("ademamix.lab.experiments.batch.LRS", (0.5,))


def arguments(name: str, tiny: tuple[str, ...], seeds: tuple[str, ...] = SEEDS) -> tuple[str, ...]:
    """Of a tiny run of an experiment, without --out."""
    model = dict(zip(tiny[::2], tiny[1::2], strict=True))
    for key in ("--log-every", "--save-every"):
        del model[key]
    if name == "horizon":
        del model["--steps"], model["--warmup"]
    text = tuple(word for pair in model.items() for word in pair)
    return ("run", name, *(() if name in ("vit", "valley") else text), *seeds, *TINY[name])


def marked(names: Iterable[str]) -> list[Any]:
    """The names of experiments, some of which have many runs at any size."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in ("length", "batch") else name for name in names]


@pytest.mark.parametrize("name", marked(EXPERIMENTS))
def test_an_experiment_decides_its_claims_and_writes_its_report(name, cli, inline, tiny, capsys):
    assert cli(*arguments(name, tiny), "--out", "out") == 0
    said = capsys.readouterr().out
    outcome = json.loads(Path("out/outcome.json").read_text())
    claims = {key for key, claim in CLAIMS.items() if claim.experiment == name}
    assert {finding["claim"] for finding in outcome["findings"]} == claims
    untested = [f["claim"] for f in outcome["findings"] if f["verdict"] == "not tested at this size"]
    assert untested == (["valley-overshoot"] if name == "valley" else [])  # nobody arrives so soon
    assert all(finding["ours"] in said for finding in outcome["findings"])
    page, markdown = Path("out/report.html").read_text(), Path("out/report.md").read_text()
    marks = ["class=picture", *["class=verdict"] * bool(claims), "<h2>Results", "<h2>Command", "<summary>Settings<"]
    places = [page.index(mark) for mark in marks]
    assert places == sorted(places)
    assert all(f"ademamix run {name} --" in text for text in (page, markdown))
    assert "nan" not in markdown.replace("Finance", "")
    assert all(b"</svg>" in Path(f"out/pictures-{scheme}.svg").read_bytes() for scheme in ("light", "dark"))
    assert said.rstrip().endswith("report: out/report.html")


@pytest.fixture
def diverge(inline, monkeypatch):
    """Let those of the runs that count diverge of whose optimizer and recipe something holds."""
    real = trials._train

    def of(lost):
        def fake(optimizer, recipe, out):
            counts = out.parent.name.startswith("final")
            return math.inf if counts and lost(optimizer, recipe) else real(optimizer, recipe, out)

        monkeypatch.setattr("ademamix.lab.experiments.trials._train", fake)

    return of


NO_NUMBER = re.compile(r"\b(inf|nan)\b")
TRAINED = [name for name in EXPERIMENTS if name != "valley"]  # by `train`


EITHER = [(name, ("ademamix",)) for name in TRAINED if name not in ("horizon", "length", "batch")]


@pytest.mark.parametrize(("name", "optimizers"), [*EITHER, ("lm", ("adamw",)), ("beyond", ("adamw", "ademamix"))])
def test_a_seed_that_diverged_is_counted_and_gives_no_figure(name, optimizers, cli, diverge, tiny, capsys):
    diverge(lambda optimizer, recipe: optimizer in optimizers and recipe.seed == 1)
    assert cli(*arguments(name, tiny), "--out", "out") == 0
    text = capsys.readouterr().out + Path("out/report.md").read_text()
    assert not NO_NUMBER.search(text)
    assert ("1 of 2 seeds left out: a run diverged" if name == "forgetting" else "diverged in 1 of 2 seeds") in text


def test_a_beta3_that_diverged_is_counted_and_not_the_best(cli, diverge, tiny, capsys):
    diverge(lambda _, recipe: recipe.seed == 1 and recipe.ademamix.beta3 == 0.8)
    assert cli(*arguments("horizon", tiny), "--out", "out") == 0
    text = capsys.readouterr().out + Path("out/report.md").read_text()
    assert not NO_NUMBER.search(text)
    assert "diverged in 1 of 2 seeds" in text


@pytest.mark.parametrize("name", marked(TRAINED))
def test_a_report_or_one_line_comes_of_runs_that_all_diverged(name, cli, diverge, tiny, capsys):
    diverge(lambda *_: True)
    code = cli(*arguments(name, tiny), "--out", "out")
    shown = capsys.readouterr()
    if name in ("horizon", "forgetting"):  # of which nothing is left to report
        assert code == 2
        assert re.fullmatch(r"ademamix: (every run .*|in every seed a run) diverged: try .*\n", shown.err)
    else:
        assert code == 0
        assert not NO_NUMBER.search(shown.out + Path("out/report.md").read_text())


@pytest.mark.parametrize("name", ["lm", "horizon", "vit", "mamba", "clip"])
def test_a_mean_of_one_seed_has_no_error_to_show(name, cli, inline, tiny):
    assert cli(*arguments(name, tiny, ("--seeds", "3")), "--out", "out") == 0
    assert not NO_NUMBER.search(Path("out/report.md").read_text())


def test_a_point_that_is_no_number_is_not_at_the_minimum(cli):
    assert cli("run", "valley", "--lr", "3e37", "--steps", "50", "--seeds", "0", "1", "--out", "out") == 0
    arrival, overshoot = json.loads(Path("out/outcome.json").read_text())["findings"]
    # After the last step, for each.
    assert "Adam, beta1 = 0.9: 51; Adam, beta1 = 0.999: 51; AdEMAMix: 51; Adam, lr 3e+38: 51;" in arrival["ours"]
    assert arrival["verdict"] == "undecided"
    assert overshoot["ours"].count("never arrives") == 4
    assert overshoot["verdict"] == "not tested at this size"
    assert not NO_NUMBER.search(Path("out/report.md").read_text())


def test_one_seed_reproduces_nothing(cli, inline, tiny):
    assert cli(*arguments("forgetting", tiny, ("--seeds", "3")), "--out", "out") == 0
    (finding,) = json.loads(Path("out/outcome.json").read_text())["findings"]
    assert finding["verdict"] == "not tested at this size"


def test_no_clipping_is_a_norm_that_no_gradient_reaches(cli, inline, tiny):
    words = arguments("clip", tiny)[: -len(TINY["clip"])]
    assert cli(*words, "--norms", "1e9", "inf", "--out", "out") == 0
    assert cli("run", "clip", "--resume", "out", "--norms", "1e9", "inf") == 0
    report = Path("out/report.md").read_text()
    same = "off undecided: +0.0000 (+0.0000 to +0.0000; signs 00)"
    assert report.count(f"compared with a norm of 1e+09: {same}") == 2  # to the bit
    assert report.count(" 0 % at 1e+09, 0 % at off") == 2


def test_a_finished_experiment_is_not_done_again(cli, inline, tiny, monkeypatch):
    assert cli(*arguments("switch", tiny), "--out", "out") == 0
    before = Path("out/outcome.json").read_text()
    monkeypatch.setattr("ademamix.lab.experiments.trials._train", None)
    for _ in range(2):
        assert cli("run", "switch", "--resume", "out") == 0
    after = json.loads(Path("out/outcome.json").read_text())
    assert after["headlines"] == json.loads(before)["headlines"]
    assert len(after["commands"]) == 2  # each once, however often it was typed


BAD = {
    "unknown preset huge; there are cpu, gpu, paper": ("lm", "--preset", "huge"),
    "seeds must be different numbers in [0, 2**63), got (1, 1)": ("lm", "--seeds", "1", "1"),
    "seeds must not have 200, that of the tuning": ("lm", "--seeds", "199", "200"),
    "workers must not be negative, got -1": ("lm", "--workers", "-1"),
    "both optimizers must have the same number of trials": ("lm", "--tuning.adamw-lr", "0.1"),
    "adamw_lr must be different numbers, got (0.1, 0.1)": ("lm", "--tuning.adamw-lr", "0.1", "0.1"),
    "adamw_beta2 must be different numbers, got (0.99, 0.99)": ("vit", "--tuning.adamw-beta2", "0.99", "0.99"),
    "ademamix_lr must be different numbers, got (0.1, 0.2, 0.1)": (
        *("mamba", "--tuning.ademamix-lr", "0.1", "0.2", "0.1"),
    ),
    "ademamix_beta3 must be different numbers, got (0.9, 0.9)": ("lm", "--tuning.ademamix-beta3", "0.9", "0.9"),
    "budgets must be growing numbers above 1, got (2.0, 1.5)": ("lm", "--budgets", "2", "1.5"),
    "at must be growing numbers between 0 and 1, got (1.5,)": ("forgetting", "--at", "1.5"),
    "after must be growing numbers between 0 and 1, got (0.5, 0.2)": ("switch", "--after", "0.5", "0.2"),
    "alpha must be growing numbers, got (2.0, 2.0)": ("sweep", "--alpha", "2", "2"),
    "beta3 must be 3 or more growing numbers, got (0.5, 0.9)": ("horizon", "--beta3", "0.5", "0.9"),
    "beta3 must be between 0 and 1, got": ("horizon", "--beta3", "0.5", "0.9", "1.5"),
    "images must be two or more growing numbers above 0, got (5,)": ("vit", "--images", "5"),
    "patch must divide size, got 7 with images of 20": ("vit", "--patch", "7"),
    "nowhere is not a token folder": ("lm", "--data", "nowhere"),
    "no such folder of images: nowhere": ("vit", "--data", "nowhere"),
    "cannot use the device abacus": ("lm", "--device", "abacus"),
    "betas[0] must be a number in [0, 1), got 2.0": ("valley", "--large", "2"),
    "large must be above small, which is 0.9, got 0.9": ("valley", "--large", "0.9"),
    "fractions must have 1, that of T steps, got (0.5, 2.0)": ("beyond", "--fractions", "0.5", "2"),
    "fractions must be growing numbers above 0, got (1.0, 0.5)": ("beyond", "--fractions", "1", "0.5"),
    "budgets must be growing numbers above 1, got (0.5,)": ("beyond", "--budgets", "0.5"),
    "warmup must be in [0, steps), got 100 with 60 steps": ("beyond", "--fractions", "0.03", "1"),
    "all must have the same number of trials, lr among what is tried: 2 of adamw, 6 of ademamix": (
        *("beyond", "--entries.adamw.tried", "lr=0.1,0.2"),
    ),
    "kema: longest must be a number of steps >= shortest (10.0), got 9.0": ("beyond", "--steps", "60", "--warmup", "3"),
    "log-time: AdEMAMix has no setting kapa; it has lr, beta1,": (
        *("beyond", "--entries.log-time.settings", "kapa=0.5"),
    ),
    "adana: kappa must be a number in (0, 1], got 1.5": (
        *("beyond", "--entries.adana.tried", "lr=0.1,0.2,0.3", "kappa=0.5,1.5"),
    ),
    "fractions must be growing numbers above 0, got (1.0, inf)": ("beyond", "--fractions", "1", "inf"),
    "budgets must be growing numbers above 1, got (2.0, inf)": ("lm", "--budgets", "2", "inf"),
    "images must be two or more growing numbers above 0, got (0, 10)": ("vit", "--images", "0", "10"),
    "at must be different steps within the 20 of the run, got (0.999,): (20,)": (
        *("forgetting", "--at", "0.999", "--steps", "20", "--warmup", "2"),
    ),
    "after must be different steps within the 20 of the run, got (1e-05,): (0,)": (
        *("switch", "--after", "0.00001", "--steps", "20", "--warmup", "2"),
    ),
    "no such file: nowhere.py": ("beyond", "--own", "nowhere.py:mine"),
    "is for other optimizers": ("lm", "--settings", "kappa=0.5"),
    "lengths must be two or more growing numbers from 100 on, got (99, 200)": ("length", "--lengths", "99", "200"),
    "budgets must be growing numbers above 1, got (1.0, 2.0)": ("length", "--budgets", "1", "2"),
    "beta3 must be growing numbers between 0 and 1, got (0.9, 1.0)": ("length", "--beta3", "0.9", "1"),
    "lrs must be 3 positive numbers, as lengths, got (1.0, -1.0, 1.0)": ("length", "--lrs", "1", "-1", "1"),
    "seed_counts must be 3 numbers from 1 on, got (8, 0, 4)": ("length", "--seed-counts", "8", "0", "4"),
    "learning rates, and beta2 one value or more: 1 of AdamW, 3 of AdEMAMix": ("length", "--adamw-lr", "0.1"),
    "batches must be two or more growing numbers from 1 on, got (2, 4)": ("batch", "--batches", "2", "4"),
    "every run must have 20 steps or more, got 19 at the largest batch": ("batch", "--steps", "319"),
    "lr must be positive, got 0.0": ("batch", "--lr", "0"),
    "beta2 must be in [0, 1), got 1.0": ("batch", "--beta2", "1"),
    "settings are those of the experiment here": ("batch", "--settings", "geometry=muon"),
    "norms must be two or more different positive numbers, got (1.0, 1.0)": ("clip", "--norms", "1", "1"),
    "norms must be two or more different positive numbers, got (1.0, nan)": ("clip", "--norms", "1", "nan"),
    "norms must be two or more different positive numbers, got (inf,)": ("clip", "--norms", "inf"),
    "batches must be growing numbers above 0, got (4, 1)": ("geometry", "--batches", "4", "1"),
    "budgets must be growing numbers above 1, got (1.0,)": ("geometry", "--budgets", "1"),
    "lengths must be 3 positive numbers, as batches, got (1.0, 0.5)": ("geometry", "--lengths", "1", "0.5"),
    "lrs must be 3 positive numbers, as batches, got (1.0, 0.0, 1.0)": ("geometry", "--lrs", "1", "0", "1"),
    "budget_seeds must be in [1, 2], got 3": ("geometry", "--seeds", "101", "102", "--budget-seeds", "3"),
    "settings are those of the entries here": ("geometry", "--settings", "geometry=muon"),
    "all must have as many learning rates: 2 of adam-ema, 4 of adam-ademamix": (
        *("geometry", "--entries.adam-ema.lr", "0.1", "0.2"),
    ),
    "muon-adana: kappa must be a number in (0, 1], got 1.5": (
        *("geometry", "--entries.muon-adana.settings", "kappa=1.5"),
    ),
    "out already exists": ("valley", "--out", "out"),
    "nothing to resume in nowhere": ("lm", "--resume", "nowhere"),
    "holds no reports": (),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_settings_give_one_line_and_write_nothing(message, cli, capsys, monkeypatch):
    monkeypatch.setattr("ademamix.lab.data.images.VALID_GLYPHS", 30)
    Path("out").mkdir()
    words = ("run", *BAD[message]) if BAD[message] else ("report", "out")
    assert cli(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert {str(path) for path in Path().iterdir()} - {"cache"} == {"out"}
    assert not list(Path("out").iterdir())


# --------------------------------------------------------------------------------- what is trained


@pytest.fixture
def recipe(tokens):
    small = {"layers": 1, "width": 16, "context": 16, "batch": 4, "steps": 40, "warmup": 2, "eval_every": 10}
    return dataclasses.replace(lm.small(), data=str(tokens), eval_sequences=8, **small)


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_a_switched_run_is_adamw_until_the_switch_and_goes_on_from_there(recipe, tmp_path):
    job = Job(log_every=1, save_every=7)
    train("adamw", recipe, job, tmp_path / "adamw")
    train("ademamix", dataclasses.replace(recipe, switch_at=20), job, tmp_path / "switched")
    adamw, switched = losses(tmp_path / "adamw"), losses(tmp_path / "switched")
    assert switched[:21] == adamw[:21]  # the loss of step 21 comes before its update
    assert switched[21:] != adamw[21:]
    train("adamw", dataclasses.replace(recipe, switch_at=20), job, tmp_path / "not")
    assert losses(tmp_path / "not") == adamw
    # Without the slow EMA it continues as AdamW.
    same = dataclasses.replace(recipe.ademamix, lr=recipe.adamw.lr, alpha=0.0)
    train("ademamix", dataclasses.replace(recipe, switch_at=20, ademamix=same), job, tmp_path / "same")
    assert losses(tmp_path / "same") == pytest.approx(adamw, rel=1e-5)


@pytest.mark.parametrize("cut", [15, 25])
def test_a_switched_run_resumes_exactly_on_both_sides_of_the_switch(cut, recipe, tmp_path, monkeypatch):
    from ademamix.lab.training.loop import _Run

    switched = dataclasses.replace(recipe, switch_at=20)
    whole = train("ademamix", switched, Job(log_every=1), tmp_path / "whole")
    advance = _Run.advance
    monkeypatch.setattr(_Run, "advance", lambda run: 1 / 0 if run.step == cut else advance(run))
    with pytest.raises(ZeroDivisionError):
        train("ademamix", switched, Job(log_every=1, save_every=5), tmp_path / "cut")
    monkeypatch.undo()
    assert train("ademamix", switched, Job(log_every=1), tmp_path / "cut").valid_loss == whole.valid_loss
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_held_out_batch_is_seen_once_and_followed(recipe, tmp_path):
    followed = dataclasses.replace(recipe, held_out=(10, 30), adamw=dataclasses.replace(recipe.adamw, lr=1e-3))
    seen = train("adamw", followed, Job(), tmp_path / "seen")
    twin = train("adamw", dataclasses.replace(followed, insert=False), Job(), tmp_path / "twin")
    assert list(seen.held_out[0]) == [9, 10, 11, 12, 13, 14, 16, 18, 21, 26, 33]
    assert list(seen.held_out[1]) == [29, 30, 31, 32, 33, 34, 36, 38]
    assert seen.held_out[0][9] == twin.held_out[0][9]  # nothing differs yet
    assert seen.held_out[0][10] < twin.held_out[0][10]  # a step on the batch itself
    plain = train("adamw", dataclasses.replace(followed, held_out=()), Job(), tmp_path / "plain")
    assert twin.valid_loss == plain.valid_loss  # looking changes nothing
    assert seen.valid_loss != plain.valid_loss
    assert Result.read(tmp_path / "seen") == seen


def test_a_drop_is_the_twins_loss_minus_the_runs_at_the_times_that_all_batches_share():
    def result(held_out: list[dict[int, float]]) -> Result:
        return Result("adamw", 0, 0, 0.0, 0.0, 0.0, 0.0, 0, 0.0, 0, "", "", [], held_out)

    seen = result([{9: 3.0, 10: 2.0, 11: 2.5, 12: 2.9}, {19: 3.0, 20: 2.2, 21: 2.4}])
    twin = result([{9: 3.0, 10: 2.8, 11: 2.7, 12: 2.6}, {19: 3.0, 20: 3.0, 21: 2.9}])
    drops = forgetting._drops(seen, twin, (10, 20))
    assert drops == pytest.approx({-1: 0.0, 0: 0.8, 1: 0.35})


def test_warmups_are_off_or_a_part_of_the_run(recipe, tmp_path):
    def warmups(**changes: float) -> list[float | None]:
        settings = dataclasses.replace(recipe.ademamix, warmup=changes.get("warmup", 1.0))
        switched = dataclasses.replace(recipe, ademamix=settings, switch_at=int(changes.get("switch_at", 0)))
        _, given = arguments_of("ademamix", switched)
        return [given["alpha_warmup"], given["beta3_warmup"]]

    assert warmups() == [40, 40]
    assert warmups(warmup=0.5) == [20, 20]
    assert warmups(warmup=0.0) == [None, None]
    assert warmups(switch_at=10) == [30, 30]


def test_the_vertex_of_a_parabola():
    x = [0.0, 1.0, 2.0, 3.0]
    assert horizon.vertex(x, [(v - 1.3) ** 2 for v in x]) == pytest.approx(1.3)
    assert horizon.vertex(x, [1.0, 2.0, 3.0, 4.0]) == 0.0
    assert horizon.vertex(x, [4.0, 3.0, 2.0, 1.0]) == 3.0
    assert horizon.vertex(x, [math.inf, 1.0, 2.0, 3.0]) == 1.0


def test_the_heat_map_has_every_loss_in_its_place():
    results = {
        (a, b): Result("ademamix", 0, 0, 0.0, 10 * a + b, 0, 0, 0, 0.0, 0, "", "", [], [])
        for a in (1, 2)
        for b in (3, 4)
    }
    results[2, 4] = None
    shown = sweep._map("", "beta3", "alpha", (3, 4), (1, 2), results)
    assert shown == HeatMap("", "beta3", "alpha", ["3", "4"], ["1", "2"], [[13, 14], [23, None]])
    assert shown.texts()[1][1] == "diverged"


def test_adam_in_the_valley_is_torchs(inline):
    import torch

    settings = valley.Valley(steps=200)
    starts = [valley._start(0), valley._start(3)]
    ours = valley._paths(settings.optimizers()["Adam, beta1 = 0.9"], starts, 200)
    p = torch.tensor(starts[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([p], lr=settings.lr, betas=(0.9, 0.999))
    for _ in range(200):
        optimizer.zero_grad()
        valley.rosenbrock(p[0], p[1]).backward()
        optimizer.step()
    assert ours[1][-1] == pytest.approx(tuple(p.tolist()), rel=1e-9)
    assert len(ours) == 2
    assert len(ours[0]) == 201


def test_the_fourth_in_the_valley_is_adam_with_steps_as_long_as_ademamixs(inline):
    import torch

    settings = valley.Valley(lr=0.01, alpha=4.0, large=0.99)
    name, make = list(settings.optimizers().items())[3]
    assert name == "Adam, lr 0.05"  # (1 + 4) 0.01
    p, q = (torch.tensor([2.0, -1.0], dtype=torch.float64, requires_grad=True) for _ in range(2))
    for of, optimizer in ((p, make(p)), (q, torch.optim.Adam([q], lr=0.05, betas=(0.9, 0.999)))):
        for _ in range(100):
            optimizer.zero_grad()
            valley.rosenbrock(of[0], of[1]).backward()
            optimizer.step()
    assert p.tolist() == pytest.approx(q.tolist(), rel=1e-9)


# --------------------------------------------------------------------------------- many runs at a time


def test_grids_run_every_point_once_and_both_optimizers_are_tuned_alike(recipe, tmp_path, inline):
    ran = []

    def made(lr: float, seed: int):
        ran.append((lr, seed))
        adamw = dataclasses.replace(recipe.adamw, lr=lr)
        return "adamw", dataclasses.replace(recipe, steps=4, warmup=1, seed=seed, adamw=adamw)

    grid = Grid("some", {"lr": (1e-3, 1e-2, 3.402e38), "seed": (0, 1)}, made)
    with Trials(tmp_path, "cpu", 1) as trials:
        (results,) = trials.run(grid)
        assert sorted(ran) == [(lr, seed) for lr in (1e-3, 1e-2, 3.402e38) for seed in (0, 1)]
        assert trials.run(grid) == [results]
    assert len(ran) == 6
    assert results[3.402e38, 0] is None  # diverged
    alone = dataclasses.replace(recipe, steps=4, warmup=1, seed=1, adamw=dataclasses.replace(recipe.adamw, lr=1e-2))
    assert results[1e-2, 1].valid_loss == train("adamw", alone, Job(), tmp_path / "alone").valid_loss
    tuning = Tuning((1.0, 2.0), (0.9,), (3.0,), (0.5, 0.6))
    assert {name: math.prod(map(len, space.values())) for name, space in tuning.spaces().items()} == {
        "adamw": 2,
        "ademamix": 2,
    }


def some_grid(recipe) -> Grid:
    return Grid("some", {"seed": (0, 1)}, lambda seed: ("adamw", dataclasses.replace(recipe, steps=4, seed=seed)))


def test_a_journal_that_was_torn_at_any_place_goes_on(recipe, tmp_path, inline):
    grid = some_grid(recipe)
    (tmp_path / "whole").mkdir()
    with Trials(tmp_path / "whole", "cpu", 1) as trials:
        whole = trials.run(grid)
    lines = (tmp_path / "whole" / "trials.log").read_bytes().splitlines(keepends=True)
    assert len(lines) > 8
    tears = [(number, line[: len(line) // 2]) for number, line in enumerate(lines)]
    last = len(lines) - 1
    tears += [(0, b""), (last, lines[last][:-1]), (last, b"\0" * 40), (last, b"\0\0\n\0")]
    for case, (kept, torn) in enumerate(tears):
        out = shutil.copytree(tmp_path / "whole", tmp_path / f"{case}")
        (out / "trials.log").write_bytes(b"".join(lines[:kept]) + torn)
        with Trials(out, "cpu", 1) as trials:
            assert trials.run(grid) == whole
        assert all(json.loads(line) for line in (out / "trials.log").read_text().splitlines())
        aside = out / "trials.log.torn"
        assert (aside.read_bytes() if aside.exists() else b"") == (torn and torn + b"\n")
        with Trials(out, "cpu", 1) as trials:  # and what was appended since is sound
            assert trials.run(grid) == whole


@pytest.mark.parametrize("damage", ["a line without an operation", "an unknown operation", "trials of other grids"])
def test_a_journal_of_sound_lines_that_do_not_fit_is_named_and_kept(damage, recipe, tmp_path, inline):
    some = some_grid(recipe)
    grids = some, Grid("other", {"number": (5, 6)}, lambda number: some.run(seed=number))
    with Trials(tmp_path, "cpu", 1) as trials:
        whole = trials.run(*grids)
    journal = tmp_path / "trials.log"
    lines = journal.read_bytes().splitlines(keepends=True)
    damaged = {
        "a line without an operation": [*lines, b"{}\n"],
        "an unknown operation": [*lines, b'{"op_code":99,"worker_id":""}\n'],
        "trials of other grids": [line.replace(b'"seed"', b'"number"') for line in lines],
    }
    journal.write_bytes(b"".join(damaged[damage]))
    before = journal.read_bytes()
    with pytest.raises(BadInputError, match=r"trials\.log is damaged \(.*\); move it away"):  # noqa: SIM117
        with Trials(tmp_path, "cpu", 1) as trials:
            trials.run(*grids)
    assert journal.read_bytes().startswith(before)  # nothing is lost
    journal.unlink()
    with Trials(tmp_path, "cpu", 1) as trials:
        assert trials.run(*grids) == whole


def test_a_journal_with_a_damaged_line_in_the_middle_is_named_and_kept(recipe, tmp_path, inline):
    with Trials(tmp_path, "cpu", 1) as trials:
        trials.run(some_grid(recipe))
    journal = tmp_path / "trials.log"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:3], lines[3][:9] + b"\n", *lines[4:]]))
    before = journal.read_bytes()
    with pytest.raises(BadInputError, match=r"trials\.log, line 4 is damaged"):
        Trials(tmp_path, "cpu", 1)
    assert journal.read_bytes() == before
    assert not journal.with_name("trials.log.torn").exists()


def test_a_run_in_a_process_of_its_own_is_that_of_this_one(recipe, tmp_path):
    short = dataclasses.replace(recipe, steps=4)
    with Trials(tmp_path, "cpu", 1) as trials:
        (results,) = trials.run(
            Grid("some", {"seed": (3,)}, lambda seed: ("adamw", dataclasses.replace(short, seed=seed)))
        )
    alone = train("adamw", dataclasses.replace(short, seed=3), Job(), tmp_path / "alone")
    # It has all cores: sums of some other order.
    assert results[3,].valid_loss == pytest.approx(alone.valid_loss, rel=1e-5)


@pytest.mark.parametrize(
    ("devices", "workers", "running"),
    [(["cpu"] * 2, 0, 2), (["cuda:0", "cuda:1"], 0, 8), (["cuda:0", "cuda:1"], 3, 3), (["mps"], 0, 1)],
)
def test_small_runs_share_a_gpu(devices, workers, running, tmp_path, monkeypatch):
    monkeypatch.setattr("ademamix.lab.experiments.trials._devices", lambda _: devices)
    with Trials(tmp_path, "auto", workers, per_gpu=4) as trials:
        assert trials.workers == running


def outcome(out: Path) -> list[str]:
    return json.loads((out / "outcome.json").read_text())["headlines"]


@pytest.mark.slow
def test_killed_and_stopped_it_goes_on_where_it_was(tiny, tmp_path):
    """SIGKILL, then SIGINT to the whole process group as a terminal sends it, then to the end; against one unbroken."""
    words = [*arguments("switch", tiny), "--steps", "300", "--eval-every", "100"]
    command = [sys.executable, "-m", "ademamix"]
    out, finished = tmp_path / "broken", "final/*/result.json"

    def begin(*more: str) -> "subprocess.Popen[str]":
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*command, *more], start_new_session=True, **pipes)

    def wait_for(count: int, process: "subprocess.Popen[str]") -> None:
        while len(list(out.glob(finished))) < count:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)

    process = begin(*words, "--out", str(out))
    wait_for(1, process)
    process.kill()
    process.communicate()
    process = begin("run", "switch", "--resume", str(out))
    wait_for(3, process)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, errors
    assert errors == f"ademamix: stopped\nresume with: python -m ademamix run switch --resume {out}\n"
    kept = {path: path.stat().st_mtime_ns for path in out.glob(finished)}
    process = begin("run", "switch", "--resume", str(out))
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    whole = begin(*words, "--out", str(tmp_path / "whole"))
    _, errors = whole.communicate(timeout=100)
    assert whole.returncode == 0, errors
    assert outcome(out) == outcome(tmp_path / "whole")


# --------------------------------------------------------------------------------- the pages


@pytest.fixture(scope="module")
def reports(tiny, once, tmp_path_factory) -> Path:
    """A folder of reports with every kind of picture, and their index."""
    from ademamix.lab import cli

    folder = tmp_path_factory.mktemp("reports")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ademamix.lab.experiments.workers.ProcessPoolExecutor", Inline)
        patch.setattr("ademamix.lab.experiments.trials._train", once)
        for name in ("sweep", "valley", "beyond"):
            patch.setattr(sys, "argv", ["ademamix", *arguments(name, tiny), "--out", str(folder / name)])
            cli.main()
        patch.setattr(sys, "argv", ["ademamix", "report", str(folder)])
        cli.main()
    return folder


def test_the_index_shows_every_claim_with_the_papers_figure_and_ours(reports):
    page = (reports / "index.html").read_text()
    assert all(html.escape(claim.paper) in page for claim in CLAIMS.values())
    for name in ("sweep", "valley", "beyond"):
        outcome = json.loads((reports / name / "outcome.json").read_text())
        assert all(html.escape(finding["ours"]) in page for finding in outcome["findings"])
        assert html.escape(outcome["headlines"][0]) in page
    assert "<code>ademamix run lm</code> tests it" in page
    assert page.count("<section class=claim>") == len(CLAIMS)


@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (390, "dark"),
        *(pytest.param(*s, marks=pytest.mark.slow) for s in ((390, "light"), (1280, "light"), (1280, "dark"))),
    ],
)
@pytest.mark.parametrize("page", ["sweep/report.html", "valley/report.html", "beyond/report.html", "index.html"])
def test_the_pages_open_without_errors_and_fit_the_screen(page, width, scheme, reports, browse):
    with browse(reports / page, width, scheme) as browser:
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        drawn = browser.execute_script("return document.querySelectorAll('.picture img').length > 0")
        assert drawn is (page != "index.html")
        ready = browser.execute_script("return document.querySelectorAll('.picture[tabindex] output').length > 0")
        assert ready is drawn
        whole = "Promise.all([...document.images].map(i => i.decode()))"
        browser.execute_script(f"return {whole}.then(() => true)")  # which raises an error for a broken image


def test_a_report_shows_the_settings_that_have_an_effect():
    def shown(settings, *decided):
        return {rows[0][0]: [row[0] for row in rows[1:]] for rows in settings_of(settings, *decided)}

    off = {"switch_at", "planned", "held_out", "insert", "settings"}
    plain = lm.PRESETS["cpu"]
    assert not {"seed", *off} & set(shown(plain)["Recipe"])
    assert {"batch", "clip", "steps"} <= set(shown(plain)["Recipe"])
    assert set(shown(plain)["Recipe"]) - set(shown(plain, "clip")["Recipe"]) == {"clip"}
    on = dataclasses.replace(plain.recipe, switch_at=5, planned=9000, held_out=(7,), settings={"geometry": "muon"})
    assert off <= set(shown(dataclasses.replace(plain, recipe=on))["Recipe"])
    assert not any(name.startswith("own") for name in shown(beyond.PRESETS["cpu"])["Beyond"])


def test_a_line_is_named_even_if_it_is_the_only_one_left():
    assert b">AdamW</text>" in svg("", [Chart("", "", "", [Line("AdamW", [1.0], [2.0])])], "light")


def test_every_module_is_one_experiment():
    for module in EXPERIMENTS.values():
        assert {"cpu", "gpu", "paper"} <= set(module.PRESETS) <= set(get_args(Preset))
        assert all(settings.preset == name for name, settings in module.PRESETS.items())
