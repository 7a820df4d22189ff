"""Folders that are written whole or not at all."""

import errno
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ademamix.lab.config import BadInputError

LOCK, PARTIAL = ".lock", ".partial"


@contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """Yield a folder that becomes `out` when the block ends well, and is gone when it does not.

    What killed processes have left of the same name is removed.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(f"{glob.escape(out.name)}.*{PARTIAL}"):
        with suppress(Timeout, OSError), _locked(_lock_of(left)) as dead:
            if dead:  # and where there are no locks, nobody knows
                shutil.rmtree(left, ignore_errors=True)
            _lock_of(left).unlink(missing_ok=True)
    # In a container every process has the same id.
    aside = out.with_name(f"{out.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        with _locked(_lock_of(aside)):  # before the folder is there for others to see
            aside.mkdir()
            try:
                yield aside
                aside.rename(out)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    finally:
        _lock_of(aside).unlink(missing_ok=True)


def _lock_of(aside: Path) -> Path:
    return aside.with_name(f"{aside.name}{LOCK}")


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold a lock for the time of a block, a kill ends it too; False on a file system without locks, as clusters have.

    Raises:
        Timeout: another process holds it.
    """
    lock = FileLock(path, blocking=False, fallback_to_soft=False)  # that one would outlive a kill
    with ExitStack() as held:
        try:
            held.enter_context(lock)
        except OSError as error:
            if isinstance(error, Timeout) or error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
        yield lock.is_locked


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Keep other processes from writing to a run's folder for the time of a block; a kill ends that too.

    File systems without locks, as clusters may have them, keep nobody away.

    Raises:
        BadInputError: another process is at work there.
    """
    with ExitStack() as held:
        try:
            held.enter_context(_locked(out / LOCK))
        except Timeout as error:
            raise BadInputError(f"another process is writing to {out}; wait for its end, or stop it") from error
        yield


def refuse_links(out: Path) -> None:
    """Raise BadInputError if anything in a run's folder is a link out of it: what is written there stays there."""
    whole = out.resolve()
    for folder, folders, names in os.walk(out):
        for path in (Path(folder, name) for name in (*folders, *names)):
            if path.is_symlink() and not path.resolve().is_relative_to(whole):
                raise BadInputError(f"{path} is a link out of the run's folder; put what it leads to in its place")


@contextmanager
def another_may_win(out: Path) -> Iterator[None]:
    """Processes that start together write the same folder; the first rename wins and the others take its work."""
    try:
        yield
    except OSError:
        if not out.exists():
            raise
