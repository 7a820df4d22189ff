"""What a checkpoint's `.metadata` says of its tensors: a pickle, read without what pickle can do.

A pickle is a program. This reader knows the few instructions that torch.distributed.checkpoint needs; what a class or
function is called with, and what gets a state, is decided here. Nothing else can be called, changed or allocated.
"""

import io
import itertools
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo

from ademamix.lab.config import BadInputError, read_file

FILE = ".metadata"
CLASSES = {
    (metadata.__name__, kind.__name__): kind
    for kind in (
        metadata.BytesStorageMetadata,
        metadata.ChunkStorageMetadata,
        metadata.Metadata,
        metadata.MetadataIndex,
        metadata.StorageMeta,
        metadata.TensorProperties,
        metadata.TensorStorageMetadata,
    )
} | {(_StorageInfo.__module__, _StorageInfo.__name__): _StorageInfo}


def _size(lengths: tuple[int, ...]) -> torch.Size:
    if type(lengths) is not tuple or not all(type(length) is int and length >= 0 for length in lengths):
        raise pickle.UnpicklingError("a shape must be a tuple of numbers from 0 on")
    return torch.Size(lengths)


def _nothing(*_: Any) -> None:
    """In place of functions whose results nobody needs: layouts, memory formats, and where the checkpoint was."""


FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch", "Size"): _size,
    ("torch.serialization", "_get_layout"): _nothing,
    (metadata.__name__, "_MEM_FORMAT_ENCODING"): _nothing,
    **dict.fromkeys(itertools.product(("pathlib", "pathlib._local"), ("PosixPath", "WindowsPath")), _nothing),
}
SAFE = (  # they put names, plain values and containers on the stack, or end the program
    *("PROTO", "FRAME", "STOP", "MARK", "GLOBAL", "STACK_GLOBAL", "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET"),
    *("LONG_BINGET", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE"),
    *("SHORT_BINUNICODE", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
)


class _Instructions(dict[int, Callable[[Any], None]]):
    def __missing__(self, code: int) -> Callable[[Any], None]:
        raise pickle.UnpicklingError(f"it has the instruction {code}, which is refused")


class _Unpickler(pickle._Unpickler):  # the one in Python, whose instructions are a table
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def find_class(self, module: str, name: str) -> Any:
        known = CLASSES.get((module, name)) or FUNCTIONS.get((module, name))
        if known is None and module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            known = vars(torch)[name]
        if known is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused")
        return known

    def call(self) -> None:
        function, arguments = self.stack[-2:]
        if not any(function is known for known in FUNCTIONS.values()) or type(arguments) is not tuple:
            raise pickle.UnpicklingError("it calls something else than a function, which is refused")
        self.stack[-2:] = [function(*arguments)]

    def create(self) -> None:
        kind, arguments = self.stack[-2:]
        if not any(kind is known for known in CLASSES.values()) or type(arguments) is not tuple or arguments:
            raise pickle.UnpicklingError("it creates something else than a description, which is refused")
        self.stack[-2:] = [kind.__new__(kind)]

    def give_state(self) -> None:
        state = self.stack.pop()
        made = self.stack[-1]
        kind: Any = type(made)
        if kind not in CLASSES.values() or vars(made):
            raise pickle.UnpicklingError("it changes something else than a new description, which is refused")
        if kind is metadata.TensorProperties and type(state) is tuple and state:
            made.__init__(state[0])  # the dtype; the others are deprecated, and the defaults
        elif type(state) is dict and state.keys() <= kind.__dataclass_fields__.keys():
            vars(made).update(state)
        else:
            raise pickle.UnpicklingError(f"it gives a {kind.__name__} what is not its own, which is refused")

    def set_items(self, items: list[Any]) -> None:
        found = self.stack[-1]
        if type(found) is not dict or not all(map(_is_key, items[::2])):
            raise pickle.UnpicklingError("it sets items of something else than a dictionary by name, which is refused")
        found.update(zip(items[::2], items[1::2], strict=True))

    def extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise pickle.UnpicklingError("it extends something else than a list, which is refused")
        self.stack[-1].extend(items)


_Unpickler.dispatch = _Instructions(
    {getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in SAFE}
    | {
        pickle.REDUCE[0]: _Unpickler.call,
        pickle.NEWOBJ[0]: _Unpickler.create,
        pickle.BUILD[0]: _Unpickler.give_state,
        pickle.SETITEM[0]: lambda self: self.set_items([self.stack.pop(), self.stack.pop()][::-1]),
        pickle.SETITEMS[0]: lambda self: self.set_items(self.pop_mark()),
        pickle.APPEND[0]: lambda self: self.extend([self.stack.pop()]),
        pickle.APPENDS[0]: lambda self: self.extend(self.pop_mark()),
    }
)


def _is_key(key: Any) -> bool:
    """Whether a key is a name, or an index: the hash of tuples within tuples may take forever."""
    if type(key) is not metadata.MetadataIndex:
        return type(key) is str
    return type(key.fqn) is str and type(key.offset) in (type(None), torch.Size)


def described(folder: Path) -> metadata.Metadata:
    """Return what a checkpoint holds, as its `.metadata` says.

    Raises:
        BadInputError: that is damaged, asks for something else than a description, or does not fit the files.
    """
    path = folder / FILE
    content = read_file(path)  # how much is read at once is for the file's size to decide, not for numbers in it
    try:
        found = _Unpickler(io.BytesIO(content)).load()
        _check(found, folder)
    except Exception as error:  # a damaged pickle raises whatever its damage leads to
        reason = str(error) or type(error).__name__
        raise BadInputError(f"{path} is not a description of tensors ({reason[:300]})") from error
    described: metadata.Metadata = found
    return described


def _check(found: Any, folder: Path) -> None:
    """Raise an error if it is not a description in every part, or speaks of more than the folder's files hold."""
    _expect(type(found) is metadata.Metadata, "it is of something else")
    needed = 0
    _expect(type(found.state_dict_metadata) is dict, "it names nothing")
    for name, entry in found.state_dict_metadata.items():
        _expect(type(name) is str, "a name is not text")
        if type(entry) is metadata.BytesStorageMetadata:
            continue
        _expect(type(entry) is metadata.TensorStorageMetadata, f"{name} is neither a tensor nor a setting")
        _expect(type(entry.properties) is metadata.TensorProperties, f"{name} has no properties")
        _expect(isinstance(entry.properties.dtype, torch.dtype), f"{name} has no dtype")
        _expect(type(entry.size) is torch.Size and type(entry.chunks) is list, f"{name} has no shape")
        for chunk in entry.chunks:
            _expect(type(chunk) is metadata.ChunkStorageMetadata, f"{name} has no chunks")
            _expect(type(chunk.offsets) is type(chunk.sizes) is torch.Size, f"{name} has chunks without a shape")
            ends = [a + b for a, b in zip(chunk.offsets, chunk.sizes, strict=True)]
            _expect(all(a <= b for a, b in zip(ends, entry.size, strict=True)), f"a chunk of {name} lies outside of it")
        needed += math.prod(entry.size) * entry.properties.dtype.itemsize
    sizes: dict[str, int] = {}
    _expect(type(found.storage_data) is dict, "it names no files")
    for index, place in found.storage_data.items():
        _expect(type(index) is metadata.MetadataIndex and type(place) is _StorageInfo, "a place is none")
        name, numbers = place.relative_path, (place.offset, place.length)
        _expect(type(name) is str, "a file has no name")
        _expect(Path(name).name == name, f"{name!r} is not a file of the folder")
        if name not in sizes:
            _expect(not (folder / name).is_symlink(), f"{name} is a link")
            sizes[name] = (folder / name).stat().st_size if (folder / name).is_file() else -1
        _expect(all(type(n) is int and n >= 0 for n in numbers), f"a place in {name} is none")
        _expect(sum(numbers) <= sizes[name], f"{name} has no byte {sum(numbers):,}")
        _expect(not getattr(place, "transform_descriptors", None), f"{name} is transformed")
    there = sum(sizes.values())
    _expect(needed <= there, f"it speaks of {needed:,} bytes, and there are {there:,}")


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise pickle.UnpicklingError(otherwise)
