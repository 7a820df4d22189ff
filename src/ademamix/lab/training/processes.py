"""The processes of one training: how they find each other, what they agree on, how a model is spread over them."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from ademamix.lab.config import BadInputError

T = TypeVar("T")


class PeerError(Exception):
    """Another process of this training has failed, and raises the reason."""


def launched() -> int:
    """Return how many processes torchrun, or a program like it, has started; 0 for a process started by itself."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else 0


def restarted() -> bool:
    """Return whether torchrun has started this very command before, and one of its processes failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


@contextmanager
def joined(device: torch.device) -> Iterator["Processes"]:
    """Join the processes that torchrun has started for the time of a block; a process started by itself has no others.

    Raises:
        BadInputError: torch.distributed cannot use the device.
    """
    if launched():
        backend = "gloo"
        if device.type != "cpu":
            try:
                backend = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
            except ValueError as error:
                raise BadInputError(f"torch.distributed cannot use the device {device}; try --device cpu") from error
            torch.accelerator.set_device_index(device)
        _start(backend)
    yield Processes()
    if launched():  # after an error the others may be gone, and this would wait for them
        dist.destroy_process_group()


def _start(backend: str) -> None:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend)
        return
    # Torch (2.13) would look for the others in the whole store, and there find the addresses of those that were killed.
    store = PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", _store())
    dist.init_process_group(backend, store=store, rank=int(os.environ["RANK"]), world_size=launched())


def _store() -> TCPStore:
    """Of torchrun: it outlives the processes that torchrun starts."""
    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)


class Processes:
    """All processes that torch.distributed was started with, or only this one."""

    def __init__(self) -> None:
        together = dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.size = dist.get_world_size() if together else 1
        self.first = self.rank == 0  # only the first writes what is not a checkpoint

    def part(self, count: int) -> slice:
        """Return which of `count` things in order, a multiple of the processes, belong to this process."""
        share = count // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def total(self, value: Tensor) -> Tensor:
        """Return the sum of all processes' values."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of all processes' values."""
        return value if self.size == 1 else self.total(value / self.size)

    def largest(self, number: int) -> int:
        """Return the largest of all processes' numbers."""
        if self.size == 1:
            return number
        most = torch.tensor(number)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)

    def everywhere(self, act: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
        """Do something on every process; return what each of them got.

        Raises:
            Exception: that of the first process on which it failed, there; PeerError on all the others.
        """
        if self.size == 1:
            return [act()]
        mine: T | None = None
        error: Exception | None = None
        try:
            mine = act()
        except Exception as raised:
            error = raised
        outcomes: list[tuple[T, str | None]] = [None] * self.size  # type: ignore[list-item]
        dist.all_gather_object(outcomes, (mine, None if error is None else str(error)), group)
        failed = [(rank, message) for rank, (_, message) in enumerate(outcomes) if message is not None]
        if failed and error is not None and failed[0][0] == self.rank:
            raise error
        if failed:
            raise PeerError("process {}: {}".format(*failed[0]))
        return [value for value, _ in outcomes]

    def on_first(self, act: Callable[[], T]) -> T:
        """Do something only on the first process; return what it got, on all of them."""
        return self.everywhere(lambda: act() if self.first else None)[0]  # type: ignore[return-value]


def agreed_name(name: str) -> str:
    """Return what the first process to ask proposed: the same on all processes, also after torchrun's restarts."""
    if not launched():
        return name
    agreed: str = _store().compare_set("ademamix/name", "", name).decode()
    return agreed


def spread(model: nn.Module, processes: Processes, device: torch.device, *, shard: bool) -> nn.Module:
    """Return the model as all processes compute it together: in parts (FSDP2), or copied to each (DDP).

    Parameters that are in parts become DTensors of the model itself, each layer's and the rest.
    """
    if processes.size == 1:
        return model
    if not shard:
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # a second of import time

    mesh = init_device_mesh(device.type, (processes.size,))
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for layer in (layer for layers in reversed(lists) for layer in layers):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def backward_of(model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Return the context of a part of a batch, forward and backward: only in the last do processes sum gradients."""
    if isinstance(model, DistributedDataParallel):
        return nullcontext() if last else model.no_sync()
    set_sync: Callable[[bool], None] | None = getattr(model, "set_requires_gradient_sync", None)
    if set_sync is not None:  # FSDP2's
        set_sync(last)
    return nullcontext()


def put_away(model: nn.Module) -> None:
    """Split what a forward pass without a backward pass has put together.

    FSDP2 leaves the outermost parameters whole for a backward pass, and `model.parameters()` would be those.
    """
    reshard: Callable[[], None] | None = getattr(model, "reshard", None)
    if reshard is not None:
        reshard()
