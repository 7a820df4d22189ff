"""Folders that are written whole or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ademamix.lab.config import BadInputError

LOCK = ".lock"


@contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """Yield a folder that becomes `out` when the block ends well, and is gone when it does not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f"{out.name}.{os.getpid()}.partial")
    aside.mkdir()
    try:
        yield aside
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Keep other processes from writing to a run's folder for the time of a block; a kill ends that too.

    File systems without locks, as clusters may have them, keep nobody away.

    Raises:
        BadInputError: another process is at work there.
    """
    lock = FileLock(out / LOCK, blocking=False, fallback_to_soft=False)  # that one would outlive a kill
    with ExitStack() as held:
        try:
            held.enter_context(lock)
        except Timeout as error:
            raise BadInputError(f"another process is writing to {out}; wait for its end, or stop it") from error
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
        yield


@contextmanager
def another_may_win(out: Path) -> Iterator[None]:
    """Processes that start together write the same folder; the first rename wins and the others take its work."""
    try:
        yield
    except OSError:
        if not out.exists():
            raise
