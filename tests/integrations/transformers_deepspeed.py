"""A program: the Trainer with DeepSpeed's ZeRO, in one process of gloo, saves what it did for a test to compare.

Usage: transformers_deepspeed.py STAGE FOLDER
"""

import os
import sys
from pathlib import Path

import deepspeed
import torch
from transformers import Trainer

from ademamix.integrations.transformers import TrainerAdEMAMix, register
from integrations.test_transformers import arguments, data, model

stage, folder = int(sys.argv[1]), Path(sys.argv[2])
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which would be compiled first, for minutes
os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
register()
auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"), "auto")
config = {"zero_optimization": {"stage": stage}, "gradient_clipping": "auto", **auto}


def trained(resume: str | None) -> Trainer:
    args = arguments(folder, deepspeed=config, max_grad_norm=0.0, save_strategy="steps", save_steps=60)
    trainer = Trainer(model(), args, train_dataset=data())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


results = []
for resume in (None, str(folder / "checkpoint-60")):
    trainer = trained(resume)
    optimizer = trainer.optimizer
    while not isinstance(optimizer, TrainerAdEMAMix):
        optimizer = optimizer.optimizer
    groups = [{name: group[name] for name in ("alpha_warmup", "betas")} for group in optimizer.param_groups]
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    results.append({"weights": weights, "groups": groups, "flat": optimizer.flat_parameters})
torch.save(results, folder / "results.pt")
torch.distributed.destroy_process_group()
