"""A small GPT on the characters of a text, with AdamW or AdEMAMix: model, loop and checkpoints in one file.

    python examples/nanogpt.py my_text.txt --optimizer ademamix --steps 2000

Started again with the same arguments, it resumes from its checkpoint, bit for bit."""

import argparse
import math
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from ademamix import AdamW, AdEMAMix, suggest


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, c))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, vocabulary: int, context: int, layers: int, width: int, heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.blocks(self.tokens(x) + self.places.weight[: x.shape[1]])
        return cross_entropy(self.head(self.norm(h)).flatten(0, 1), y.flatten())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("text", type=Path)
    parser.add_argument("--optimizer", choices=["adamw", "ademamix"], default="ademamix")
    parser.add_argument("--lr", type=float, help="the peak; 1e-3 for AdamW, half of that for AdEMAMix")
    parser.add_argument("--out", type=Path, default=Path("nanogpt.pt"), help="the checkpoint")
    parser.add_argument("--bf16", action="store_true", help="forward and backward in bfloat16")
    parser.add_argument("--stop", type=int, help="end after this step; the next call resumes from there")
    for name, default in (("steps", 2000), ("batch", 16), ("context", 128), ("layers", 4), ("width", 128), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    text = args.text.read_text(encoding="utf-8")
    codes = {character: i for i, character in enumerate(sorted(set(text)))}
    train, valid = torch.tensor([codes[c] for c in text]).tensor_split([len(text) * 9 // 10])
    model = GPT(len(codes), args.context, args.layers, args.width).to(device)

    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]  # norms and biases, which do not decay
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    if args.optimizer == "adamw":
        optimizer = AdamW(groups, lr=args.lr or 1e-3, betas=(0.9, 0.95))
    else:
        optimizer = AdEMAMix(groups, lr=args.lr or 5e-4, **suggest(args.steps, beta2=0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(  # a warmup of 5 %, and down to a tenth along a cosine
        optimizer, lambda t: min(20 * (t + 1) / args.steps, 0.55 + 0.45 * math.cos(math.pi * t / args.steps))
    )

    def loss_on(part: torch.Tensor, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(args.seed + 1 + step)  # a step's batch, whenever the run began
        starts = torch.randint(len(part) - args.context, (args.batch, 1), generator=generator)
        rows = part[starts + torch.arange(args.context + 1)].to(device)
        with torch.autocast(device, torch.bfloat16, enabled=args.bf16):
            return model(rows[:, :-1], rows[:, 1:])

    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    saved = torch.load(args.out, map_location=device, weights_only=True) if args.out.exists() else {"step": 0}
    for name in saved.keys() & parts.keys():
        parts[name].load_state_dict(saved[name])
    last = args.stop or args.steps
    for step in range(saved["step"], last):
        loss_on(train, step).backward()
        norm = optimizer.clip_grad_norm_(1.0)  # a step with a NaN in its gradients changes nothing
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 99 or step == last - 1:
            with torch.no_grad():
                losses = [loss_on(valid, 10**9 + i).item() for i in range(8)]
            print(f"step {step + 1}: validation loss {sum(losses) / len(losses):.4f}, gradient norm {norm.item():.3f}")
            torch.save({"step": step + 1, **{name: part.state_dict() for name, part in parts.items()}}, args.out)


if __name__ == "__main__":
    main()
