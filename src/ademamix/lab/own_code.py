"""Code of the user's own, named FILE.py:NAME: a command runs no file that its own words do not name.

So whoever wrote a folder that is resumed cannot choose what is run.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ademamix.lab.config import BadInputError, Optimizer, shortened

_named: frozenset[str] | None = None  # the files that the command names; None outside of a command: any may be run


class UnnamedCodeError(BadInputError):
    """Code was to be run that the command does not name."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        file = shortened(split(self.name)[0])
        return f"the run's folder names the code in {file}, which is not run unless you name it"


def split(name: Optimizer) -> tuple[str, str, str]:
    """The file, what is meant in it, and its digest; no file for an optimizer of the library's."""
    path, _, rest = name.rpartition(":")
    attribute, _, digest = rest.partition("@")
    return path, attribute, digest


@contextmanager
def only_named_by(words: Sequence[str]) -> Iterator[None]:
    """For the time of a block, run no code but that of files which a command's words name, as FILE.py:NAME."""
    global _named
    values = (word.partition("=")[2] if word.startswith("--") and "=" in word else word for word in words)
    before, _named = _named, frozenset(split(value)[0] for value in values)
    try:
        yield
    finally:
        _named = before


def refuse_unnamed(path: str, attribute: str) -> None:
    """Raise UnnamedCodeError for a file that the command does not name."""
    if _named is not None and path not in _named:
        raise UnnamedCodeError(f"{path}:{attribute}")
