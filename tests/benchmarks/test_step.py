"""benchmarks/step.py where it may go wrong unseen on a machine without a GPU."""

import gc
import itertools
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import step as benchmark
import torch
from torch.autograd import DeviceType


def test_one_program_at_a_time_has_state_beside_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them together would not fit next to 1.3 billion parameters on a GPU of 80 GB."""
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
        rows = list(benchmark.steps("small", 1, torch.device("cpu"), ["float32", "compact"]))
    finally:
        gc.enable()
    assert max(alive) == len(benchmark.FUSED) + 1
    assert len(rows) == 4 + 1 + len(made)  # title and head; copy is not an optimizer
    assert {goal[0] for goal in benchmark.GOALS} <= {row.split(" | ")[0][2:] for row in rows}


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
    assert benchmark.kernels(lambda: None) == (1, 1, 0.5)


def test_on_a_gpu_a_step_is_timed_anew_behind_a_longer_pause_until_the_host_was_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses: list[int] = []
    needed = 10 * benchmark.PAUSE

    class Event:
        def __init__(self, **_: bool) -> None:
            pass

        def record(self) -> None:
            pass

        def query(self) -> bool:
            """Whether the GPU has got here: the pause is over."""
            return pauses[-1] < needed

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, _: Any) -> float:
            return 1.0 if pauses[-1] >= needed else 5.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", pauses.append)
    assert benchmark.seconds(lambda: None, torch.device("cuda")) == 1e-3
    assert pauses == [benchmark.PAUSE, 4 * benchmark.PAUSE, 16 * benchmark.PAUSE]
    needed = 10 * benchmark.LONGEST  # the host is never ahead
    assert benchmark.seconds(lambda: None, torch.device("cuda")) == 5e-3
    assert pauses[-1] <= benchmark.LONGEST


def test_gradients_that_move_do_so_for_those_steps_only() -> None:
    """In a GPU's tables their addresses would be new for every other step too."""
    params = benchmark.made([(8, 8)] * 3, torch.device("cpu"))
    seen: dict[str, list[int]] = {}
    for name, program in benchmark.ways(params).items():
        for _ in range(3):
            program.prepare()
            seen.setdefault(name, []).append(params[0].grad.data_ptr())
    assert all(len(set(at)) == (2 if "move" in name else 1) for name, at in seen.items())
    assert all(a != b for name, at in seen.items() if "move" in name for a, b in itertools.pairwise(at))
