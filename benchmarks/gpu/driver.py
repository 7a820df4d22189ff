"""Commands with time limits, one after another or in the background; whatever becomes of one, the next one runs."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LEAST = 5.0  # seconds: with fewer left, a part is not started
MARGIN = 3.0  # seconds before its limit that a part is told to end
LOGGED = 60_000  # bytes of a part's output, the last ones


@dataclass(frozen=True)
class Part:
    """A command and how many seconds it may take."""

    name: str
    command: Sequence[str]
    limit: float
    output: Path | None = None  # where its output goes at once; None: to the log, once it is over


@dataclass(frozen=True)
class Outcome:
    """What became of a part."""

    name: str
    end: str  # "ended", or in which other way
    seconds: float

    @property
    def fine(self) -> bool:
        """Whether nothing went wrong; a part may have been left out for a good reason."""
        return self.end == "ended" or self.end.startswith("left out")


@dataclass(frozen=True)
class Running:
    """A part that was started, with all its processes in one group."""

    part: Part
    process: subprocess.Popen[bytes]
    output: Path
    began: float  # by time.monotonic()
    limit: float

    def finish(self) -> str:
        """Wait for the end or the limit, whichever comes first; nothing of the part is left running."""
        try:
            code: int | None = self.process.wait(max(0.0, self.began + self.limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            self.kill()
        if code is None or (code == -signal.SIGKILL and time.monotonic() >= self.began + self.limit):
            return f"killed at its limit of {self.limit:.0f} s"
        return "ended" if code == 0 else f"failed, exit code {code}"

    def kill(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # nobody is left; macOS says the latter of those that ended
            return
        with contextlib.suppress(subprocess.TimeoutExpired):  # it may hang in the system, and die when that lets go
            self.process.wait(5)


class Driver:
    """Runs parts within one time limit.

    Args:
        seconds: for all parts together.
        log: a file that gets what the parts print.
        work: a folder for what nobody wants to keep.
        environment: of the parts, besides ENDS, the time (as of time.time()) by which a part had better end.
        told: is called whenever a part is over.
    """

    def __init__(
        self, seconds: float, log: Path, work: Path, environment: Mapping[str, str], told: Callable[[], Any]
    ) -> None:
        self.ends = time.monotonic() + seconds
        self.kept = 0.0  # seconds that are kept for parts to come
        self.log, self.work, self.environment, self.told = log, work, environment, told
        self.background: list[Running] = []
        self.outcomes: list[Outcome] = []
        log.write_text("")

    @property
    def left(self) -> float:
        """Seconds that the next part may take."""
        return self.ends - self.kept - time.monotonic()

    def run(self, part: Part) -> bool:
        """Whether the part came to a good end."""
        running = self._start(part)
        return running is not None and self._finish(running)

    def start(self, part: Part) -> None:
        """Run a part in the background, until ``wait``."""
        running = self._start(part)
        if running is not None:
            self.background.append(running)
            # Nobody waits for it then; once somebody has, its number may be another's.
            timer = threading.Timer(running.limit, lambda: running.process.poll() is None and running.kill())
            timer.daemon = True
            timer.start()

    def wait(self) -> None:
        """Wait for what runs in the background."""
        while self.background:
            self._finish(self.background.pop(0))

    def skip(self, name: str, reason: str) -> None:
        """Leave a part out, for a reason."""
        self._over(Outcome(name, f"left out: {reason}", 0.0))

    def stop(self) -> None:
        """Kill what runs in the background."""
        while self.background:
            (running := self.background.pop()).kill()
            self._over(Outcome(running.part.name, "stopped", time.monotonic() - running.began))

    def _start(self, part: Part) -> Running | None:
        limit = min(part.limit, self.left)
        if limit < LEAST:
            self._over(Outcome(part.name, "not run: no time left", 0.0))
            return None
        print(f"=== {part.name} (at most {limit:.0f} s)", flush=True)
        output = part.output or self.work / f"{part.name.replace(' ', '-')}.log"
        environment = {**self.environment, "ENDS": str(time.time() + limit - MARGIN)}
        with open(output, "wb") as file:
            process = subprocess.Popen(
                part.command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # a group of its own, to be killed with all it has started
            )
        return Running(part, process, output, time.monotonic(), limit)

    def _finish(self, running: Running) -> bool:
        end = "stopped"
        try:
            end = running.finish()
        finally:
            text = running.output.read_bytes()[-LOGGED:].decode(errors="replace")
            outcome = Outcome(running.part.name, end, time.monotonic() - running.began)
            with open(self.log, "a") as log:
                log.write(f"=== {outcome.name}: {outcome.end}, {outcome.seconds:.0f} s\n{text}\n")
            if not outcome.fine:
                print("\n".join(line[:300] for line in text.splitlines()[-6:]))
            self._over(outcome)
        return outcome.fine

    def _over(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        print(f"    {outcome.name}: {outcome.end}, {outcome.seconds:.0f} s", flush=True)
        self.told()
