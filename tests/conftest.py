import os
import tempfile
from typing import Any

# Kernels compiled by the tests are kept for the whole session, its workers and its subprocesses, and away from the
# user's own.
if "ADEMAMIX_CACHE" not in os.environ:
    kernels = tempfile.TemporaryDirectory(prefix="ademamix-tests-", ignore_cleanup_errors=True)
    os.environ["ADEMAMIX_CACHE"] = kernels.name
# What is computed here is so small that a second thread costs more than it brings, and another worker has that core.
# Read when torch is imported; also by the programs that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

LEFT_OUT = pytest.StashKey[int]()  # slow tests that `make test` leaves out


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: not any(map(item.get_closest_marker, ("slow", "first"))))


def pytest_deselected(items: list[pytest.Item]) -> None:
    if items and "not slow" in items[0].config.option.markexpr:
        items[0].config.stash[LEFT_OUT] = sum(item.get_closest_marker("slow") is not None for item in items)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a worker tells the one that started it, which collects nothing itself
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)  # of xdist
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if count := terminalreporter.config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(f"{count} slow tests left out; `make test-all` runs them")
