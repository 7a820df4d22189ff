"""Checks that need four processes: all those of a file in one start of them."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def started_together(file: Path) -> tuple[Any, list[str]]:
    """A fixture for what became of each ``@check`` of a file, and their names.

    The fixture has a dict for each process: an error's traceback, or nothing, by the check's name.
    """

    @pytest.fixture(scope="module")
    def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
        folder = tmp_path_factory.mktemp("processes")
        logs = [folder / f"{rank}.log" for rank in range(4)]
        started = []
        for rank, log in enumerate(logs):
            with log.open("w") as out:
                command = [sys.executable, str(file), str(rank), str(folder)]
                started.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT))
        try:
            for process in started:
                process.wait(timeout=300)
        finally:
            for process in started:
                process.kill()
                process.wait()
        results = [folder / f"{rank}.json" for rank in range(4)]
        missing = "".join(log.read_text()[-3000:] for log, r in zip(logs, results, strict=True) if not r.exists())
        assert not missing, missing
        return [json.loads(result.read_text()) for result in results]

    return outcomes, re.findall(r"@check\ndef (\w+)", file.read_text(encoding="utf-8"))


def assert_passed(name: str, outcomes: list[dict[str, str]]) -> None:
    errors = [f"process {rank}: {outcome.get(name, 'did not get there')}" for rank, outcome in enumerate(outcomes)]
    assert all(outcome.get(name) == "" for outcome in outcomes), "\n".join(errors)
