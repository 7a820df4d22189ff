"""Many runs at a time: grids of them, kept by Optuna, on all cores or GPUs; what is finished is not done again."""

import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import optuna
import torch
from optuna.samplers import GridSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from ademamix.lab.config import BadInputError, Job, Optimizer, Training, read_file, shortened, write_whole
from ademamix.lab.console import say
from ademamix.lab.experiments.statistics import loss_of
from ademamix.lab.experiments.workers import Workers, train_here
from ademamix.lab.training.devices import pick_device
from ademamix.lab.training.loop import DivergedError, Result

JOURNAL = "trials.log"
Value = float | int | str
Point = tuple[Value, ...]  # one value for each axis of a grid, in its order


@dataclass(frozen=True)
class Grid:
    """Runs, one for each combination of values."""

    name: str  # of the Optuna study, and of the folder of the runs
    space: Mapping[str, Sequence[Value]]
    run: Callable[..., tuple[Optimizer, Training]]  # of a point's values, by name

    @property
    def size(self) -> int:
        return math.prod(map(len, self.space.values()))

    def points(self) -> Iterator[dict[str, Value]]:
        for point in itertools.product(*self.space.values()):
            yield dict(zip(self.space, point, strict=True))

    def folder(self, point: Mapping[str, Value]) -> Path:
        """Of a point's run, in the folder of all grids."""
        return Path(self.name, label(point).replace(", ", "-").replace(" ", "_").replace("/", "_"))


def label(point: Mapping[str, Value]) -> str:
    """A point, for people."""
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in point.items()
    )


@dataclass(frozen=True)
class _Trial:
    grid: Grid
    study: optuna.Study
    trial: optuna.Trial
    point: dict[str, Value]


class _Sampler(GridSampler):
    def after_trial(self, *_: Any) -> None:
        """Leave it to Trials to end: Optuna's own would stop the loop of Study.optimize, which is not used here."""


class Trials:
    """Carries out grids in a folder, a context manager.

    Args:
        out: the folder; an Optuna journal (trials.log) and the runs' own folders are kept there.
        device: "auto", or the device of all runs.
        workers: runs at a time; 0 for one per CPU core, with one thread each, or ``per_gpu`` on each GPU.
        per_gpu: how many runs share a GPU.
    """

    def __init__(self, out: Path, device: str, workers: int, per_gpu: int = 1) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        (out / f"{JOURNAL}.lock").unlink(missing_ok=True)  # of a process that was killed while it wrote
        self.out = out
        _cut_torn_tail(out / JOURNAL)
        with self._reading():
            self.storage = JournalStorage(JournalFileBackend(str(out / JOURNAL)))
        devices = _devices(device)
        self.workers = workers or len(devices) * (per_gpu if devices[0].startswith("cuda") else 1)
        threads = max(1, (os.cpu_count() or 1) // self.workers)
        self.pool = Workers([devices[i % len(devices)] for i in range(self.workers)], threads)
        self.began = time.perf_counter()

    def __enter__(self) -> "Trials":
        self.pool.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.pool.__exit__(kind, error, at)

    def run(self, *grids: Grid) -> list[dict[Point, Result | None]]:
        """Carry out all runs of some grids, as many at a time as there are workers.

        Returns:
            For each grid, the result of each point; None for a run that diverged.

        Raises:
            Interrupted: SIGINT or SIGTERM came; the block's end saves the runs that are under way.
            BadInputError: a run's data or settings cannot be used.
        """
        running: dict[Future[float], _Trial] = {}
        left = count = sum(grid.size for grid in grids)
        with self._reading():
            trials = iter([trial for grid in grids for trial in self._open(grid)])
            left -= sum(len(self._complete(grid)) for grid in grids)
        while True:
            while len(running) < self.workers and (trial := next(trials, None)):
                optimizer, recipe = trial.grid.run(**trial.point)
                running[self.pool.submit(_train, optimizer, recipe, self.out / trial.grid.folder(trial.point))] = trial
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                trial = running.pop(future)
                loss = future.result()
                trial.study.tell(trial.trial, loss)
                left -= 1
                minutes = (time.perf_counter() - self.began) / 60
                which = f"{trial.grid.name} {count - left} of {count}  {label(trial.point)}"
                say(f"{minutes:5.1f} min  {which}: {loss_of(loss)}")
        return [self._complete(grid) for grid in grids]

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Raise BadInputError for whatever Optuna raises if the journal's entries do not fit."""
        try:
            yield
        except (BadInputError, OSError):
            raise
        except Exception as error:
            why = f"{self.out / JOURNAL} is damaged ({type(error).__name__}: {shortened(error)})"
            raise BadInputError(f"{why}; move it away: finished runs stay in folders of their own") from error

    def _study(self, grid: Grid) -> optuna.Study:
        sampler = _Sampler(grid.space, seed=0)
        return optuna.create_study(study_name=grid.name, storage=self.storage, sampler=sampler, load_if_exists=True)

    def _open(self, grid: Grid) -> Iterator[_Trial]:
        """The trials of a grid that are not complete: those that a killed process left, then new ones."""
        study = self._study(grid)
        known = study.get_trials(deepcopy=False)
        running = [begun for begun in known if begun.state == optuna.trial.TrialState.RUNNING]
        for begun in running:
            study.sampler.before_trial(study, begun)  # gives it a point, if the kill came before
        trials = [optuna.Trial(study, begun._trial_id) for begun in running]
        trials += [study.ask() for _ in range(grid.size - len(known))]
        for trial in trials:
            point: dict[str, Any] = {n: trial.suggest_categorical(n, list(values)) for n, values in grid.space.items()}
            yield _Trial(grid, study, trial, point)

    def _complete(self, grid: Grid) -> dict[Point, Result | None]:
        found = {}
        for t in self._study(grid).get_trials(deepcopy=False):
            if t.state.is_finished():
                point = {name: t.params[name] for name in grid.space}
                lost = math.isinf(t.value or 0.0)
                found[tuple(point.values())] = None if lost else Result.read(self.out / grid.folder(point))
        return found


def _cut_torn_tail(path: Path) -> None:
    """Cut off what a crash left after a journal's last whole line, and keep it in FILE.torn.

    The runs are in folders of their own, so their results are not lost.

    Raises:
        BadInputError: whole lines follow a damaged one.
    """
    *lines, rest = read_file(path).split(b"\n") if path.exists() else [b""]
    sound = [_is_entry(line) for line in lines]
    whole = sound.index(False) if False in sound else len(lines)
    if any(sound[whole:]):
        raise BadInputError(f"{path}, line {whole + 1} is damaged, and what follows it cannot be used without it")
    torn = b"\n".join([*lines[whole:], rest])
    if torn:
        with open(path.with_name(f"{path.name}.torn"), "ab") as aside:
            aside.write(torn + b"\n")
        write_whole(path, b"".join(line + b"\n" for line in lines[:whole]))


def _is_entry(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def best(results: Mapping[Point, Result | None]) -> Point:
    """The point with the lowest final validation loss.

    Raises:
        BadInputError: every run diverged.
    """
    losses = {point: result.valid_loss for point, result in results.items() if result is not None}
    if not losses:
        raise BadInputError("every run of the tuning diverged: try smaller learning rates")
    return min(losses, key=lambda point: losses[point])


def _devices(name: str) -> list[str]:
    """The devices that runs are spread over."""
    device = pick_device(name)
    if device.type == "cuda" and device.index is None:
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return [str(device)] * (os.cpu_count() or 1 if device.type == "cpu" else 1)


def _train(optimizer: Optimizer, recipe: Training, out: Path) -> float:
    """Carry out one run in a worker; infinity if it diverged."""
    try:
        return train_here(optimizer, recipe, Job(log_every=50), out).valid_loss
    except DivergedError:
        return math.inf
