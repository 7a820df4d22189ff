"""FSDP2 by Lightning's ModelParallelStrategy on two processes (gloo); test_lightning.py runs it with torchrun."""

import sys
import warnings
from pathlib import Path
from typing import Any

import integrations.torchvision_for_cpu  # noqa: F401  # before Lightning, which imports torchvision

# isort: split

import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from ademamix import AdEMAMix
from integrations.loops import MAX_NORM, SETTINGS, STEPS, Batch, batches, loss, model, plain_loop

WORLD = 2
# A factor of clipping whose norm was summed in another order is off by 1e-7 of itself, which a step of at most
# lr (1 + alpha) = 0.09 hands on, and so do all that follow.
CLIPPED = {"rtol": 0.0, "atol": STEPS * 0.09 * 1e-5}


class Module(lightning.LightningModule):
    """Sharded in ``configure_model``; ``rows`` are batches of all processes, in turn."""

    def __init__(self, rows: list[Batch], **options: Any) -> None:
        super().__init__()
        self.net, self.rows, self.options = model(), rows, {**SETTINGS, **options}

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net:
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def configure_optimizers(self) -> AdEMAMix:
        self.made = AdEMAMix(self.net.parameters(), **self.options)
        return self.made

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows[self.global_rank :: WORLD], batch_size=None)  # type: ignore[arg-type]

    def training_step(self, batch: Batch, _: int) -> Tensor:
        return loss(self.net, batch)

    def weights(self) -> list[Tensor]:
        return [p.full_tensor() for p in self.net.parameters()]  # type: ignore[attr-defined]


def trainer(**options: Any) -> lightning.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    strategy = ModelParallelStrategy(data_parallel_size=WORLD, tensor_parallel_size=1)
    options = {"max_epochs": 1, **quiet, **options}
    return lightning.Trainer(
        accelerator="cpu", devices=WORLD, strategy=strategy, use_distributed_sampler=False, **options
    )


def check(module: Module, wanted: nn.Module, **tolerance: float) -> None:
    torch.testing.assert_close(
        module.weights(), [p.detach() for p in wanted.parameters()], **(tolerance or {"rtol": 0.0, "atol": 0.0})
    )


def main(folder: Path) -> None:
    data = batches(WORLD * STEPS)
    module = Module(data)
    trainer().fit(module)
    check(module, plain_loop(data, accumulate=WORLD))

    module = Module(data)
    trainer(gradient_clip_val=MAX_NORM).fit(module)
    check(module, plain_loop(data, accumulate=WORLD, max_norm=MAX_NORM), **CLIPPED)

    module = Module(batches(WORLD * STEPS, bad=[41]), skip_nonfinite=True)  # the second process's in step 20
    trainer().fit(module)
    check(module, plain_loop(data[:40] + data[42:], accumulate=WORLD))
    assert module.made.skipped_steps == 1

    first = trainer()
    first.fit(Module(data[:STEPS], state="compact"))
    first.save_checkpoint(folder / "half.ckpt")
    module = Module(data[:STEPS], state="compact")
    for p in module.parameters():
        nn.init.zeros_(p)
    trainer(max_epochs=2).fit(module, ckpt_path=folder / "half.ckpt")
    check(module, plain_loop(2 * data[:STEPS], accumulate=WORLD, state="compact"))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
