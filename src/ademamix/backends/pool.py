"""Work on several threads that survives whatever ends threads: an interrupt, a fork, the end of the interpreter.

Threads only help. A call carries out all the work itself unless they take some of it, and it leaves no lock behind:
an exception may hit any line of it, also one that another thread or a signal handler raises.
"""

import _thread
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from queue import SimpleQueue  # written in C: an exception cannot leave it half changed
from typing import Any

import torch

_jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
_helpers: list[int] = []  # all wait for jobs


def _forget() -> None:
    """A forked child has its parent's objects but not its threads."""
    global _jobs
    _jobs = SimpleQueue()
    _helpers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _help(jobs: SimpleQueue[Callable[[], None]]) -> None:
    while True:
        jobs.get()()


def _grow(helpers: int) -> None:
    """Start threads until there are so many; fewer if the system or an interpreter that shuts down allows no more."""
    try:
        while len(_helpers) < helpers:
            # Not threading.Thread, whose start() waits for the thread with a lock that an exception could leave locked.
            _helpers.append(_thread.start_new_thread(_help, (_jobs,)))
    except RuntimeError:
        pass


def for_each(pieces: range, act: Callable[[int], None], threads: int) -> None:
    """Call ``act`` once for each piece, on this thread and up to ``threads - 1`` others.

    It returns or raises when no thread is at work any more. After an error, pieces that nobody has begun are dropped.
    """
    if threads < 2:
        for piece in pieces:
            act(piece)
        return
    left = iter(pieces)  # shared: next() on it is atomic, so each piece is taken once
    busy: list[None] = []  # an entry for each helper at work
    ended: SimpleQueue[None] = SimpleQueue()
    errors: list[BaseException] = []
    flushes = sys.float_info.min * 0.5 == 0.0  # denormal numbers to 0: a setting that each thread has of its own

    def work() -> None:
        for piece in left:
            act(piece)

    def help() -> None:
        busy.append(None)  # before it takes a piece: once none are left, nobody else begins
        try:
            torch.set_flush_denormal(flushes)
            work()
        except BaseException as error:
            errors.append(error)
        busy.pop()
        ended.put(None)  # after it is no longer busy: whoever sees it busy can wait for this

    try:
        try:
            _grow(threads - 1)
            for _ in _helpers[: threads - 1]:
                _jobs.put(help)
            work()
        finally:
            _wait(left, busy, ended)
    finally:  # an exception may have hit the line above
        _wait(left, busy, ended)
    if errors:
        raise errors[0]


def _wait(left: Iterator[int], busy: list[None], ended: SimpleQueue[None]) -> None:
    """Drop what nobody has begun, and return or raise once no helper is busy."""
    interrupt: Any = None
    while True:
        try:
            deque(left, 0)
            while busy:
                ended.get()
            break
        except BaseException as error:  # an impatient Ctrl-C; helpers still write
            interrupt = error
    if interrupt is not None:
        raise interrupt
