"""Parameters of which each process has a part, checkpoints that change their number, and torch's other machinery.

What needs several processes is checked by distributed_processes.py, all in one start of four of them.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

PROCESSES = Path(__file__).with_name("distributed_processes.py")
CHECKS = re.findall(r"@check\ndef (\w+)", PROCESSES.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What became of each check in each of four processes: an error's traceback, or nothing."""
    folder = tmp_path_factory.mktemp("processes")
    logs = [folder / f"{rank}.log" for rank in range(4)]
    started = []
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            command = [sys.executable, str(PROCESSES), str(rank), str(folder)]
            started.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT))
    for process in started:
        process.wait(timeout=170)
    results = [folder / f"{rank}.json" for rank in range(4)]
    missing = "".join(log.read_text()[-3000:] for log, result in zip(logs, results, strict=True) if not result.exists())
    assert not missing, missing
    return [json.loads(result.read_text()) for result in results]


@pytest.mark.parametrize("name", CHECKS)
def test_on_four_processes(name: str, outcomes: list[dict[str, Any]]) -> None:
    errors = [f"process {rank}: {outcome.get(name, 'did not get there')}" for rank, outcome in enumerate(outcomes)]
    assert all(outcome.get(name) == "" for outcome in outcomes), "\n".join(errors)
