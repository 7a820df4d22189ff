"""Threads that help with a step: whatever ends them, or interrupts the step, the next one works."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from types import FrameType
from typing import Any

import pytest
import torch

from ademamix.backends import pool

PIECES = range(0, 40, 2)


class Interrupt(BaseException):
    """As KeyboardInterrupt is, no Exception."""


class Work:
    """Counts the pieces carried out, and those that helpers are at."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.done, self.under_way = seconds, Counter[int](), 0
        self.threads: set[int] = set()

    def __call__(self, piece: int) -> None:
        self.threads.add(threading.get_ident())
        helping = threading.current_thread() is not threading.main_thread()
        self.under_way += helping
        time.sleep(self.seconds)
        self.done[piece] += 1
        self.under_way -= helping


def finishes_within(seconds: float, act: Any) -> None:
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it hangs"


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_each_piece_is_carried_out_once(threads: int) -> None:
    work = Work(0.001)
    pool.for_each(PIECES, work, threads)
    assert work.done == Counter(PIECES)
    assert len(work.threads) <= threads
    assert threads == 1 or len(work.threads) > 1


def test_an_error_of_a_helper_is_raised() -> None:
    def act(piece: int) -> None:
        time.sleep(0.002)
        if threading.current_thread() is not threading.main_thread():
            raise MemoryError("of the helper")

    for _ in range(2):
        with pytest.raises(MemoryError, match="of the helper"):
            pool.for_each(PIECES, act, 2)


def test_denormal_numbers_are_flushed_by_all_threads_or_by_none() -> None:
    """As this one does when it asks for help, whatever it did when they were started."""
    found: set[tuple[bool, bool]] = set()
    smallest = sys.float_info.min

    def act(piece: int) -> None:
        time.sleep(0.001)
        found.add((threading.current_thread() is threading.main_thread(), smallest * 0.5 == 0.0))

    try:
        for flushes in (False, True, False):
            if not torch.set_flush_denormal(flushes):
                pytest.skip("this processor does not flush denormal numbers")
            found.clear()
            pool.for_each(PIECES, act, 3)
            assert found == {(True, flushes), (False, flushes)}
    finally:
        torch.set_flush_denormal(False)


def interrupted(act: Any, after: int) -> bool:
    """Raise an exception before the instruction number ``after`` of the pool's on this thread; whether it came to that.

    Any instruction is a place for an asynchronous exception; those where CPython looks for signals are among them.
    """
    left = after

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename != pool.__file__:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            left -= 1
            if left == 0:
                raise Interrupt
        return trace

    before = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # Python 3.12 asks, when a trace begins, whether any frame has it
    sys.settrace(trace)
    try:
        act()
    except Interrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_an_exception_in_any_instruction_leaves_nobody_at_work_and_the_pool_as_it_was() -> None:
    pieces, number, hit = range(6), 0, True
    while hit:
        number += 1
        work = Work(0.0002)
        hit = interrupted(lambda work=work: pool.for_each(pieces, work, 3), number)
        assert not work.under_way
        seen = work.done.copy()
        time.sleep(0.0005)
        assert work.done == seen
        assert set(seen.values()) <= {1}
    assert number > 100  # every instruction was reached
    work = Work(0.001)
    finishes_within(20, lambda: pool.for_each(PIECES, work, 3))
    assert work.done == Counter(PIECES)
    assert len(work.threads) > 1


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="Windows has no such timers")
def test_impatient_interrupts_leave_nobody_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another, also while the call waits for its helpers because of the first."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # some hit a finalizer, which cannot raise

    def interrupt(_: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code is pool.for_each.__code__:
                raise Interrupt
            frame = frame.f_back

    work, came = Work(2e-4), 0
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-4, 3.1e-4)
        for _ in range(300):
            try:
                pool.for_each(PIECES, work, 3)
            except Interrupt:
                came += 1
            assert not work.under_way
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert came > 100
    finishes_within(20, lambda: pool.for_each(PIECES, Work(0.0), 3))


# --------------------------------------------------------------------------------- the life of a process

LIVES = {
    "several threads at once, all for the first time": """
        seen = []
        def steps():
            params, optimizer = made()
            for _ in range(5):
                optimizer.step()
            seen.append(params[0].tolist())
        threads = [threading.Thread(target=steps) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(seen) == 5 and all(each == seen[0] for each in seen)
        """,
    "a fork before the first step, after it, and during another thread's": """
        params, optimizer = made()
        in_child(optimizer.step)
        optimizer.step()
        in_child(optimizer.step)
        end = threading.Event()
        def steps():
            while not end.is_set():
                optimizer.step()
        thread = threading.Thread(target=steps)
        thread.start()
        other = made()[1]
        for _ in range(5):
            in_child(other.step)
        end.set()
        thread.join()
        """,
    "a fork while another thread imports the compiler or compiles": """
        thread = threading.Thread(target=made()[1].step)
        thread.start()
        time.sleep(0.3)
        in_child(made(AdamW)[1].step)
        thread.join()
        """,
    "steps at exit": """
        params, optimizer = made()
        optimizer.step()
        atexit.register(lambda: (optimizer.step(), print("stepped")))
        """,
    "steps of a thread that outlives the main one, the first among them": """
        def steps():
            threading.main_thread().join()
            optimizer = made()[1]
            for _ in range(3):
                optimizer.step()
            print("stepped")
        threading.Thread(target=steps).start()
        """,
}
BEGIN = """
    import atexit, os, signal, sys, threading, time
    import torch
    from ademamix import AdamW, AdEMAMix
    torch.set_num_threads(2)
    def made(kind=AdEMAMix):
        params = [torch.ones(30_000, requires_grad=True) for _ in range(20)]
        for p in params:
            p.grad = torch.ones_like(p)
        return params, kind(params, lr=0.1, backend="cpu")
    def in_child(act):
        child = os.fork()
        if not child:
            signal.alarm(20)
            act()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.slow  # each starts a process that imports torch and Numba
@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
@pytest.mark.parametrize("life", LIVES)
def test_steps_work_in(life: str, tmp_path: Any) -> None:
    code = textwrap.dedent(BEGIN) + textwrap.dedent(LIVES[life])
    cold = {"ADEMAMIX_CACHE": str(tmp_path)} if "compiles" in life else {}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | cold, capture_output=True, text=True, timeout=90
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == ("stepped\n" if "stepped" in code else "")
