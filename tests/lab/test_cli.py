import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch

import ademamix
from ademamix.lab.cli import _finish, _place
from ademamix.lab.config import BadInputError
from ademamix.lab.experiments import EXPERIMENTS
from ademamix.lab.files import alone_in
from ademamix.lab.training.loop import _Run


def run_python(code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=100)


def fail(error: Exception) -> NoReturn:
    raise error


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a refused command prints."""
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ademamix: ")
    return line


def test_without_the_extra_one_line_says_what_to_install():
    code = "import sys; sys.modules['tyro'] = None; from ademamix.lab.cli import main; main()"
    done = run_python(code, "compare")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert 'tyro is missing): pip install "ademamix[lab]"' in line


def test_help_is_shown_without_torch():
    code = (
        "import sys; from ademamix.lab.cli import main\n"
        "for command in ([], ['run'], ['train'], ['data'], ['compare'], ['plan'], ['report']):\n"
        "    sys.argv[1:] = [*command, '--help']\n"
        "    try: main()\n"
        "    except SystemExit as end: assert not end.code\n"
        "    assert not {'torch', 'numpy', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "    print('NEXT')"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    *pages, _ = done.stdout.split("NEXT")
    words = ("--version", "geometry", "--ademamix.beta3", "--text-key", "--match-cap", "--vocab-size", "claim")
    for page, word in zip(pages, words, strict=True):
        assert word in page
        assert "examples:\n  ademamix " in page
        assert "None" not in page
        assert "(default: )" not in page
        assert max(map(len, page.split("examples:")[0].splitlines())) <= 80


def test_the_version_is_the_librarys(cli, capsys):
    assert cli("--version") == 0
    assert capsys.readouterr().out == f"ademamix {ademamix.__version__}\n"


@pytest.mark.parametrize("words", [("run",), ("run", "--help"), ("run", "-h")])
def test_run_without_a_name_lists_the_experiments(words, cli, capsys):
    assert cli(*words) == 0
    listed = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +\w", listed, re.MULTILINE) for name in EXPERIMENTS)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "kind", "last"), [(("x",), "command", "report"), (("run", "x"), "experiment", "geometry")]
)
def test_an_unknown_name_is_refused_with_those_that_there_are(words, kind, last, cli, capsys):
    assert cli(*words) == 2
    line = refusal(capsys)
    assert line.startswith(f"ademamix: unknown {kind} x; there are ")
    assert line.endswith(last)


def test_data_without_out_says_so(cli, capsys):
    Path("some.txt").write_text("text")
    assert cli("data", "some.txt") == 2
    said = capsys.readouterr().err
    assert "--out FOLDER" in said
    assert "exists" not in said


@pytest.mark.parametrize(
    ("words", "warmup"),
    [
        (("train", "--steps", "200"), 10),  # the preset's is 250 of 5,000
        (("train", "--steps=200"), 10),
        (("compare", "--steps", "200", "--preset", "110m"), 200 * 3000 // 256_000),
        (("run", "lm", "--steps", "200"), 10),
        (("train", "--steps", "1"), 0),
        (("train", "--steps", "200", "--warmup", "7"), 7),
        (("train",), 250),
    ],
)
def test_the_warmup_scales_with_the_steps(words, warmup, cli, capsys):
    assert cli(*words, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"Steps of linear learning-rate warmup. (default: {warmup})" in text or "--warmup" in words


def test_a_resume_says_from_which_step(finished, cli, capsys):
    (finished / "result.json").unlink()
    shutil.rmtree(finished / "checkpoints" / "step-00000020")
    assert cli("train", "--resume", "run") == 0
    assert "AdEMAMix resumes from step 16\n" in capsys.readouterr().out


def test_the_library_does_not_import_the_lab():
    done = run_python("import sys, ademamix; assert not any('lab' in name.split('.') for name in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_a_preset_gives_the_defaults(cli, capsys):
    assert cli("train", "--preset", "330m", "--help") == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "(default: 256000)" in text
    assert "(default: 0.9999)" in text


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_shows_its_settings(name, cli, capsys):
    assert cli("run", name, "--help") == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"ademamix run {name} --out runs/{name}" in text
    assert all(word in text for word in ("--preset", "--seeds", "--dry-run"))


@pytest.fixture
def overnight(monkeypatch):
    """A preset that one experiment has, and all others lack."""
    for name, module in EXPERIMENTS.items():
        monkeypatch.setattr(module, "PRESETS", {key: s for key, s in module.PRESETS.items() if key != "overnight"})
        if name == "switch":
            longer = dataclasses.replace(module.PRESETS["cpu"], preset="overnight", seeds=(71, 72))
            module.PRESETS["overnight"] = longer


@pytest.mark.parametrize("words", [("--preset", "overnight"), ("--preset=overnight",)])
def test_an_experiment_may_have_a_preset_that_the_others_lack(words, overnight, cli, capsys):
    assert cli("run", "switch", *words, "--help") == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "(default: overnight)" in text
    assert "(default: 71 72)" in text
    assert cli("run", "lm", *words) == 2
    assert refusal(capsys) == "ademamix: unknown preset overnight; there are cpu, gpu, paper"
    assert cli("run", "switch", "--preset", "huge") == 2
    assert refusal(capsys) == "ademamix: unknown preset huge; there are cpu, gpu, paper, overnight"


BAD_DATA = {
    "no such file or folder: nowhere.txt": ("nowhere.txt",),
    'bad.jsonl, line 2: no JSON record with a text "text"': ("bad.jsonl",),
    'good.jsonl, line 1: no JSON record with a text "body"': ("good.jsonl", "--text-key", "body"),
    'table.parquet has no column "text", only id': ("table.parquet",),
    "broken.parquet is not a Parquet file": ("broken.parquet",),
    "picture.bin is not text": ("picture.bin",),
    "of 1 documents none fell to": ("good.jsonl",),
    "latin.jsonl, line 2: no JSON record": ("latin.jsonl",),
    "max_tokens must be at least 1, got 0": ("good.jsonl", "--max-tokens", "0"),
    "no such tokenizer file: nowhere.json": ("good.jsonl", "--tokenizer", "nowhere.json"),
    "good.jsonl is not a tokenizer file": ("good.jsonl", "--tokenizer", "good.jsonl"),
    "valid_fraction must be between 0 and 1": ("good.jsonl", "--valid-fraction", "1.5"),
    'cannot read the dataset "./nowhere"': ("hf:./nowhere",),
    "give at least one file, folder or hf:NAME to read": ("",),
    "out/out lies inside ., which is read": (".", "--out", "out/out"),
    "end_token goes with a tokenizer": ("good.jsonl", "--end-token", "x"),
    'deep.jsonl, line 1: no JSON record with a text "text" (it is nested too deeply)': ("deep.jsonl",),
    "wide.txt is UTF-16": ("wide.txt",),
}


@pytest.mark.parametrize("message", BAD_DATA)
def test_bad_data_gives_one_line_and_writes_nothing(message, cli, capsys):
    import pyarrow
    import pyarrow.parquet

    Path("good.jsonl").write_text('{"text": "one document"}\n')
    Path("bad.jsonl").write_text('{"text": "good"}\n{"text": 3}\n')
    Path("latin.jsonl").write_bytes(b'{"text": "good"}\n{"text": "caf\xe9"}\n')
    Path("deep.jsonl").write_text("[" * 100_000)
    Path("wide.txt").write_text("text", encoding="utf-16")
    pyarrow.parquet.write_table(pyarrow.table({"id": [1]}), "table.parquet")
    Path("broken.parquet").write_bytes(b"PAR1 not really")
    Path("picture.bin").write_bytes(b"\x89PNG\0\0")
    before = {path.name for path in Path().iterdir()}
    assert cli("data", "--out", "out", *BAD_DATA[message]) == 2
    assert message in refusal(capsys)
    assert {path.name for path in Path().iterdir()} - {"cache"} == before


BAD_TRAIN = {
    "unknown preset huge; there are demo, 3m, 10m, 30m, 110m, 330m, 1.3b": ("--preset", "huge"),
    "nowhere is not a token folder, data.json is missing": ("--data", "nowhere"),
    "the corpus is too small": ("--context", "100000"),
    "steps must be at least 1, got 0": ("--steps", "0"),
    "warmup must be in [0, steps), got 20 with 20 steps": ("--warmup", "20"),
    "accumulate must divide batch, got 3 with a batch of 4": ("--accumulate", "3"),
    "width must be a multiple of 64": ("--width", "100"),
    "lr must be": ("--ademamix.lr", "-1"),
    "betas[2] must be": ("--ademamix.beta3", "1"),
    "cannot use the device abacus": ("--device", "abacus"),
    "cannot use the device meta": ("--device", "meta"),
    "seed must be in [0, 2**63), got 9223372036854775808": ("--seed", str(2**63)),
    "lr must be a finite number >= 0, got nan": ("--switch-at", "5", "--adamw.lr", "nan"),
    "switch_at is for AdEMAMix": ("--optimizer", "kema", "--switch-at", "5"),
    "out already exists": ("--out", "out"),
    "file: File exists": ("--out", "file/run"),
    "nothing to resume in nowhere": ("--resume", "nowhere"),
}


@pytest.mark.parametrize("message", BAD_TRAIN)
@pytest.mark.parametrize("command", ["train", "compare"])
def test_bad_settings_give_one_line_and_write_nothing(command, message, cli, tiny, capsys):
    Path("out").mkdir()
    Path("out", "mine").write_text("not to be touched")
    Path("file").write_text("")
    assert cli(command, *tiny, *BAD_TRAIN[message]) == 2
    assert message in refusal(capsys)
    assert {str(path) for path in Path().rglob("*")} == {"out", "out/mine", "file"}


@pytest.fixture
def finished(cli, tiny, capsys) -> Path:
    """A finished run in the folder `run`."""
    assert cli("train", *tiny, "--out", "run") == 0
    capsys.readouterr()
    return Path("run")


def test_a_resume_with_other_settings_names_them(finished, cli, capsys):
    assert cli("train", "--resume", "run", "--steps", "30", "--ademamix.alpha", "3", "--optimizer", "adamw") == 2
    line = refusal(capsys)
    assert "steps (20 there, 30 here)" in line
    assert "ademamix.alpha (8.0 there, 3.0 here)" in line
    assert "optimizer (ademamix there, adamw here)" in line
    assert "warmup" not in line


def test_a_resume_by_the_other_command_or_with_out_is_refused(finished, cli, capsys):
    assert cli("compare", "--resume", "run") == 2
    assert "run was made by `ademamix train`" in refusal(capsys)
    assert cli("train", "--resume", "run", "--out", "other") == 2
    assert "not both" in refusal(capsys)


@pytest.mark.parametrize("cap", ["nan", "-3", "inf"])
def test_a_cap_that_is_no_budget_is_refused(cap, cli, tiny, capsys):
    assert cli("compare", *tiny, "--match", "--match-cap", cap) == 2
    assert "match_cap must be a number from 1 on" in refusal(capsys)


def test_a_folder_that_another_process_writes_to_is_left_alone(finished, cli, capsys):
    before = (finished / "config.json").read_text()
    hold = (
        "import sys; from pathlib import Path; from ademamix.lab.files import alone_in\n"
        "with alone_in(Path('run')): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        assert cli("train", "--resume", "run") == 2
        assert "another process is writing to run" in refusal(capsys)
        assert (finished / "config.json").read_text() == before
        other.kill()
    assert cli("train", "--resume", "run") == 0  # whatever ended the other


@pytest.mark.parametrize("without", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_keeps_nobody_away(without, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(without, os.strerror(without))

    monkeypatch.setattr("fcntl.flock", flock)
    with alone_in(tmp_path), alone_in(tmp_path):
        pass


def test_ctrl_c_before_a_run_began_gives_one_line(cli, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("ademamix.lab.data.corpus.write_data", stop)
    assert cli("data", "some.txt", "--out", "out") == 128 + 2
    assert refusal(capsys) == "ademamix: stopped"


def test_a_terminal_without_the_characters_shows_others(tmp_path):
    code = "import sys; from ademamix.lab.cli import main; main()"
    command = [sys.executable, "-c", code, "run", "valley", "--steps", "20", "--out", "valley"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith(b"report: valley/report.html")


def test_a_resume_on_other_text_is_refused(finished, cli, capsys, tokens):
    (finished / "result.json").unlink()
    meta = json.loads((tokens / "data.json").read_text())
    try:
        (tokens / "data.json").write_text(json.dumps(meta | {"sources": ["elsewhere"]}))
        assert cli("train", "--resume", "run") == 2
    finally:
        (tokens / "data.json").write_text(json.dumps(meta, indent=2) + "\n")
    assert "other settings: the data" in refusal(capsys)


def test_a_damaged_checkpoint_is_named(finished, cli, capsys):
    (finished / "result.json").unlink()
    (damaged,) = finished.glob("checkpoints/step-00000020/*.distcp")
    damaged.write_bytes(b"")
    assert cli("train", "--resume", "run") == 2
    assert f"{damaged} is damaged: it has 0 bytes" in refusal(capsys)


DAMAGE = {  # of a file of the run what is written into it, and what is said
    "config.json": {
        "{": "config.json is damaged (",
        "[]": "config.json is damaged: it holds no",
        "{}": "config.json is damaged, or of another version of ademamix ('command')",
    },
    "metrics.jsonl": {
        "garbage\n": "metrics.jsonl, line 1 is damaged; the run can be resumed without that line",
        '{"loss": 3.0}\n': "metrics.jsonl, line 1 is damaged",
        '{"step": 3}\n[1]\n': "metrics.jsonl, line 2 is damaged",
        '{"step": Infinity}\n': "metrics.jsonl, line 1 is damaged",
        '{"step": 3, "optimizer_ms": "long"}\n': "metrics.jsonl, line 1 is damaged",
        "[" * 100_000 + "\n": "metrics.jsonl, line 1 is damaged",
        "\udcff\n": "metrics.jsonl, line 1 is damaged",  # no UTF-8
    },
    "result.json": {
        '{"valid_loss": "low"}': "result.json is damaged, or of another version",
        "{": "result.json is damaged (",
        '{"steps": 3}': "result.json is damaged, or of another version",
    },
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in DAMAGE.items() for text in texts])
def test_a_damaged_file_of_a_run_is_named_and_kept(name, text, finished, cli, capsys):
    (finished / "result.json").unlink()
    bad = text.encode(errors="surrogateescape")
    (finished / name).write_bytes(bad)
    assert cli("train", "--resume", "run") == 2
    assert DAMAGE[name][text] in refusal(capsys)
    assert (finished / name).read_bytes() == bad


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("job", "later", 1),
        ("job", "device", None),
        ("job", "shard", "yes"),
        ("job", "keep", True),
        ("recipe", "steps", "many"),
        ("recipe", "steps", 20.0),
        ("recipe", "steps", 10**400),
        ("recipe", "final_lr", 10**400),
        ("recipe", "data", "x" * 400),
        ("job", "keep", -(10**400)),
        (None, "command", "x" * 400),
        ("recipe", "data", -1),
        ("recipe", "architecture", "unknown"),
        ("recipe", "held_out", 3),
        ("recipe", "ademamix", [1]),
        (None, "optimizer", 7),
        (None, "typed", None),
        (None, "typed", [1]),
        (None, "preset", {}),
        (None, "job", []),
    ],
)
def test_settings_of_another_version_or_kind_are_refused(section, key, value, finished, cli, capsys):
    stored = json.loads((finished / "config.json").read_text())
    (stored if section is None else stored[section])[key] = value
    (finished / "config.json").write_text(json.dumps(stored))
    assert cli("train", "--resume", "run") == 2
    assert len(refusal(capsys)) < 300


@pytest.mark.parametrize("steps", ["9" * 400, str(2**63)])
def test_more_steps_than_can_be_counted_are_refused(steps, cli, tiny, capsys):
    assert cli("train", *tiny, "--steps", steps, "--out", "new") == 2
    assert refusal(capsys).startswith("ademamix: steps must be below 2**63, got ")
    assert not Path("new").exists()


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "result.json", "seconds.json", "tensorboard/mine"])
def test_a_resume_refuses_pipes(name, finished, cli, capsys):
    (finished / name).unlink(missing_ok=True)
    os.mkfifo(finished / name)
    assert cli("train", "--resume", "run") == 2  # and does not wait for a writer
    assert f"run/{name} must be a file, but is a pipe" in refusal(capsys)


@pytest.mark.parametrize(
    "name", ["config.json.partial", "metrics.jsonl", "metrics.jsonl.partial", "result.json.partial"]
)
def test_a_resume_names_a_folder_in_the_place_of_a_file(name, finished, cli, capsys):
    (finished / "result.json").unlink()
    (finished / name).unlink(missing_ok=True)
    (finished / name).mkdir()
    assert cli("train", "--resume", "run") == 2
    line = refusal(capsys)
    assert f"run/{name} " in line
    assert "resume with" not in line


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/step-00000030.partial", "tensorboard"])
def test_a_resume_names_a_file_in_the_place_of_a_folder(name, finished, cli, capsys):
    (finished / "result.json").unlink()
    shutil.rmtree(finished / name, ignore_errors=True)
    (finished / name).write_text("mine")
    assert cli("train", "--resume", "run") == 2
    line = refusal(capsys)
    assert f"run/{name} must be a folder, but is a file; move it away" in line
    assert "resume with" not in line
    assert (finished / name).read_text() == "mine"


def test_what_else_is_in_the_folder_of_checkpoints_stays(finished, cli):
    (finished / "result.json").unlink()
    mine = [finished / "checkpoints" / name for name in ("z.partial", "mine.partial", "step-1.partial")]
    mine[0].write_text("mine")
    for folder in mine[1:]:
        folder.mkdir()
    assert cli("train", "--resume", "run") == 0
    assert all(path.exists() for path in mine)


def test_a_resume_refuses_a_link_in_a_circle(finished, cli, capsys):
    (finished / "loop").symlink_to("loop")
    assert cli("train", "--resume", "run") == 2
    assert "run/loop is a link that leads in a circle" in refusal(capsys)
    Path("around").symlink_to("around")
    assert cli("train", "--resume", "around") == 2
    assert refusal(capsys)


def test_metrics_that_are_gone_are_named(finished, cli, capsys):
    (finished / "result.json").unlink()
    (finished / "metrics.jsonl").unlink()
    assert cli("train", "--resume", "run") == 2
    assert "run/metrics.jsonl is damaged" in refusal(capsys)


def test_a_user_without_a_home_is_told_what_to_set(cli, capsys, monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    for name in ("ADEMAMIX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cli("train", "--out", "new") == 2
    assert "set ADEMAMIX_CACHE to a folder" in refusal(capsys)
    assert not Path("new").exists()


@pytest.mark.parametrize("seconds", ["1" + "0" * 400, "NaN", "-Infinity", "Infinity", "-1", "true", '"1"', "null"])
def test_a_time_that_is_none_is_refused(seconds, tmp_path):
    (tmp_path / "seconds.json").write_text(f'{{"seconds": {seconds}}}')
    with pytest.raises(BadInputError, match=r"seconds\.json is damaged") as caught:
        _finish(tmp_path, [], lambda: pytest.fail("it was not read first"))
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "result.json", "tensorboard", "checkpoints", "mine"])
def test_a_resume_refuses_links_out_of_the_run(name, finished, cli, capsys):
    outside = Path("outside")
    if name == "mine":
        outside.write_text("mine")
    else:
        (finished / name).rename(outside)
    (finished / name).symlink_to(outside.resolve())
    before = {path: path.is_file() and path.read_bytes() for path in (outside, *outside.rglob("*"))}
    assert cli("train", "--resume", "run") == 2
    assert f"run/{name} is a link out of the run's folder" in refusal(capsys)
    assert (finished / name).is_symlink()
    assert {path: path.is_file() and path.read_bytes() for path in (outside, *outside.rglob("*"))} == before


def test_a_run_may_be_resumed_through_a_link_to_it(finished, cli):
    Path("latest").symlink_to("run")
    (finished / "newest").symlink_to("checkpoints")
    assert cli("train", "--resume", "latest") == 0


def test_a_resume_on_changed_tokens_is_refused(finished, cli, capsys, tokens):
    (finished / "result.json").unlink()
    path = tokens / "train.bin"
    before = path.read_bytes()
    try:
        path.write_bytes(bytes(len(before)))
        assert cli("train", "--resume", "run") == 2
    finally:
        path.write_bytes(before)
    line = refusal(capsys)
    assert line == f"ademamix: {path} is damaged: its SHA-256 is not what data.json says; {tokens} must be made anew"


# TensorBoard writes in a thread of its own. It may find the folder gone first; its error ends nothing but the thread.
@pytest.mark.filterwarnings("ignore:Exception in thread:pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_folder_that_was_removed_is_not_offered_and_not_made_anew(command, cli, tiny, capsys, monkeypatch):
    log = _Run.log

    def remove(run: _Run, loss: torch.Tensor) -> None:
        log(run, loss)
        shutil.rmtree("run", ignore_errors=True)

    monkeypatch.setattr(_Run, "log", remove)
    monkeypatch.setattr("ademamix.lab.experiments.arms.side_by_side", lambda _: False)
    assert cli(command, *tiny, "--out", "run") == 1
    line = refusal(capsys)
    assert "was removed while the run was under way" in line
    assert line.endswith("run has nothing left to resume")
    assert not list(Path("run").rglob("*.distcp"))


def test_commands_of_the_same_second_write_to_different_folders(cli, tiny, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda _: "20300101-000000")
    for _ in range(3):
        assert cli("train", *tiny) == 0
    names = ["train-demo-20300101-000000", "train-demo-20300101-000000-2", "train-demo-20300101-000000-3"]
    assert sorted(path.name for path in Path("runs").iterdir()) == names


def test_a_name_that_another_command_takes_meanwhile_is_left_to_it(cli, tiny, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda _: "20300101-000000")
    place, taken = _place, Path("runs/train-demo-20300101-000000")

    def raced(*args):
        found = place(*args)
        if not taken.exists():
            taken.mkdir(parents=True)
            (taken / "other").touch()
        return found

    monkeypatch.setattr("ademamix.lab.cli._place", raced)
    assert cli("train", *tiny) == 0
    assert [path.name for path in taken.iterdir()] == ["other"]
    assert (taken.with_name(f"{taken.name}-2") / "result.json").exists()


@pytest.mark.parametrize(
    "allocate",
    [
        lambda *_: np.empty(1 << 57),
        lambda *_: torch.empty(1 << 50),  # more than a process can address
        lambda *_: fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")),
    ],
)
def test_a_run_that_lacks_memory_says_what_needs_less(allocate, cli, tiny, capsys, monkeypatch):
    monkeypatch.setattr(_Run, "advance", allocate)
    assert cli("train", *tiny, "--out", "run") == 1
    line = refusal(capsys)
    assert line.startswith("ademamix: memory ran out (")
    assert line.endswith("); a smaller --batch, or a larger --accumulate, needs less")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_is_asked_to_stop_leaves_nothing(signum, tmp_path):
    code = (
        "import signal, time; from ademamix.lab import cli; from ademamix.lab.data import corpus\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell in the background has it ignored
        "def endless(*_):\n"
        "    yield 'text'\n"
        "    print('half', flush=True)\n"
        "    time.sleep(100)\n"
        "corpus.documents_of = endless\n"
        "corpus._parcels = lambda texts: ([text] for text in texts)\n"
        "cli.main()"
    )
    command = [sys.executable, "-c", code, "data", "some.txt", "--out", "out/tokens"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.stdout.readline() != "half\n":
            assert process.poll() is None
        assert list((tmp_path / "out").glob("*.partial/train.bin"))
        process.send_signal(signum)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert errors == "ademamix: stopped\n"
    assert list((tmp_path / "out").iterdir()) == []


FINDING = '{"title": "", "headlines": [], "findings": [{"claim": "%s", "verdict": "%s", "ours": %s}]}'


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"title": "", "headlines": [], "findings": [{"claim": "tokens"}]}',
        '{"title": 3, "headlines": [], "findings": []}',
        '{"title": "", "headlines": "text", "findings": []}',
        '{"title": "", "headlines": [["text"]], "findings": []}',
        FINDING % ("tokens", "perhaps", '""'),
        FINDING % ("later", "reproduced", '""'),
        FINDING % ("tokens", "reproduced", "[]"),
    ],
)
def test_an_index_names_a_damaged_outcome(text, cli, capsys):
    Path("runs/lm").mkdir(parents=True)
    Path("runs/lm/outcome.json").write_text(text)
    assert cli("report", "runs") == 2
    assert "runs/lm/outcome.json is damaged" in refusal(capsys)
    assert not Path("runs/index.html").exists()


def test_a_diverged_run_says_so(cli, tiny, capsys):
    assert cli("train", *tiny, "--ademamix.lr", "3.402e38", "--warmup", "1", "--out", "run") == 1
    assert "a smaller learning rate may help" in refusal(capsys)
