"""Checks that need several processes: all those of a file in one start of them.

The file that has the checks is what each process runs: `python FILE RANK FOLDER`, which ends in ``main(WORLD)``. Each
process writes what became of each check into FOLDER.
"""

import datetime
import json
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

CHECKS: dict[str, Callable[[], None]] = {}


def started_together(file: Path, processes: int = 4) -> tuple[Any, list[str]]:
    """A fixture for what became of each ``@check`` of a file, and their names.

    The fixture has a dict for each process: an error's traceback, or nothing, by the check's name.
    """

    @pytest.fixture(scope="module")
    def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
        folder = tmp_path_factory.mktemp("processes")
        logs = [folder / f"{rank}.log" for rank in range(processes)]
        paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        started = []
        for rank, log in enumerate(logs):
            with log.open("w") as out:
                command = [sys.executable, str(file), str(rank), str(folder)]
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}  # as torchrun does
                environment = {**os.environ, **place, "PYTHONPATH": paths}
                started.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment))
        try:
            for process in started:
                process.wait(timeout=300)
        finally:
            for process in started:
                process.kill()
                process.wait()
        results = [folder / f"{rank}.json" for rank in range(processes)]
        missing = "".join(log.read_text()[-3000:] for log, r in zip(logs, results, strict=True) if not r.exists())
        assert not missing, missing
        return [json.loads(result.read_text()) for result in results]

    names = re.findall(r"^@check\n(?:@.*\n)*def (\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    assert names, f"{file} has no checks"
    return outcomes, names


def assert_passed(name: str, outcomes: list[dict[str, str]]) -> None:
    errors = [f"process {rank}: {outcome.get(name, 'did not get there')}" for rank, outcome in enumerate(outcomes)]
    assert all(outcome.get(name) == "" for outcome in outcomes), "\n".join(errors)


# ------------------------------------------------------------------------------- in each of the processes


def check(function: Callable[[], None]) -> Callable[[], None]:
    if function.__module__ == "__main__":  # not those of a file that is imported
        CHECKS[function.__name__] = function
    return function


def main(world: int) -> None:
    """Run the checks, or those that are named after RANK and FOLDER, on gloo, up to the first that fails."""
    rank, folder, *wanted = sys.argv[1:]
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group(
        "gloo", init_method=store, rank=int(rank), world_size=world, timeout=datetime.timedelta(minutes=5)
    )
    results: dict[str, str] = {}
    for name, function in CHECKS.items():
        if wanted and name not in wanted:
            continue
        started = time.monotonic()
        try:
            dist.barrier()
            function()
            results[name] = ""
        except BaseException:
            results[name] = traceback.format_exc()
        print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)
        Path(folder, f"{rank}.json").write_text(json.dumps(results))
        if results[name]:
            sys.exit(1)
    dist.destroy_process_group()
