"""What the lab itself costs: `python benchmarks/lab.py [--steps 1000] [--out TABLE]`.

The share of a training step that is neither forward, nor backward, nor optimizer (clipping counts as the optimizer's),
logging included; and how busy a sweep of 12 small runs keeps the cores, from the command's start to its end.
"""

import argparse
import dataclasses
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import ademamix
from ademamix.lab.config import Job
from ademamix.lab.experiments.lm import small
from ademamix.lab.experiments.trials import Grid, Trials
from ademamix.lab.reports.report import machine
from ademamix.lab.training.loop import _Run
from ademamix.lab.training.processes import Processes

RUNS = 12


class Clock:
    """Adds up the time that is spent in some functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def watch(self, of: Any, name: str) -> None:
        function = getattr(of, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        setattr(of, name, timed)


def overhead(steps: int, folder: Path) -> list[tuple[str, ...]]:
    """Time `steps` steps as `train` takes them; on one thread, as in a sweep."""
    torch.set_num_threads(1)
    recipe, job = small(steps + 20), Job()
    run = _Run("ademamix", recipe, job, folder / "run", Processes())
    backward = torch.autograd.backward
    clocks = {name: Clock() for name in ("forward", "backward", "optimizer")}
    clocks["forward"].watch(run, "_loss")
    clocks["backward"].watch(torch.autograd, "backward")
    for name in ("clip_grad_norm_", "step", "zero_grad"):
        clocks["optimizer"].watch(run.optimizer, name)
    try:
        for _ in range(20):
            run.advance()
        for clock in clocks.values():
            clock.seconds = 0.0
        began = time.perf_counter()
        for step in range(1, steps + 1):
            loss = run.advance()
            if step % job.log_every == 0:
                run.log(loss)
        total = time.perf_counter() - began
    finally:
        torch.autograd.backward = backward
        run.close()
    rows = [(name, f"{1e3 * c.seconds / steps:.3f}", f"{c.seconds / total:.1%}") for name, c in clocks.items()]
    rest = total - sum(c.seconds for c in clocks.values())
    return [*rows, ("all the rest", f"{1e3 * rest / steps:.3f}", f"{rest / total:.1%}")]


def sweep(steps: int, folder: Path) -> list[tuple[str, ...]]:
    """Carry out 12 small runs and compare their processor time with that of the cores."""
    recipe = dataclasses.replace(small(steps), eval_every=steps)
    grid = Grid("runs", {"seed": tuple(range(RUNS))}, lambda seed: ("ademamix", dataclasses.replace(recipe, seed=seed)))
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with Trials(folder, "cpu", 0) as trials:
        (results,) = trials.run(grid)
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    training = sum(result.seconds for result in results.values() if result is not None)
    cores = os.cpu_count() or 1
    return [
        ("wall time, seconds", f"{wall:.1f}", ""),
        ("processor time of the runs' processes", f"{busy:.1f}", f"{busy / wall / cores:.1%}"),
        ("time in training steps", f"{training:.1f}", f"{training / wall / cores:.1%}"),
    ]


def table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = [heads, ("---", *["--:"] * (len(heads) - 1)), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="steps that are timed, and steps of each run")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    options = parser.parse_args()
    parts: list[tuple[str, tuple[str, ...], Callable[[int, Path], list[tuple[str, ...]]]]] = [
        ("One training step, one thread", ("part", "ms", "share"), overhead),
        (f"A sweep of {RUNS} runs of {options.steps} steps", ("", "seconds", "of all cores"), sweep),
    ]
    lines = [
        "## What the lab itself costs",
        "",
        f"- command: `python {' '.join(sys.argv)}`",
        f"- machine: {machine()}",
        f"- versions: ademamix {ademamix.__version__}, Python {platform.python_version()}, torch {torch.__version__}",
        f"- date: {time.strftime('%Y-%m-%d')}",
    ]
    for title, heads, measure in parts:
        with tempfile.TemporaryDirectory() as folder:
            lines += ["", f"### {title}", "", *table(heads, measure(options.steps, Path(folder)))]
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
