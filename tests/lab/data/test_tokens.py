import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ademamix.lab.config import BadInputError
from ademamix.lab.data.tokens import SPLITS, Tokens, token_dtype


def test_the_smallest_type_that_holds_every_token():
    assert [token_dtype(n) for n in (256, 257, 65536, 65537)] == [np.uint8, np.uint16, np.uint16, np.uint32]


def test_batches_are_a_pure_function_of_seed_and_step(tokens):
    one, two = Tokens.open(tokens), Tokens.open(tokens)
    one.batch(1, 5, 4, 16)  # what was drawn before does not matter
    assert torch.equal(one.batch(3, 7, 4, 16), two.batch(3, 7, 4, 16))
    others = [one.batch(3, 8, 4, 16), one.batch(4, 7, 4, 16)]
    assert not any(torch.equal(one.batch(3, 7, 4, 16), other) for other in others)


def test_batches_are_windows_of_the_training_tokens_and_reach_both_ends():
    text = np.arange(20, dtype=np.uint8)
    data = Tokens(256, "", text, text)
    windows = torch.cat([data.batch(0, step, 8, 16) for step in range(50)])
    assert torch.equal(windows - windows[:, :1], torch.arange(17).expand(len(windows), -1))
    assert set(windows[:, 0].tolist()) == {0, 1, 2, 3}


def test_validation_batches_are_fixed_and_cover_the_text():
    text = np.arange(100, dtype=np.uint8)
    batches = Tokens(256, "", text, text).valid_batches(sequences=4, batch=3, context=9)
    assert [len(batch) for batch in batches] == [3, 1]
    assert torch.cat(batches)[:, 0].tolist() == [0, 30, 60, 90]
    assert batches[1][0, -1] == 99


def test_more_validation_sequences_than_the_text_has_are_not_repeated():
    text = np.arange(100, dtype=np.uint8)
    (batch,) = Tokens(256, "", text, text).valid_batches(sequences=1000, batch=1000, context=9)
    assert len(batch) == 11


def test_a_damaged_token_file_is_refused(tokens, tmp_path):
    for file in tokens.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "train.bin").write_bytes((tokens / "train.bin").read_bytes()[:-5])
    with pytest.raises(BadInputError, match="damaged"):
        Tokens.open(tmp_path)


@pytest.fixture
def copied(tokens, tmp_path) -> Path:
    """A copy of the token folder."""
    return Path(shutil.copytree(tokens, tmp_path / "tokens"))


@pytest.mark.parametrize("split", SPLITS)
def test_other_tokens_of_the_same_number_are_refused(split, copied):
    Tokens.open(copied)
    path = copied / f"{split}.bin"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadInputError, match=rf"{path} is damaged: its SHA-256 is not what data\.json says"):
        Tokens.open(copied)


def test_a_description_without_sums_is_refused(copied):
    meta = json.loads((copied / "data.json").read_text())
    del meta["valid"]["sha256"]
    (copied / "data.json").write_text(json.dumps(meta))
    with pytest.raises(BadInputError, match=r"valid\.bin is damaged: its SHA-256"):
        Tokens.open(copied)


def test_a_process_reads_a_file_through_once_as_long_as_it_stays_as_it_is(copied, monkeypatch):
    read = []
    memmap = np.memmap

    def counted(path, *args, **kwargs):
        read.append(Path(path).name)
        return memmap(path, *args, **kwargs)

    monkeypatch.setattr(np, "memmap", counted)
    for _ in range(3):
        Tokens.open(copied)
    assert read.count("train.bin") == 3 + 1  # mapped by each, and once more to be read
    os.utime(copied / "train.bin", ns=(0, 0))
    Tokens.open(copied)
    assert read.count("train.bin") == 4 + 2


def test_a_vocabulary_that_lacks_tokens_of_the_text_is_refused(copied):
    meta = json.loads((copied / "data.json").read_text())
    (copied / "data.json").write_text(json.dumps(meta | {"vocab_size": 50}))
    most = max((copied / "train.bin").read_bytes())
    with pytest.raises(BadInputError, match=f"train.bin has the token {most}, and a vocab_size of 50 ends at 49"):
        Tokens.open(copied)
    (copied / "data.json").write_text(json.dumps(meta | {"vocab_size": most + 1}))
    assert Tokens.open(copied).vocab_size == most + 1


@pytest.mark.parametrize("split", SPLITS)
def test_a_folder_without_tokens_for_a_split_is_too_small(split, tokens, tmp_path):
    for file in tokens.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / f"{split}.bin").write_bytes(b"")
    meta = json.loads((tmp_path / "data.json").read_text())
    (tmp_path / "data.json").write_text(json.dumps(meta | {split: {"tokens": 0}}))
    with pytest.raises(BadInputError, match=f"the corpus is too small: .* has no tokens for {split}"):
        Tokens.open(tmp_path)


def test_a_corpus_shorter_than_one_sequence_is_refused():
    data = Tokens(256, "", np.zeros(100, np.uint8), np.zeros(16, np.uint8))
    data.check(15)
    with pytest.raises(BadInputError, match="too small: 16 tokens for valid, a context of 16 needs at least 17"):
        data.check(16)


@pytest.mark.parametrize("text", ["[]", "{", '{"vocab_size": "many"}', '{"vocab_size": 256, "train": 3, "valid": 3}'])
def test_a_description_of_another_kind_is_refused(text, tokens, tmp_path):
    for file in tokens.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(BadInputError, match="is not a token folder"):
        Tokens.open(tmp_path)


@pytest.mark.parametrize("vocab_size", [0, -1, True, 1.5, 2**70, None])
def test_a_vocabulary_size_that_is_none(vocab_size, tmp_path):
    (tmp_path / "data.json").write_text(json.dumps({"vocab_size": vocab_size}))
    with pytest.raises(BadInputError, match=r"is not a token folder .vocab_size must be an integer from 1 to"):
        Tokens.open(tmp_path)


def test_a_deep_description_and_an_empty_file(tmp_path):
    (tmp_path / "data.json").write_text("[" * 100_000)
    with pytest.raises(BadInputError, match="is not a token folder"):
        Tokens.open(tmp_path)
    splits = {"train": {"tokens": 3}, "valid": {"tokens": 3}}
    (tmp_path / "data.json").write_text(json.dumps({"vocab_size": 256, **splits}))
    for split in splits:
        (tmp_path / f"{split}.bin").touch()
    with pytest.raises(BadInputError, match=r"train\.bin is empty"):
        Tokens.open(tmp_path)
