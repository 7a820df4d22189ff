"""Megatron-core's training loop with AdEMAMix in it, on two processes against a plain loop.

Megatron names the device "cuda" throughout. Here this means the CPU; all else is Megatron's own.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from plain_loop import MAX_NORM, ROUNDED, SETTINGS, STEPS, WORLD, assert_same, loss, model, plain_loop, train
from processes import assert_passed, check, main, started_together

pytest.importorskip("megatron.core.optimizer", reason="megatron-core is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(torch.cuda.is_available(), reason="Megatron would use the GPU")]
outcomes, CHECKS = started_together(Path(__file__), WORLD)


@pytest.mark.parametrize("name", CHECKS)
def test_on_two_processes(name: str, outcomes: list[dict[str, str]]) -> None:
    assert_passed(name, outcomes)


class CudaIsTheCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device")):
            kwargs["device"] = "cpu"
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.")
        return result


class Megatron:
    def __init__(self, max_norm: float = 0.0, layer_wise: bool = False, bf16: bool = False, **options: Any) -> None:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig
        from megatron.core.transformer import MegatronModule, TransformerConfig

        from ademamix.integrations.megatron import get_megatron_ademamix

        shape = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=1)
        net = MegatronModule(shape)
        net.layers = model().bfloat16() if bf16 else model()
        net.forward = net.layers.forward
        self.model = DistributedDataParallel(shape, DistributedDataParallelConfig(), net)
        config = OptimizerConfig(
            lr=SETTINGS["lr"],
            weight_decay=SETTINGS["weight_decay"],
            adam_eps=SETTINGS["eps"],
            clip_grad=max_norm,
            bf16=bf16,
        )
        self.optimizer = get_megatron_ademamix(
            config, [self.model], 100, config_overrides={}, layer_wise=layer_wise, **options
        )

    def step(self, micro_batches: list[Tensor]) -> None:
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        *others, last = (x.to(next(self.model.parameters()).dtype) for x in micro_batches)
        with self.model.no_sync():
            for x in others:
                (loss(self.model, x) / len(micro_batches)).backward()
        (loss(self.model, last) / len(micro_batches)).backward()
        self.model.finish_grad_sync()
        self.optimizer.step()

    def weights(self) -> list[Tensor]:
        return list(self.model.parameters())


@contextlib.contextmanager
def megatron() -> Iterator[None]:
    from megatron.core import parallel_state
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

    with CudaIsTheCpu(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: "cpu")
        patch.setattr(torch.cuda, "synchronize", lambda: None)
        # gloo gathers parts of one size only; this is Megatron's other way.
        patch.setattr(LayerWiseDistributedOptimizer, "allgather_params", LayerWiseDistributedOptimizer.broadcast_params)
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel()
        yield


@check
@megatron()
def weights_are_those_of_a_plain_loop() -> None:
    for layer_wise in (False, True):
        assert_same(train(Megatron(layer_wise=layer_wise), range(STEPS)), plain_loop(range(STEPS)))


@check
@megatron()
def accumulated_gradients_too() -> None:
    wanted = plain_loop(range(STEPS), accumulate=2)
    for layer_wise in (False, True):
        assert_same(train(Megatron(layer_wise=layer_wise), range(STEPS), accumulate=2), wanted)


@check
@megatron()
def clipping_is_that_of_torch() -> None:
    wanted = plain_loop(range(STEPS), max_norm=MAX_NORM)
    for layer_wise in (False, True):
        assert_same(train(Megatron(MAX_NORM, layer_wise), range(STEPS)), wanted, **ROUNDED)


@check
@megatron()
def a_bad_batch_of_one_process_changes_nothing_on_any() -> None:
    wanted = plain_loop(range(STEPS), without=(7, 8))
    for layer_wise in (False, True):
        tool = Megatron(layer_wise=layer_wise)
        assert_same(train(tool, range(STEPS), bad=(7, 8)), wanted)
        assert tool.optimizer.chained_optimizers[0].optimizer.skipped_steps == 2


@check
@megatron()
def its_checkpoint_resumes_exactly() -> None:
    from megatron.core import dist_checkpointing

    for number, (layer_wise, bf16) in enumerate([(False, False), (False, True), (True, True)]):
        whole, tool, fresh = (Megatron(layer_wise=layer_wise, bf16=bf16) for _ in range(3))
        train(tool, range(10))
        folder = Path(sys.argv[2], str(number))
        folder.mkdir(exist_ok=True)
        kept = []
        for t, loading in ((tool, False), (fresh, True)):
            weights = t.model.module.sharded_state_dict()
            kept.append({"model": weights, "optimizer": t.optimizer.sharded_state_dict(weights, is_loading=loading)})
        dist_checkpointing.save(kept[0], folder)
        loaded = dist_checkpointing.load(kept[1], folder)
        fresh.model.module.load_state_dict(loaded["model"])
        fresh.optimizer.load_state_dict(loaded["optimizer"])
        assert_same(train(fresh, range(10, 20)), train(whole, range(20)))


if __name__ == "__main__":
    main(WORLD)
