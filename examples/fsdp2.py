"""AdEMAMix with FSDP2, its clipping, and a checkpoint that resumes on any number of processes.

    torchrun --nproc-per-node 2 examples/fsdp2.py --steps 200 --out fsdp2_checkpoint

Without GPUs the processes share the CPU (torch 2.7 and newer). The data is made up: put your own batches in.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import fully_shard

from ademamix import AdEMAMix, suggest


class Training(Stateful):
    """What a checkpoint has: whole tensors by name, whichever process holds which part."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer, self.steps_done = model, optimizer, 0

    def state_dict(self) -> dict:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "steps_done": self.steps_done}

    def load_state_dict(self, state: dict) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.steps_done = state["steps_done"]


def batch(step: int, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
    return torch.randn(32, 64, generator=generator).to(device)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200, help="of the whole run")
    parser.add_argument("--stop", type=int, help="end after this step; the next call resumes from there")
    parser.add_argument("--out", type=Path, default=Path("fsdp2_checkpoint"))
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    mesh = dist.init_device_mesh(device, (dist.get_world_size(),))

    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(2)))
    for layer in model.to(device):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

    # After fully_shard, so that state is cut as parameters are. state="compact" takes 4.1 bytes per parameter, not 12.
    optimizer = AdEMAMix(model.parameters(), lr=1e-3, weight_decay=0.1, state="compact", **suggest(args.steps))
    training = Training(model, optimizer)
    if args.out.exists():
        dcp.load({"training": training}, checkpoint_id=args.out)

    last = args.stop or args.steps
    for step in range(training.steps_done, last):
        x = batch(step, device)
        loss = (model(x) - x.flip(1)).square().mean()
        loss.backward()
        norm = optimizer.clip_grad_norm_(1.0)  # of all parts together; a NaN anywhere skips the step everywhere
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0 and (step % 50 == 49 or step == last - 1):
            print(f"step {step + 1}: loss {loss.item():.4f}, gradient norm {norm.item():.3f}")
    training.steps_done = last
    dcp.save({"training": training}, checkpoint_id=args.out)
    dist.barrier()  # so that none is gone while another still needs it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
