"""A training program with those options of timm's train.py that the tests use, and its way to make an optimizer."""

import argparse

import timm
import torch
from timm import utils
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.utils import dispatch_clip_grad

parser = argparse.ArgumentParser()
parser.add_argument("--data-dir")
parser.add_argument("--model", default="vit_tiny_patch16_224")
parser.add_argument("--opt", default="sgd")
parser.add_argument("--opt-betas", type=float, nargs="+")
parser.add_argument("--opt-kwargs", nargs="*", default={}, action=utils.ParseKwargs)
parser.add_argument("--momentum", type=float, default=0.9)
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--weight-decay", type=float, default=2e-5)
parser.add_argument("--clip-grad", type=float)
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--warmup-epochs", type=int)
parser.add_argument("--sched-on-updates", action="store_true")
parser.add_argument("--max-batches", type=int, default=1)
args = parser.parse_args()

model = timm.create_model(args.model, img_size=16, patch_size=8, embed_dim=64, depth=1, num_heads=2, num_classes=2)
optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
data = create_dataset("", root=args.data_dir, split="train", is_training=True)
loader = create_loader(data, 16, args.batch_size, is_training=True, num_workers=0, use_prefetcher=False)
for steps, (x, y) in enumerate(loader, start=1):
    torch.nn.functional.cross_entropy(model(x), y).backward()
    if args.clip_grad is not None:
        dispatch_clip_grad(model.parameters(), args.clip_grad)
    optimizer.step()
    optimizer.zero_grad()
    if steps == args.max_batches:
        break
print(f"{type(optimizer).__name__}, alpha_warmup {optimizer.defaults['alpha_warmup']}, {steps} steps")
