"""Folders that are written whole or not at all."""

import errno
import os
import re
import shutil
import stat
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

    Leftovers of killed processes with the same name are removed: folders OUT.<32 hex digits>.partial with a lock that
    no process holds. Folders without a lock belong to the user, or to version 0.1.0, which had no locks.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    ours = re.compile(rf"{re.escape(out.name)}\.[0-9a-f]{{32}}{re.escape(PARTIAL + LOCK)}")
    for lock in [path for path in out.parent.iterdir() if ours.fullmatch(path.name) and _is_empty_file(path)]:
        with suppress(Timeout, OSError), _locked(lock) as dead:
            if dead:  # and where there are no locks, nobody knows
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.unlink(missing_ok=True)
    # In a container every process has the same id.
    aside = out.with_name(f"{out.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        with _locked(_lock_of(aside), blocking=True):  # another process may be looking whether it is held
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


def _is_empty_file(path: Path) -> bool:
    """Whether a path may be a lock of ours; taking one empties it."""
    try:
        about = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(about.st_mode) and about.st_size == 0


@contextmanager
def _locked(path: Path, *, blocking: bool = False) -> Iterator[bool]:
    """Hold a lock for the time of a block, a kill ends it too; False on a file system without locks, as clusters have.

    Raises:
        Timeout: another process holds it.
    """
    lock = FileLock(path, blocking=blocking, fallback_to_soft=False)  # that one would outlive a kill
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


def refuse_strange(out: Path) -> None:
    """Raise BadInputError if a run's folder holds anything but files, folders, and links to these.

    So what is written there stays there, and nothing waits for the other end of a pipe.
    """
    whole = os.path.realpath(out)
    for folder, folders, names in os.walk(out):
        for path in (Path(folder, name) for name in (*folders, *names)):
            with suppress(FileNotFoundError):  # another process is at work there
                mode, leads_to = path.lstat().st_mode, Path(os.path.realpath(path))
                if leads_to.is_symlink():
                    raise BadInputError(f"{path} is a link that leads in a circle; remove it")
                if stat.S_ISLNK(mode) and not leads_to.is_relative_to(whole):
                    raise BadInputError(f"{path} is a link out of the run's folder; put what it leads to in its place")
                if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
                    raise BadInputError(f"{path} must be a file, but is a pipe or a device; remove it")


@contextmanager
def another_may_win(out: Path) -> Iterator[None]:
    """Processes that start together write the same folder; the first rename wins and the others take its work."""
    try:
        yield
    except OSError:
        if not out.exists():
            raise
