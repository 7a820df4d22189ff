"""Text to token files: any text, JSONL or Parquet, a folder of those, or a Hugging Face dataset; streamed."""

import hashlib
import itertools
import json
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ademamix.backends.cache import cache_folder
from ademamix.lab.config import VALID_FRACTION, BadInputError, Data, to_json
from ademamix.lab.data.tokens import META, SPLITS, token_dtype
from ademamix.lab.files import another_may_win, written_aside

WHOLE_FILE = 1 << 20  # bytes up to which a text file in a folder is one document
PIECE = 1 << 14  # characters of a document cut from a longer text
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")  # what tokenizers call the end of a document


def write_data(settings: Data) -> dict[str, Any]:
    """Carry out `ademamix data`; return what its data.json says."""
    if not 0 < settings.valid_fraction < 1:
        raise BadInputError(f"valid_fraction must be between 0 and 1, got {settings.valid_fraction}")
    if settings.max_tokens is not None and settings.max_tokens < 1:
        raise BadInputError(f"max_tokens must be at least 1, got {settings.max_tokens}")
    if settings.out.exists():
        raise BadInputError(f"{settings.out} already exists; choose another --out")
    documents = itertools.chain.from_iterable(_documents(source, settings) for source in settings.sources)
    name = "bytes" if settings.tokenizer is None else str(settings.tokenizer)
    encode, vocab_size = byte_encoder() if settings.tokenizer is None else _file_encoder(settings.tokenizer)
    about = {"tokenizer": name, "vocab_size": vocab_size, "sources": list(settings.sources)}
    return write_tokens(settings.out, documents, encode, about, settings.valid_fraction, settings.max_tokens)


Encoder = Callable[[list[str]], list[Any]]  # documents -> the token ids of each, its end included


def byte_encoder() -> tuple[Encoder, int]:
    return lambda texts: [np.frombuffer(text.encode(errors="replace") + b"\0", np.uint8) for text in texts], 256


def _file_encoder(path: Path) -> tuple[Encoder, int]:
    from tokenizers import Tokenizer

    if not path.is_file():
        raise BadInputError(f"no such tokenizer file: {path}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise BadInputError(f"{path} is no tokenizer file ({error})") from error
    end = next((token for token in map(tokenizer.token_to_id, ENDS) if token is not None), None)
    tail = [] if end is None else [end]

    def encode(texts: list[str]) -> list[Any]:
        return [encoding.ids + tail for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]

    return encode, tokenizer.get_vocab_size()


def write_tokens(
    out: Path,
    documents: Iterable[str],
    encode: Encoder,
    about: dict[str, Any],
    valid_fraction: float,
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """Write a token folder, whole or not at all; return what its data.json says.

    Raises:
        BadInputError: one of the splits got no document.
    """
    counts = {split: {"documents": 0, "tokens": 0} for split in SPLITS}
    digests = {split: hashlib.sha256() for split in SPLITS}
    dtype = token_dtype(about["vocab_size"])
    with written_aside(out) as aside:
        with open(aside / "train.bin", "wb") as train, open(aside / "valid.bin", "wb") as valid:
            for texts in _parcels(documents):
                for text, ids in zip(texts, encode(texts), strict=True):
                    split, file = ("valid", valid) if _share(text) < valid_fraction else ("train", train)
                    tokens = np.asarray(ids, dtype).tobytes()
                    file.write(tokens)
                    digests[split].update(tokens)
                    counts[split]["documents"] += 1
                    counts[split]["tokens"] += len(ids)
                if max_tokens is not None and sum(count["tokens"] for count in counts.values()) >= max_tokens:
                    break
        empty = [split for split in SPLITS if not counts[split]["documents"]]
        if empty:
            many = sum(count["documents"] for count in counts.values())
            raise BadInputError(f"the corpus is too small: of {many} documents none fell to {empty[0]}")
        meta = about | {split: counts[split] | {"sha256": digests[split].hexdigest()} for split in SPLITS}
        to_json(aside / META, meta)
    return meta


def _share(text: str) -> float:
    """Return a number in [0, 1) that depends on the text alone."""
    digest = hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest()
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


def _documents(source: str, settings: Data) -> Iterator[str]:
    if source.startswith("hf:"):
        return _from_hub(source.removeprefix("hf:"), settings)
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path)))
        return itertools.chain.from_iterable(_from_file(file, settings.text_key, in_folder=True) for file in files)
    if not path.is_file():
        raise BadInputError(f"no such file or folder: {source} (a dataset of the Hugging Face hub is hf:NAME)")
    return _from_file(path, settings.text_key, in_folder=False)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _from_file(path: Path, key: str, *, in_folder: bool) -> Iterator[str]:
    if path.suffix == ".jsonl":
        return _from_jsonl(path, key)
    if path.suffix == ".parquet":
        return _from_parquet(path, key)
    return _from_text(path, whole=in_folder and path.stat().st_size <= WHOLE_FILE)


def _from_text(path: Path, *, whole: bool) -> Iterator[str]:
    with open(path, "rb") as file:
        if b"\0" in file.read(8192):
            raise BadInputError(f"{path} is not text: it holds zero bytes")
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        if whole:
            yield file.read()
        else:
            while lines := file.readlines(PIECE):
                yield "".join(lines)


def _from_jsonl(path: Path, key: str) -> Iterator[str]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield _text_of(json.loads(line.decode()), key)
                except (ValueError, TypeError, KeyError) as error:
                    raise BadInputError(f'{path}, line {number}: no JSON record with a text "{key}"') from error


def _from_parquet(path: Path, key: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if key not in file.schema_arrow.names:
                raise BadInputError(f'{path} has no column "{key}", only {", ".join(file.schema_arrow.names)}')
            for batch in file.iter_batches(columns=[key], batch_size=1024):
                yield from (text for text in batch.column(0).to_pylist() if text)
    except pyarrow.ArrowInvalid as error:
        raise BadInputError(f"{path} is no Parquet file ({error})") from error


def _from_hub(name: str, settings: Data) -> Iterator[str]:
    import datasets

    name, _, subset = name.partition(":")
    try:
        rows = datasets.load_dataset(name, subset or None, split=settings.split, streaming=True)
    except Exception as error:  # whatever the hub or the network raises, it is the name or the connection
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInputError(f'cannot read the dataset "{name}" ({reason})') from error
    for row in rows:
        try:
            yield _text_of(row, settings.text_key)
        except (TypeError, KeyError) as error:
            keys = ", ".join(row)
            raise BadInputError(f'the dataset "{name}" has no text "{settings.text_key}", only {keys}') from error


def _text_of(record: Any, key: str) -> str:
    text = record[key]
    if not isinstance(text, str):
        raise TypeError(f"{key} is no text")
    return text


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
    digest = hashlib.blake2b(digest_size=8)
    for path in files:  # reading them all would take half a second at every start
        stat = path.stat()
        digest.update(repr((str(path.relative_to(root)), stat.st_size, stat.st_mtime_ns)).encode())
    out = cache_folder() / f"stdlib-{digest.hexdigest()}"
    if not out.exists():
        encode, vocab_size = byte_encoder()
        version = ".".join(map(str, sys.version_info[:3]))
        about = {"tokenizer": "bytes", "vocab_size": vocab_size, "sources": [f"standard library of Python {version}"]}
        texts = (path.read_text(encoding="utf-8", errors="replace") for path in files)
        with another_may_win(out):
            write_tokens(out, texts, encode, about, VALID_FRACTION)
    return out
