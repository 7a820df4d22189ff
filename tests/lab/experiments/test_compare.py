import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ademamix.lab.experiments.compare import crossing, reached_at
from ademamix.lab.training.loop import Result


def test_the_crossing_is_linear_in_the_logarithm_of_the_budget():
    trials = [(1.0, 1.5), (1.25, 1.3), (2.0, 1.1)]
    assert crossing(trials, 1.1) == pytest.approx(2.0)
    assert crossing(trials, 1.2) == pytest.approx(math.sqrt(1.25 * 2.0))
    assert crossing(trials, 1.0) is None
    assert crossing([*trials, (3.0, 1.2)], 1.1) == pytest.approx(2.0)  # the first time counts
    assert crossing([(1.0, 1.5)], 1.6) == 1.0


def test_the_fraction_at_which_a_loss_was_first_reached():
    curve = [{"step": step, "valid_loss": loss} for step, loss in ((10, 3.0), (20, 2.0), (30, 2.2), (40, 1.0))]
    run = Result("adamw", 40, 0, 0.0, 1.0, 0.0, 0.0, 0, 0, "", "", curve, [])
    assert reached_at(run, 2.5) == pytest.approx(15 / 40)
    assert reached_at(run, 1.6) == pytest.approx(35 / 40)
    assert reached_at(run, 3.5) == 10 / 40
    assert reached_at(run, 0.5) is None


@pytest.fixture(scope="module")
def compared(tiny, tmp_path_factory) -> Path:
    """The folder of a comparison that was killed in its second run and resumed with --match."""
    out = tmp_path_factory.mktemp("compare") / "out"
    command = [sys.executable, "-m", "ademamix", "compare"]
    longer = [*tiny, "--steps", "600", "--save-every", "20", "--eval-every", "60"]
    process = subprocess.Popen([*command, *longer, "--out", str(out)], stdout=subprocess.DEVNULL)
    while not list((out / "ademamix" / "checkpoints").glob("step-*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (out / "report.html").exists()
    before = (out / "adamw" / "result.json").stat().st_mtime_ns
    resumed = [*command, "--resume", str(out), "--match", "--match-cap", "1.25"]
    done = subprocess.run(resumed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (out / "adamw" / "result.json").stat().st_mtime_ns == before
    assert done.stdout.startswith("Trains one small language model twice")
    assert "final validation loss" in done.stdout
    assert done.stdout.endswith(f"report: {out / 'report.html'}\n")
    return out


def test_both_runs_start_from_the_same_weights_and_the_results_are_those_of_the_runs(compared):
    results = json.loads((compared / "results.json").read_text())
    for name in ("adamw", "ademamix"):
        assert results[name] == json.loads((compared / name / "result.json").read_text())
        assert [point["step"] for point in results[name]["curve"]] == list(range(60, 601, 60))
    assert results["adamw"]["initial_weights"] == results["ademamix"]["initial_weights"]
    assert len(json.loads((compared / "outcome.json").read_text())["commands"]) == 2
    assert all(b"</svg>" in (compared / f"pictures-{scheme}.svg").read_bytes() for scheme in ("light", "dark"))


def test_match_trains_adamw_on_full_schedules_until_it_is_there(compared):
    results = json.loads((compared / "results.json").read_text())
    trials = results["matched"]["trials"]
    if results["adamw"]["valid_loss"] <= results["ademamix"]["valid_loss"]:
        assert trials == [[1.0, results["adamw"]["valid_loss"]]]
    else:
        longer = json.loads((compared / "adamw-1.25x" / "result.json").read_text())
        assert longer["steps"] == 750
        assert trials[1] == [1.25, longer["valid_loss"]]


@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (1280, "light"),
        (390, "dark"),
        *(pytest.param(*s, marks=pytest.mark.slow) for s in ((1280, "dark"), (390, "light"))),
    ],
)
def test_the_report_opens_without_errors_and_fits_the_screen(compared, browse, width, scheme):
    with browse(compared / "report.html", width, scheme) as page:
        assert page.execute_script("return document.querySelectorAll('.picture .scatterlayer .trace').length") == 6
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        assert page.execute_script("return getComputedStyle(document.body).backgroundColor") == (
            "rgb(255, 255, 255)" if scheme == "light" else "rgb(13, 17, 23)"
        )
