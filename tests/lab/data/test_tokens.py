import json

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
    with pytest.raises(BadInputError, match="is no token folder"):
        Tokens.open(tmp_path)


@pytest.mark.parametrize("vocab_size", [0, -1, True, 1.5, 2**70, None])
def test_a_vocabulary_size_that_is_none(vocab_size, tmp_path):
    (tmp_path / "data.json").write_text(json.dumps({"vocab_size": vocab_size}))
    with pytest.raises(BadInputError, match=r"is no token folder .vocab_size must be an integer from 1 to"):
        Tokens.open(tmp_path)


def test_a_deep_description_and_an_empty_file(tmp_path):
    (tmp_path / "data.json").write_text("[" * 100_000)
    with pytest.raises(BadInputError, match="is no token folder"):
        Tokens.open(tmp_path)
    splits = {"train": {"tokens": 3}, "valid": {"tokens": 3}}
    (tmp_path / "data.json").write_text(json.dumps({"vocab_size": 256, **splits}))
    for split in splits:
        (tmp_path / f"{split}.bin").touch()
    with pytest.raises(BadInputError, match=r"train\.bin is empty"):
        Tokens.open(tmp_path)
