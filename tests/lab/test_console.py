import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from ademamix.lab import console
from ademamix.lab.config import Recipe

CONTROL = re.compile(r"\x1b\[[?0-9;]*[A-Za-z]")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is shown on a terminal 60 columns wide."""
    shown = io.StringIO()
    monkeypatch.setattr(console, "OUT", Console(file=shown, force_terminal=True, width=60))
    return shown


def test_a_bar_leaves_room_for_the_characters_of_ctrl_c(terminal: io.StringIO) -> None:
    with console.Show("AdEMAMix", Recipe(), 0) as first:
        second = console.Show("AdamW", Recipe(), 0, below=first)
        for show in (first, second):
            show.update(1000, 2.5, 2.6, rate=1000.0)
    lines = re.split(r"[\r\n]+", CONTROL.sub("", terminal.getvalue()))
    assert any("loss" in line for line in lines)
    assert max(map(len, lines)) + len("^C") < 60  # in the last column a terminal would go to the next line


def test_a_line_wraps_between_words_and_no_path_is_cut(terminal: io.StringIO) -> None:
    path = str(Path("runs", "a-long-name-" * 8))
    console.say(f"everything that this run writes, and there is quite a lot of it, is written to {path}")
    lines = terminal.getvalue().splitlines()
    assert path in lines
    assert max(len(line) for line in lines if line != path) <= 60


def test_a_file_gets_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(console, "OUT", Console(file=shown, width=60))
    console.say("word " * 40)
    assert shown.getvalue().count("\n") == 1
