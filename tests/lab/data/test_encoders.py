import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

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
    page = (Path(__file__).parents[3] / "docs" / "how-to" / "data.md").read_text(encoding="utf-8")
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


def in_bytes(unknown: str | None, *words: str, **settings: Any) -> Tokenizer:
    vocabulary = {name: i for i, name in enumerate([END, *words])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=unknown, **settings))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel()])
    return tokenizer


ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
FALLBACK = [f"<0x{byte:02X}>" for byte in range(256)]


def with_metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({"▁": 0, "a": 1, "</s>": 2}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def with_a_prefix() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({"▁": 0, "a": 1, "</s>": 2}, []))
    tokenizer.normalizer = normalizers.Prepend("▁")
    return tokenizer


LEAVES_OUT = {
    "Metaspace": (with_metaspace, True),
    "Prepend": (with_a_prefix, True),
    "some bytes": (lambda: in_bytes(None, *"helowrd"), True),
    "all bytes": (lambda: in_bytes(None, *ALPHABET), False),
    "all bytes, not at the end of a word": (lambda: in_bytes(None, *ALPHABET, end_of_word_suffix="</w>"), True),
    "some bytes to fall back on": (lambda: in_bytes(None, "a", *FALLBACK[1:], byte_fallback=True), True),
    "all bytes to fall back on": (lambda: in_bytes(None, "a", *FALLBACK, byte_fallback=True), False),
    "bytes without fallback": (lambda: in_bytes(None, "a", *FALLBACK), True),
    "an unknown token": (lambda: in_bytes("a", "a"), False),
}


@pytest.mark.parametrize("kind", LEAVES_OUT)
def test_what_a_model_leaves_out_is_said(kind, tmp_path):
    make, said = LEAVES_OUT[kind]
    assert any(line.startswith("characters that ") for line in encoder(make(), tmp_path).about) == said


def without_other_text(step: Any, model: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = step
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


OTHERS = Regex("[^\x00-\x7f]")
STANDS_FOR_UNKNOWN = {
    "WordLevel": lambda: without_other_text(
        normalizers.Replace(OTHERS, ""), models.WordLevel({"</s>": 0, "a": 1}, unk_token="</s>")
    ),
    "WordPiece": lambda: without_other_text(
        normalizers.Replace(OTHERS, "a"),
        models.WordPiece({"</s>": 0, "a": 1, "##a": 2}, unk_token="</s>", max_input_chars_per_word=5),
    ),
    "Unigram": lambda: without_other_text(
        normalizers.Replace(OTHERS, "a"), models.Unigram([("</s>", 0.0), ("a", -1.0)], 0)
    ),
    "BPE": lambda: without_other_text(
        normalizers.Replace(OTHERS, "a"), models.BPE({"</s>": 0, "a": 1}, [], unk_token="</s>")
    ),
    "some bytes": lambda: in_bytes(END, "a"),
}


@pytest.mark.parametrize("kind", STANDS_FOR_UNKNOWN)
def test_an_end_that_stands_for_unknown_text_is_found_in_the_model(kind, tmp_path):
    with pytest.raises(BadInputError, match="stands for unknown text too"):
        encoder(STANDS_FOR_UNKNOWN[kind](), tmp_path)


def test_the_end_may_be_the_unknown_token_where_nothing_is_unknown(tmp_path):
    clip = in_bytes(END, *ALPHABET, *(f"{letter}</w>" for letter in ALPHABET), end_of_word_suffix="</w>")
    (tokens,) = ids(encoder(clip, tmp_path), "é世 \U0001f600")
    assert tokens.count(0) == 1


@pytest.mark.parametrize(
    ("model", "end"),
    [
        (models.BPE({"a": 0, "b": 1, "|": 2}, []), "|"),
        (models.WordLevel({"a": 0, "|": 1}, unk_token="a"), "|"),
        (models.Unigram([("a", -1.0), ("|", -1.0)], 0), "|"),
        (models.WordPiece({"[UNK]": 0, "a": 1, "##a": 2}), "##a"),
        (models.BPE({"a": 0, "a</w>": 1}, [], end_of_word_suffix="</w>"), "a</w>"),
        (models.BPE({"a": 0, "<0x0A>": 1}, [], byte_fallback=True), "<0x0A>"),
    ],
)
def test_a_token_that_text_becomes_cannot_end_documents(model, end, tmp_path):
    with pytest.raises(BadInputError, match="cannot end documents, text becomes this token too"):
        encoder(Tokenizer(model), tmp_path, end)


def test_an_end_that_is_merged_within_a_word_only_is_not_made_of_text(tmp_path):
    names = [*"</s>x", "x</w>", "></w>", "</", "</s", "</s>"]
    merges = [("<", "/"), ("</", "s"), ("</s", ">")]
    model = models.BPE({name: i for i, name in enumerate(names)}, merges, end_of_word_suffix="</w>")
    (tokens,) = ids(encoder(Tokenizer(model), tmp_path), "</s>x")
    assert tokens.count(names.index("</s>")) == 1


def test_two_names_of_one_token_are_an_error(tmp_path):
    model = {"type": "WordLevel", "vocab": {"text": 1, "<unk>": 0, "</s>": 1}, "unk_token": "<unk>"}
    with pytest.raises(BadInputError, match=r"token 1 has two names, '(text|</s>)' and '(text|</s>)'"):
        encoder(words(), tmp_path, model=model)


ENDLESS = {"pattern": {"Regex": "(x+x+)+y"}}
FAILS: dict[str, tuple[Any, dict[str, Any]]] = {
    "pieces of no length": (models.WordLevel({"a": 0}, "a"), {"pre_tokenizer": {"type": "FixedLength", "length": 0}}),
    "an endless split": (
        models.WordLevel({"a": 0}, "a"),
        {"pre_tokenizer": {"type": "Split", **ENDLESS, "behavior": "Isolated", "invert": False}},
    ),
    "an endless replacement": (
        models.WordLevel({"a": 0}, "a"),
        {"normalizer": {"type": "Replace", **ENDLESS, "content": "a"}},
    ),
    "a bad table": (
        models.WordLevel({"a": 0}, "a"),
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}},
    ),
    "BPE": (models.BPE({"a": 0, "</s>": 1}, [], unk_token="<unk>"), {}),
    "WordPiece": (models.WordPiece({"a": 0, "</s>": 1}, unk_token="[UNK]"), {}),
    "Unigram": (models.Unigram([("a", 0.0), ("</s>", 0.0)], None), {}),
}


@pytest.mark.parametrize("kind", FAILS)
def test_whatever_fails_in_the_library_is_one_error(kind, tmp_path, capfd):
    model, changes = FAILS[kind]
    found = encoder(Tokenizer(model), tmp_path, **changes)
    with pytest.raises(BadInputError, match=r"tokenizer\.json cannot encode 'x"):
        found.encode(["x" * 40])


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
    with pytest.raises(BadInputError, match=r"tokenizer\.json is not a tokenizer file \("):
        encoder(words("a"), tmp_path, **BROKEN[kind])


def test_a_file_without_tokens_is_an_error(tmp_path):
    with pytest.raises(BadInputError, match="has no tokens"):
        encoder(Tokenizer(models.WordLevel({}, unk_token="a")), tmp_path)


def test_bytes_end_with_zero():
    assert ids(bytes_encoder(), "a", "é") == [[97, 0], [195, 169, 0]]


def test_a_special_token_of_one_character_is_named(tmp_path):
    """No cut keeps a text from it."""
    model = {"type": "WordLevel", "vocab": {"<unk>": 0, "a": 1, "§": 2, "</s>": 3}, "unk_token": "<unk>"}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    whole = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    added = [{"id": 2, "content": "§", **flags}]
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"version": "1.0", **whole, "added_tokens": added, "model": model}))
    assert "a text may spell the special token §, and has it then" in file_encoder(path, None).about
