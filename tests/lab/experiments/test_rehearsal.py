"""A dry run: what it lists, what it says of the time, and that it trains no more than its probes and leaves nothing."""

import dataclasses
import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ademamix.lab.config import ImageRecipe, Job, to_json
from ademamix.lab.experiments import EXPERIMENTS, lm, rehearsal, trials, workers
from ademamix.lab.experiments.rehearsal import PROBE, Planned, Rehearsal
from ademamix.lab.experiments.trials import Grid
from ademamix.lab.training.loop import RESULT, Result, train

STEP, OPTIMIZER = 0.016, 0.004  # seconds of a faked probe
SWITCH = ("--seeds", "0", "1", "--after", "0.5")


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """All runs in this process: starting others takes seconds."""
    monkeypatch.setattr(workers, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    monkeypatch.setattr("ademamix.lab.data.images.VALID_GLYPHS", 30)
    # What takes seconds and is not looked at here: reports, and a picture in one that a dry run throws away.
    monkeypatch.setattr("ademamix.lab.reports.report.write", lambda *_: None)
    monkeypatch.setattr("ademamix.lab.experiments.beyond.memory", lambda _, __, ___, ages: [1.0] * len(ages))


@pytest.fixture
def probes(monkeypatch):
    """Fake all runs; what they were."""
    ran = []

    def fake(optimizer, recipe, out):
        ran.append((optimizer, recipe))
        # The first steps are slow, as kernels are compiled in them.
        times = {n: 60.0 + STEP * n for n in range(recipe.eval_every, recipe.steps + 1, recipe.eval_every)}
        curve = [{"step": n, recipe.unit: n, "seconds": t, "valid_loss": 3.0} for n, t in times.items()]
        result = Result(optimizer, recipe.steps, 0, 1.0, 3.0, 1e3 * OPTIMIZER, 1.0, 0, 0.0, 1, "", "", curve, [])
        out.mkdir(parents=True)
        to_json(out / RESULT, dataclasses.asdict(result))
        return 3.0

    monkeypatch.setattr(trials, "_train", fake)
    return ran


@pytest.fixture
def small(tiny):
    """Words for an experiment on text with its own number of steps, on a tiny model."""
    kept = {key: value for key, value in zip(tiny[::2], tiny[1::2], strict=True) if key in ("--data", "--width")}
    return tuple(word for pair in kept.items() for word in pair)


@pytest.fixture
def short(tiny):
    """Words for an experiment on text whose runs take a fraction of a second."""
    pairs = zip(tiny[::2], tiny[1::2], strict=True)
    return tuple(word for pair in pairs if pair[0] not in ("--log-every", "--save-every") for word in pair)


def there() -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in Path().rglob("*") if "cache" not in path.parts}


def counts(said: str) -> dict[str, int]:
    """The numbers of runs in the table, by grid."""
    return {name: int(count) for name, count in re.findall(r"^│ (\S+) +│ (\d+)", said, re.MULTILINE)}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_dry_run_probes_each_kind_of_run_once_and_leaves_nothing(name, cli, probes, small, capsys):
    own = {"valley": (), "vit": ("--images", "20", "40", "--examples", "40")}.get(name, small)
    assert cli("run", name, *own, "--workers", "2", "--dry-run") == 0
    assert there() == {}
    assert {recipe.steps for _, recipe in probes} <= {PROBE}
    *_, last = capsys.readouterr().out.splitlines()
    if name == "valley":
        assert last == "valley has no runs: it trains no model"
        assert not probes
        return
    assert re.fullmatch(
        r"\d+ runs, about .* (s|min) with 2 workers on this machine \(from 50-step .* machine is slower\)", last
    )
    kinds = {Planned(*probe).kind for probe in probes}
    assert len(probes) == max(2, len(kinds))  # no worker idles


LISTED = {  # with their own words: the grids of some wait for the results of others
    "lm": ("--budgets", "1.5"),
    "switch": (),
    "sweep": ("--alpha", "2", "8"),
    "horizon": ("--lengths", "40", "80"),
    "mamba": ("--tuning.adamw-lr", "0.01", "--tuning.ademamix-lr", "0.01"),
}


@pytest.mark.parametrize("name", LISTED)
def test_it_lists_the_runs_that_are_trained(name, cli, probes, short, capsys):
    words = ("run", name, *short, "--seeds", "0", "1", *LISTED[name])
    assert cli(*words, "--dry-run") == 0
    said = capsys.readouterr().out
    probes.clear()
    assert cli(*words, "--out", "out") == 0
    trained = [path.parent.parent.name for path in Path().rglob(RESULT)]
    assert len(trained) == len(probes)
    assert counts(said) == {name: trained.count(name) for name in trained}
    assert f"\n{len(trained)} runs, about " in said


def test_no_step_is_trained_but_those_of_the_probes(cli, short, monkeypatch, capsys):
    ran = []

    def counted(name, recipe, job, out):
        ran.append((name, recipe.steps))
        return train(name, recipe, job, out, quiet=True)

    monkeypatch.setattr(trials, "train_here", counted)
    assert cli("run", "switch", *short, *SWITCH, "--workers", "1", "--out", "out", "--dry-run") == 0
    assert sorted(ran) == [("adamw", PROBE), ("ademamix", PROBE)]
    assert "6 runs, about " in capsys.readouterr().out
    assert there() == {}


# One after another, or in two rounds.
@pytest.mark.parametrize(("workers", "said"), [("1", "7 min with 1 worker on"), ("4", "2 min with 4 workers on")])
def test_the_time_is_that_of_steps_and_of_looks_at_the_validation_set(workers, said, cli, probes, small, capsys):
    # 6 runs of 4,000 steps; 20 looks at 256 sequences, 4 at a time, a third of (step - optimizer) each.
    of_one = 4000 * STEP + 20 * 64 * (STEP - OPTIMIZER) / 3
    assert of_one == pytest.approx(69.12)
    assert cli("run", "switch", *small, *SWITCH, "--workers", workers, "--dry-run") == 0
    out = capsys.readouterr().out
    assert re.search(r"│ final │ 6 +│ 4,000 +│ 1,024,000 +│ 69 +│ 6.9 +│", out)
    assert f"6 runs, about {said} this machine" in out


def test_runs_that_wait_for_others_are_not_counted_as_parallel():
    assert rehearsal._together([3.0, 2.0, 2.0, 1.0], 2) == 4.0
    assert rehearsal._together([3.0], 8) == 3.0
    assert rehearsal._together([], 2) == 0.0


@pytest.mark.parametrize(
    ("seconds", "said"), [(1.4, "1 s"), (89.4, "89 s"), (90, "2 min"), (5369, "89 min"), (6590, "1 h 50 min")]
)
def test_a_duration_for_people(seconds, said):
    assert rehearsal._duration(seconds) == said


def test_runs_are_of_one_kind_if_only_numbers_differ_that_cost_nothing():
    recipe = lm.small()

    def kind(optimizer="ademamix", **changes):
        return Planned(optimizer, dataclasses.replace(recipe, **changes)).kind

    ademamix, adamw = recipe.ademamix, recipe.adamw
    same = [
        {"steps": 9000, "warmup": 7, "eval_every": 3, "seed": 4, "switch_at": 50, "held_out": (5,), "insert": False},
        {"ademamix": dataclasses.replace(ademamix, lr=0.5, alpha=1.0, beta3=0.9, warmup=0.0), "planned": 70},
        {"adamw": dataclasses.replace(adamw, state="bfloat16")},
    ]
    other = [
        {"batch": 8},
        {"accumulate": 2},
        {"dtype": "bfloat16"},
        {"architecture": "mamba"},
        {"context": 32},
        {"width": 128},
        {"layers": 3},
        {"ademamix": dataclasses.replace(ademamix, state="compact")},
        {"ademamix": dataclasses.replace(ademamix, beta1=0.0)},
        {"settings": {"geometry": "muon"}},
        {"settings": {"geometry": "muon", "ns_steps": 3}},
    ]
    assert {kind(**changes) for changes in same} == {kind()}
    kinds = [kind(), kind("adamw"), *(kind(**changes) for changes in other)]
    assert len(set(kinds)) == len(kinds)
    kema = [{"lr": 1e-3, "longest": "0.3T"}, {"lr": 2e-3, "longest": "0.5T"}, {"lr": 1e-3, "count": 5}]
    one, two, more = (kind("kema", settings=settings) for settings in kema)
    assert one == two != more
    images = [Planned("adamw", ImageRecipe(examples=n)).kind for n in (100, 200)]
    assert images[0] == images[1]


@pytest.fixture
def recipe(tokens):
    tiny = {"layers": 1, "width": 16, "context": 16, "batch": 4, "steps": 23, "warmup": 2, "eval_every": 5}
    return dataclasses.replace(lm.small(), data=str(tokens), eval_sequences=8, held_out=(1, 9, 20), **tiny)


def test_made_up_results_have_the_form_of_real_ones(recipe, tmp_path):
    real = train("adamw", recipe, Job(), tmp_path / "real", quiet=True)
    grid = Grid("final", {"seed": (0, 1)}, lambda seed: ("adamw", dataclasses.replace(recipe, seed=seed)))
    ((made, other),) = (results.values() for results in Rehearsal(None).run(grid))
    assert [point.keys() for point in made.curve] == [point.keys() for point in real.curve]
    assert [(point["step"], point["tokens"]) for point in made.curve] == [
        (point["step"], point["tokens"]) for point in real.curve
    ]
    assert [list(losses) for losses in made.held_out] == [list(losses) for losses in real.held_out]
    assert (made.steps, made.seen) == (real.steps, real.seen)
    assert made.valid_loss == made.curve[-1]["valid_loss"] != other.valid_loss
    to_json(tmp_path / RESULT, dataclasses.asdict(made))
    assert Result.read(tmp_path) == made


def test_runs_that_are_finished_are_not_counted_in_the_time(cli, short, probes, capsys):
    assert cli("run", "switch", *short, *SWITCH, "--out", "out") == 0
    Path("out/final/after_0-seed_0", RESULT).unlink()
    probes.clear()
    before = there()
    capsys.readouterr()
    assert cli("run", "switch", "--resume", "out", "--workers", "1", "--dry-run") == 0
    assert there() == before
    assert [name for name, _ in probes] == ["ademamix"]
    said = capsys.readouterr().out
    assert "│ 6, 1 left │" in said
    assert "6 runs, 5 of them finished, about 0 s with 1 worker" in said


def test_nothing_is_probed_if_every_run_is_finished(cli, short, probes, capsys):
    assert cli("run", "switch", *short, *SWITCH, "--out", "out") == 0
    probes.clear()
    assert cli("run", "switch", "--resume", "out", "--dry-run") == 0
    assert capsys.readouterr().out.endswith("\n6 runs, 6 of them finished\n")
    assert not probes


def test_a_dry_run_is_no_setting_of_the_run(cli, short, probes):
    assert cli("run", "switch", *short, *SWITCH, "--out", "out") == 0
    assert "dry_run" not in json.loads(Path("out/config.json").read_text())["job"]
    assert cli("run", "switch", "--resume", "out", "--dry-run") == 0
    assert cli("run", "switch", "--resume", "out") == 0
    assert len(json.loads(Path("out/config.json").read_text())["typed"]) == 2


BAD = {
    "nowhere is not a token folder": ("--data", "nowhere"),
    "out already exists": ("--out", "out"),
    "cannot use the device abacus": ("--device", "abacus"),
    "nothing to resume in nowhere": ("--resume", "nowhere"),
    "old is a run with other settings: seeds": ("--resume", "old", "--seeds", "5"),
    "old was made by `ademamix run switch`, not by": (),
}


@pytest.mark.parametrize("message", BAD)
def test_what_would_end_the_run_ends_the_dry_run(message, cli, probes, short, capsys):
    Path("out").mkdir()
    assert cli("run", "switch", *short, *SWITCH, "--out", "old") == 0
    probes.clear()
    capsys.readouterr()
    before = there()
    words = ("switch", *BAD[message]) if BAD[message] else ("sweep", *short, "--resume", "old")
    assert cli("run", *words, "--dry-run") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert there() == before
    assert not probes


def test_a_probe_that_diverges_is_named(cli, short, monkeypatch, capsys):
    monkeypatch.setattr(trials, "_train", lambda *_: math.inf)
    assert cli("run", "switch", *short, *SWITCH, "--dry-run") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"ademamix: a probe of adam\w+ diverged within 50 steps: try smaller learning rates", line)
