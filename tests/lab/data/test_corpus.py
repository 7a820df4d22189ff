import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ademamix.lab.config import BadInputError, Data
from ademamix.lab.data.corpus import PIECE, _first, stdlib_tokens, write_data
from ademamix.lab.data.tokens import SPLITS, Tokens

TEXTS = [f"text number {i}, ünïcode too; " * 5 for i in range(40)]


def documents(folder: Path) -> dict[str, list[str]]:
    """What a token folder of bytes holds, for each split."""
    tokens = Tokens.open(folder)
    splits = {split: bytes(getattr(tokens, split)).decode().split("\0") for split in SPLITS}
    assert all(parts.pop() == "" for parts in splits.values())
    return splits


def write_jsonl(path: Path) -> Path:
    path.write_text("\n".join(json.dumps({"id": i, "body": text}) for i, text in enumerate(TEXTS)))
    return path


def write_parquet(path: Path) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS, "id": range(len(TEXTS))}), path)
    return path


def write_folder(path: Path) -> Path:
    (path / "deep").mkdir(parents=True)
    for i, text in enumerate(TEXTS):
        (path / ("deep" if i % 2 else "") / f"{i}.md").write_text(text)
    (path / ".hidden").write_text("not to be read")
    return path


KINDS = [
    (write_jsonl, False),
    (write_parquet, False),
    (write_folder, False),
    (write_jsonl, True),
    (write_parquet, True),
]


@pytest.mark.parametrize(("write", "hub"), KINDS)
def test_every_kind_of_source_gives_its_documents(write, hub, tmp_path):
    source = write(tmp_path / f"source.{write.__name__.removeprefix('write_')}")
    if hub:  # a dataset "by name" that lies on the disk
        folder = tmp_path / "dataset"
        folder.mkdir()
        source = f"hf:{source.rename(folder / source.name).parent}"
    meta = write_data(Data((str(source),), tmp_path / "out", text_key="body", valid_fraction=0.3))
    found = documents(tmp_path / "out")
    assert sorted(found["train"] + found["valid"]) == sorted(TEXTS)
    assert meta["sources"] == [str(source)]
    for split in SPLITS:
        tokens = (tmp_path / "out" / f"{split}.bin").read_bytes()
        assert meta[split] == {
            "documents": len(found[split]),
            "tokens": len(tokens),
            "sha256": hashlib.sha256(tokens).hexdigest(),
        }


def test_one_long_text_is_cut_at_line_ends(tmp_path):
    lines = [f"line {i} " + "x" * (i % 50) + "\n" for i in range(20_000)]
    (tmp_path / "long.txt").write_text("".join(lines))
    write_data(Data((str(tmp_path / "long.txt"),), tmp_path / "out"))
    found = documents(tmp_path / "out")
    pieces = found["train"] + found["valid"]
    assert all(piece.endswith("\n") and len(piece) < PIECE + 100 for piece in pieces)
    assert sum(len(piece) < PIECE for piece in pieces) <= 1  # the last one
    assert sorted("".join(pieces).splitlines(keepends=True)) == sorted(lines)


def test_a_document_that_occurs_often_is_on_one_side_only(tmp_path):
    for i in range(200):
        (tmp_path / f"{i}.txt").write_text(f"one of twenty texts: {i % 20}")
    write_data(Data((str(tmp_path),), tmp_path.parent / "out", valid_fraction=0.3))
    found = documents(tmp_path.parent / "out")
    assert len(found["train"]) + len(found["valid"]) == 200
    assert set(found["train"]).isdisjoint(found["valid"])


def test_the_split_is_the_same_in_any_order_and_about_the_asked_share(tmp_path):
    texts = [f"text {i}" for i in range(2000)]
    for name, order in (("a", texts), ("b", texts[::-1])):
        (tmp_path / name).write_text("\n".join(json.dumps({"text": text}) for text in order))
        (tmp_path / name).rename(tmp_path / f"{name}.jsonl")
        write_data(Data((str(tmp_path / f"{name}.jsonl"),), tmp_path / name, valid_fraction=0.1))
    a, b = documents(tmp_path / "a"), documents(tmp_path / "b")
    assert set(a["valid"]) == set(b["valid"])
    assert 150 < len(a["valid"]) < 250  # 200 +- 13.4


def test_a_tokenizer_file_with_its_end_of_document(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {f"w{i}": i for i in range(300)} | {"</s>": 300}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    texts = [f"w{i} w{i + 1} w299" for i in range(50)]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    settings = Data((str(tmp_path / "in.jsonl"),), tmp_path / "out", tmp_path / "tokenizer.json", valid_fraction=0.3)
    assert write_data(settings)["vocab_size"] == 301
    tokens = Tokens.open(tmp_path / "out")
    assert tokens.train.dtype == np.uint16
    rows = np.concatenate([tokens.train, tokens.valid]).reshape(-1, 4).tolist()
    assert sorted(rows) == [[i, i + 1, 299, 300] for i in range(50)]


def records(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.mark.parametrize("most", [4, 5, 100, 1000, 1010, 1011, 50_000, 100_989, 100_999, 101_000])
def test_max_tokens_are_the_first_tokens_of_each_split_and_no_more(most, tmp_path):
    source = records(tmp_path / "in.jsonl", [f"{i:0100}" for i in range(1000)])
    whole = write_data(Data((source,), tmp_path / "whole", valid_fraction=0.3))
    meta = write_data(Data((source,), tmp_path / "out", valid_fraction=0.3, max_tokens=most))
    assert meta["train"]["tokens"] + meta["valid"]["tokens"] == most
    in_all = whole["valid"]["tokens"]
    if max(2, round(0.3 * most)) <= in_all and most - round(0.3 * most) <= 101_000 - in_all:
        assert meta["valid"]["tokens"] == max(2, round(0.3 * most))
    for split in SPLITS:  # the same text on the same side
        tokens = (tmp_path / "out" / f"{split}.bin").read_bytes()
        assert (tmp_path / "whole" / f"{split}.bin").read_bytes().startswith(tokens)
        assert meta[split]["documents"] == -(-len(tokens) // 101)


@given(
    lengths=st.lists(st.tuples(st.sampled_from(SPLITS), st.integers(0, 9)), max_size=30),
    most=st.integers(1, 60),
    for_valid=st.integers(2, 70),
)
def test_a_limit_takes_as_much_as_there_is(lengths, most, for_valid):
    pieces = [(split, np.full(length, i, np.uint8), 1) for i, (split, length) in enumerate(lengths)]
    taken = [*_first(pieces, most, for_valid)]
    has = {split: sum(length for side, length in lengths if side == split) for split in SPLITS}
    got = {split: sum(len(tokens) for side, tokens, _ in taken if side == split) for split in SPLITS}
    assert sum(got.values()) == min(most, sum(has.values()))
    assert got["valid"] >= min(for_valid, has["valid"], most)
    if has["train"] >= most - for_valid:
        assert got["valid"] <= for_valid
    for split in SPLITS:
        whole, begin = ([t for side, part, _ in some if side == split for t in part] for some in (pieces, taken))
        assert whole[: len(begin)] == begin
        assert sum(begun for side, part, begun in taken if side == split and len(part)) == len(set(begin))


def test_more_max_tokens_than_there_are_take_everything(tmp_path):
    source = records(tmp_path / "in.jsonl", TEXTS)
    metas = [
        write_data(Data((source,), tmp_path / f"{m is None}", valid_fraction=0.3, max_tokens=m))
        for m in (None, 10**400)
    ]
    assert metas[0] == metas[1]


def test_one_long_line_is_enough_for_both_splits(tmp_path):
    (tmp_path / "in.txt").write_text("".join(f"{i} " for i in range(700_000)))
    meta = write_data(Data((str(tmp_path / "in.txt"),), tmp_path / "out"))
    # 4.7 MB are 290 documents, of which 5 % go to validation: 14.5 +- 3.7.
    assert 14.5 - 3 * 3.7 < meta["valid"]["documents"] < 14.5 + 3 * 3.7


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "of 0 documents none fell to train"),
        (["a" * 1000], "of 1 documents none fell to valid; give more documents or another --valid-fraction"),
        (["", ""], "of 0 documents none fell to train"),
    ],
)
def test_a_corpus_without_two_sides_is_refused_with_the_remedy(texts, message, tmp_path, capsys):
    source = records(tmp_path / "in.jsonl", texts)
    with pytest.raises(BadInputError, match=f"the corpus is too small: {message}"):
        write_data(Data((source,), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_side_of_documents_without_tokens_is_refused(tmp_path):
    from tokenizers import Tokenizer, models, normalizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.normalizer = normalizers.Replace("b", "")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    source = records(tmp_path / "in.jsonl", ["b" * n for n in range(1, 50)])
    with pytest.raises(BadInputError, match=r"of 49 documents \d+ fell to train, with 0 tokens"):
        write_data(Data((source,), tmp_path / "out", tmp_path / "tokenizer.json", valid_fraction=0.3))


def test_max_tokens_too_few_for_two_splits_are_refused(tmp_path):
    source = records(tmp_path / "in.jsonl", TEXTS)
    with pytest.raises(BadInputError, match="1 fell to train, with 1 tokens; give more than --max-tokens 3 or another"):
        write_data(Data((source,), tmp_path / "out", max_tokens=3))


# Sources and an --out that would lie in one of them, by whatever way. The folder `texts` is there, and `link` is a link
# to it; `above` is a link to the folder that holds all this.
INSIDE = [
    ("texts", "texts/out"),
    ("texts", "texts/deep/er/out"),
    ("texts", "texts/../texts/out"),
    ("texts", "link/out"),
    ("link", "texts/out"),
    ("link", "link/new/out"),
    ("link/", "link/../texts/out"),
    (".", "out"),
    (".", "texts/out"),
    ("above", "out"),
    ("above/texts", "link/out"),
    ("texts/..", "out"),
    ("hf:texts", "texts/out"),
    ("hf:texts:subset", "texts/out"),
]
EXISTS = [("texts", "texts"), ("texts", "link"), ("texts", "dangling"), ("texts/0.txt", "texts")]
EXISTS += [("texts", "loop"), ("texts", "texts/0.txt"), ("texts", ".."), ("texts", "made")]
BELOW_NO_FOLDER = [("texts", "texts/0.txt/out"), ("texts/0.txt", "hard.txt/new/out"), ("texts", "dangling/out")]
BELOW_NO_FOLDER += [("texts", "loop/out")]
REASONS = dict.fromkeys(INSIDE, "lies inside") | dict.fromkeys(EXISTS, "already exists")
REASONS |= dict.fromkeys(BELOW_NO_FOLDER, "is not a folder") | {
    ("texts", ""): "give --out, a folder that does not exist"
}
APART = [
    ("texts", "out"),
    ("texts", "texts/../out"),
    ("texts", "new/out"),
    ("link", "above/out"),
    ("texts", "made/out"),
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with texts and links to them, entered."""
    monkeypatch.chdir(tmp_path)
    write_data(Data((records(tmp_path / "in.jsonl", TEXTS),), Path("made"), valid_fraction=0.3))
    Path("texts").mkdir()
    for i, text in enumerate(TEXTS):
        Path("texts", f"{i}.txt").write_text(text)
    for name, target in {"link": "texts", "above": ".", "dangling": "nowhere", "loop": "loop"}.items():
        Path(name).symlink_to(target)
    Path("hard.txt").hardlink_to("texts/0.txt")
    return tmp_path


def everything(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


@pytest.mark.parametrize(("source", "out"), REASONS)
def test_an_out_that_meets_a_source_is_refused_and_nothing_is_written(source, out, place):
    before = everything(place)
    with pytest.raises(BadInputError, match=REASONS[source, out]):
        write_data(Data((source,), Path(out), valid_fraction=0.3))
    assert everything(place) == before


@pytest.mark.parametrize(("source", "out"), APART)
def test_an_out_apart_from_the_sources_is_written(source, out, place):
    write_data(Data((source,), Path(out), valid_fraction=0.3))
    found = documents(Path(out))
    assert sorted(found["train"] + found["valid"]) == sorted(TEXTS)


def test_what_was_read_and_left_out_is_said(tmp_path, capsys):
    write_folder(tmp_path / "texts")
    (tmp_path / "texts" / "link").symlink_to(tmp_path)
    write_data(Data((str(tmp_path / "texts"),), tmp_path / "out", valid_fraction=0.3))
    first, second = capsys.readouterr().out.splitlines()
    assert first == "text as bytes; a zero byte ends each document"
    assert second.startswith("40 files; skipped 1 hidden path (first: ")
    assert ", 1 linked folder (first: " in second


def test_what_was_left_out_is_said_of_a_corpus_that_is_too_small(tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "more").symlink_to(tmp_path)
    with pytest.raises(BadInputError, match="too small"):
        write_data(Data((str(tmp_path / "texts"),), tmp_path / "out"))
    assert "0 files; skipped 1 linked folder" in capsys.readouterr().out


@pytest.mark.parametrize("sources", [(), ("",), ("hf:",), ("in.jsonl", "")])
def test_an_empty_name_is_not_the_working_folder(sources, place):
    with pytest.raises(BadInputError, match="give at least one file, folder or hf:NAME to read, and no empty names"):
        write_data(Data(sources, Path("out")))


def test_an_end_token_goes_with_a_tokenizer(tmp_path):
    with pytest.raises(BadInputError, match="end_token goes with a tokenizer"):
        write_data(Data((records(tmp_path / "in.jsonl", TEXTS),), tmp_path / "out", end_token="</s>"))


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "good"}\nbad')
    with pytest.raises(Exception, match="line 2"):
        write_data(Data((str(tmp_path / "in.jsonl"),), tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_the_standard_library_is_made_once_and_holds_no_file_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("ADEMAMIX_CACHE", str(tmp_path))
    code = "from ademamix.lab.data.corpus import stdlib_tokens; print(stdlib_tokens())"
    together = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folder = stdlib_tokens()
    assert {process.communicate()[0].strip() for process in together} == {str(folder)}
    before = (folder / "train.bin").stat().st_mtime_ns
    assert stdlib_tokens() == folder
    assert (folder / "train.bin").stat().st_mtime_ns == before
    assert list(tmp_path.iterdir()) == [folder]
    found = documents(folder)
    assert set(found["train"]).isdisjoint(found["valid"])
    import argparse

    assert Path(argparse.__file__).read_text() in found["train"] + found["valid"]
    assert len(Tokens.open(folder).train) > 5_000_000
