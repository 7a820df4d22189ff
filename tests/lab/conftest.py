import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ademamix.lab.cli import main
from ademamix.lab.config import Data
from ademamix.lab.data.corpus import write_data

Cli = Callable[..., int]


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


@pytest.fixture
def browse(tmp_path: Path) -> Callable[[Path, int, str], Any]:
    """Open a page in headless Chromium, as wide as asked for, in light or dark; it must not complain or ask the net."""
    selenium = pytest.importorskip("selenium.webdriver")
    browser, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if browser is None or driver is None:
        pytest.skip("no chromium with chromedriver on this machine")

    @contextmanager
    def opened(path: Path, width: int, scheme: str) -> Iterator[Any]:
        options = selenium.ChromeOptions()
        options.binary_location = browser
        flags = ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking")
        for flag in (*flags, f"user-data-dir={tmp_path / 'browser'}"):
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        with selenium.Chrome(options, selenium.ChromeService(driver)) as page:
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
            page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
            page.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
            page.get(path.as_uri())
            yield page
            assert page.get_log("browser") == []
            events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
            urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
            assert [url for url in urls if url.startswith(("http", "ws"))] == []
            assert any(url.startswith("file:") for url in urls)

    return opened
