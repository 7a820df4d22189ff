"""A step ends or has not begun, and leaves nothing behind: what an interrupt, at whatever moment, must not break."""

import _signal  # type: ignore[import-not-found]  # signal's own functions take ten times as long, to look up enums
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

NEVER_HANDLED = {getattr(signal, name, 0) for name in ("SIGKILL", "SIGSTOP")}
SIGNALS = [int(number) for number in sorted(signal.valid_signals() - NEVER_HANDLED)]


def without_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    """As torch.no_grad(), which an interrupt at its end leaves in force: Python looks for one at each call."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        before = torch.is_grad_enabled()
        try:
            torch._C._set_grad_enabled(False)
            return function(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(before)

    return call


class _Gate:
    """Keeps signals while it is closed."""

    def __init__(self) -> None:
        self.closed = True
        self.came: dict[int, None] = {}


class _Held:
    """A handler behind a gate."""

    def __init__(self, handler: Any, gate: _Gate) -> None:
        self.handler, self.gate = handler, gate

    def __call__(self, number: int, frame: Any) -> None:
        if self.gate.closed:
            self.gate.came[number] = None
        else:
            self.handler(number, frame)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let the handlers of signals, such as that of Ctrl-C, run after the block.

    Python runs them in the main thread only; elsewhere there is nothing to hold back. Of blocks within each other, the
    outermost counts.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    gate = _Gate()
    held: dict[int, _Held] = {}
    try:
        for number in SIGNALS:
            handler = _signal.getsignal(number)
            if callable(handler):
                if isinstance(handler, _Held) and not handler.gate.closed:  # an interrupt left it, on the way out
                    handler = handler.handler
                held[number] = _Held(handler, gate)
                _signal.signal(number, held[number])
        yield
    finally:
        try:
            try:
                _put_back(held)
            finally:  # a handler that was back already has raised, once in thousands of interrupts
                _put_back(held)
        finally:
            gate.closed = False  # one that is still behind it does no harm
            _deliver([(number, held[number].handler) for number in gate.came])


def _put_back(held: dict[int, _Held]) -> None:
    for number, each in held.items():
        _signal.signal(number, each.handler)


def _deliver(came: list[tuple[int, Any]]) -> None:
    """Call the handlers of signals that came, each of them also if one before raises."""
    if came:
        number, handler = came[0]
        try:
            handler(number, sys._getframe())
        finally:
            _deliver(came[1:])
