import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from ademamix.lab.config import Data
from ademamix.lab.data.corpus import PIECE, stdlib_tokens, write_data
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


def test_max_tokens_stops_a_source_that_never_ends(tmp_path):
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"text": f"{i:0100}"}) for i in range(100_000)))
    meta = write_data(Data((str(tmp_path / "in.jsonl"),), tmp_path / "out", max_tokens=1_000_000))
    assert 1_000_000 <= meta["train"]["tokens"] + meta["valid"]["tokens"] < 2_100_000


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
