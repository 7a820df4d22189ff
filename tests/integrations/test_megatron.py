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
    def __init__(self, max_norm: float = 0.0, layer_wise: bool = False, **options: Any) -> None:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig
        from megatron.core.transformer import MegatronModule, TransformerConfig

        from ademamix.integrations.megatron import get_megatron_ademamix

        shape = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=1)
        net = MegatronModule(shape)
        net.layers = model()
        net.forward = net.layers.forward
        self.model = DistributedDataParallel(shape, DistributedDataParallelConfig(), net)
        config = OptimizerConfig(
            lr=SETTINGS["lr"], weight_decay=SETTINGS["weight_decay"], adam_eps=SETTINGS["eps"], clip_grad=max_norm
        )
        self.optimizer = get_megatron_ademamix(
            config, [self.model], 100, config_overrides={}, layer_wise=layer_wise, **options
        )

    def step(self, micro_batches: list[Tensor]) -> None:
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        *others, last = micro_batches
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

    with CudaIsTheCpu(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: "cpu")
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel()
        yield


@check
@megatron()
def weights_are_those_of_a_plain_loop() -> None:
    for layer_wise in (False, True):
        assert_same(train(Megatron(layer_wise=layer_wise), range(STEPS)), plain_loop(range(STEPS)))


if __name__ == "__main__":
    main(WORLD)
