"""torchtitan's container and clipping over FSDP2 on two processes, against a plain loop."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from pages import python_blocks
from plain_loop import MAX_NORM, ROUNDED, SETTINGS, STEPS, WORLD, assert_same, loss, model, plain_loop, train
from processes import assert_passed, check, main, started_together

titan = pytest.importorskip("torchtitan.components.optimizer", reason="torchtitan is not installed")
if not hasattr(titan, "ParamGroupConfig"):
    pytest.skip("torchtitan is older than 0.3", allow_module_level=True)
pytestmark = pytest.mark.slow
outcomes, CHECKS = started_together(Path(__file__), WORLD)


@pytest.mark.parametrize("name", CHECKS)
def test_on_two_processes(name: str, outcomes: list[dict[str, str]]) -> None:
    assert_passed(name, outcomes)


class Titan:
    def __init__(self, max_norm: float = 1e9, **options: Any) -> None:
        from ademamix.integrations.torchtitan import default_ademamix

        self.model = model()
        fully_shard(self.model, mesh=torch.distributed.init_device_mesh("cpu", (WORLD,)))
        config = default_ademamix(total_steps=100, **{**SETTINGS, **options})
        self.optimizers = config.build(model_parts=[self.model])
        self.schedulers = titan.LRSchedulersContainer.Config(warmup_steps=0, decay_ratio=0.0).build(
            optimizers=self.optimizers, training_steps=100
        )
        self.max_norm = max_norm

    def step(self, micro_batches: list[Tensor]) -> None:
        from torchtitan.distributed.utils import clip_grad_norm_

        self.optimizers.zero_grad()
        for i, x in enumerate(micro_batches, 1):
            self.model.set_requires_gradient_sync(i == len(micro_batches))
            (loss(self.model, x) / len(micro_batches)).backward()
        clip_grad_norm_(self.model.parameters(), self.max_norm, foreach=True)
        self.optimizers.step()
        self.schedulers.step()

    def weights(self) -> list[Tensor]:
        return [p.full_tensor() for p in self.model.parameters()]


@check
def weights_are_those_of_a_plain_loop() -> None:
    for state in ("float32", "compact"):
        assert_same(train(Titan(state=state), range(STEPS)), plain_loop(range(STEPS), state=state))


@check
def accumulated_gradients_too() -> None:
    assert_same(train(Titan(), range(STEPS), accumulate=2), plain_loop(range(STEPS), accumulate=2))


@check
def clipping_is_that_of_torch() -> None:
    wanted = plain_loop(range(STEPS), max_norm=MAX_NORM)
    assert_same(train(Titan(max_norm=MAX_NORM), range(STEPS)), wanted, **ROUNDED)


@check
def a_bad_batch_of_one_process_changes_nothing_on_any() -> None:
    tool = Titan()
    assert_same(train(tool, range(STEPS), bad=(7, 8)), plain_loop(range(STEPS), without=(7, 8)))
    assert [optimizer.skipped_steps for optimizer in tool.optimizers] == [2]


@check
def its_checkpoint_resumes_exactly() -> None:
    folder = Path(sys.argv[2])
    for state in ("float32", "compact"):
        tool, fresh = Titan(state=state), Titan(state=state)
        train(tool, range(10))
        kept = [{"model": t.model, "optimizer": t.optimizers, "lr_scheduler": t.schedulers} for t in (tool, fresh)]
        dcp.save(kept[0], checkpoint_id=folder / state)  # as torchtitan's Checkpointer does
        dcp.load(kept[1], checkpoint_id=folder / state)
        assert_same(train(fresh, range(10, 20)), plain_loop(range(20), state=state))


@check
def groups_may_have_other_optimizers_and_settings() -> None:
    from ademamix import ADana, AdEMAMix
    from ademamix.integrations.torchtitan import Container

    groups = [
        titan.ParamGroupConfig(pattern="bias", optimizer_name="AdamW", optimizer_kwargs={"lr": 1e-3}),
        titan.ParamGroupConfig(pattern="3.weight", optimizer_name="ADana", optimizer_kwargs={"lr": 2e-3}),
        titan.ParamGroupConfig(pattern="2.weight", optimizer_name="AdEMAMix", optimizer_kwargs={"alpha": 3.0}),
        titan.ParamGroupConfig(pattern=".*", optimizer_name="AdEMAMix", optimizer_kwargs={"alpha": 5.0}),
    ]
    config = Container.Config(param_groups=groups, implementation="foreach")
    optimizers = config.build(model_parts=[model()])
    got = [(type(o), g["lr"], g.get("alpha")) for o in optimizers for g in o.param_groups]
    assert got == [(torch.optim.AdamW, 1e-3, None), (ADana, 2e-3, None), (AdEMAMix, 1e-3, 3.0), (AdEMAMix, 1e-3, 5.0)]


@check
def the_config_of_the_page_builds_what_it_says() -> None:
    scope: dict[str, Any] = {}
    for block in python_blocks("tools/torchtitan.md"):
        exec(block, scope)
    (optimizer,) = scope["config"].build(model_parts=[model()])
    decays = [[name, group["weight_decay"]] for group in optimizer.param_groups for name in group["param_names"]]
    assert decays == [*([f"{i}.bias", 0.0] for i in (0, 2, 3)), *([f"{i}.weight", 0.1] for i in (0, 2, 3))]
    assert (optimizer.state_format, optimizer.skip_nonfinite) == ("compact", True)


if __name__ == "__main__":
    main(WORLD)
