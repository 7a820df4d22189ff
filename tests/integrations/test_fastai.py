"""AdEMAMix in fastai's Learner, against a plain loop."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ademamix import AdEMAMix
from integrations.loops import MAX_NORM, SETTINGS, STEPS, Batch, assert_same, batches, model, plain_loop
from pages import run_blocks

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of torch.jit, when it is imported
    pytest.importorskip("fastai.learner", reason="fastai is not installed")
    from fastai.callback.core import Callback
    from fastai.callback.schedule import combined_cos
    from fastai.callback.training import GradientAccumulation, GradientClip
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper

pytestmark = pytest.mark.filterwarnings("ignore")  # its own, of NumPy and of torch

HP_MAP = {"weight_decay": "wd", "betas__0": "mom", "betas__1": "sqr_mom"}
GIVEN = {name: value for name, value in SETTINGS.items() if name != "lr"}  # fastai hands lr on itself


def mean_square(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (out - y).square().mean()


def learner(data: list[Batch], path: Path | None = None, **options: Any) -> Learner:
    opt_func = partial(OptimWrapper, opt=AdEMAMix, hp_map=HP_MAP, **{**GIVEN, **options})
    dls = DataLoaders(data, data[:1], device=torch.device("cpu"))
    return Learner(dls, model(), loss_func=mean_square, opt_func=opt_func, lr=SETTINGS["lr"], path=path)


def test_a_run_ends_with_the_weights_of_a_plain_loop() -> None:
    learn = learner(batches())
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    assert_same(learn.model, plain_loop(batches()))


def test_clipping_and_accumulation_are_those_of_a_plain_loop() -> None:
    data = batches(2 * STEPS)
    learn = learner(data)
    with learn.no_bar(), learn.no_logging():
        # It counts samples, of which a batch has 6.
        learn.fit(1, cbs=[GradientAccumulation(n_acc=12), GradientClip(MAX_NORM)])
    assert_same(learn.model, plain_loop(data, accumulate=2, max_norm=MAX_NORM))


@pytest.mark.parametrize("options", [{}, {"state": "compact"}])
def test_a_run_resumes_exactly_from_fastai_s_file(tmp_path: Path, options: dict[str, Any]) -> None:
    epoch = batches(STEPS // 2)
    first = learner(epoch, tmp_path, **options)
    with first.no_bar(), first.no_logging():
        first.fit(1)
        first.save("half")
    resumed = learner(epoch, tmp_path, **options)
    for p in resumed.model.parameters():  # it continues only from what is in the file
        nn.init.zeros_(p)
    resumed.load("half")
    with resumed.no_bar(), resumed.no_logging():
        resumed.fit(1)
    assert_same(resumed.model, plain_loop(2 * epoch, **options))


@pytest.mark.parametrize("clip", [None, MAX_NORM])
def test_a_batch_with_a_nan_changes_nothing(clip: float | None) -> None:
    learn = learner(batches(bad=[20]), skip_nonfinite=True)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=[] if clip is None else [GradientClip(clip)])
    good = [batch for i, batch in enumerate(batches()) if i != 20]
    assert_same(learn.model, plain_loop(good, max_norm=clip))
    assert learn.opt.opt.skipped_steps == 1


class Seen(Callback):
    """Groups as they are in each step."""

    order = 100

    def before_fit(self) -> None:
        self.groups: list[dict[str, Any]] = []

    def before_step(self) -> None:
        self.groups += [{k: v for k, v in group.items() if k != "params"} for group in self.opt.opt.param_groups]


def one_cycle(moms: tuple[float, float, float] | None) -> list[dict[str, Any]]:
    learn, seen = learner(batches()), Seen()
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, 1e-2, moms=moms, wd=0.05, cbs=[seen])
    return seen.groups


def test_one_cycle_moves_lr_and_the_first_beta_only() -> None:
    groups = one_cycle(None)
    assert all(group["betas"][1:] == SETTINGS["betas"][1:] for group in groups)
    assert {group["alpha"] for group in groups} == {SETTINGS["alpha"]}
    assert {group["weight_decay"] for group in groups} == {0.05}
    beta1, lr = combined_cos(0.25, 0.95, 0.85, 0.95), combined_cos(0.25, 1e-2 / 25, 1e-2, 1e-7)
    assert [group["betas"][0] for group in groups] == pytest.approx([beta1(i / STEPS) for i in range(STEPS)])
    assert [group["lr"] for group in groups] == pytest.approx([lr(i / STEPS) for i in range(STEPS)])


def test_moms_keep_the_first_beta() -> None:
    assert {group["betas"] for group in one_cycle((0.9, 0.9, 0.9))} == {SETTINGS["betas"]}


def test_fastai_s_own_map_takes_alpha_for_the_second_beta() -> None:
    """Why the page has a map."""
    made = OptimWrapper(list(model().parameters()), opt=AdEMAMix)
    made.set_hyper("sqr_mom", 0.99)
    assert made.opt.param_groups[0]["alpha"] == 0.99
    made = OptimWrapper(list(model().parameters()), opt=AdEMAMix, hp_map=HP_MAP)
    made.set_hyper("sqr_mom", 0.99)
    assert made.opt.param_groups[0]["alpha"] == 2.0
    assert made.opt.param_groups[0]["betas"] == (0.9, 0.99, 0.9999)


def test_the_page_s_examples_run() -> None:
    data = batches(8)
    scope = run_blocks(
        "tools/fastai.md",
        {"build": model, "loss_func": mean_square, "dls": DataLoaders(data, data, device=torch.device("cpu"))},
    )
    group = scope["learn"].opt.opt.param_groups[0]
    assert group["alpha"] == 8.0
    assert group["betas"][0] == 0.9
