import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ademamix.lab.cli import main
from ademamix.lab.config import Data
from ademamix.lab.corpus import write_data

Cli = Callable[..., int]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """The models here are so small that a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the programs that tests start
    yield
    torch.set_num_threads(before)
    del os.environ["OMP_NUM_THREADS"]


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 small, different text files."""
    folder = tmp_path_factory.mktemp("texts")
    for i in range(60):
        words = (f"word{(i * k * k + k) % 97}" for k in range(1, 80))
        (folder / f"{i:02}.txt").write_text(f"document {i}: " + " ".join(words))
    return folder


@pytest.fixture(scope="session")
def tokens(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The token folder of `texts`."""
    out = tmp_path_factory.mktemp("tokens") / "bytes"
    write_data(Data(sources=(str(texts),), out=out, valid_fraction=0.2))
    return out


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    """Run `ademamix ...` in this process, in a folder of its own; return the exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADEMAMIX_CACHE", str(tmp_path / "cache"))

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["ademamix", *map(str, arguments)])
        try:
            main()
        except SystemExit as exit_:
            return int(exit_.code or 0)
        return 0

    return run


@pytest.fixture(scope="session")
def tiny(tokens: Path) -> tuple[str, ...]:
    """Settings of a run that takes a fraction of a second."""
    settings = {"data": tokens, "layers": 1, "width": 16, "context": 16, "batch": 4, "steps": 20, "warmup": 2}
    settings |= {"eval-every": 5, "eval-sequences": 8, "log-every": 3, "save-every": 8}
    return tuple(text for key, value in settings.items() for text in (f"--{key}", str(value)))
