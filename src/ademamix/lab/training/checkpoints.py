"""Checkpoints: complete or absent, checked when they are read, and without any code in them.

Each is a folder of torch.distributed.checkpoint with a manifest: what the run was, size and SHA-256 of every file.
"""

import hashlib
import io
import json
import os
import pickle
import re
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_into
from torch.distributed.checkpoint.state_dict_saver import async_save

from ademamix.lab.config import BadInputError, expect_folder, from_json, shortened
from ademamix.lab.training.description import FILE, described
from ademamix.lab.training.processes import Processes

FOLDER, MANIFEST, PARTIAL = "checkpoints", "manifest.json", ".partial"
NAME = re.compile(r"step-[0-9]{8,}")
EARLIER = "checkpoint.pt"  # the file of version 0.1.0


class SaveError(Exception):
    """A checkpoint could not be written."""


class Checkpoints:
    """The checkpoints of a run: written while it continues, the last few kept.

    Args:
        out: the run's folder, one that all processes see.
        keep: how many to keep.
        processes: those that train together.
    """

    def __init__(self, out: Path, keep: int, processes: Processes) -> None:
        self.folder, self.keep, self.processes = out / FOLDER, keep, processes
        # A thread writes, and what its processes tell each other must not get between what the training tells.
        self.group = dist.new_group(backend="gloo") if processes.size > 1 else None
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.writing: tuple[Path, Future[None]] | None = None
        processes.on_first(self._sweep)

    def _sweep(self) -> None:
        """Remove what a killed run was writing or removing, and nothing else."""
        expect_folder(self.folder)
        for left in self.folder.glob(f"step-*{PARTIAL}"):
            if NAME.fullmatch(left.stem):
                expect_folder(left)
                shutil.rmtree(left)

    def save(self, step: int, about: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Copy the state and begin to write it, once the checkpoint before it is written.

        Args:
            step: the training step, which names the checkpoint.
            about: what is not a tensor, for JSON.
            model: of which parameters and buffers are written,
            optimizer: and all of its state.

        Raises:
            SaveError: the checkpoint before it could not be written.
        """
        self.wait()
        _expect_one_process()
        aside = self.folder / f"step-{step:08}{PARTIAL}"
        state = _state(model, optimizer)
        if torch.__version__ < "2.7":  # its async_save copies from GPUs only, and training continues
            state = _copied(state)
        saved = async_save(state, checkpoint_id=aside, process_group=self.group)
        self.writing = aside, self.thread.submit(self._finish, saved, aside, about)

    def _finish(self, saved: Any, aside: Path, about: dict[str, Any]) -> None:
        """Give the written files their manifest, and the folder its name; runs in the thread."""
        saved.result()  # its metadata has no names of files in torch 2.11, so what was written is read
        entries = described(aside).storage_data.values()
        names = sorted({entry.relative_path for entry in entries} | {FILE})
        mine = names[self.processes.rank :: self.processes.size]
        files: dict[str, list[Any]] = {}
        for sums in self.processes.everywhere(lambda: {name: _size_and_sum(aside / name) for name in mine}, self.group):
            files |= sums
        self.processes.everywhere(lambda: self._publish(aside, {**about, "files": files}), self.group)

    def _publish(self, aside: Path, content: dict[str, Any]) -> None:
        if not self.processes.first:
            return
        with open(aside / MANIFEST, "w") as file:
            json.dump({"sha256": _sum_of(content), **content}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync(aside)
        aside.rename(aside.with_suffix(""))
        _sync(self.folder)
        for old in complete(self.folder)[: -self.keep]:
            shutil.rmtree(old.rename(f"{old}{PARTIAL}"))

    def wait(self) -> None:
        """Wait until what is being written is on the disk.

        Raises:
            SaveError: it could not be written; it is gone, and those before it are as they were.
        """
        if self.writing is None:
            return
        (aside, done), self.writing = self.writing, None
        try:
            done.result()
        except (Exception, CheckpointException) as error:
            if self.processes.first:
                shutil.rmtree(aside, ignore_errors=True)
            before = complete(self.folder)
            kept = f"the one before it is {before[-1]}" if before else "there is none before it"
            raise SaveError(f"the checkpoint {aside.stem} could not be written ({_reason(error)}); {kept}") from error

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest checkpoint and what its manifest says, or None if there is none; every byte is checked.

        Raises:
            BadInputError: it is damaged; the message names the file, and the newest one that is not.
        """
        found = self.processes.on_first(lambda: complete(self.folder))
        if not found:
            self.processes.on_first(lambda: _refuse_earlier(self.folder.parent / EARLIER))
            return None
        fault = self._fault(found[-1])
        if fault is not None:
            whole = next((path for path in reversed(found[:-1]) if self._fault(path) is None), None)
            how = f"{whole} is whole: to resume from there, delete {found[-1]}" if whole else "no other one is whole"
            self.processes.on_first(lambda: _refuse(f"{fault}; {how}"))
        return found[-1], from_json(found[-1] / MANIFEST)

    def _fault(self, path: Path) -> str | None:
        """What is wrong with a checkpoint, if anything; each process reads some of its files."""
        share = slice(self.processes.rank, None, self.processes.size)
        return next(filter(None, self.processes.everywhere(lambda: _fault_in(path, share))), None)

    def close(self) -> None:
        """Wait as well, but say nothing: the run has ended, or by another error."""
        with suppress(SaveError):
            self.wait()
        self.thread.shutdown()


def complete(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first."""
    found = (path for path in folder.glob("step-*") if NAME.fullmatch(path.name))
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fill model and optimizer, spread as they may be over however many processes.

    Raises:
        BadInputError: it is not a checkpoint of such a model, or holds something else than tensors and plain values.
    """
    state = _state(model, optimizer)
    newer = _take_newer(state["optimizer"], optimizer, described(path))
    _read(path, state)
    for group, values in zip(state["optimizer"]["param_groups"], newer, strict=True):
        group.update(values)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def weights(path: Path) -> dict[str, Tensor]:
    """Return the model's state dict from a checkpoint, whole and on the CPU.

    Raises:
        BadInputError: it is damaged, or holds something else than tensors and plain values.
    """
    fault = _fault_in(path, slice(None))
    if fault is not None:
        raise BadInputError(fault)
    stored = described(path).state_dict_metadata
    model = {
        name.removeprefix("model."): torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if name.startswith("model.") and isinstance(entry, metadata.TensorStorageMetadata)
    }
    _read(path, {"model": model})
    return model


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The tensors and settings of both, by the parameters' names; tensors are the model's and optimizer's own."""
    fresh = not optimizer.state
    in_model, in_optimizer = get_state_dict(model, optimizer)
    if fresh:  # then that was a step with lr = 0 and no gradient; it must not count
        for slots in optimizer.state.values():
            slots["step"].zero_()
    return {"model": in_model, "optimizer": in_optimizer}


def _take_newer(state: dict[str, Any], optimizer: torch.optim.Optimizer, stored: metadata.Metadata) -> list[Any]:
    """Take from each group the hyperparameters that an earlier version did not store; return what stands for them.

    That is what stands for them in state dicts too.
    """
    earlier = {**optimizer.defaults, **getattr(optimizer, "earlier", {})}
    newer = []
    for number, group in enumerate(state["param_groups"]):
        there = {name for name in group if f"optimizer.param_groups.{number}.{name}" in stored.state_dict_metadata}
        newer.append({name: earlier[name] for name in earlier.keys() & group.keys() - there})
        for name in newer[-1]:
            del group[name]
    return newer


def _copied(value: Any) -> Any:
    """The same with copies of the tensors in host memory."""
    if isinstance(value, dict):
        return {key: _copied(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_copied(entry) for entry in value]
    return value.clone() if isinstance(value, Tensor) and value.device.type == "cpu" else value


def _read(path: Path, state: dict[str, Any]) -> None:
    described(path)  # what the library meets there it takes for an absent file
    _expect_one_process()
    try:
        load_into(state, storage_reader=_Reader(path), planner=_Planner())
    except CheckpointException as error:
        raise BadInputError(f"{path} cannot be loaded ({_reason(error)})") from error


class _Reader(FileSystemReader):
    def read_metadata(self, *_: Any, **__: Any) -> metadata.Metadata:
        return described(Path(self.path))


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Unpickle what is not a tensor as torch.load does with weights_only: the base class runs what it finds."""
        name = read_item.dest_index.fqn
        try:
            plain = torch.load(value, weights_only=True)
        except Exception as error:
            raise BadInputError(f"{name} is not a plain value, and is refused") from error
        set_element(self.original_state_dict, self.mappings[name], plain)


def _reason(error: BaseException) -> str:
    """What was at fault, on the first process where something was, in one line."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, pickle.UnpicklingError):  # its text says how to run what the pickle holds
        return "something else than a tensor is refused"
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OSError) and cause.strerror):
        cause = cause.__context__  # torch.save complains, after the disk did, that its file is too short
    said = cause.strerror if isinstance(cause, OSError) else str(error)
    return (said or type(error).__name__).splitlines()[0]


def _expect_one_process() -> None:
    """Keep torch from warning that it saves and loads in a single process, and (2.6) by what means it does."""
    warnings.filterwarnings("ignore", "torch.distributed is (disabled, )?unavailable or uninitialized")
    warnings.filterwarnings("ignore", "TypedStorage is deprecated", module=r"torch\.")


def _refuse(why: str) -> None:
    raise BadInputError(why)


def _refuse_earlier(path: Path) -> None:
    if path.exists():
        raise BadInputError(f"{path} was written by ademamix 0.1.0; only that version can resume this run")


def _size_and_sum(path: Path) -> list[Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
        return [file.tell(), digest.hexdigest()]


def _sum_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _fault_in(path: Path, share: slice) -> str | None:
    """What is wrong with the manifest, or with some of the files in it."""
    try:
        content = from_json(path / MANIFEST)
        files = content["files"]
        sound = (
            content.pop("sha256") == _sum_of(content)
            and FILE in files
            and all(Path(name).name == name and list(map(type, files[name])) == [int, str] for name in files)
        )
    except (BadInputError, OSError, KeyError, TypeError):
        sound = False
    if not sound:
        return f"{path / MANIFEST} is damaged"
    for name in sorted(files)[share]:
        size, digest = files[name]
        if not os.path.isfile(path / name):  # pathlib's raises an error for names that are too long
            return f"{path / shortened(name)} is missing"
        if os.path.islink(path / name):
            return f"{path / name} is a link; put what it leads to in its place"
        found = _size_and_sum(path / name)
        if found[0] != size:
            return f"{path / name} is damaged: it has {found[0]:,} bytes, not {size:,}"
        if found[1] != digest:
            return f"{path / name} is damaged: its SHA-256 is not what {MANIFEST} says"
    return None


def _sync(folder: Path) -> None:
    """Have the names in a folder on the disk; Windows does not offer that."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
