import dataclasses
import pickle
import struct
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from ademamix.lab.config import BadInputError
from ademamix.lab.training.description import described

MD = "torch.distributed.checkpoint.metadata"
WATCHED = (
    Path,
    PosixPath,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
    StorageMeta,
    _StorageInfo,
    torch.Size,
)


def sound() -> Metadata:
    shape = torch.Size([2, 3])
    entries: dict[str, Any] = {
        "w": TensorStorageMetadata(TensorProperties(), shape, [ChunkStorageMetadata(torch.Size([0, 0]), shape)]),
        "lr": BytesStorageMetadata(),
    }
    places = {
        MetadataIndex("w", torch.Size([0, 0])): _StorageInfo("__0_0.distcp", 0, 24),
        MetadataIndex("lr"): _StorageInfo("__0_0.distcp", 24, 8),
    }
    return Metadata(entries, {"w": ("w",), "lr": ("lr",)}, places, StorageMeta(Path("somewhere"), "id"), "1.0.0")


def read(folder: Path, content: bytes) -> Metadata:
    (folder / "__0_0.distcp").write_bytes(bytes(32))
    (folder / ".metadata").write_bytes(content)
    return described(folder)


def test_a_file_with_a_name_that_no_disk_takes_is_refused(tmp_path: Path) -> None:
    places = {MetadataIndex("lr"): _StorageInfo("x" * 100_000, 0, 8)}
    found = Metadata({"lr": BytesStorageMetadata()}, {"lr": ("lr",)}, places, StorageMeta(), "1.0.0")
    with pytest.raises(BadInputError, match=r"\.metadata is not a description of tensors \(.+\)") as caught:
        read(tmp_path, pickle.dumps(found, protocol=2))
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_description_is_read_as_pickle_reads_it(protocol: int, tmp_path: Path) -> None:
    found = read(tmp_path, pickle.dumps(sound(), protocol))
    assert (found.state_dict_metadata, found.storage_data, found.planner_data, found.version) == (
        sound().state_dict_metadata,
        sound().storage_data,
        sound().planner_data,
        sound().version,
    )


# ------------------------------------------------------------------------------------ programs


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def stacked(module: str, name: str) -> bytes:
    return text(module) + text(name) + pickle.STACK_GLOBAL


def text(value: str) -> bytes:
    return pickle.SHORT_BINUNICODE + bytes([len(value)]) + value.encode()


def nested(depth: int) -> bytes:
    """A tuple whose hash and text take 2**depth steps."""
    return b")" + b"".join(b"q" + bytes([k]) + b"h" + bytes([k]) + b"\x86" for k in range(depth))


PATH, META, INDEX = named("pathlib", "PosixPath"), named(MD, "Metadata"), named(MD, "MetadataIndex")
CHANGED = b"}" + text("is_file") + b"Ns"  # {"is_file": None}
PROGRAMS = {
    "BUILD on a class": META + b"}" + text("__init__") + b"Nsb",
    "BUILD on a class, with slots": META + b"N" + CHANGED + b"\x86b",
    "BUILD on a placeholder of a class": PATH + b"N" + CHANGED + b"\x86b",
    "BUILD on a function": named("torch.serialization", "_get_layout") + CHANGED + b"b",
    "BUILD on a dtype": named("torch", "float32") + b"N" + CHANGED + b"\x86b",
    "BUILD on a shape": named("torch", "Size") + b")\x85R" + CHANGED + b"b",
    "BUILD with slots": META + b")\x81N" + CHANGED + b"\x86b",
    "BUILD of what is not a field": META + b")\x81}" + text("__class__") + PATH + b"sb",
    "BUILD twice": META + b")\x81}" + text("version") + b"Nsb}" + text("version") + b"Nsb",
    "BUILD with a nested state": named(MD, "TensorProperties") + b")\x81" + nested(60) + b"b",
    "REDUCE of a class": META + b")R",
    "REDUCE of a dtype": named("torch", "float32") + b")R",
    "REDUCE of a text": text("system") + b")R",
    "REDUCE without a tuple": named("torch", "Size") + b"]R",
    "REDUCE of a nested shape": named("torch", "Size") + nested(60) + b"R",
    "REDUCE of a nested path": PATH + nested(60) + b"R.",
    "REDUCE of an enumeration of nested values": named(MD, "_MEM_FORMAT_ENCODING") + nested(60) + b"\x85R.",
    "NEWOBJ of a function": named("torch", "Size") + b")\x81",
    "NEWOBJ with arguments": META + b"N\x85\x81",
    "NEWOBJ_EX": META + b")}\x92",
    "INST": b"(i" + f"{MD}\nMetadata\n".encode(),
    "OBJ": b"(" + META + b"o",
    "EXT1": pickle.EXT1 + b"\x01",
    "EXT2": pickle.EXT2 + b"\x01\x00",
    "EXT4": pickle.EXT4 + b"\x01\x00\x00\x00",
    "PERSID": b"P1\n",
    "BINPERSID": b"NQ",
    "SETITEM on a class": META + text("a") + b"Ns",
    "SETITEMS on a list": b"](" + text("a") + b"Nu",
    "SETITEM with a nested key": b"}" + nested(60) + b"Ns",
    "SETITEM with a nested key in an index": b"}" + INDEX + b")\x81}" + text("fqn") + nested(60) + b"sbNs",
    "APPEND to a class": META + b"Na",
    "APPENDS to a text": text("a") + b"(Ne",
    "APPENDS to a dictionary": b"}(Ne",
    "ADDITEMS": b"\x8f(N\x90",
    "a class that is not of the list": named("os", "system"),
    "a class by a dotted name": stacked(MD, "Metadata.__init__"),
    "a module's global by a dotted name": stacked(MD, "torch.os.system"),
    "torch's own by a dotted name": stacked("torch", "os.system"),
    "a name that is not text": b"NN" + pickle.STACK_GLOBAL,
    "a name from the memo that is a class": META + b"q\x00h\x00" + pickle.STACK_GLOBAL,
    "a memo that there is not": b"h\x07",
    "a memo with a huge number": b"Nr\xff\xff\xff\xff",
    "a huge text": pickle.BINUNICODE + struct.pack("<I", 2**32 - 1),
    "a huge text of 8 bytes": pickle.BINUNICODE8 + struct.pack("<Q", 2**62),
    "huge bytes": pickle.BINBYTES8 + struct.pack("<Q", 2**62),
    "a huge bytearray": pickle.BYTEARRAY8 + struct.pack("<Q", 2**62),
    "a huge frame": pickle.FRAME + struct.pack("<Q", 2**62),
    "a huge number": pickle.LONG4 + struct.pack("<I", 2**31 - 1),
    "a number in decimal": b"I" + b"9" * 10_000 + b"\n",
    "nothing": b"",
    "an empty stack": b"",
    "something else": b"]",
}


def state_of(kind: type) -> dict[str, Any]:
    return dict(vars(kind))


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_refused_and_changes_nothing(name: str, tmp_path: Path) -> None:
    before = [state_of(kind) for kind in WATCHED]
    with pytest.raises(BadInputError, match=r"\.metadata is not a description of tensors \(.+\)"):
        read(tmp_path, b"\x80\x04" + PROGRAMS[name] + b".")
    assert [state_of(kind) for kind in WATCHED] == before


def test_the_programs_do_what_they_say_where_nothing_refuses_them() -> None:
    """Else it would be no wonder that nothing changed."""

    program = b"\x80\x04" + META + b"N}" + text("planted") + text("here") + b"s\x86b."
    try:
        pickle.loads(program)
        assert Metadata.planted == "here"
    finally:
        del Metadata.planted


# ------------------------------------------------------------------------------------ descriptions that are none


def changed(**fields: Any) -> Metadata:
    return dataclasses.replace(sound(), **fields)


def tensor(**fields: Any) -> Metadata:
    made = sound()
    made.state_dict_metadata["w"] = dataclasses.replace(made.state_dict_metadata["w"], **fields)
    return made


def placed(*place: Any) -> Metadata:
    return changed(storage_data={MetadataIndex("w", torch.Size([0, 0])): _StorageInfo(*place)})


FAULTS = {
    "no entries": changed(state_dict_metadata=None),
    "an entry of another kind": changed(state_dict_metadata={"w": "text"}),
    "no places": changed(storage_data=None),
    "a place of another kind": changed(storage_data={MetadataIndex("w"): ("__0_0.distcp", 0, 8)}),
    "a place by name": changed(storage_data={"w": _StorageInfo("__0_0.distcp", 0, 8)}),
    "another folder": placed("../secret", 0, 8),
    "another root": placed("/etc/passwd", 0, 8),
    "the folder itself": placed("..", 0, 8),
    "a missing file": placed("other", 0, 8),
    "no file name": placed(3, 0, 8),
    "a file that is too short": placed("__0_0.distcp", 30, 8),
    "a place before the file": placed("__0_0.distcp", -8, 8),
    "a fractional place": placed("__0_0.distcp", 0.5, 8),
    "a transformed file": placed("__0_0.distcp", 0, 8, ["zstd"]),
    "more bytes than there are": tensor(size=torch.Size([2**20, 2**20]), chunks=[]),
    "a shape that is a list": tensor(size=[2, 3]),
    "no properties": tensor(properties=None),
    "another dtype": tensor(properties=TensorProperties(dtype="float32")),
    "a chunk outside": tensor(chunks=[ChunkStorageMetadata(torch.Size([1, 0]), torch.Size([2, 3]))]),
    "a chunk of other dimensions": tensor(chunks=[ChunkStorageMetadata(torch.Size([0]), torch.Size([2]))]),
    "chunks of another kind": tensor(chunks=["text"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_description_that_does_not_hold_is_refused(fault: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(32))
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    read(folder, pickle.dumps(sound()))
    with pytest.raises(BadInputError, match="is not a description of tensors"):
        read(folder, pickle.dumps(FAULTS[fault]))
