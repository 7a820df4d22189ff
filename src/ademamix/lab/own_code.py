"""Code of the user's own, named FILE.py:NAME: a command runs no file that its own options do not name.

So whoever wrote a folder that is resumed cannot choose what is run.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ademamix.lab.config import BadInputError, Optimizer, shortened

OPTIONS = ("--optimizer", "--own")
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
    """For the time of a block, run only the code in files that a command names as an optimizer."""
    global _named
    values = [value for option, value in itertools.pairwise(words) if option in OPTIONS]
    values += [word.partition("=")[2] for word in words if word.partition("=")[0] in OPTIONS]
    before, _named = _named, frozenset(split(value)[0] for value in values)
    try:
        yield
    finally:
        _named = before


def refuse_unnamed(path: str, attribute: str) -> None:
    """Raise UnnamedCodeError for a file that the command does not name."""
    if _named is not None and path not in _named:
        raise UnnamedCodeError(f"{path}:{attribute}")
