"""Files of code: run where the command line names them, never because a run's folder does."""

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ademamix.lab.cli import PROGRAM
from ademamix.lab.training.loop import _Run
from ademamix.lab.training.optimizers import pinned

CODE = """
from pathlib import Path
Path("ran").touch()

def rule(p, g, *, lr=0.1):
    return (p - lr * g,)
"""


@pytest.fixture
def planted(cli, tiny, capsys) -> Path:
    """A finished run, and a stranger's code next to it, in a file that need not be called .py."""
    assert cli("train", *tiny, "--out", "run") == 0
    Path("code.txt").write_text(f"{CODE}# {Path.cwd()}")  # the same text is run once per process
    capsys.readouterr()
    return Path("run")


def changed(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip()


@pytest.mark.parametrize("name", ["code.txt:rule", "code.txt:rule@0123abcd", "../{}/code.txt:rule"])
@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_resumed_folder_runs_no_code_that_it_alone_names(command, name, planted, cli, capsys):
    name = name.format(Path.cwd().name)
    changed(planted / "config.json", lambda config: config.update(command=command, optimizer=name))
    assert cli(command, "--resume", "run") == 2
    assert not Path("ran").exists()
    line = refusal(capsys)
    plain = name.partition("@")[0]
    typed = f"{PROGRAM} {command} --resume run --optimizer {plain}"
    file = plain.rpartition(":")[0]
    said = f"ademamix: the run's folder names the code in {file}, which is not run unless you name it"
    assert line == f"{said}\nif you trust it: {typed}"
    assert (
        cli(*shlex.split(typed.removeprefix(PROGRAM))) == 2
    )  # its digest, or its settings, are others; but now it is asked for
    assert Path("ran").exists()


@pytest.mark.parametrize("where", ["own", "entries.kema.optimizer", "entries.adamw.optimizer"])
def test_an_experiment_runs_no_code_that_its_folder_alone_names(where, planted, cli, tiny, capsys, monkeypatch):
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ademamix.lab.experiments.trials.Trials.run", stopped)
    assert cli("run", "beyond", "--data", tiny[1], "--out", "out") == 128 + 2

    def plant(config: dict) -> None:
        *above, last = where.split(".")
        for key in above:
            config = config[key]
        config[last] = "code.txt:rule"

    changed(Path("out/config.json"), plant)
    capsys.readouterr()
    assert cli("run", "beyond", "--resume", "out") == 2
    assert not Path("ran").exists()
    assert "the run's folder names the code in code.txt, which is not run" in refusal(capsys)


def test_a_planted_result_runs_no_code(planted, cli, capsys):
    changed(planted / "config.json", lambda config: config.update(command="compare"))
    changed(planted / "result.json", lambda result: result.update(optimizer="code.txt:rule"))
    for name in ("adamw", "ademamix"):
        (planted / name).mkdir()
        (planted / name / "result.json").write_bytes((planted / "result.json").read_bytes())
    assert cli("compare", "--resume", "run") == 2
    assert not Path("ran").exists()
    assert "the run's folder names the code in code.txt, which is not run" in refusal(capsys)


@pytest.mark.parametrize("words", [("--optimizer", "code.txt:rule"), ("--optimizer=code.txt:rule",)])
def test_what_is_said_on_ctrl_c_resumes_a_run_of_an_own_rule(words, planted, cli, tiny, capsys, monkeypatch):
    finish = _Run.finish

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_Run, "finish", stopped)
    assert cli("train", *tiny, *words, "--settings", "lr=0.1", "--out", "a run") == 128 + 2
    how = refusal(capsys).partition("resume with: ")[2]
    assert how == f"{PROGRAM} train --resume 'a run' --optimizer code.txt:rule"
    monkeypatch.setattr(_Run, "finish", finish)
    assert cli(*shlex.split(how.removeprefix(PROGRAM))) == 0


@pytest.mark.parametrize("option", ["--out", "--data", "--resume"])
def test_only_an_optimizer_names_code(option, planted, cli, capsys):
    planted.rename("code.txt:rule")
    changed(Path("code.txt:rule/config.json"), lambda config: config.update(optimizer="code.txt:rule"))
    cli("train", "--resume", "code.txt:rule", *([] if option == "--resume" else [option, "code.txt:rule"]))
    assert not Path("ran").exists()
    assert "the run's folder names the code in code.txt, which is not run" in refusal(capsys)


def test_python_may_name_any_file(planted):
    assert pinned("code.txt:rule").startswith("code.txt:rule@")
    assert sys.argv[0] == "ademamix"  # a command was run in this process before
