"""Which device a run is on, and how long things take there."""

import os
import statistics
import time
from typing import Any

import torch

from ademamix.lab.config import BadInputError
from ademamix.lab.training.processes import launched


class Stopwatch:
    """Times a block many times over: by the clock on a CPU, by events in the stream elsewhere (no waiting)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[tuple[Any, Any]] = []
        self.on_core = 0.0  # seconds of this thread

    def _now(self) -> Any:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(self.device, enable_timing=True)
        event.record(torch.accelerator.current_stream(self.device))  # not the current device's
        return event

    def __enter__(self) -> None:
        self.start = self._now()
        self.on_core -= time.thread_time()

    def __exit__(self, *_: object) -> None:
        self.on_core += time.thread_time()
        self.times.append((self.start, self._now()))

    def core_share(self) -> float:
        """Return for which share of the timed blocks since the last `median_ms` this thread had a core of the CPU."""
        took: float = sum(end - start for start, end in self.times)
        return self.on_core / took

    def median_ms(self) -> float:
        """Return the median since the last call; the device must have caught up."""
        on_cpu = self.device.type == "cpu"
        times: list[float] = [1e3 * (end - start) if on_cpu else start.elapsed_time(end) for start, end in self.times]
        self.times.clear()
        self.on_core = 0.0
        return statistics.median(times)


def pick_device(name: str) -> torch.device:
    """Return the named device, or for "auto" the accelerator that is there, else the CPU.

    Of the devices of a machine, each process that torchrun starts there takes its own.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        name = str(found or "cpu")
    try:
        device = torch.device(name)
        if device.type != "cpu" and device.index is None and launched():
            device = torch.device(device.type, int(os.environ.get("LOCAL_RANK", 0)))
        torch.zeros(1, device=device).item()  # a device that holds no numbers, as meta, is none
    except (RuntimeError, AssertionError) as error:
        raise BadInputError(f"cannot use the device {name} ({str(error).splitlines()[0]})") from error
    return device


def device_name(device: torch.device) -> str:
    """Return what a device is called in reports."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
