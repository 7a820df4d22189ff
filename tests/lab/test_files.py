import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ademamix.lab.config import BadInputError, from_json, to_json
from ademamix.lab.files import written_aside

WRITE = """
import os, sys
os.getpid = lambda: 1  # as in every container
from pathlib import Path
from ademamix.lab.files import written_aside
with written_aside(Path(sys.argv[1])) as aside:
    (aside / "half").write_text("half")
    print(aside, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that writes `name` in `tmp_path`."""
    command = [sys.executable, "-c", WRITE, str(tmp_path / "name")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        process.aside = Path(process.stdout.readline().strip())
        yield process
        process.kill()


def write(out: Path) -> None:
    with written_aside(out) as aside:
        (aside / "whole").write_text("whole")


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(other, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)
    digits = "0123456789abcdef" * 2
    names = ["name2.1", "name", "name.mine", "name.texts", "name.1", f"name.{digits}", f"name.{digits}0", "name.1.2"]
    strangers = [*(tmp_path / f"{name}.partial" for name in names), tmp_path / "name.1"]
    for stranger in strangers:
        (stranger / "folder").mkdir(parents=True)
    mine = tmp_path / f"name.{digits[::-1]}.partial.lock"
    mine.write_text("no lock of ours: those are empty")
    for lock in (f"name.{'0' * 32}.partial.lock", f"name.{'1' * 32}.partial.lock"):  # the first without a folder
        (tmp_path / lock).touch()
    (tmp_path / f"name.{'1' * 32}.partial" / "folder").mkdir(parents=True)
    strangers.append(mine)
    write(tmp_path / "name")
    assert (other.aside / "half").exists()
    others = {other.aside, other.aside.with_name(f"{other.aside.name}.lock")}
    assert set(tmp_path.iterdir()) == {tmp_path / "name", *others, *strangers}
    other.send_signal(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
    other.wait()
    (tmp_path / "name").rename(tmp_path / "before")
    write(tmp_path / "name")
    assert set(tmp_path.iterdir()) == {tmp_path / "name", tmp_path / "before", *strangers}
    assert [path.name for path in (tmp_path / "name").iterdir()] == ["whole"]


def test_a_name_may_hold_characters_of_patterns(tmp_path):
    stranger = tmp_path / "n.1.partial"
    stranger.mkdir()
    write(tmp_path / "[n]")
    assert set(tmp_path.iterdir()) == {stranger, tmp_path / "[n]"}


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), written_aside(tmp_path / "name"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_without_locks_nothing_of_anybody_is_removed(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("fcntl.flock", flock)
    left, lock = tmp_path / f"name.{'1' * 32}.partial", tmp_path / f"name.{'1' * 32}.partial.lock"
    left.mkdir()
    lock.touch()
    write(tmp_path / "name")
    assert set(tmp_path.iterdir()) == {left, lock, tmp_path / "name"}


def test_a_link_named_like_a_leftover_is_not_followed(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    (tmp_path / f"name.{'1' * 32}.partial").symlink_to(tmp_path / "mine")
    (tmp_path / f"name.{'1' * 32}.partial.lock").touch()
    (tmp_path / f"name.{'2' * 32}.partial.lock").symlink_to(tmp_path / "mine" / "file")
    write(tmp_path / "name")
    assert (tmp_path / "mine" / "file").read_text() == "mine"


def test_a_file_is_written_in_the_place_of_a_link_and_not_through_it(tmp_path):
    mine, path = tmp_path / "mine", tmp_path / "config.json"
    mine.write_text("mine")
    path.symlink_to(mine)
    path.with_name("config.json.partial").symlink_to(mine)
    to_json(path, {"a": 1})
    assert mine.read_text() == "mine"
    assert not path.is_symlink()
    assert from_json(path) == {"a": 1}
    assert set(tmp_path.iterdir()) == {mine, path}


@pytest.mark.parametrize("name", ["config.json", "config.json.partial"])
def test_a_folder_in_the_place_of_a_file_is_named_and_kept(name, tmp_path):
    (tmp_path / name / "mine").mkdir(parents=True)
    with pytest.raises(BadInputError, match=f"{tmp_path / name} is a folder, where a file is to be written"):
        to_json(tmp_path / "config.json", {"a": 1})
    assert (tmp_path / name / "mine").exists()


@pytest.mark.parametrize("what", ["folder", "pipe", "device", "huge", "nested", "number", "bytes"])
def test_what_is_no_json_of_ours_is_named(what, tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    elif what == "huge":
        with open(path, "wb") as file:
            file.truncate(1 << 40)  # takes no room on the disk
    else:
        path.write_bytes({"nested": b"[" * 200_000, "number": b"9" * 10_000, "bytes": b'"\xff"'}[what])
    with pytest.raises(BadInputError, match=str(path)):
        from_json(path)
