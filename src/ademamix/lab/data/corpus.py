"""Text to token files: `ademamix data`, and the corpus that a run trains on by default."""

import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ademamix.backends.cache import cache_folder
from ademamix.lab.config import VALID_FRACTION, BadInputError, Data, to_json
from ademamix.lab.console import say
from ademamix.lab.data.encoders import Encoder, bytes_encoder, file_encoder
from ademamix.lab.data.sources import HUB, PIECE, Tally, documents_of, local_path, refuse_inside, state_of
from ademamix.lab.data.tokens import META, SPLITS, token_dtype
from ademamix.lab.files import another_may_win, written_aside

Piece = tuple[str, NDArray[np.unsignedinteger[Any]], int]  # a split, some of its tokens, and the documents begun there


def write_data(settings: Data) -> dict[str, Any]:
    """Carry out `ademamix data`; return what its data.json says.

    Raises:
        BadInputError: something in the settings or the sources cannot be used; nothing was written.
    """
    if not settings.sources or not all(source.removeprefix(HUB) for source in settings.sources):
        raise BadInputError("give at least one file, folder or hf:NAME to read, and no empty names")
    if not 0 < settings.valid_fraction < 1:
        raise BadInputError(f"valid_fraction must be between 0 and 1, got {settings.valid_fraction}")
    if settings.max_tokens is not None and settings.max_tokens < 1:
        raise BadInputError(f"max_tokens must be at least 1, got {settings.max_tokens}")
    if settings.out == Path():
        raise BadInputError("give --out, a folder that does not exist yet")
    if os.path.lexists(settings.out) or os.path.exists(os.path.realpath(settings.out)):  # new/.. is there too
        raise BadInputError(f"{settings.out} already exists; choose another --out")
    above = next(path for path in settings.out.absolute().parents if os.path.lexists(path))
    if not above.is_dir():
        raise BadInputError(f"cannot make --out {settings.out}: {above} is not a folder")
    refuse_inside(settings.out, *map(local_path, settings.sources))
    if settings.tokenizer is not None:
        encoder = file_encoder(settings.tokenizer, settings.end_token)
    elif settings.end_token is not None:
        raise BadInputError("end_token goes with a tokenizer; in bytes, a zero byte ends a document")
    else:
        encoder = bytes_encoder()
    tally = Tally()
    documents = documents_of(settings, tally)
    for line in encoder.about:
        say(line)
    sources = list(settings.sources)
    try:
        return write_tokens(settings.out, documents, encoder, sources, settings.valid_fraction, settings.max_tokens)
    finally:
        if tally.files or tally.skipped:
            say(str(tally))


def write_tokens(
    out: Path,
    documents: Iterable[str],
    encoder: Encoder,
    sources: list[str],
    valid_fraction: float,
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """Write a token folder, whole or not at all; return what its data.json says.

    Raises:
        BadInputError: one of the splits is too short for anything.
    """
    counts = {split: {"documents": 0, "tokens": 0} for split in SPLITS}
    digests = {split: hashlib.sha256() for split in SPLITS}
    pieces = _pieces(documents, encoder, valid_fraction)
    if max_tokens is not None:
        most = min(max_tokens, sys.maxsize)
        pieces = _first(pieces, most, max(2, round(most * valid_fraction)))
    with written_aside(out) as aside:
        with open(aside / "train.bin", "wb") as train, open(aside / "valid.bin", "wb") as valid:
            files = {"train": train, "valid": valid}
            for split, tokens, begun in pieces:
                files[split].write(tokens.data)
                digests[split].update(tokens.data)
                counts[split]["documents"] += begun
                counts[split]["tokens"] += len(tokens)
        for split in SPLITS:
            _refuse_short(split, counts, max_tokens)
        meta = {"tokenizer": encoder.name, "vocab_size": encoder.vocab_size, "sources": sources}
        meta |= {split: counts[split] | {"sha256": digests[split].hexdigest()} for split in SPLITS}
        to_json(aside / META, meta)
    return meta


def _refuse_short(split: str, counts: dict[str, dict[str, int]], max_tokens: int | None) -> None:
    documents, tokens = counts[split].values()
    if tokens >= 2:  # one to train on and one to predict
        return
    many = sum(count["documents"] for count in counts.values())
    held = f"{documents} fell to {split}, with {tokens} tokens" if documents else f"none fell to {split}"
    more = "more documents" if max_tokens is None else f"more than --max-tokens {max_tokens}"
    raise BadInputError(
        f"the corpus is too small: of {many} documents {held}; give {more} or another --valid-fraction; a text file "
        f"given by name is cut into documents of about {PIECE:,} characters"
    )


def _pieces(documents: Iterable[str], encoder: Encoder, valid_fraction: float) -> Iterator[Piece]:
    dtype = token_dtype(encoder.vocab_size)
    for texts in _parcels(documents):
        for text, ids in zip(texts, encoder.encode(texts), strict=True):
            yield "valid" if _share(text) < valid_fraction else "train", np.asarray(ids, dtype), 1


def _first(pieces: Iterable[Piece], most: int, for_valid: int) -> Iterator[Piece]:
    """Cut both splits short: `most` tokens in all, so many of them for validation as long as the corpus has them.

    What one split has too much is held until it is known whether the other needs its room.
    """
    room = {"train": max(0, most - for_valid), "valid": min(most, for_valid)}
    held: dict[str, list[Piece]] = {split: [] for split in SPLITS}
    holds = dict.fromkeys(SPLITS, 0)
    for split, tokens, begun in pieces:
        taken, rest = tokens[: room[split]], tokens[room[split] :]
        if room[split]:
            yield split, taken, begun
            room[split] -= len(taken)
            begun = 0
        if len(rest) and holds[split] < room[_other(split)]:
            held[split].append((split, rest, begun))
            holds[split] += len(rest)
        if not any(room.values()):
            return
    for split in SPLITS:
        left = room[_other(split)]
        for _, tokens, begun in held[split]:
            if left:
                yield split, tokens[:left], begun
                left -= len(tokens[:left])


def _other(split: str) -> str:
    return SPLITS[1 - SPLITS.index(split)]


def _share(text: str) -> float:
    """Return a number in [0, 1) that depends only on the text."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _parcels(documents: Iterable[str], size: int = 1 << 20) -> Iterator[list[str]]:
    """Group documents into lists of about `size` characters: enough for a tokenizer to use all cores."""
    parcel: list[str] = []
    held = 0
    for text in documents:
        parcel.append(text)
        held += len(text)
        if held >= size:
            yield parcel
            parcel, held = [], 0
    if parcel:
        yield parcel


def stdlib_tokens() -> Path:
    """Return the token folder of the standard library's own sources, made on first use.

    Its tests are left out: many distributions ship Python without them, and the same version should give the same
    corpus everywhere. The name of the folder is a hash of the files' names, sizes and times.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    leave = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - leave  # not entered: site-packages can be large
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    files.sort()
    if not files:
        raise BadInputError(f"this Python has no sources of its standard library in {root}; give --data")
    out = cache_folder() / f"stdlib-{state_of(files, root)}"
    if not out.exists():
        version = ".".join(map(str, sys.version_info[:3]))
        texts = (path.read_text(encoding="utf-8", errors="replace") for path in files)
        with another_may_win(out):
            write_tokens(out, texts, bytes_encoder(), [f"standard library of Python {version}"], VALID_FRACTION)
    return out
