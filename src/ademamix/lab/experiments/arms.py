"""The runs of a comparison: on a CPU at the same time, so that whatever else the machine does slows both."""

import json
import os
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ademamix.lab.config import Job, Optimizer, Training, fits
from ademamix.lab.console import Show, say
from ademamix.lab.experiments.workers import Workers, train_here
from ademamix.lab.training.devices import pick_device
from ademamix.lab.training.loop import METRICS, RESULT, Result, train

LOOK_EVERY = 0.5  # seconds
TAIL = 1 << 16  # bytes: some 250 lines of metrics


@dataclass(frozen=True, eq=False)
class Arm:
    """One of the runs."""

    label: str  # for people
    optimizer: Optimizer
    recipe: Training
    out: Path


def side_by_side(device: str) -> bool:
    """Whether runs are carried out at the same time on the device of that name; "auto" is that of `pick_device`."""
    return pick_device(device).type == "cpu"


def carry_out(arms: Sequence[Arm], job: Job) -> list[Result]:
    """Train all arms, or resume them: on a CPU at the same time, one thread each, elsewhere one after the other.

    Raises:
        Interrupted, StoppedError: SIGINT or SIGTERM came; the arms are saved.
        DivergedError, BadInputError, SaveError: as `train` does, from the first arm that ends so; the others are saved.
    """
    if not side_by_side(job.device):
        return [train(arm.optimizer, arm.recipe, job, arm.out, label=arm.label) for arm in arms]
    results = {arm: Result.read(arm.out) for arm in arms if (arm.out / RESULT).exists()}
    if left := [arm for arm in arms if arm not in results]:
        results |= _together(left, job)
    return [results[arm] for arm in arms]


def _together(arms: Sequence[Arm], job: Job) -> dict[Arm, Result]:
    from ademamix.lab.training.checkpoints import FOLDER, complete  # nearly a second of import time

    results: dict[Arm, Result] = {}
    first, *others = arms
    for arm in arms:
        if saved := complete(arm.out / FOLDER):
            say(f"{arm.label} resumes from step {int(saved[-1].name.removeprefix('step-')):,}")
    with Workers(["cpu"] * len(arms), threads=1) as workers, Show(first.label, first.recipe, 0) as top:
        shows = {first: top} | {arm: Show(arm.label, arm.recipe, 0, below=top) for arm in others}
        running = {workers.submit(train_here, arm.optimizer, arm.recipe, job, arm.out): arm for arm in arms}
        while running:
            done, under_way = wait(running, LOOK_EVERY, FIRST_COMPLETED)
            for run in done:
                arm = running.pop(run)
                results[arm] = run.result()
                _look(arm, shows[arm], finished=True)
            for run in under_way:
                _look(running[run], shows[running[run]])
    return results


def _look(arm: Arm, show: Show, *, finished: bool = False) -> None:
    """Show what a worker has logged last; whatever is wrong with its file, it is the worker that complains."""
    found: dict[str, Any] = {}
    with suppress(OSError), open(arm.out / METRICS, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
        for line in file:
            with suppress(ValueError, RecursionError):  # the first is cut, the last is half written
                found |= values if fits(values := json.loads(line), dict[str, float]) else {}
    known = {"step", "loss", "seconds"} <= found.keys() and found["seconds"] > 0
    if known and (finished or found["step"] < arm.recipe.steps):  # a run's last line has its last validation loss
        rate = found["step"] / found["seconds"]
        show.update(found["step"], found["loss"], found.get("valid_loss"), rate=rate)
