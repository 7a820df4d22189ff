import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from ademamix.lab.config import BadInputError
from ademamix.lab.data.encoders import ENDS, Encoder, bytes_encoder, file_encoder

END = "<|endoftext|>"
LETTERS = [*"abcdefghijklmnopqrstuvwxyz<>|/[]SEP ▁"]


def bpe(**settings: Any) -> Tokenizer:
    """Bytes, with a merge of `a` and `b`, and an end of a document."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*alphabet, "ab"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b")], **settings))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([END])
    return tokenizer


def words(*names: str, **ids: int) -> Tokenizer:
    """Words between white space."""
    vocabulary = {name: i for i, name in enumerate(("<unk>", *names))} | ids
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def encoder(tokenizer: Tokenizer, tmp_path: Path, end: str | None = None, **changes: Any) -> Encoder:
    """Save a tokenizer, with other settings in its file, and read it."""
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(tokenizer.to_str()) | changes))
    return file_encoder(path, end)


def ids(found: Encoder, *texts: str) -> list[list[int]]:
    return [list(tokens) for tokens in found.encode(list(texts))]


A, AB, IN_BPE = ord("a") - 33, 256, 257  # ByteLevel's alphabet begins with the printable characters from "!" on


def test_text_is_encoded_and_ended(tmp_path):
    found = encoder(bpe(), tmp_path)
    assert ids(found, "ab", "aab") == [[AB, IN_BPE], [A, AB, IN_BPE]]
    assert (found.vocab_size, found.about) == (258, (f"{END} (token 257) ends each document",))


LONG, SHORT = "ab" * 50, "a"


def truncated(tokenizer: Tokenizer) -> None:
    tokenizer.enable_truncation(3)


def padded(tokenizer: Tokenizer) -> None:
    tokenizer.enable_padding(length=200, pad_id=5)


def padded_to_the_longest(tokenizer: Tokenizer) -> None:
    tokenizer.enable_padding(pad_to_multiple_of=8)


def in_a_template(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(f"{END} $A $A", special_tokens=[(END, IN_BPE)])


def with_dropout(tokenizer: Tokenizer) -> None:
    tokenizer.model.dropout = 0.5


def with_ends_of_its_own(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.BertProcessing((END, IN_BPE), (END, IN_BPE))


@pytest.mark.parametrize(
    "change", [truncated, padded, padded_to_the_longest, in_a_template, with_dropout, with_ends_of_its_own]
)
def test_settings_that_are_not_the_texts_have_no_effect(change, tmp_path):
    tokenizer = bpe()
    change(tokenizer)
    assert ids(encoder(tokenizer, tmp_path), LONG, SHORT) == [[AB] * 50 + [IN_BPE], [A, IN_BPE]]


def test_a_normalizer_has_its_effect(tmp_path):
    tokenizer = bpe()
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    assert ids(encoder(tokenizer, tmp_path), "ＡB") == [[AB, IN_BPE]]  # noqa: RUF001


def test_added_tokens_that_are_no_control_tokens_have_their_effect(tmp_path):
    tokenizer = bpe()
    tokenizer.add_tokens([AddedToken("    ", normalized=False)])
    assert ids(encoder(tokenizer, tmp_path), "a    ab") == [[A, 258, AB, IN_BPE]]


def unigram(*control: str) -> Tokenizer:
    pieces = [("<unk>", 0.0), *((name, 0.0) for name in control), *((letter, -5.0) for letter in LETTERS)]
    return Tokenizer(models.Unigram([*pieces, ("▁<", -6.0)], 0))


def wordpiece(*control: str) -> Tokenizer:
    pieces = [*LETTERS, *(f"##{letter}" for letter in LETTERS)]
    names = ["[UNK]", *control, *pieces]
    return Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))


def whole_words(*control: str) -> Tokenizer:
    return words(*control, *LETTERS)


def merged(*control: str) -> Tokenizer:
    """A model that merges letters to the control token."""
    vocabulary = {letter: i for i, letter in enumerate(LETTERS)}
    merges = []
    for name in control:
        for end in range(2, len(name) + 1):
            vocabulary.setdefault(name[:end], len(vocabulary))
            merges.append((name[: end - 1], name[end - 1]))
    return Tokenizer(models.BPE(vocabulary, merges))


SPLITS = {
    "whole": None,
    "at white space": pre_tokenizers.WhitespaceSplit(),
    "as BERT": pre_tokenizers.BertPreTokenizer(),
    "as T5": pre_tokenizers.Metaspace(),
}


@pytest.mark.parametrize("special", [True, False, None])  # None: only in the model's vocabulary
@pytest.mark.parametrize("end", [END, "</s>", "[SEP]"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("model", [unigram, wordpiece, whole_words, merged])
def test_a_text_that_spells_the_end_of_a_document_does_not_end_it(model, split, end, special, tmp_path):
    tokenizer = model(end)
    if SPLITS[split] is not None:
        tokenizer.pre_tokenizer = SPLITS[split]
    if special is not None:
        tokenizer.add_tokens([AddedToken(end, special=special, normalized=False)])
    found = encoder(tokenizer, tmp_path)
    number = tokenizer.token_to_id(end)
    for text in (end, f"a {end} b", f"a{end}", f"{end}b", end * 3, f"{end[:3]}{end}"):
        (tokens,) = ids(found, text)
        assert tokens.count(number) == 1
        assert tokens[-1] == number
    (plain,) = tokenizer.encode_batch(["ab < a"])
    assert ids(found, "ab < a") == [[*plain.ids, number]]  # other text is as it was


@given(text=st.text("ab<>|/endoftx s", max_size=60))
def test_no_text_makes_a_control_token_and_other_text_is_as_it_was(text, tmp_path_factory):
    names = ["</s>", "<s>", "<b>"]
    tokenizer = unigram(*names)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(names)
    found = encoder(tokenizer, tmp_path_factory.getbasetemp())
    control = {tokenizer.token_to_id(name) for name in names}
    (tokens,) = ids(found, f"{text}<s></s>{text}")
    assert not control & set(tokens[:-1])
    if not any(name in text for name in names):
        assert ids(found, text) == [[*tokenizer.encode(text).ids, tokenizer.token_to_id("</s>")]]


FAMILIES = {
    "GPT-2, NeoX, OLMo, Falcon": ([END], END),
    "Llama 2, Mistral": (["<unk>", "<s>", "</s>"], "</s>"),
    "Llama 3": (["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], "<|end_of_text|>"),
    "Gemma": (["<pad>", "<eos>", "<bos>", "<start_of_turn>"], "<eos>"),
    "BERT": (["[PAD]", "[CLS]", "[SEP]", "[MASK]"], "[SEP]"),
    "ModernBERT": ([END, "[CLS]", "[SEP]", "[MASK]"], "[SEP]"),
    "T5": (["<pad>", "</s>", "<extra_id_0>"], "</s>"),
    "Qwen": ([END, "<|im_start|>", "<|im_end|>"], END),
    "DeepSeek": (["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<|EOT|>"], "<｜end▁of▁sentence｜>"),  # noqa: RUF001
    "Phi-3": (["<s>", "</s>", END, "<|end|>"], END),
    "gpt-oss": (["<|startoftext|>", END, "<|return|>"], END),
    "Command R": (["<PAD>", "<EOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"], "<EOS_TOKEN>"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_end_of_a_document_of_the_usual_families(family, tmp_path):
    special, end = FAMILIES[family]
    tokenizer = words("a")
    if family == "Gemma":
        tokenizer.add_tokens(["<s>", "</s>"])  # as in HTML
    tokenizer.add_special_tokens(special)
    found = encoder(tokenizer, tmp_path)
    number = tokenizer.token_to_id(end)
    assert ids(found, "a") == [[1, number]]
    assert found.about[0] == f"{end} (token {number}) ends each document"


def test_the_page_lists_the_ends_of_documents_in_their_order():
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    assert ", ".join(f"`{end}`" for end in ENDS) in " ".join(page.split())


def test_a_special_token_is_the_end_before_a_word(tmp_path):
    tokenizer = words("a", END)
    tokenizer.add_special_tokens(["</s>"])
    assert ids(encoder(tokenizer, tmp_path), f"a {END}") == [[1, 2, 3]]


def test_no_end_is_said_and_one_can_be_named(tmp_path):
    tokenizer = words("a", "<eod>")
    found = encoder(tokenizer, tmp_path)
    assert ids(found, "a", "") == [[1], []]
    assert found.about[0].startswith("no token ends a document: ")
    named = encoder(tokenizer, tmp_path, "<eod>")
    assert ids(named, "a <eod>") == [[1, 0, 0, 2]]
    assert named.about == ("<eod> (token 2) ends each document",)
    with pytest.raises(BadInputError, match=r"tokenizer.json has no token '<end>' \(--end-token\)"):
        encoder(tokenizer, tmp_path, "<end>")


def test_ids_with_holes_count_up_to_the_largest(tmp_path):
    found = encoder(words("a", b=300, c=70_000), tmp_path)
    assert found.vocab_size == 70_001
    assert ids(found, "a b c") == [[1, 300, 70_000]]


def test_an_added_token_that_would_get_another_id_is_an_error(tmp_path):
    added = json.loads(bpe().to_str())["added_tokens"]
    with pytest.raises(BadInputError, match="is token 300 in it, but becomes 257"):
        encoder(bpe(), tmp_path, added_tokens=[added[0] | {"id": 300}])


def test_an_end_that_stands_for_unknown_text_too_is_an_error(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({END: 0, "a": 1}, unk_token=END))
    with pytest.raises(BadInputError, match="stands for unknown text too"):
        encoder(tokenizer, tmp_path)
    with pytest.raises(BadInputError, match="stands for unknown text too"):
        encoder(words("a"), tmp_path, "<unk>")


def test_text_that_would_be_left_out_is_said(tmp_path):
    tokenizer = Tokenizer(models.BPE({"a": 0, END: 1}, []))
    found = encoder(tokenizer, tmp_path)
    assert ids(found, "aéa") == [[0, 0, 1]]
    assert found.about[1].startswith("characters that ")


def test_text_that_cannot_be_encoded_is_named(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = encoder(tokenizer, tmp_path)
    assert ids(found, "a a") == [[0, 0]]
    with pytest.raises(BadInputError, match=r"tokenizer.json cannot encode 'a b' \(WordLevel error: Missing"):
        found.encode(["a", "a b", "a"])


BROKEN: dict[str, dict[str, Any]] = {
    "no model": {"model": None},
    "another kind of model": {"model": {"type": "Sum"}},
    "a dropout of 7": {"model": {"type": "BPE", "dropout": 7, "vocab": {"a": 0}, "merges": []}},
    "an id beyond 32 bits": {"model": {"type": "WordLevel", "vocab": {"a": 2**33}, "unk_token": "a"}},
    "a bad pattern": {
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
    },
    "a table that makes the library panic": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_one_error(kind, tmp_path, capfd):
    with pytest.raises(BadInputError, match=r"tokenizer\.json is no tokenizer file \("):
        encoder(words("a"), tmp_path, **BROKEN[kind])


def test_a_file_without_tokens_is_an_error(tmp_path):
    with pytest.raises(BadInputError, match="has no tokens"):
        encoder(Tokenizer(models.WordLevel({}, unk_token="a")), tmp_path)


def test_bytes_end_with_zero():
    assert ids(bytes_encoder(), "a", "é") == [[97, 0], [195, 169, 0]]


# --------------------------------------------------------------------------------- what an attack found


def written(path, model, **others):
    """A tokenizer.json of a model and settings as JSON has them."""
    whole = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [], **whole, "model": model, **others}))
    return path


def test_characters_that_a_model_without_an_unknown_token_drops_are_announced(tmp_path):
    """Also where something stands before each text, so that none is empty."""
    model = {"type": "BPE", "vocab": {"▁": 0, "a": 1, "</s>": 2}, "merges": []}
    cutting = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    encoder = file_encoder(written(tmp_path / "t.json", model, pre_tokenizer=cutting), None)
    assert any("left out" in line for line in encoder.about)


def test_a_byte_level_model_with_all_bytes_drops_nothing(tmp_path):
    from tokenizers import pre_tokenizers

    vocabulary = {letter: n for n, letter in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"])}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [], "unk_token": "<|endoftext|>"}  # as CLIP has it
    cutting = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    encoder = file_encoder(written(tmp_path / "t.json", model, pre_tokenizer=cutting), None)
    assert encoder.about == (f"<|endoftext|> (token {len(vocabulary) - 1}) ends each document",)
    (ids,) = encoder.encode(["é 世"])
    assert len(ids) == 2 + 1 + 3 + 1


@pytest.mark.parametrize("kind", ["WordLevel", "WordPiece"])
def test_an_end_that_is_the_unknown_token_is_an_error_whatever_a_probe_gives(kind, tmp_path):
    model = {"type": kind, "vocab": {"</s>": 0, "a": 1, "\U00013000": 2}, "unk_token": "</s>"}
    model |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 5} if kind == "WordPiece" else {}
    with pytest.raises(BadInputError, match="stands for unknown text too"):
        file_encoder(written(tmp_path / "t.json", model), None)


@pytest.mark.parametrize(
    ("vocab", "others", "end"),
    [
        ({"a": 0, "b": 1, "|": 2}, {}, "|"),
        ({"a": 0, **{f"<0x{n:02X}>": n + 1 for n in range(256)}}, {"byte_fallback": True}, "<0x0A>"),
    ],
)
def test_an_end_that_texts_are_made_of_is_an_error(vocab, others, end, tmp_path):
    path = written(tmp_path / "t.json", {"type": "BPE", "vocab": vocab, "merges": [], **others})
    with pytest.raises(BadInputError, match="is a token of texts too, and cannot end documents"):
        file_encoder(path, end)


def test_a_control_token_is_no_part_of_a_word_with_a_suffix(tmp_path):
    end, vocab, merges = "</s>", {}, []
    for letter in [*"</s>xab", *(f"{letter}</w>" for letter in "</s>xab")]:
        vocab.setdefault(letter, len(vocab))
    for i in range(2, 5):
        vocab.setdefault(end[:i], len(vocab))
        merges.append([end[: i - 1], end[i - 1]])
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "end_of_word_suffix": "</w>", "unk_token": None}
    encoder = file_encoder(written(tmp_path / "t.json", model, pre_tokenizer={"type": "WhitespaceSplit"}), None)
    (ids,) = encoder.encode(["</s>x"])
    assert ids.count(vocab[end]) == 1
    assert ids[-1] == vocab[end]


def test_two_names_of_one_token_are_an_error(tmp_path):
    model = {"type": "WordLevel", "vocab": {"text": 1, "<unk>": 0, "</s>": 1}, "unk_token": "<unk>"}
    with pytest.raises(BadInputError, match="are both token 1"):
        file_encoder(written(tmp_path / "t.json", model), None)


@pytest.mark.parametrize(
    "model",
    [
        {"type": "BPE", "vocab": {"a": 0, "</s>": 1}, "merges": [], "unk_token": "<unk>"},
        {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0], ["</s>", 0.0]], "byte_fallback": False},
    ],
)
def test_a_model_that_cannot_encode_says_so_at_the_text(model, tmp_path):
    encoder = file_encoder(written(tmp_path / "t.json", model), None)
    with pytest.raises(BadInputError, match="cannot encode 'b'"):
        encoder.encode(["a", "b"])


@pytest.mark.filterwarnings("ignore")
def test_a_panic_of_the_library_is_an_error(tmp_path):
    model = {"type": "WordLevel", "vocab": {"a": 0, "</s>": 1}, "unk_token": "a"}
    encoder = file_encoder(
        written(tmp_path / "t.json", model, pre_tokenizer={"type": "FixedLength", "length": 0}), None
    )
    with pytest.raises(BadInputError, match="cannot encode 'a a'"):
        encoder.encode(["a a"])
