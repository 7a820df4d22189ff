"""benchmarks/gpu where it may go wrong unseen on a machine without a GPU; time on one that has it is short."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import step
import torch
from gpu import __main__ as parts
from gpu import driver as driving
from gpu import lab, report
from gpu.driver import Driver, Outcome, Part
from gpu.summary import summary

ROOT = Path(__file__).parents[2]
HANGS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
with open({page!r}, "a") as page:
    print("| a row |", file=page, flush=True)
    time.sleep(600)
"""


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.fixture
def drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Driver]:
    monkeypatch.setattr(driving, "LEAST", 0.2)
    work = tmp_path / "work"
    work.mkdir()
    return lambda seconds: Driver(seconds, tmp_path / "log.txt", work, dict(os.environ), lambda: None)


def test_a_part_that_hangs_is_killed_with_all_it_started_and_the_next_one_runs(
    drive: Callable[[float], Driver], tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    driver = drive(60.0)
    driver.start(Part("background", python(HANGS.format(page=str(page))), 1.5))
    assert not driver.run(Part("hangs", python(HANGS.format(page=str(page))), 1.5))
    assert not driver.run(Part("fails", python("raise SystemExit('on purpose')"), 30.0))
    assert driver.run(Part("next", python("print('here')"), 30.0))
    driver.wait()
    ends = {outcome.name: outcome.end for outcome in driver.outcomes}
    killed = "killed at its limit of 2 s"
    assert ends == {"hangs": killed, "fails": "failed, exit code 1", "next": "ended", "background": killed}
    assert page.read_text() == "| a row |\n" * 2
    log = (tmp_path / "log.txt").read_text()
    assert "on purpose" in log
    assert "here" in log
    pids = [int((tmp_path / "work" / f"{name}.log").read_text()) for name in ("hangs", "background")]
    assert not any(map(alive, pids))


def test_parts_have_the_time_that_is_left_and_none_is_started_without(drive: Callable[[float], Driver]) -> None:
    driver = drive(6.0)
    driver.kept = 5.0
    assert not driver.run(Part("long", python("import time; time.sleep(600)"), 300.0))
    assert not driver.run(Part("late", python("print()"), 300.0))
    assert [outcome.end for outcome in driver.outcomes] == ["killed at its limit of 1 s", "not run: no time left"]
    driver.kept = 0.0
    assert driver.run(Part("kept for", python("print()"), 300.0))


def test_the_summary_comes_when_everything_is_stopped(tmp_path: Path) -> None:
    code = f"""
import sys
from gpu import __main__ as parts
from gpu.driver import Part
def run(driver, *_):
    driver.run(Part("quick", [sys.executable, "-c", ""], 60))
    driver.start(Part("background", [sys.executable, "-c", "import time; time.sleep(600)"], 600))
    driver.run(Part("long", [sys.executable, "-c", {HANGS.format(page=str(tmp_path / "page.md"))!r}], 600))
parts.run = run
parts.main()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks"), "DEVICE": "cpu", "OUT": str(tmp_path / "out")}
    process = subprocess.Popen(python(code), env=environment, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "page.md").exists():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)  # the part may have been faster than the one that starts it
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    text = (tmp_path / "out" / "summary.md").read_text()
    assert "| quick | ended |" in text
    assert "| long | stopped |" in text
    assert "| background | stopped |" in text
    assert text in said
    assert len(os.listdir(tmp_path / "out")) <= 8


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_nothing_runs_beside_what_is_timed(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Recorder:
        left = 570.0

        def __init__(self) -> None:
            self.calls: list[tuple[str, str]] = []

        def run(self, part: Part) -> bool:
            self.calls.append(("run", part.name))
            return True

        def start(self, part: Part) -> None:
            self.calls.append(("start", part.name))

        def skip(self, name: str, reason: str) -> None:
            assert reason

        def wait(self) -> None:
            self.calls.append(("wait", ""))

    monkeypatch.setattr(lab, "missing", lambda which, wheels: [])
    recorder: Any = Recorder()
    parts.run(recorder, tmp_path, tmp_path, tmp_path, device)
    at = recorder.calls.index(("wait", ""))
    before, after = [{name for _, name in calls} for calls in (recorder.calls[:at], recorder.calls[at:])]
    assert {"smoke", "tests", "correct: exact", "lm"} <= before
    assert {"step", "muon", "sweep", "train"} <= after
    assert all(kind != "start" for kind, _ in recorder.calls[at:])


def test_goals_are_beside_what_was_measured(tmp_path: Path) -> None:
    figures = {
        step.OURS: step.Figures(to_fused=1.30, of_copy=0.912, launches=2),
        step.OURS_COMPACT: step.Figures(to_fused=0.55, of_copy=0.8, launches=2),
    }
    (tmp_path / "step-gpu.md").write_text("\n".join(["# A step", "", *step.goals(figures), "", "### More", "no goal"]))
    (tmp_path / "gpu-correct.md").write_text(
        "| check | verdict | what | time |\n|---|--:|--:|--:|\n"
        "| a | ok | fine | 0.1 s |\n| b | **FAILED** | ValueError: no | 0.2 s |\n"
    )
    (tmp_path / "tests.txt").write_text(
        "tests/test_a.py::test_one PASSED [ 50%]\n[gw0] [100%] FAILED tests/test_a.py::test_two\n"
        "FAILED tests/test_a.py::test_two - assert 1 == 2\n"
    )
    text = summary(tmp_path, [Outcome("step", "ended", 12.0)], tmp_path / "none")
    goals = [line.split(" | ")[2:] for line in text.splitlines() if "at least" in line or "at most" in line]
    assert goals == [["0.912", "yes |"], ["1.3", "**no** |"], ["0.55", "yes |"], ["2", "yes |"]]
    assert "1 ok, 1 FAILED" in text
    assert "- b: ValueError: no" in text
    assert "1 passed, 1 failed" in text
    assert "no goal" not in text
    assert [line.count("not measured") for line in step.goals({})] == [0] * 4 + [1] * 4


def test_a_check_that_fails_is_a_row_like_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "OUT", tmp_path)
    monkeypatch.setattr(report, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(report, "CUDA", False)
    page = report.Page("page.md", "Checks", "About them.")
    checks: dict[str, Any] = {"right": lambda: "fine", "wrong": lambda: (False, "off"), "raises": lambda: 1 / 0}
    assert [report.check(page, name, act) for name, act in checks.items()] == ["ok", "**FAILED**", "**FAILED**"]
    monkeypatch.setattr(report, "ENDS", 0.0)
    assert report.check(report.Page("page.md", "Checks", "About them."), "late", checks["right"]) == "not run"
    rows = [line for line in page.path.read_text().splitlines() if line.startswith("|")]
    assert [row.split(" | ")[:3] for row in rows] == [
        ["| right", "ok", "fine"],
        ["| wrong", "**FAILED**", "off"],
        ["| raises", "**FAILED**", "ZeroDivisionError: division by zero"],
        ["| late", "not run", "no time left"],
    ]
    assert page.path.read_text().count("# Checks") == 1


def test_the_lab_s_page_has_what_there_is(tmp_path: Path) -> None:
    page, result = tmp_path / "lm-gpu.md", tmp_path / "result.json"
    lab.lm_page(page, tmp_path / "report.md")
    assert "did not come to its end" in page.read_text()
    (tmp_path / "report.md").write_text(f"# AdamW\n\n<picture>...</picture>\n\n    ademamix run lm --out {tmp_path}\n")
    lab.lm_page(page, tmp_path / "report.md")
    assert page.read_text() == "# AdamW\n\n\n    ademamix run lm --out FOLDER\n"
    assert "did not come to its end" in lab.train_rows("cuda", result)
    result.write_text(json.dumps({"seen": 1000, "seconds": 0.5, "optimizer_ms": 1.234, "valid_loss": 2.0}))
    assert "| tokens per second | 2,000 |" in lab.train_rows("cuda", result)


def test_tests_for_a_gpu_are_found_in_all_rooms() -> None:
    assert {"tests/engine/test_offload.py", "tests/backends/test_triton.py"} <= set(parts.with_tests())
