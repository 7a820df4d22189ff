"""Signals that ask a program to stop, as an exception: what was begun is cleaned up as after Ctrl-C."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to stop."""

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.signum = signum


def interrupt(signum: int, _: object) -> None:
    """Handle a signal: raise Interrupted."""
    raise Interrupted(signum)


@contextmanager
def interrupted_by(signum: signal.Signals) -> Iterator[None]:
    """Have a signal that would end the program at once raise Interrupted for the time of a block."""
    before = signal.getsignal(signum)
    if before is signal.SIG_DFL:
        signal.signal(signum, interrupt)
    try:
        yield
    finally:
        if before is signal.SIG_DFL:
            signal.signal(signum, before)
