"""The table of docs/how-to/data.md, cell by cell: every kind of value in every kind of source."""

import gzip
import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from ademamix.lab.config import BadInputError, Data
from ademamix.lab.data.sources import PIECE, WHOLE_FILE, Tally, documents_of

DEEP = object()  # a value too deep for any parser
NOT_A_RECORD = object()
MISSING = object()

# What happens to a value: it is a document, it is left out and counted, or it is an error with this reason.
TAKEN, LEFT_OUT = "taken", "left out"
TABLE = {
    "text": ("a text, with ünïcode \U0001f600", TAKEN),
    "white space": (" \n", TAKEN),
    "byte-order mark within a text": ("a\ufeffb", TAKEN),
    "empty text": ("", LEFT_OUT),
    "null": (None, LEFT_OUT),
    "missing": (MISSING, "it has only other"),
    "number": (3, "it is of type int"),
    "fraction": (0.5, "it is of type float"),
    "bool": (True, "it is of type bool"),
    "list": (["a"], "it is of type list"),
    "struct": ({"a": "b"}, "it is of type dict"),
    "bytes": (b"a", "it is of type bytes"),
    "lone surrogate": ("a\ud800", r"it holds a lone surrogate, '\\ud800'"),
    "zero": ("a\0b", "it holds a zero byte"),
    "deep": (DEEP, "it is nested too deeply"),
    "no record": (NOT_A_RECORD, "it is of type list"),
}
IMPOSSIBLE = {  # what a source cannot hold
    "jsonl": {"bytes"},
    "parquet": {"lone surrogate", "deep", "no record", "missing"},  # a missing column is a test of its own
    "hub": {"deep", "no record"},
}


def write_jsonl(folder: Path, value: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    line = '{"other": 1}' if value is MISSING else json.dumps({"text": value}, default=lambda _: 0)
    line = f'{{"text": {"[" * 100_000}{"]" * 100_000}}}' if value is DEEP else line
    line = "[1]" if value is NOT_A_RECORD else line
    (folder / "in.jsonl").write_text('{"text": "first"}\n' + line + "\n")
    return str(folder / "in.jsonl")


def write_parquet(folder: Path, value: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    first = "first" if value is None or isinstance(value, str) else value  # a column has one type
    pyarrow.parquet.write_table(pyarrow.table({"text": [first, value]}), folder / "in.parquet")
    return str(folder / "in.parquet")


def stream(folder: Path, value: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    rows = [{"text": "first"}, {"other": 1} if value is MISSING else {"text": value}]
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: iter(rows))
    return "hf:some/dataset"


SOURCES = {"jsonl": write_jsonl, "parquet": write_parquet, "hub": stream}
CELLS = [(source, kind) for source in SOURCES for kind in TABLE if kind not in IMPOSSIBLE[source]]


@pytest.mark.parametrize(("source", "kind"), CELLS)
def test_a_value_means_the_same_in_every_source(source, kind, tmp_path, monkeypatch):
    value, expected = TABLE[kind]
    tally = Tally()
    documents = documents_of(Data((SOURCES[source](tmp_path, value, monkeypatch),), Path("out")), tally)
    if expected == TAKEN:
        assert list(documents) == ["first", value]
    elif expected == LEFT_OUT:
        assert list(documents) == ["first"]
        assert re.search(r"1 empty or null text \(first: .*(line|record) 2\)", str(tally))
    else:
        for python, arrow in (
            (("float", "double"), ("dict", "struct"), ("bytes", "binary")) if source == "parquet" else ()
        ):
            expected = expected.replace(f"of type {python}", f"of type {arrow}")
        with pytest.raises(BadInputError, match=rf"(line|record) [12]: no .*text \"text\" \({expected}"):
            list(documents)


def read(*sources: Path | str, tally: Tally | None = None) -> list[str]:
    return list(documents_of(Data(tuple(map(str, sources)), Path("out")), tally or Tally()))


TYPES = {
    "large": pyarrow.large_string(),
    "view": pyarrow.string_view(),
    "dictionary": pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
}


@pytest.mark.parametrize("kind", TYPES)
def test_every_kind_of_string_column_is_text(kind, tmp_path):
    texts = ["ein text", "noch einer", "ein text"]
    column = pyarrow.array([*texts, None, ""]).cast(TYPES[kind])
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "in.parquet")
    tally = Tally()
    assert read(tmp_path / "in.parquet", tally=tally) == texts
    assert "2 empty or null texts" in str(tally)


def columns(*names: str) -> pyarrow.Table:
    return pyarrow.table([["a"]] * len(names), names=list(names))


def bad_bytes() -> pyarrow.Table:
    buffers = pyarrow.array([b"good", b"\xff"]).buffers()
    return pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.string(), 2, buffers)})


BAD_PARQUET = {
    'has no column "text", only id, body': lambda: columns("id", "body"),
    'has more than one column "text"': lambda: columns("text", "text"),
    'has no column "text", only a.text': lambda: columns("a.text"),
    "is damaged after record 2 .*0xff": bad_bytes,
}


@pytest.mark.parametrize("message", BAD_PARQUET)
def test_a_parquet_file_without_one_column_of_text_is_named(message, tmp_path):
    pyarrow.parquet.write_table(BAD_PARQUET[message](), tmp_path / "in.parquet")
    with pytest.raises(BadInputError, match=f"in.parquet {message}"):
        read(tmp_path / "in.parquet")


def test_a_damaged_page_is_named(tmp_path):
    texts = [os.urandom(50).hex() for _ in range(3000)]
    path = tmp_path / "in.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, use_dictionary=False, compression="snappy")
    data = bytearray(path.read_bytes())
    data[2000:2600] = bytes(600)
    path.write_bytes(data)
    with pytest.raises(BadInputError, match=r"in\.parquet is damaged after record 0"):
        read(path)


@pytest.mark.parametrize("cut", [0, 3, 200])
def test_what_is_not_parquet_is_named(cut, tmp_path):
    pyarrow.parquet.write_table(columns("text"), tmp_path / "in.parquet")
    (tmp_path / "in.parquet").write_bytes((tmp_path / "in.parquet").read_bytes()[:cut])
    with pytest.raises(BadInputError, match=r"in\.parquet is not a Parquet file"):
        read(tmp_path / "in.parquet")


def test_a_dataset_that_breaks_off_is_named(monkeypatch):
    def rows() -> Iterator[dict[str, str]]:
        yield {"text": "first"}
        raise RuntimeError("an error while generating") from ConnectionError("the line is dead")

    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows())
    with pytest.raises(BadInputError, match=r'record 2 of the dataset "a/b" \(the line is dead\)'):
        read("hf:a/b")


RECORD = json.dumps({"text": "a record"})


@pytest.mark.parametrize("suffix", [".jsonl", ".JSONL", ".ndjson", ".Ndjson", ".json", ".JSON"])
def test_json_lines_are_known_by_any_of_their_names(suffix, tmp_path):
    (tmp_path / f"in{suffix}").write_text(f"{RECORD}\r\n\n{RECORD}")
    assert read(tmp_path / f"in{suffix}") == ["a record"] * 2


NOT_LINES = {
    "one array": f"[{RECORD}]",
    "one array over several lines": f"[\n{RECORD}\n]",
    "one object over several lines": json.dumps({"text": "a"}, indent=1),
    "two records in a line": RECORD * 2,
    "an endless number": f'{{"text": "a", "id": {"9" * 5000}}}',
    "no JSON": "text",
}


@pytest.mark.parametrize("kind", NOT_LINES)
def test_json_that_is_not_one_object_per_line_is_refused(kind, tmp_path):
    (tmp_path / "in.json").write_text(NOT_LINES[kind])
    with pytest.raises(BadInputError, match=r"in.json, line 1: no JSON .*each line must be one object"):
        read(tmp_path / "in.json")


def test_a_parquet_file_is_known_by_its_name_in_capitals(tmp_path):
    pyarrow.parquet.write_table(columns("text"), tmp_path / "IN.PARQUET")
    assert read(tmp_path / "IN.PARQUET") == ["a"]


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "zstd": lambda data: pyarrow.compress(data, "zstd", asbytes=True),
    "parquet": lambda _: b"PAR1" + bytes(range(128, 256)),
    "latin": lambda data: data + "é".encode("latin1"),
}


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("name", ["in.jsonl", "in.txt", "in.jsonl.gz", "in.parquet.zst", "in"])
def test_what_is_not_utf8_is_refused_whatever_its_name(kind, name, tmp_path):
    (tmp_path / name).write_bytes(PACKED[kind](RECORD.encode()))
    for source in (tmp_path / name, tmp_path):
        with pytest.raises(BadInputError, match=rf"{name}.*(not UTF-8; convert it, or unpack it first|zero byte)"):
            read(source)


@pytest.mark.parametrize("end", [b"\xe9 and more", b"\xe9"])
@pytest.mark.parametrize("before", [0, 1, 8191, 8192, 8193, 40_001])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_the_place_of_a_byte_that_is_not_utf8_is_named(mark, before, end, tmp_path):
    data = mark + ("ä" * before).encode() + end
    (tmp_path / "in.txt").write_bytes(data)
    for source in (tmp_path / "in.txt", tmp_path):
        with pytest.raises(
            BadInputError, match=r"in.txt is not text \(byte 0xe9 at position ([\d,]+) is not"
        ) as caught:
            read(source)
        assert f"position {data.index(0xE9):,} is" in str(caught.value)


@pytest.mark.parametrize("name", ["in.txt", "in.jsonl"])
def test_a_byte_order_mark_is_not_text(name, tmp_path):
    (tmp_path / name).write_text(RECORD, encoding="utf-8-sig")
    assert read(tmp_path / name) == [RECORD if name == "in.txt" else "a record"]


@pytest.mark.parametrize("name", ["in.txt", "in.jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_other_encodings_are_named_by_their_byte_order_mark(encoding, name, tmp_path):
    (tmp_path / name).write_text("\ufeff" + RECORD, encoding=encoding)
    with pytest.raises(BadInputError, match=f"{name} is UTF-16 or UTF-32, as its byte-order mark says"):
        read(tmp_path / name)


@pytest.mark.parametrize("before", [0, 8192, WHOLE_FILE])
def test_a_zero_byte_is_found_wherever_it_stands(before, tmp_path):
    (tmp_path / "in.txt").write_bytes(b"a" * before + b"\0")
    for source in (tmp_path / "in.txt", tmp_path):
        with pytest.raises(BadInputError, match=r"in.txt is not text \(it holds a zero byte\)"):
            read(source)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\x85", "\u2028"])
def test_line_ends_stay_what_they_are(end, tmp_path):
    text = end.join(f"line {i}" for i in range(5000))
    (tmp_path / "in.txt").write_bytes(text.encode())
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False), newline="")
    assert "".join(read(tmp_path / "in.txt")) == text
    assert read(tmp_path / "in.jsonl") == [text]
    assert read(tmp_path) == [text] * 2


def test_a_line_longer_than_a_piece_is_cut(tmp_path):
    text = "".join(f"{i} " for i in range(50_000)) + "\nshort\n"
    (tmp_path / "in.txt").write_text(text)
    pieces = read(tmp_path / "in.txt")
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 2 * PIECE
    assert len(pieces) >= len(text) // (PIECE + 1)


def test_nothing_in_a_folder_is_left_out_without_a_word(tmp_path):
    folder, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    for path in (folder / "sub", folder / ".git" / "deep", elsewhere):
        path.mkdir(parents=True)
        (path / "a.txt").write_text(path.name)
    (folder / "empty.txt").touch()
    (folder / "linked.txt").symlink_to(elsewhere / "a.txt")
    (folder / "gone.txt").symlink_to("nothing.txt")
    (folder / "loop").symlink_to("loop")
    (folder / "sub" / "up").symlink_to("..")
    (folder / "other").symlink_to(elsewhere)
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "sub" / "socket"))
        tally = Tally()
        assert read(folder, tally=tally) == ["elsewhere", "sub"]
    line = str(tally)
    for part in (
        f"3 files, 1 link among them (first: {folder}/linked.txt -> {elsewhere}/a.txt); skipped ",
        f"1 hidden path (first: {folder}/.git)",
        f"2 linked folders (first: {folder}/other)",
        f"2 broken links (first: {folder}/gone.txt)",
        f"2 special files (first: {folder}/pipe)",
        f"1 empty or null text (first: {folder}/empty.txt)",
    ):
        assert part in line


def test_a_folder_that_may_not_be_read_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "locked").mkdir()

    def refusing(path: Path) -> Iterator[Path]:
        if path.name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return map(path.joinpath, os.listdir(path))

    monkeypatch.setattr(Path, "iterdir", refusing)  # root may read everything
    with pytest.raises(PermissionError):
        read(tmp_path)


def test_a_link_to_a_folder_is_a_source_like_the_folder(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    (tmp_path / "link").symlink_to("texts")
    (tmp_path / "link.txt").symlink_to("texts/a.txt")
    assert read(tmp_path / "link", tmp_path / "link.txt") == ["a", "a"]


def test_a_pipe_by_name_is_refused_and_nothing_hangs(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadInputError, match="pipe is neither a file nor a folder"):
        read(tmp_path / "pipe")


def test_every_source_is_looked_up_before_one_is_read(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(BadInputError, match="no such file or folder: nowhere"):
        read(tmp_path / "bad.txt", "nowhere")


@pytest.mark.parametrize("kind", ["date32", "date64", "timestamp"])
def test_a_date_that_python_does_not_have_is_no_text(kind, tmp_path):
    number = (
        pyarrow.array([None, 2**31 - 1], pyarrow.int32())
        if kind == "date32"
        else pyarrow.array([None, 2**60], pyarrow.int64())
    )
    column = number.cast(
        {"date32": pyarrow.date32(), "date64": pyarrow.date64(), "timestamp": pyarrow.timestamp("us")}[kind]
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "in.parquet")
    with pytest.raises(BadInputError, match=r"in.parquet, record 2: no text \"text\" \(it is of type (date|timestamp)"):
        list(documents_of(Data((str(tmp_path / "in.parquet"),), Path("out")), Tally()))


def test_a_page_that_its_checksum_does_not_fit_is_no_text(tmp_path):
    path = tmp_path / "in.parquet"
    texts = pyarrow.table({"text": [f"number {n}" for n in range(100)]})
    pyarrow.parquet.write_table(texts, path, write_page_checksum=True, compression="none", use_dictionary=False)
    path.write_bytes(path.read_bytes().replace(b"number 77", b"Xumber 77", 1))
    with pytest.raises(BadInputError, match=r"in.parquet is (damaged|no Parquet file)"):
        list(documents_of(Data((str(path),), Path("out")), Tally()))
