"""Token files: a folder with train.bin and valid.bin (memory-mapped) and data.json, and the batches cut from them."""

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ademamix.lab.config import LARGEST_VOCAB, BadInputError, read_file

META = "data.json"
SPLITS = ("train", "valid")
WHOLE = slice(None)  # all of a batch
PIECE = 1 << 20  # tokens that are read at a time


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest unsigned type that holds every token."""
    return np.min_scalar_type(vocab_size - 1)


@dataclass(frozen=True)
class Tokens:
    """A tokenized corpus on disk."""

    vocab_size: int
    sha256: str  # of what data.json says, which holds the checksums of both token files
    train: NDArray[np.unsignedinteger[Any]]
    valid: NDArray[np.unsignedinteger[Any]]

    @classmethod
    def open(cls, folder: Path) -> "Tokens":
        """Open a folder written by `ademamix data`.

        Raises:
            BadInputError: there is no such folder, it is incomplete, or its files are not what data.json says.
        """
        try:
            text = read_file(folder / META).decode()
            meta = json.loads(text)
            if type(meta["vocab_size"]) is not int or not 1 <= meta["vocab_size"] <= LARGEST_VOCAB:
                raise ValueError(f"vocab_size must be an integer from 1 to 2**32, got {meta['vocab_size']!r:.60}")
            dtype = token_dtype(meta["vocab_size"])
            lengths = [meta[split]["tokens"] for split in SPLITS]
            if 0 in lengths:
                raise BadInputError(f"the corpus is too small: {folder} has no tokens for {SPLITS[lengths.index(0)]}")
            # As plain arrays: indexing takes a memmap five times as long.
            for split in SPLITS:
                if (folder / f"{split}.bin").stat().st_size == 0:
                    raise ValueError(f"{split}.bin is empty")
            splits = [np.memmap(folder / f"{split}.bin", dtype, mode="r").view(np.ndarray) for split in SPLITS]
        except FileNotFoundError as error:
            missing = f"{Path(error.filename).name} is missing"
            raise BadInputError(f"{folder} is not a token folder, {missing}; `ademamix data` makes one") from error
        except (ValueError, TypeError, KeyError, NotADirectoryError, RecursionError) as error:
            raise BadInputError(f"{folder} is not a token folder ({error})") from error
        if [len(split) for split in splits] != lengths:
            raise BadInputError(f"{folder} is damaged: its token files are not as long as {META} says")
        for split in SPLITS:
            path = folder / f"{split}.bin"
            digest, largest = _read_through(path, dtype, *identity(path))
            if digest != meta[split].get("sha256"):
                raise BadInputError(
                    f"{path} is damaged: its SHA-256 is not what {META} says; {folder} must be made anew"
                )
            if largest >= meta["vocab_size"]:
                allowed = f"a vocab_size of {meta['vocab_size']:,} ends at {meta['vocab_size'] - 1:,}"
                raise BadInputError(
                    f"{folder} is damaged: {path.name} has the token {largest:,}, and {allowed} ({META})"
                )
        return cls(meta["vocab_size"], hashlib.sha256(text.encode()).hexdigest(), *splits)

    def check(self, context: int) -> None:
        """Raise BadInputError when a split is too short for one sequence of `context` tokens and its target."""
        for name, split in zip(SPLITS, (self.train, self.valid), strict=True):
            if len(split) <= context:
                need = f"a context of {context} needs at least {context + 1}"
                raise BadInputError(f"the corpus is too small: {len(split)} tokens for {name}, {need}")

    def batch(self, seed: int, step: int, sequences: int, context: int, part: slice = WHOLE) -> Tensor:
        """Return training batch number `step`, int64 [sequences, context + 1]: a pure function of the arguments.

        Only `part` of the batch is read and returned.
        """
        return _drawn(self.train, seed, step, sequences, context, part)

    def held_out(self, seed: int, number: int, sequences: int, context: int, part: slice = WHOLE) -> Tensor:
        """Return a batch drawn from the validation text like those of training from theirs."""
        return _drawn(self.valid, seed, number, sequences, context, part)

    def valid_batches(self, sequences: int, batch: int, context: int) -> list[Tensor]:
        """Return the fixed validation batches: up to `sequences` windows spread evenly, `batch` at a time."""
        most = (len(self.valid) - 1) // context
        starts = np.linspace(0, len(self.valid) - context - 1, min(sequences, most)).astype(np.int64)
        return list(torch.split(_windows(self.valid, starts, context), batch))


def identity(path: Path) -> tuple[int, int, int]:
    """What changes when a file is written or replaced."""
    about = path.stat()
    return about.st_ino, about.st_size, about.st_mtime_ns


@cache  # of a file that stays as it is: a process reads it once, however many runs it has
def _read_through(path: Path, dtype: np.dtype[Any], *_: int) -> tuple[str, int]:
    """A token file's SHA-256 and its largest token."""
    tokens, digest, largest = np.memmap(path, dtype, mode="r").view(np.ndarray), hashlib.sha256(), 0
    for start in range(0, len(tokens), PIECE):
        piece = tokens[start : start + PIECE]
        digest.update(piece.data)
        largest = max(largest, int(piece.max()))
    return digest.hexdigest(), largest


def _drawn(
    tokens: NDArray[np.unsignedinteger[Any]], seed: int, number: int, sequences: int, context: int, part: slice
) -> Tensor:
    return _windows(tokens, drawn(seed, number, len(tokens) - context, sequences)[part], context)


def drawn(seed: int, number: int, below: int, count: int) -> NDArray[np.int64]:
    """Random integers in [0, below): a pure function of the arguments."""
    random = np.random.Generator(np.random.Philox(key=np.array([seed, number], np.uint64)))
    return random.integers(0, below, size=count)


def _windows(tokens: NDArray[np.unsignedinteger[Any]], starts: NDArray[np.int64], context: int) -> Tensor:
    windows = tokens[starts[:, None] + np.arange(context + 1)]
    return torch.from_numpy(windows.astype(np.int64))
