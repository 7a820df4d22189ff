"""AdEMAMix prepared by accelerate, against a plain loop."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ademamix import AdEMAMix
from integrations.loops import (
    MAX_NORM,
    MAX_VALUE,
    SETTINGS,
    STEPS,
    Batch,
    assert_same,
    batches,
    loss,
    model,
    plain_loop,
)
from pages import run_blocks

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402


@pytest.fixture(autouse=True)
def alone() -> Any:
    """Its states are singletons: no test shall see another's."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


class Run:
    """A training loop in accelerate's words."""

    def __init__(self, accumulate: int = 1, scaler: Any = None, **options: Any) -> None:
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        if scaler is not None:
            self.accelerator.scaler = scaler  # as mixed_precision="fp16" makes one on a GPU
        net = model()
        optimizer = AdEMAMix(net.parameters(), **{**SETTINGS, **options})
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        self.net, self.optimizer, self.schedule = self.accelerator.prepare(net, optimizer, schedule)

    def train(self, data: list[Batch], max_norm: float | None = None, max_value: float | None = None) -> nn.Module:
        for batch in data:
            with self.accelerator.accumulate(self.net):
                self.accelerator.backward(loss(self.net, batch))
                if self.accelerator.sync_gradients and max_norm is not None:
                    self.accelerator.clip_grad_norm_(self.net.parameters(), max_norm)
                if self.accelerator.sync_gradients and max_value is not None:
                    self.accelerator.clip_grad_value_(self.net.parameters(), max_value)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
        return self.net


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [{}, {"max_norm": MAX_NORM}, {"max_value": MAX_VALUE}])
def test_a_run_ends_with_the_weights_of_a_plain_loop(accumulate: int, clip: dict[str, float]) -> None:
    data = batches(STEPS * accumulate)
    assert_same(Run(accumulate).train(data, **clip), plain_loop(data, accumulate=accumulate, **clip))


def test_our_clipping_is_called_on_the_optimizer_within() -> None:
    run, plain = Run(), model()
    by_hand = AdEMAMix(plain.parameters(), **SETTINGS)
    for i, (batch, good) in enumerate(zip(batches(bad=[20]), batches(), strict=True)):
        run.accelerator.backward(loss(run.net, batch))
        run.optimizer.optimizer.clip_grad_norm_(MAX_NORM)
        run.optimizer.step()
        run.optimizer.zero_grad()
        if i != 20:
            loss(plain, good).backward()
            by_hand.clip_grad_norm_(MAX_NORM)
            by_hand.step()
            by_hand.zero_grad()
    assert_same(run.net, plain)
    assert run.optimizer.optimizer.skipped_steps == 1


def test_a_batch_with_a_nan_changes_nothing() -> None:
    run = Run(skip_nonfinite=True)
    good = [batch for i, batch in enumerate(batches()) if i != 20]
    assert_same(run.train(batches(bad=[20]), max_norm=MAX_NORM), plain_loop(good, max_norm=MAX_NORM))
    assert run.optimizer.optimizer.skipped_steps == 1


@pytest.mark.parametrize("max_norm", [None, MAX_NORM])
def test_accelerate_learns_that_its_scaler_skipped_a_step(max_norm: float | None) -> None:
    run = Run(scaler=torch.amp.GradScaler("cpu", init_scale=2.0**8))
    skipped = []
    for batch in batches(bad=[20]):
        run.train([batch], max_norm)
        skipped.append(run.accelerator.optimizer_step_was_skipped)
    assert skipped == [i == 20 for i in range(STEPS)]
    assert run.schedule.scheduler._step_count - 1 == STEPS - 1  # no step of the schedule without one of the optimizer
    good = [batch for i, batch in enumerate(batches()) if i != 20]
    if max_norm is None:  # else it clips what is scaled, as it knows nothing of this scaler
        assert_same(run.net, plain_loop(good))


@pytest.mark.parametrize("options", [{}, {"state": "compact"}, {"skip_nonfinite": True}])
def test_a_run_resumes_exactly_from_accelerate_s_checkpoint(tmp_path: Path, options: dict[str, Any]) -> None:
    data = batches()
    first = Run(**options)
    first.train(data[: STEPS // 2])
    first.accelerator.save_state(str(tmp_path))
    resumed = Run(**options)
    for p in resumed.net.parameters():  # it continues only from what is in the folder
        nn.init.zeros_(p)
    resumed.accelerator.load_state(str(tmp_path))
    assert_same(resumed.train(data[STEPS // 2 :]), plain_loop(data, **options))


def test_the_page_s_examples_run() -> None:
    scope = run_blocks("tools/accelerate.md", {"build": model, "loss": loss, "data": batches(8)})
    assert scope["optimizer"].optimizer.state
