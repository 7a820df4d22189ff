"""FSDP2 (fully_shard) on two processes against a plain loop."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from ademamix import AdEMAMix
from plain_loop import MAX_NORM, ROUNDED, SETTINGS, STEPS, WORLD, assert_same, loss, model, plain_loop, train
from processes import assert_passed, check, main, started_together

pytestmark = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this torch's fully_shard trains on GPUs only"
)
outcomes, CHECKS = started_together(Path(__file__), WORLD)


@pytest.mark.parametrize("name", CHECKS)
def test_on_two_processes(name: str, outcomes: list[dict[str, str]]) -> None:
    assert_passed(name, outcomes)


class Fsdp2:
    def __init__(self, max_norm: float | None = None, **options: Any) -> None:
        self.model = model()
        mesh = torch.distributed.init_device_mesh("cpu", (WORLD,))
        fully_shard(self.model, mesh=mesh)
        self.optimizer = AdEMAMix(self.model.parameters(), **SETTINGS, **options)
        self.max_norm = max_norm

    def step(self, micro_batches: list[Tensor]) -> None:
        for i, x in enumerate(micro_batches, 1):
            self.model.set_requires_gradient_sync(i == len(micro_batches))
            (loss(self.model, x) / len(micro_batches)).backward()
        if self.max_norm is not None:
            self.optimizer.clip_grad_norm_(self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self) -> list[Tensor]:
        return [p.full_tensor() for p in self.model.parameters()]


@check
def weights_are_those_of_a_plain_loop() -> None:
    for state in ("float32", "compact"):
        assert_same(train(Fsdp2(state=state), range(STEPS)), plain_loop(range(STEPS), state=state))


@check
def accumulated_gradients_too() -> None:
    assert_same(train(Fsdp2(), range(STEPS), accumulate=2), plain_loop(range(STEPS), accumulate=2))


@check
def clipping_is_that_of_torch() -> None:
    wanted = plain_loop(range(STEPS), max_norm=MAX_NORM)
    assert_same(train(Fsdp2(max_norm=MAX_NORM), range(STEPS)), wanted, **ROUNDED)


@check
def a_bad_batch_of_one_process_changes_nothing_on_any() -> None:
    for options in ({"max_norm": 1e9}, {"skip_nonfinite": True}):  # the one looks at the norm, as the other does
        tool = Fsdp2(**options)
        assert_same(train(tool, range(STEPS), bad=(7, 8)), plain_loop(range(STEPS), without=(7, 8)))
        assert tool.optimizer.skipped_steps == 2


@check
def its_checkpoint_resumes_exactly() -> None:
    folder = Path(sys.argv[2])
    for state in ("float32", "compact"):
        tool, fresh = Fsdp2(state=state), Fsdp2(state=state)
        train(tool, range(10))
        saved = dict(zip(("model", "optimizer"), get_state_dict(tool.model, tool.optimizer), strict=True))
        dcp.save(saved, checkpoint_id=folder / state)
        loaded = dict(zip(("model", "optimizer"), get_state_dict(fresh.model, fresh.optimizer), strict=True))
        dcp.load(loaded, checkpoint_id=folder / state)
        set_state_dict(
            fresh.model, fresh.optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"]
        )
        assert_same(train(fresh, range(10, 20)), plain_loop(range(20), state=state))


if __name__ == "__main__":
    main(WORLD)
