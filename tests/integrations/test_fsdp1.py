"""FSDP1 (FullyShardedDataParallel), whose parameters are flat, on two processes against a plain loop."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel

from ademamix import AdEMAMix
from pages import python_blocks
from plain_loop import MAX_NORM, ROUNDED, SETTINGS, STEPS, WORLD, assert_same, batches, loss, model, plain_loop, train
from processes import assert_passed, check, main, started_together

outcomes, CHECKS = started_together(Path(__file__), WORLD)


@pytest.mark.parametrize("name", CHECKS)
def test_on_two_processes(name: str, outcomes: list[dict[str, str]]) -> None:
    assert_passed(name, outcomes)


class Fsdp1:
    def __init__(self, max_norm: float | None = None, use_orig_params: bool = True, **options: Any) -> None:
        self.model = FullyShardedDataParallel(model(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
        self.optimizer = AdEMAMix(self.model.parameters(), **SETTINGS, **options)
        self.max_norm = max_norm

    def step(self, micro_batches: list[Tensor]) -> None:
        *others, last = micro_batches
        with self.model.no_sync():
            for x in others:
                (loss(self.model, x) / len(micro_batches)).backward()
        (loss(self.model, last) / len(micro_batches)).backward()
        if self.max_norm is not None:
            self.model.clip_grad_norm_(self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self) -> list[Tensor]:
        with FullyShardedDataParallel.summon_full_params(self.model):
            return [p.detach().clone() for p in self.model.parameters()]


@check
def weights_are_those_of_a_plain_loop() -> None:
    wanted = plain_loop(range(STEPS))
    for original in (True, False):
        assert_same(train(Fsdp1(use_orig_params=original), range(STEPS)), wanted)


@check
def accumulated_gradients_too() -> None:
    assert_same(train(Fsdp1(), range(STEPS), accumulate=2), plain_loop(range(STEPS), accumulate=2))


@check
def clipping_is_that_of_torch() -> None:
    wanted = plain_loop(range(STEPS), max_norm=MAX_NORM)
    assert_same(train(Fsdp1(max_norm=MAX_NORM), range(STEPS)), wanted, **ROUNDED)


@check
def a_bad_batch_of_one_process_changes_nothing_on_any() -> None:
    tool = Fsdp1(max_norm=1e9, skip_nonfinite=True)
    assert_same(train(tool, range(STEPS), bad=(7, 8)), plain_loop(range(STEPS), without=(7, 8)))
    assert tool.optimizer.skipped_steps == 2


@check
def the_loop_of_the_page_skips_a_step_whose_norm_is_infinite() -> None:
    (clip_and_step,) = python_blocks("tools/fsdp.md")
    tool = Fsdp1()
    before = tool.weights()
    loss(tool.model, batches(0, torch.distributed.get_rank())[0]).backward()
    if torch.distributed.get_rank() == 0:
        next(p.grad for p in tool.model.parameters() if p.grad is not None).flatten()[0] = torch.inf
    exec(clip_and_step, {"model": tool.model, "optimizer": tool.optimizer})
    assert_same(tool.weights(), before)
    tool.max_norm = 1e9
    assert_same(train(tool, range(5)), plain_loop(range(5)))


@check
def its_checkpoint_resumes_exactly() -> None:
    folder = Path(sys.argv[2])
    tool, fresh = Fsdp1(), Fsdp1()
    train(tool, range(10))
    saved = dict(zip(("model", "optimizer"), get_state_dict(tool.model, tool.optimizer), strict=True))
    dcp.save(saved, checkpoint_id=folder / "fsdp1")
    loaded = dict(zip(("model", "optimizer"), get_state_dict(fresh.model, fresh.optimizer), strict=True))
    dcp.load(loaded, checkpoint_id=folder / "fsdp1")
    set_state_dict(fresh.model, fresh.optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    assert_same(train(fresh, range(10, 20)), plain_loop(range(20)))


@check
def flat_parameters_have_low_bit_state_that_resumes_exactly() -> None:
    options: dict[str, Any] = {"state": "compact", "flat_parameters": True, "seed": torch.distributed.get_rank()}
    options["use_orig_params"] = False
    whole, tool, fresh = (Fsdp1(**options) for _ in range(3))
    wanted = train(whole, range(20))
    assert {s["exp_avg_slow"].dtype for s in whole.optimizer.state.values()} == {torch.int16}
    for p, q, r in zip(wanted, train(Fsdp1(use_orig_params=False), range(20)), Fsdp1().weights(), strict=True):
        assert (p - q).norm() < 0.2 * (q - r.view_as(q)).norm()  # 8 bits for the fast EMA and the second moment
    train(tool, range(10))
    fresh.model.load_state_dict(tool.model.state_dict())
    fresh.optimizer.load_state_dict(tool.optimizer.state_dict())
    assert_same(train(fresh, range(10, 20)), wanted)


if __name__ == "__main__":
    main(WORLD)
