"""DeepSpeed's ZeRO, whose parameters are flat, on two processes (CPU, gloo) against a plain loop."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ademamix import AdEMAMix
from plain_loop import MAX_NORM, ROUNDED, SETTINGS, STEPS, WORLD, assert_same, loss, model, plain_loop, train
from processes import assert_passed, check, main, started_together

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytestmark = pytest.mark.slow
outcomes, CHECKS = started_together(Path(__file__), WORLD)


@pytest.mark.parametrize("name", CHECKS)
def test_on_two_processes(name: str, outcomes: list[dict[str, str]]) -> None:
    assert_passed(name, outcomes)


class Zero:
    def __init__(self, stage: int, accumulate: int = 1, max_norm: float = 0.0, **options: Any) -> None:
        import deepspeed

        net = model()
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": accumulate,
            "gradient_clipping": max_norm,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage},
        }
        optimizer = AdEMAMix(net.parameters(), **SETTINGS, **options)
        self.engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)

    def step(self, micro_batches: list[Tensor]) -> None:
        for x in micro_batches:
            self.engine.backward(loss(self.engine, x))
            self.engine.step()

    def weights(self) -> list[Tensor]:
        import deepspeed

        params = list(self.engine.module.parameters())
        with deepspeed.zero.GatheredParameters(params):
            return [p.detach().clone() for p in params]


@check
def weights_are_those_of_a_plain_loop() -> None:
    wanted = plain_loop(range(STEPS))
    for stage in (1, 2, 3):
        assert_same(train(Zero(stage), range(STEPS)), wanted)


@check
def accumulated_gradients_too() -> None:
    wanted = plain_loop(range(STEPS), accumulate=2)
    for stage in (1, 2, 3):
        exact = {} if stage == 1 else ROUNDED  # 2 and 3 sum over processes first
        assert_same(train(Zero(stage, accumulate=2), range(STEPS), accumulate=2), wanted, **exact)


@check
def clipping_is_that_of_torch() -> None:
    wanted = plain_loop(range(STEPS), max_norm=MAX_NORM)
    for stage in (1, 2, 3):
        assert_same(train(Zero(stage, max_norm=MAX_NORM), range(STEPS)), wanted, **ROUNDED)


@check
def a_bad_batch_of_one_process_is_skipped_by_deepspeed() -> None:
    wanted = plain_loop(range(STEPS), without=(7, 8))
    for stage in (1, 2, 3):
        tool = Zero(stage)
        assert_same(train(tool, range(STEPS), bad=(7, 8)), wanted)
        assert tool.engine.skipped_steps == 2


@check
def its_checkpoint_resumes_exactly() -> None:
    wanted = plain_loop(range(20))
    for stage in (1, 2, 3):
        tool, fresh = Zero(stage), Zero(stage)
        train(tool, range(10))
        tool.engine.save_checkpoint(sys.argv[2], tag=f"stage{stage}")
        fresh.engine.load_checkpoint(sys.argv[2], tag=f"stage{stage}")
        assert_same(train(fresh, range(10, 20)), wanted)


@check
def flat_parameters_have_low_bit_state_that_resumes_exactly() -> None:
    options: dict[str, Any] = {"state": "compact", "flat_parameters": True, "seed": dist.get_rank()}
    moved = [(p - q).norm() for p, q in zip(plain_loop(range(20)), model().parameters(), strict=True)]
    for stage in (1, 2, 3):
        whole, tool, fresh = (Zero(stage, **options) for _ in range(3))
        wanted = train(whole, range(20))
        states = whole.engine.optimizer.optimizer.state.values()
        assert {s["exp_avg_slow"].dtype for s in states} == {torch.int16}
        for p, q, distance in zip(wanted, plain_loop(range(20)), moved, strict=True):
            assert (p - q).norm() < 0.2 * distance  # 8 bits for the fast EMA and the second moment: about 2**-4 each
        train(tool, range(10))
        tool.engine.save_checkpoint(sys.argv[2], tag=f"compact{stage}")
        fresh.engine.load_checkpoint(sys.argv[2], tag=f"compact{stage}")
        assert_same(train(fresh, range(10, 20)), wanted)


if __name__ == "__main__":
    main(WORLD)
