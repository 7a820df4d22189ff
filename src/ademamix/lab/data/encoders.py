"""Text to token ids: as bytes, or with a tokenizer.json, of which only what belongs to the text has an effect."""

import json
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ademamix.lab.config import BadInputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What tokenizers call the end of a document. The order decides where one has several: ModernBERT has GPT's token too,
# Phi-3 has Llama 2's, and Gemma has </s> as the end of HTML's strikethrough.
ENDS = (
    "[SEP]",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001 (DeepSeek writes it so)
    "<eos>",
    "<EOS_TOKEN>",
    "</s>",
)


@dataclass(frozen=True)
class Encoder:
    """How documents become token ids."""

    name: str
    vocab_size: int  # the largest id + 1; ids need not be without holes
    encode: Callable[[list[str]], list[Any]]  # documents -> the token ids of each, its end included
    about: tuple[str, ...]  # lines for the user


def bytes_encoder() -> Encoder:
    """UTF-8, with a zero byte at the end of each document."""

    def encode(texts: list[str]) -> list[Any]:
        return [np.frombuffer(text.encode() + b"\0", np.uint8) for text in texts]

    return Encoder("bytes", 256, encode, ("text as bytes; a zero byte ends each document",))


def file_encoder(path: Path, end_token: str | None) -> Encoder:
    """Read a tokenizer.json.

    A text becomes all of its tokens, and always the same: truncation, padding, what a template puts around a text and
    random segmentation are off. A text that spells a control token is text.

    Raises:
        BadInputError: the file is missing or damaged, or the token that ends a document has another use.
    """
    import tokenizers

    if not path.is_file():
        raise BadInputError(f"no such tokenizer file: {path}")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises plain Exception, and panics, which are not even that
        raise BadInputError(f"{path} is not a tokenizer file ({error})") from error
    vocabulary = tokenizer.get_vocab()
    if not vocabulary:
        raise BadInputError(f"{path} has no tokens")
    added = json.loads(path.read_text(encoding="utf-8")).get("added_tokens") or []
    moved = next((token for token in added if vocabulary.get(token["content"]) != token["id"]), None)
    if moved is not None:
        given = vocabulary.get(moved["content"])
        raise BadInputError(
            f"{path} is damaged: {moved['content']!r} is token {moved['id']} in it, but becomes {given}"
        )
    names = {number: name for name, number in vocabulary.items()}
    twice = next((name for name, number in vocabulary.items() if names[number] != name), None)
    if twice is not None:
        number = vocabulary[twice]
        raise BadInputError(f"{path} is damaged: token {number} has two names, {twice!r} and {names[number]!r}")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.post_processor = None
    if hasattr(tokenizer.model, "dropout"):
        tokenizer.model.dropout = None
    special = {token["content"] for token in added if token["special"]}
    end = _end_of(path, vocabulary, special, end_token)
    loaded = json.loads(tokenizer.to_str())
    complete = _knows_all(loaded, tokenizer.get_vocab(with_added_tokens=False))
    if end is not None:
        _refuse_text(path, tokenizer, loaded, end, complete)
        tokenizer.add_special_tokens([end])
    _keep_as_text(tokenizer, special | {end} if end is not None else special)

    def encode(texts: list[str]) -> list[Any]:
        try:
            found = tokenizer.encode_batch(texts, add_special_tokens=False)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # as above
            for text in texts if len(texts) > 1 else ():
                encode([text])  # to name the one
            raise BadInputError(f"{path} cannot encode {textwrap.shorten(texts[0], 60)!r} ({error})") from error
        return [encoding.ids + tail for encoding in found]

    tail: list[int] = []
    about = []
    if end is None:
        about.append(f"no token ends a document: {path} has none of {', '.join(ENDS)}; --end-token names another")
    else:
        tail = [vocabulary[end]]
        about.append(f"{end} (token {vocabulary[end]}) ends each document")
    for token in sorted(special - {end}):
        if len(token) == 1 and tokenizer.model.token_to_id(token) is not None:
            about.append(f"a text may spell the special token {token}, and has it then")
    model = loaded["model"]
    if model["type"] == "BPE" and model["unk_token"] is None and not complete:  # others refuse such text
        about.append(f"characters that {path} does not know are left out")
    return Encoder(str(path), max(vocabulary.values()) + 1, encode, tuple(about))


def _end_of(path: Path, vocabulary: dict[str, int], special: set[str], given: str | None) -> str | None:
    """The token that ends a document: the one that was asked for, else a special one, else a plain one."""
    if given is not None and given not in vocabulary:
        raise BadInputError(f"{path} has no token {given!r} (--end-token)")
    known = [token for token in ENDS if token in vocabulary]
    return given or next((token for token in known if token in special), next(iter(known), None))


def _knows_all(loaded: dict[str, Any], words: dict[str, int]) -> bool:
    """Whether a model has tokens for any text: one for each byte, in every place of a word."""
    from tokenizers import pre_tokenizers

    model = loaded["model"]
    if model["type"] not in ("BPE", "Unigram"):
        return False
    if model["byte_fallback"] and all(f"<0x{byte:02X}>" in words for byte in range(256)):
        return True
    before = {"", model.get("continuing_subword_prefix") or ""}
    after = {"", model.get("end_of_word_suffix") or ""}
    return _in_bytes(loaded) and all(
        f"{prefix}{letter}{suffix}" in words
        for letter in pre_tokenizers.ByteLevel.alphabet()
        for prefix in before
        for suffix in after
    )


def _in_bytes(loaded: dict[str, Any]) -> bool:
    """Whether a model reads the letters that stand for bytes, and no others."""
    steps = [loaded["normalizer"], loaded["pre_tokenizer"]]
    for step in steps:
        if step is not None:
            steps += step.get("normalizers") or step.get("pretokenizers") or []
    return any(step is not None and step["type"] == "ByteLevel" for step in steps)


def _refuse_text(path: Path, tokenizer: "Tokenizer", loaded: dict[str, Any], end: str, complete: bool) -> None:
    """Raise BadInputError when a model makes the end of a document of text, and no cut would keep it from that."""
    from tokenizers import pre_tokenizers

    model, number = loaded["model"], tokenizer.model.token_to_id(end)
    if number is None:
        return
    unknown = model.get("unk_id")
    if model.get("unk_token") is not None:
        unknown = tokenizer.model.token_to_id(model["unk_token"])
    if number == unknown and not complete:
        raise BadInputError(f"{path}: {end} ends documents, and stands for unknown text too; choose an --end-token")
    prefix, suffix = (model.get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix"))
    letter = len(end) == 1 and not (_in_bytes(loaded) and end not in pre_tokenizers.ByteLevel.alphabet())
    part = (prefix and end.startswith(prefix)) or (suffix and end.endswith(suffix))
    byte = model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", end)
    if letter or part or byte:
        raise BadInputError(f"{path}: {end} cannot end documents, text becomes this token too; choose an --end-token")


def _keep_as_text(tokenizer: "Tokenizer", control: set[str]) -> None:
    """Let a text that spells a control token be encoded as any other text."""
    from tokenizers import Regex, pre_tokenizers

    tokenizer.encode_special_tokens = True
    # A model may know such a token as a word. Cut after its first character, it is two words and neither is the token.
    words = sorted(token for token in control if len(token) > 1 and tokenizer.model.token_to_id(token) is not None)
    if words:
        after_first = "|".join(f"{re.escape(word[0])}(?={re.escape(word[1:])})" for word in words)
        cut = pre_tokenizers.Split(Regex(after_first), "merged_with_previous")
        before = tokenizer.pre_tokenizer
        tokenizer.pre_tokenizer = cut if before is None else pre_tokenizers.Sequence([before, cut])
