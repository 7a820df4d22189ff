"""Where things are kept that can be made again, and whether what is found there can be trusted, and is whole."""

import contextlib
import hashlib
import os
import stat
import tempfile
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path


def cache_folder() -> Path:
    """The folder named by ``ADEMAMIX_CACHE``, else ``ademamix`` in the user's cache folder; made if it is not there.

    Raises:
        OSError: it cannot be made, or the user has no home.
    """
    if ours := os.environ.get("ADEMAMIX_CACHE"):
        return made_private(Path(ours))
    users = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    if users:
        return made_private(Path(users) / "ademamix")
    try:
        home = Path.home()
    except RuntimeError as error:  # an account that is not there, as in containers
        raise OSError("this user has no home folder to keep things in; set ADEMAMIX_CACHE to a folder") from error
    return made_private(home / ".cache" / "ademamix")


def made_private(folder: Path) -> Path:
    """Make a folder, and those above it, for the user only, whatever the umask; one that is there stays as it is."""
    if os.name == "nt":
        folder.mkdir(parents=True, exist_ok=True)
    elif not folder.is_dir():
        made_private(folder.parent)
        try:
            folder.mkdir(0o700)
        except FileExistsError:  # another process was faster
            if not folder.is_dir():
                raise
        else:
            folder.chmod(0o700)
    return folder


def trusted(folder: Path) -> bool:
    """Whether nobody but the user and root can change what is in a folder, or put another in its place.

    Each folder and link on the way must be the user's or root's. Where others may write, a sticky bit must keep them
    from exchanging what is there, as in /tmp. If it does not hold there is one warning. Windows has other means.
    """
    if os.name == "nt":
        return True
    ours = os.geteuid()
    for path in _way(folder.absolute()):
        about = path.lstat()
        if about.st_uid not in (0, ours) or (path == folder and about.st_uid != ours):
            return _distrust(folder, f"{path} belongs to user {about.st_uid}, not to user {ours}")
        sticky = about.st_mode & stat.S_ISVTX and path != folder
        if not stat.S_ISLNK(about.st_mode) and about.st_mode & 0o022 and not sticky:
            return _distrust(folder, f"others may write to {path} (its mode is {stat.S_IMODE(about.st_mode):o})")
    return True


def _way(path: Path) -> Iterator[Path]:
    """All that leads to a path, and it itself; of links also all that leads to where they point."""
    for part in (*reversed(path.parents), path):
        yield part
        if part.is_symlink():
            yield from _way(part.parent / part.readlink())


@cache
def _distrust(folder: Path, why: str) -> bool:
    warnings.warn(
        f"ademamix: compiled kernels are not kept in {folder}, because {why}; it would be run as code. "
        "chmod go-w, or ADEMAMIX_CACHE=FOLDER with a folder of your own, helps.",
        stacklevel=2,
    )
    return False


def only_ours(path: Path) -> bool:
    """Whether a path is a regular file of the user's that nobody else may write to."""
    if os.name == "nt":
        return True
    about = path.lstat()
    return stat.S_ISREG(about.st_mode) and about.st_uid == os.geteuid() and not about.st_mode & 0o022


def read(path: Path) -> bytes | None:
    """What :func:`write` has written; None if it is not there, damaged, or if others may write to it."""
    try:
        content = path.read_bytes() if only_ours(path) else b""
    except OSError:
        return None
    digest, data = content[:DIGEST], content[DIGEST:]
    return data if digest == _digest(path, data) else None


def write(path: Path, data: bytes) -> None:
    """Write a file, in one moment, after a digest of its name and of what it holds.

    Raises:
        OSError: it cannot be written; then what was there still is.
    """
    handle, aside = tempfile.mkstemp(dir=path.parent)  # nobody else may read or write it
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_digest(path, data) + data)
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise


DIGEST = 32  # bytes


def _digest(path: Path, data: bytes) -> bytes:
    return hashlib.sha256(path.name.encode() + b"\0" + data).digest()
