"""Documents of text from files, folders and datasets: every source follows the same rules (docs/how-to/data.md)."""

import codecs
import hashlib
import io
import itertools
import json
import os
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from ademamix.lab.config import BadInputError, Data

HUB = "hf:"
WHOLE_FILE = 1 << 20  # bytes up to which a text file in a folder is one document
PIECE = 1 << 14  # characters of a document cut from a longer text
WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)  # that of UTF-32 LE begins like UTF-16's

Value = tuple[Any, str, str]  # what a record holds as its text, where it stands, and what to say where it is not text


class Tally:
    """How many files there are, how many of them are links, and what was left out: how often, and where first."""

    def __init__(self) -> None:
        self.files = 0
        self.linked: list[Path] = []
        self.skipped: dict[str, tuple[int, str]] = {}

    def skip(self, kind: str, where: object) -> None:
        count, first = self.skipped.get(kind, (0, str(where)))
        self.skipped[kind] = (count + 1, first)

    def __str__(self) -> str:
        kinds = [f"{_counted(count, kind)} (first: {first})" for kind, (count, first) in self.skipped.items()]
        files = _counted(self.files, "file")
        if self.linked:
            first = f"{self.linked[0]} -> {os.path.realpath(self.linked[0])}"
            files += f", {_counted(len(self.linked), 'link')} among them (first: {first})"
        return f"{files}; skipped {', '.join(kinds) or 'nothing'}"


def _counted(count: int, kind: str) -> str:
    return f"{count:,} {kind}{'s' * (count != 1)}"


def documents_of(settings: Data, tally: Tally) -> Iterator[str]:
    """Return the documents of all sources, in order; every source is looked up before the first one is read.

    Raises:
        BadInputError: a source is missing, damaged, or holds something that is not text.
    """
    values = [_values(source, settings, tally) for source in settings.sources]
    return _texts(itertools.chain.from_iterable(values), tally)


def files_in(folder: Path, tally: Tally) -> list[Path]:
    """Return all files below a folder, sorted. Links to files are followed; the tally has what was left out."""
    files, folders = [], [folder]
    while folders:
        for path in sorted(folders.pop().iterdir()):
            if path.name.startswith("."):
                tally.skip("hidden path", path)
            elif path.is_dir() and path.is_symlink():
                tally.skip("linked folder", path)
            elif path.is_dir():
                folders.append(path)
            elif path.is_file():
                files.append(path)
                tally.linked += [path] if path.is_symlink() else []
            else:
                tally.skip("special file" if path.exists() else "broken link", path)
    return sorted(files)


def local_path(source: str) -> Path:
    """Where a source lies, if it is not a dataset of the hub: hf:NAME may be a folder too."""
    return Path(source.removeprefix(HUB).partition(":")[0] if source.startswith(HUB) else source)


def state_of(files: Iterable[Path], root: Path) -> str:
    """A hash of files' names below a folder, their sizes and times: reading them all would take too long at a start."""
    digest = hashlib.blake2b(digest_size=8)
    for path in files:
        stat = path.stat()
        digest.update(repr((str(path.relative_to(root)), stat.st_size, stat.st_mtime_ns)).encode())
    return digest.hexdigest()


def refuse_inside(out: Path, *sources: Path) -> None:
    """Raise BadInputError when `out` would lie inside a source, whatever links lead there: it would be read as one."""
    above = [path for path in Path(os.path.realpath(out)).parents if path.exists()]
    for source in sources:
        if source.exists() and any(source.samefile(path) for path in above):
            raise BadInputError(f"--out {out} lies inside {source}, which is read; choose an --out elsewhere")


def first_line(error: BaseException) -> str:
    """The first line of an error of another library, or its name where it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _texts(values: Iterable[Value], tally: Tally) -> Iterator[str]:
    for value, where, lack in values:
        if value is None or value == "":
            tally.skip("empty or null text", where)
        elif not isinstance(value, str):
            raise BadInputError(f"{where}{lack} (it is of type {type(value).__name__})")
        elif "\0" in value:  # ends a document where text is bytes
            raise BadInputError(f"{where}{lack} (it holds a zero byte)")
        else:
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise BadInputError(f"{where}{lack} (it holds a lone surrogate, {value[error.start]!a})") from error
            yield value


def _values(source: str, settings: Data, tally: Tally) -> Iterator[Value]:
    if source.startswith(HUB):
        return _from_hub(source.removeprefix(HUB), settings)
    path = Path(source)
    if path.is_dir():
        files = files_in(path, tally)
    elif path.is_file():
        files = [path]
    elif path.exists():
        raise BadInputError(f"{source} is neither a file nor a folder")
    else:
        raise BadInputError(f"no such file or folder: {source} (a dataset of the Hugging Face hub is hf:NAME)")
    tally.files += len(files)
    return itertools.chain.from_iterable(_from_file(file, settings.text_key, file != path) for file in files)


def _from_file(path: Path, key: str, in_folder: bool) -> Iterator[Value]:
    kind = path.suffix.lower()
    if kind in (".jsonl", ".ndjson", ".json"):
        return _from_jsonl(path, key)
    if kind == ".parquet":
        return _from_parquet(path, key)
    return _from_text(path, whole=in_folder and path.stat().st_size <= WHOLE_FILE)


@contextmanager
def _utf8(path: Path) -> Iterator[BinaryIO]:
    """Open a file after its byte-order mark."""
    with open(path, "rb") as file:
        head = file.read(4)
        if head.startswith(WIDE):
            raise BadInputError(f"{path} is UTF-16 or UTF-32, as its byte-order mark says; convert it to UTF-8")
        file.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
        yield file


def _from_text(path: Path, *, whole: bool) -> Iterator[Value]:
    lack = " is not text"
    with _utf8(path) as file:
        text = io.TextIOWrapper(file, "utf-8", newline="")
        try:
            yield text.read() if whole else _piece(text), str(path), lack
            while piece := _piece(text):
                yield piece, str(path), lack
        except UnicodeDecodeError as error:
            start = file.tell() - len(error.object)  # of what was being decoded
            raise BadInputError(f"{path}{lack} ({_not_utf8(error, start)})") from error


def _piece(text: TextIO) -> str:
    """The next lines, whole ones where they are not longer than a piece."""
    lines, held = [], 0
    while held <= PIECE and (line := text.readline(PIECE + 1)):
        lines.append(line)
        held += len(line)
    return "".join(lines)


def _not_utf8(error: UnicodeDecodeError, start: int = 0) -> str:
    at = start + error.start
    return f"byte 0x{error.object[error.start]:02x} at position {at:,} is not UTF-8; convert it, or unpack it first"


def _from_jsonl(path: Path, key: str) -> Iterator[Value]:
    lack = f': no JSON record with a text "{key}"'
    with _utf8(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line.decode())
            except UnicodeDecodeError as error:
                raise BadInputError(f"{where}{lack} ({_not_utf8(error)})") from error
            except RecursionError as error:
                raise BadInputError(f"{where}{lack} (it is nested too deeply)") from error
            except ValueError as error:
                reason = f"{getattr(error, 'msg', error)}; each line must be one object"
                raise BadInputError(f"{where}{lack} ({reason})") from error
            if not isinstance(record, dict):
                reason = f"it is of type {type(record).__name__}; each line must be one object"
                raise BadInputError(f"{where}{lack} ({reason})")
            yield _field(record, key, where + lack), where, lack


def _field(record: dict[str, Any], key: str, lack: str) -> Any:
    if key not in record:
        raise BadInputError(
            f"{lack} ({textwrap.shorten('it has only ' + ', '.join(record), 200) if record else 'it has none'})"
        )
    return record[key]


def _from_parquet(path: Path, key: str) -> Iterator[Value]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
        names = file.schema_arrow.names
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise BadInputError(f"{path} is not a Parquet file ({first_line(error)})") from error
    with file:
        if names.count(key) != 1:
            found = "more than one" if key in names else "no"
            only = textwrap.shorten(", ".join(names), 200)
            raise BadInputError(f'{path} has {found} column "{key}", only {only}')
        number, lack = 0, f': no text "{key}"'
        kind = file.schema_arrow.field(key).type
        try:
            for batch in file.iter_batches(columns=[key], batch_size=1024):
                for value in batch.column(key):
                    number += 1
                    where = f"{path}, record {number}"
                    if value.is_valid and not _is_text(kind):  # not every value of other types is one of Python's too
                        raise BadInputError(f"{where}{lack} (it is of type {kind})")
                    yield value.as_py() if value.is_valid else None, where, lack
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise BadInputError(f"{path} is damaged after record {number} ({first_line(error)})") from error


def _is_text(kind: Any) -> bool:
    """Whether an Arrow type is text."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return any(is_kind(kind) for is_kind in (types.is_string, types.is_large_string, types.is_string_view))


def _from_hub(name: str, settings: Data) -> Iterator[Value]:
    import datasets

    name, _, subset = name.partition(":")
    try:
        rows = iter(datasets.load_dataset(name, subset or None, split=settings.split, streaming=True))
    except Exception as error:  # whatever the hub or the network raises, it is the name or the connection
        raise BadInputError(f'cannot read the dataset "{name}" ({first_line(error)})') from error
    return _from_rows(rows, name, settings.text_key)


def _from_rows(rows: Iterator[dict[str, Any]], name: str, key: str) -> Iterator[Value]:
    for number in itertools.count(1):
        try:
            row = next(rows, None)
        except Exception as error:
            reason = first_line(error.__cause__ or error)
            raise BadInputError(f'cannot read record {number} of the dataset "{name}" ({reason})') from error
        if row is None:
            return
        where, lack = f'the dataset "{name}", record {number}', f': no text "{key}"'
        yield _field(row, key, where + lack), where, lack
