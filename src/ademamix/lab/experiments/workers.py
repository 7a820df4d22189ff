"""Processes that train at the same time, each on a device of its own; a signal to their parent saves their runs."""

import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import torch

from ademamix.lab.config import Job, Optimizer, Training
from ademamix.lab.signals import Interrupted, interrupt
from ademamix.lab.training.loop import Result, train

P = ParamSpec("P")
T = TypeVar("T")
ASK_AGAIN = 1.0  # seconds: a worker that was preparing its run did not listen yet


class Workers:
    """A pool of processes that train, a context manager.

    In its block SIGINT and SIGTERM raise Interrupted. If the block ends by an error, the runs that are under way are
    saved first; a second Ctrl-C ends the workers at once.

    Args:
        devices: the device of each worker.
        threads: of each worker on a CPU.
    """

    def __init__(self, devices: Sequence[str], threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        places = context.SimpleQueue()
        for device in devices:
            places.put(device)
        self.pool = ProcessPoolExecutor(
            len(devices), context, initializer=_begin, initargs=(places, threads, Path.cwd())
        )
        self.runs: list[Future[Any]] = []

    def __enter__(self) -> "Workers":
        self.before = {signum: signal.signal(signum, interrupt) for signum in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)
        try:
            while error is not None and (workers := multiprocessing.active_children()):
                for worker in workers:
                    worker.terminate()  # saves the run that is under way, or ends a worker that has none
                wait(self.runs, timeout=ASK_AGAIN)
                for worker in workers:
                    worker.join(0.1)
            self.pool.shutdown(cancel_futures=True)
        except KeyboardInterrupt:
            for worker in multiprocessing.active_children():
                worker.kill()
            raise
        if isinstance(error, Interrupted):
            self._refuse_unsaved()

    def _refuse_unsaved(self) -> None:
        """Raise the error of a run that could not be saved."""
        from ademamix.lab.training.checkpoints import SaveError  # nearly a second of import time

        for run in self.runs:
            if not run.cancelled() and isinstance(failure := run.exception(), SaveError | OSError):
                raise failure

    def submit(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
        """Have a worker call a function, which is to train by `train_here`."""
        self.runs.append(self.pool.submit(function, *args, **kwargs))
        return self.runs[-1]


_device = "cpu"  # of this worker


def _begin(places: Any, threads: int, folder: Path) -> None:
    """Start a worker: it takes one of the devices, and ends with its parent, however the parent ended."""
    global _device
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which stops the workers
    os.chdir(folder)  # the parent may have gone there after it was started
    torch.set_num_threads(threads)
    _device = places.get()

    def follow() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def train_here(optimizer: Optimizer, recipe: Training, job: Job, out: Path) -> Result:
    """Train in this worker, on its device, and show nothing.

    Raises:
        StoppedError, DivergedError, BadInputError, SaveError: as `train` does.
    """
    # `train` saves at the first SIGTERM, and leaves a second one to whoever was in charge before. That must not end
    # the worker while it saves: the pool itself sends one to all workers when one of them is gone.
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        return train(optimizer, recipe, dataclasses.replace(job, device=_device), out, quiet=True)
    finally:
        signal.signal(signal.SIGTERM, before)
