import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
from reliability import losses, same, saved, until

from ademamix.lab.cli import PROGRAM, main
from ademamix.lab.config import Job, Recipe
from ademamix.lab.experiments.arms import Arm, _look, carry_out
from ademamix.lab.experiments.compare import Comparison, reached_at, report_of
from ademamix.lab.experiments.workers import Workers
from ademamix.lab.training.checkpoints import SaveError
from ademamix.lab.training.loop import Result, train

COMMAND = [sys.executable, "-m", "ademamix", "compare"]
NAMES = ("adamw", "ademamix")
RULE = Path(__file__).parents[2] / "data/runs/own.py"


def test_the_fraction_at_which_a_loss_was_first_reached():
    curve = [{"step": step, "valid_loss": loss} for step, loss in ((10, 3.0), (20, 2.0), (30, 2.2), (40, 1.0))]
    run = Result("adamw", 40, 0, 0.0, 1.0, 0.0, 0.0, 0, 0.0, 0, "", "", curve, [])
    assert reached_at(run, 2.5) == pytest.approx(15 / 40)
    assert reached_at(run, 1.6) == pytest.approx(35 / 40)
    assert reached_at(run, 3.5) == 10 / 40
    assert reached_at(run, 0.5) is None


def result(name: str, end: float, *, step_ms: float = 2.0, core_share: float | None = 0.99) -> Result:
    """A run of 100 steps of 10 tokens whose loss falls evenly from 3 to `end`."""
    curve = [
        {"step": step, "tokens": 10 * step, "valid_loss": 3 - (3 - end) * step / 100} for step in range(0, 101, 10)
    ]
    about = {"seen": 1000, "seconds": 1.0, "optimizer_ms": 0.5, "state_bytes_per_parameter": 8.0, "skipped_steps": 0}
    about |= {"clipped_share": 0.0, "parameters": 10, "initial_weights": "", "device": "cpu, 1 threads", "held_out": []}
    return Result(name, 100, valid_loss=end, curve=curve, step_ms=step_ms, core_share=core_share, **about)


def compared_to(other: Result, adamw: Result | None = None) -> Comparison:
    return Comparison(Recipe(), adamw or result("adamw", 2.0), other, None)


@pytest.mark.parametrize(
    ("end", "says_little"), [(1.0, False), (1.95, False), (1.97, True), (2.03, True), (2.05, False)]
)
def test_one_seed_is_said_to_be_one_and_a_difference_within_two_deviations_of_seeds_to_say_little(end, says_little):
    (line,) = [line for line in compared_to(result("ademamix", end)).headlines() if "one seed" in line]
    assert "about ±0.02" in line
    assert ("says little" in line) is says_little


def test_times_are_those_of_a_step_and_no_sum_of_seconds_is_shown():
    report = report_of(compared_to(result("ademamix", 1.5, step_ms=2.5)))
    assert "takes 1.25 times as long with AdEMAMix as with AdamW: 2.50 ms against 2.00 ms" in report.headlines[-1]
    assert not any("second" in text for p in report.pictures for text in (p.title, p.x_label))
    assert not any("second" in str(cell) for table in report.tables for row in table for cell in row)


@pytest.mark.parametrize(("shares", "busy"), [((0.99, 0.95), False), ((0.99, 0.6), True), ((0.5, 0.99), True)])
def test_a_machine_that_was_busy_is_named_with_the_shares(shares, busy):
    adamw, other = (result(name, 2.0, core_share=share) for name, share in zip(NAMES, shares, strict=True))
    report = report_of(compared_to(other, adamw))
    said = [line for line in report.headlines if "machine was busy" in line]
    assert len(said) == busy
    shown = tuple(f"{100 * share:.0f} %" for share in shares)
    assert all(" and ".join(shown) in line for line in said)
    assert ("time with a core of the CPU", *shown) in report.tables[0]


def test_on_an_accelerator_nothing_is_said_of_cores_and_of_two_devices_nothing_of_times():
    off_cpu = [dataclasses.replace(result(name, 2.0, core_share=None), device="mps") for name in NAMES]
    assert "core" not in str(report_of(compared_to(off_cpu[1], off_cpu[0])))
    lines = compared_to(off_cpu[1]).headlines()
    assert "on cpu, 1 threads, AdEMAMix on mps" in lines[-1]
    assert not any(" ms" in line for line in lines)


def test_the_curve_shows_adamws_final_loss_and_where_the_other_crosses_it():
    chart, *_ = report_of(compared_to(result("ademamix", 1.75))).pictures
    assert chart.reference == ((2.0, "AdamW's final loss"),)
    crossing_at = chart.lines[-1]
    assert "after 80.0 % of the budget" in crossing_at.name  # 3 - 1.25 x = 2
    assert (crossing_at.x, crossing_at.y, crossing_at.mode) == ([pytest.approx(800)], [2.0], "markers")
    above, *_ = report_of(compared_to(result("ademamix", 2.5))).pictures
    assert [line.name for line in above.lines] == ["AdamW", "AdEMAMix"]


class Shown:
    """What was shown of a run."""

    def __init__(self) -> None:
        self.updates = []

    def update(self, *values, rate):
        self.updates.append((*values, rate))


def test_progress_is_read_from_whatever_a_worker_has_written_by_then(tmp_path):
    arm, shown, file = Arm("some", "adamw", Recipe(), tmp_path), Shown(), tmp_path / "metrics.jsonl"
    for text in (
        "",
        "no JSON\n",
        "[1]\n",
        '{"step": "x"}\n',
        "[" * 9999 + "\n",
        '{"step": 1, "loss": 1.0, "seconds": 0}\n',
    ):
        file.write_text(text)
        _look(arm, shown)
    file.unlink()
    _look(arm, shown)
    assert shown.updates == []
    line = '{"step": %d, "loss": 2.0, "seconds": 4.0}\n'
    file.write_text(line % 10 + '{"step": 10, "seconds": 4.0, "valid_loss": 3.0}\n' + line % 20 + '{"step": 30, "lo')
    _look(arm, shown)
    assert shown.updates == [(20, 2.0, 3.0, 5.0)]
    file.write_text("x" * 10**6 + "\n" + line % 5000)  # the last step: its validation loss may not be there yet
    _look(arm, shown)
    assert len(shown.updates) == 1
    _look(arm, shown, finished=True)
    assert shown.updates[1:] == [(5000, 2.0, None, 1250.0)]


class Inline:
    """In the place of a pool of processes, for speed: runs in this one, one after the other."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def submit(self, function, *args):
        future = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, **kwargs: object) -> None:
        pass


@pytest.fixture(scope="module")
def inline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ademamix.lab.experiments.workers.ProcessPoolExecutor", Inline)
        yield


@pytest.fixture(scope="module")
def compared(inline, tiny, tmp_path_factory) -> Path:
    """The folder of a comparison, and then of one resumed with --match."""
    out = tmp_path_factory.mktemp("compare") / "out"
    with pytest.MonkeyPatch.context() as patch:
        for words in ((*tiny, "--device", "cpu", "--out", out), ("--resume", out, "--match", "--match-cap", "1.25")):
            before = {path: path.stat().st_mtime_ns for path in out.glob("*/result.json")}
            patch.setattr(sys, "argv", ["ademamix", "compare", *map(str, words)])
            main()
            assert {path: path.stat().st_mtime_ns for path in before} == before
    return out


def test_both_runs_start_from_the_same_weights_and_the_results_are_those_of_the_runs(compared):
    results = json.loads((compared / "results.json").read_text())
    for name in NAMES:
        assert results[name] == json.loads((compared / name / "result.json").read_text())
        assert [point["step"] for point in results[name]["curve"]] == [5, 10, 15, 20]
        assert results[name]["step_ms"] > results[name]["optimizer_ms"] > 0
        assert 0 < results[name]["core_share"] <= 1.1  # the two clocks are not read at the same moment
    assert results["adamw"]["initial_weights"] == results["ademamix"]["initial_weights"]
    assert len(json.loads((compared / "outcome.json").read_text())["commands"]) == 2
    assert all(b"</svg>" in (compared / f"pictures-{scheme}.svg").read_bytes() for scheme in ("light", "dark"))
    assert "This is one seed" in (compared / "report.md").read_text()


@pytest.mark.parametrize(("lr", "name"), [("--adamw.lr", "adamw"), ("--ademamix.lr", "ademamix")])
def test_an_arm_that_diverges_is_named(lr, name, cli, inline, tiny, capsys):
    assert cli("compare", *tiny, "--device", "cpu", lr, "3.402e38", "--warmup", "1", "--out", "out") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"with {name} at lr" in line
    assert "a smaller learning rate may help" in line


def test_a_killed_worker_is_named_with_how_to_resume(cli, inline, tiny, capsys, monkeypatch):
    def gone(*_):
        raise BrokenProcessPool

    monkeypatch.setattr("ademamix.lab.experiments.arms.train_here", gone)
    assert cli("compare", *tiny, "--device", "cpu", "--out", "out") == 1
    errors = capsys.readouterr().err
    assert f"was killed, perhaps because memory ran out\nresume with: {PROGRAM} compare --resume out\n" in errors


@pytest.mark.parametrize("failure", [SaveError("no space"), OSError(28, "No space left on device")])
def test_a_run_that_a_stop_could_not_save_is_reported(failure, inline):
    def fail():
        raise failure

    def stopped():
        with Workers(["cpu"], 1) as workers:
            workers.submit(fail)
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(type(failure), match="space"):
        stopped()


def test_off_the_cpu_the_runs_come_one_after_the_other_in_this_process(monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr("ademamix.lab.experiments.arms.side_by_side", lambda device: False)
    monkeypatch.setattr("ademamix.lab.experiments.arms.Workers", None)
    monkeypatch.setattr(
        "ademamix.lab.experiments.arms.train", lambda name, recipe, job, out, label: ran.append((name, label)) or name
    )
    arms = [Arm(f"the {name}", name, Recipe(), tmp_path / name) for name in NAMES]
    assert carry_out(arms, Job()) == list(NAMES)
    assert ran == [("adamw", "the adamw"), ("ademamix", "the ademamix")]


def test_match_trains_adamw_on_full_schedules_until_it_is_there(compared):
    results = json.loads((compared / "results.json").read_text())
    trials = results["matched"]["trials"]
    if results["adamw"]["valid_loss"] <= results["ademamix"]["valid_loss"]:
        assert trials == [[1.0, results["adamw"]["valid_loss"]]]
    else:
        longer = json.loads((compared / "adamw-1.25x" / "result.json").read_text())
        assert longer["steps"] == 25
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
        assert page.execute_script("return document.querySelectorAll('.picture[tabindex] img').length") == 2
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        assert page.execute_script("return getComputedStyle(document.body).backgroundColor") == (
            "rgb(255, 255, 255)" if scheme == "light" else "rgb(13, 17, 23)"
        )


# --------------------------------------------------------------------------------- processes


@pytest.fixture(scope="module")
def recipe(tokens) -> Recipe:
    small = {"layers": 1, "width": 16, "context": 16, "batch": 4, "steps": 2000, "warmup": 2}
    return dataclasses.replace(Recipe(), data=str(tokens), eval_every=1000, eval_sequences=8, **small)


def words(recipe: Recipe, *more: str) -> list[str]:
    numbers = ("layers", "width", "context", "batch", "steps", "warmup", "eval_every", "eval_sequences")
    settings = [word for name in numbers for word in (f"--{name.replace('_', '-')}", str(getattr(recipe, name)))]
    return [*COMMAND, "--data", recipe.data, *settings, "--device", "cpu", "--log-every", "1", *more]


def begin(command: list[str]) -> "subprocess.Popen[str]":
    """Start a command as a terminal does, in a group of its own, with two threads for whoever does not ask for one."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "2"}, **pipes)


def under_way(out: Path, process: "subprocess.Popen[str]") -> None:
    """Wait until both arms have logged a few more steps."""

    def sizes() -> list[int]:
        return [sum(log.stat().st_size for log in (out / name).glob("metrics.jsonl")) for name in NAMES]

    goal = [size + 2000 for size in sizes()]
    assert until(lambda: all(map(int.__gt__, sizes(), goal)), lambda: process.poll() is None), process.communicate()


@pytest.mark.slow
def test_both_run_at_once_ctrl_c_saves_both_and_resumed_they_are_bit_for_bit_those_of_train(recipe, tmp_path):
    out = tmp_path / "out"
    process = begin(words(recipe, "--save-every", "10000", "--out", str(out)))
    under_way(out, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers as well
    printed, errors = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGINT, errors
    assert errors == f"ademamix: stopped\nresume with: python -m ademamix compare --resume {out}\n"
    for name in NAMES:  # at the same time: neither was at its end when the other had begun
        (checkpoint,) = saved(out / name)
        assert checkpoint.name == f"step-{len(losses(out / name)):08}"
        assert 0 < len(losses(out / name)) < recipe.steps
    going_on = begin([*COMMAND, "--resume", str(out)])
    under_way(out, going_on)
    going_on.terminate()  # this time only to the parent
    _, errors = going_on.communicate(timeout=100)
    assert going_on.returncode == 128 + signal.SIGTERM, errors
    killed = begin([*COMMAND, "--resume", str(out)])
    under_way(out, killed)
    killed.kill()  # its workers end with it
    killed.communicate(timeout=100)
    at_last = begin([*COMMAND, "--resume", str(out)])
    printed, errors = at_last.communicate(timeout=100)
    assert at_last.returncode == 0, errors
    assert printed.count(" resumes from step ") == len(NAMES)
    assert all(f"{label} step 2,000 of 2,000" in " ".join(printed.split()) for label in ("AdamW", "AdEMAMix"))
    for name in NAMES:
        assert json.loads((out / name / "result.json").read_text())["device"] == "cpu, 1 threads"
        train(name, recipe, Job(device="cpu", log_every=1), tmp_path / name, quiet=True)
        assert same(tmp_path / name, out / name)


@pytest.mark.slow
def test_when_one_diverges_the_other_is_saved(recipe, tmp_path):
    """AdEMAMix takes over from AdamW after 1,000 steps, by which time the other run is under way too."""
    out = tmp_path / "out"
    longer = dataclasses.replace(recipe, steps=100_000, eval_every=100_000)
    late = ("--switch-at", "1000", "--ademamix.lr", "1e10", "--ademamix.weight-decay", "1e38", "--save-every", "100000")
    process = begin(words(longer, *late, "--out", str(out)))
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 1, errors
    (line,) = errors.splitlines()
    assert "with ademamix at lr" in line
    assert [path.name for path in saved(out / "adamw")] == [f"step-{len(losses(out / 'adamw')):08}"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files there")
def test_a_full_disk_is_reported_once_with_how_to_go_on(recipe, tmp_path):
    import resource

    out = tmp_path / "out"
    command = words(recipe, "--save-every", "20", "--out", str(out))
    process = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, 16_000)),
        timeout=100,
    )
    assert process.returncode == 1, process.stderr
    assert "could not be written (File too large)" in process.stderr
    assert f"--resume {out}" in process.stderr


@pytest.mark.slow
def test_a_rule_of_ones_own_is_found_from_the_folder_in_which_the_command_is_given(cli, tiny):
    """In a process that went there after its start, as this one."""
    shutil.copy(RULE, "own.py")
    assert cli("compare", *tiny, "--device", "cpu", "--optimizer", "own.py:lion", "--out", "out") == 0
    assert {path.parent.name for path in Path("out").glob("*/result.json")} == {"adamw", "own-lion"}
