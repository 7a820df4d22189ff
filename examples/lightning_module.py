"""A small byte-level language model in PyTorch Lightning, with AdEMAMix in `configure_optimizers`.

    python examples/lightning_module.py --text my.txt --epochs 4 --out runs/lightning

After an interruption, the same command resumes at the end of the last epoch.
"""

import argparse
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ademamix import AdEMAMix
from ademamix.integrations.lightning import settings

CONTEXT = 32


class Text(Dataset):
    """Windows of a text's bytes, and the byte after each of theirs."""

    def __init__(self, text: bytes) -> None:
        self.bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()

    def __len__(self) -> int:
        return (len(self.bytes) - 1) // CONTEXT

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = i * CONTEXT
        return self.bytes[start : start + CONTEXT], self.bytes[start + 1 : start + CONTEXT + 1]


class Model(lightning.LightningModule):
    def __init__(self, lr: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(256, 64)
        self.memory = nn.GRU(64, 128, batch_first=True)
        self.head = nn.Linear(128, 256)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
        x, y = batch
        hidden, _ = self.memory(self.embedding(x))
        loss = nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), y.flatten())
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict:
        # AdEMAMix's lr is about half of AdamW's; alpha, beta3 and warmups follow from the Trainer's number of steps.
        optimizer = AdEMAMix(
            self.parameters(), lr=self.hparams.lr, weight_decay=0.1, **settings(self.trainer, beta2=0.95)
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        # Within the step, without a pass that writes the gradients; a norm that is not finite skips the step.
        self.log("norm", optimizer.clip_grad_norm_(gradient_clip_val), prog_bar=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=Path(__file__), help="a text to learn; this program itself")
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args()

    lightning.seed_everything(0)
    data = DataLoader(Text(options.text.read_bytes()), options.batch_size, shuffle=True)
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        gradient_clip_val=1.0,
        callbacks=[ModelCheckpoint(options.out, save_last=True)],
        logger=False,
    )
    trainer.fit(Model(options.lr), data, ckpt_path="last")


if __name__ == "__main__":
    main()
