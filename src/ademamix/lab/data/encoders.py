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
    from tokenizers.models import Model

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
UNHEARD_OF = "\U00013000"  # a hieroglyph: what a tokenizer makes of it, it makes of any text that it does not know


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
        raise BadInputError(f"{path} is no tokenizer file ({error})") from error
    vocabulary = tokenizer.get_vocab()
    if not vocabulary:
        raise BadInputError(f"{path} has no tokens")
    names: dict[int, str] = {}
    for token, number in vocabulary.items():
        if names.setdefault(number, token) != token:
            raise BadInputError(f"{path} is damaged: {names[number]!r} and {token!r} are both token {number}")
    said = json.loads(path.read_text(encoding="utf-8"))
    added = said.get("added_tokens") or []
    moved = next((token for token in added if vocabulary.get(token["content"]) != token["id"]), None)
    if moved is not None:
        given = vocabulary.get(moved["content"])
        raise BadInputError(
            f"{path} is damaged: {moved['content']!r} is token {moved['id']} in it, but becomes {given}"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.post_processor = None
    if hasattr(tokenizer.model, "dropout"):
        tokenizer.model.dropout = None
    special = {token["content"] for token in added if token["special"]}
    end = _end_of(path, vocabulary, special, end_token)
    if end is not None:
        if _is_text(tokenizer.model, end, said["model"]):
            raise BadInputError(f"{path}: {end!r} is a token of texts too, and cannot end documents")
        tokenizer.add_special_tokens([end])
    control = special | {end} if end is not None else special
    _keep_as_text(tokenizer, control)

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
    unknown, known = _unknown(tokenizer), _knows_all_bytes(said, vocabulary)
    about = []
    if end is None:
        about.append(f"no token ends a document: {path} has none of {', '.join(ENDS)}; --end-token names another")
    else:
        tail = [vocabulary[end]]
        about.append(f"{end} (token {vocabulary[end]}) ends each document")
        named = not known and end == _unknown_token(said["model"])
        if named or (unknown is not None and vocabulary[end] in unknown):
            raise BadInputError(f"{path}: {end} ends documents, and stands for unknown text too; choose an --end-token")
    for token in sorted(token for token in control - {end} if _is_text(tokenizer.model, token, said["model"])):
        about.append(f"texts can spell the special token {token}")
    drops = said["model"].get("type") == "BPE" and _unknown_token(said["model"]) is None and not known
    if unknown == [] or drops:
        about.append(f"characters that {path} does not know are left out")
    return Encoder(str(path), max(vocabulary.values()) + 1, encode, tuple(about))


def _end_of(path: Path, vocabulary: dict[str, int], special: set[str], given: str | None) -> str | None:
    """The token that ends a document: the one that was asked for, else a special one, else a plain one."""
    if given is not None and given not in vocabulary:
        raise BadInputError(f"{path} has no token {given!r} (--end-token)")
    known = [token for token in ENDS if token in vocabulary]
    return given or next((token for token in known if token in special), next(iter(known), None))


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


def _is_text(model: "Model", token: str, said: dict[str, Any]) -> bool:
    """Whether texts become a token, wherever they are cut: one of a single character, or of a single byte."""
    if model.token_to_id(token) is None:
        return False
    return len(token) == 1 or (bool(said.get("byte_fallback")) and re.fullmatch("<0x[0-9A-F]{2}>", token) is not None)


def _unknown_token(said: dict[str, Any]) -> str | None:
    """The token that a model has for text that it does not know."""
    if said.get("unk_id") is not None:
        found: str = said["vocab"][said["unk_id"]][0]
        return found
    return said.get("unk_token")


def _knows_all_bytes(said: dict[str, Any], vocabulary: dict[str, int]) -> bool:
    """Whether there is a token for each byte, so that no text is unknown."""
    from tokenizers import pre_tokenizers

    if said["model"].get("byte_fallback"):
        return all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    cutting = json.dumps([said.get("pre_tokenizer"), said.get("normalizer")])
    return '"ByteLevel"' in cutting and all(letter in vocabulary for letter in pre_tokenizers.ByteLevel.alphabet())


def _unknown(tokenizer: "Tokenizer") -> list[int] | None:
    """The tokens of text that a tokenizer does not know; None where it refuses such text."""
    try:
        ids: list[int] = tokenizer.encode(UNHEARD_OF, add_special_tokens=False).ids
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # as above
        return None
    return ids
