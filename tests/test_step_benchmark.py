"""benchmarks/step.py where it may go wrong unseen on a machine without a GPU."""

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import step as benchmark
import torch
from torch.autograd import DeviceType


def test_one_program_at_a_time_has_state_beside_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them together would not fit beside 1.3 billion parameters on a GPU of 80 GB."""
    made: list[weakref.ref[torch.optim.Optimizer]] = []
    alive: list[int] = []
    of = benchmark.Program.of

    def watched(optimizer: torch.optim.Optimizer) -> benchmark.Program:
        made.append(weakref.ref(optimizer))
        alive.append(sum(m() is not None for m in made))
        return of(optimizer)

    monkeypatch.setattr(benchmark.Program, "of", watched)
    monkeypatch.setitem(benchmark.SHAPES, "small", ("two tensors", [(64, 64), (5,)]))
    gc.disable()  # a step must not have to wait for it
    try:
        rows = benchmark.steps("small", 1, torch.device("cpu"), ["float32", "compact"])
    finally:
        gc.enable()
    assert max(alive) == len(benchmark.FUSED) + 1
    assert len(rows) == 4 + 1 + len(made)  # title and head; copy is no optimizer


def test_kernels_are_what_the_gpu_works_on_without_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    class Profile:
        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def events(self) -> list[Any]:
            def event(name: str, where: DeviceType, marked: bool = False) -> Any:
                lasts = SimpleNamespace(elapsed_us=lambda: 500.0)
                return SimpleNamespace(name=name, device_type=where, is_user_annotation=marked, time_range=lasts)

            return [
                event("cuLaunchKernelEx", DeviceType.CPU),
                event("kernel", DeviceType.CUDA),
                event("Memcpy HtoD (Pinned -> Device)", DeviceType.CUDA),
                event("Optimizer.step#AdEMAMix.step", DeviceType.CUDA, marked=True),
                event("cudaDeviceSynchronize", DeviceType.CPU),
            ]

    monkeypatch.setattr(torch.profiler, "profile", lambda **_: Profile())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert benchmark.kernels(lambda: None) == (1, 0.5)
