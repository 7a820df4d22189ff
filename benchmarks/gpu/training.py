"""What training runs do with an optimizer: scale, clip, offload, save and resume, shard."""

import math
import os
import tempfile
import time

import torch
import torch.distributed as dist
from step import gpt2_shapes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ademamix import AdamW, AdEMAMix
from gpu.exact import BETAS, FUSED, equal, everything, generator, gradients, parameters
from gpu.report import CUDA, DEVICE, Check, sync


def grad_scaler() -> tuple[bool, str]:
    """float16 autocast with two overflows made on purpose, half of the steps clipped."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 10)).to(DEVICE)
    optimizer = AdEMAMix(net.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**15, growth_interval=5)
    losses = []
    for step in range(60):
        x = torch.randn(64, 128, generator=generator(step)).to(DEVICE)
        with torch.autocast(DEVICE.type, torch.float16 if CUDA else torch.bfloat16):
            loss = nn.functional.cross_entropy(net(x).float(), x[:, :10].argmax(1))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if step in (7, 23):
            net[0].weight.grad[0, 0] = math.inf
        if step % 2:
            scaler.unscale_(optimizer)
            optimizer.clip_grad_norm_(1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    right = losses[-1] < 0.8 * losses[0] and optimizer.skipped_steps >= 2
    finite = all(bool(p.isfinite().all()) for p in net.parameters())
    skipped = f"{optimizer.skipped_steps} steps skipped, scale {scaler.get_scale():g}"
    return right and finite, f"loss {losses[0]:.3f} to {losses[-1]:.3f}, {skipped}"


def scaled_steps_are_plain_ones() -> tuple[bool, str]:
    params, plain = parameters(), parameters()
    a, b = AdEMAMix(params, state="compact", fused=True), AdEMAMix(plain, state="compact")
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0)
    for step in range(6):
        scaler.scale(torch.zeros((), device=DEVICE, requires_grad=True))
        gradients(params, step, scale=1024.0)
        gradients(plain, step)
        if step == 2:
            params[0].grad[0, 0] = math.inf
        scaler.step(a)
        scaler.update(1024.0)
        if step != 2:
            b.step()
    right, what = equal(everything(params, a), everything(plain, b))
    return right and a.skipped_steps == 1, f"{what}, {a.skipped_steps} step skipped"


def clip_as_torch() -> tuple[bool, str]:
    params, plain = parameters(), parameters()
    a, b = AdamW(params, lr=0.01), AdamW(plain, lr=0.01)
    worst = 0.0
    for step in range(5):
        gradients(params, step, 3.0)
        gradients(plain, step, 3.0)
        norm, theirs = a.clip_grad_norm_(1.0).item(), nn.utils.clip_grad_norm_(plain, 1.0).item()
        worst = max(worst, abs(norm / theirs - 1.0))
        a.step()
        b.step()
    off = max((p - q).abs().max().item() for p, q in zip(params, plain, strict=True) if p.numel())
    return worst < 1e-5 and off < 1e-5, f"norms are off by {worst:.2g} of their size, parameters by {off:.2g}"


def offload(dtype: torch.dtype) -> tuple[bool, str]:
    params = parameters(dtype)
    host = [p.detach().cpu().requires_grad_() for p in params]
    a, b = (AdEMAMix(ps, lr=0.01, offload=True, **BETAS) for ps in (params, host))
    for step in range(6):
        gradients(params, step)
        for p, q in zip(params, host, strict=True):
            q.grad = p.grad.cpu()
        for optimizer in (a, b):
            optimizer.clip_grad_norm_(1e9)  # far above: the norm itself may differ in its last bit
            optimizer.step()
    return equal([p.detach() for p in params], [q.detach() for q in host], "the host's bits")


def offload_in_chunks() -> tuple[bool, str]:
    """The GPU is busy before each step, and the gradients' memory is used again at once after it."""
    shapes = gpt2_shapes()[:60] if CUDA else [(50, 768), *gpt2_shapes()[2:5]]
    params = [torch.randn(s, device=DEVICE).requires_grad_() for s in shapes]
    twins = [p.detach().clone().requires_grad_() for p in params]
    a, b = AdEMAMix(params, lr=0.01, offload=True), AdEMAMix(twins, lr=0.01, backend=FUSED)
    times = []
    for _ in range(4):
        for p, q in zip(params, twins, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        b.step()
        sync()
        began = time.perf_counter()
        if CUDA:
            torch.cuda._sleep(10_000_000)
        a.step()
        for p in params:
            p.grad = None
        rubbish = [torch.full_like(p, math.nan) for p in params]
        del rubbish
        sync()
        times.append(time.perf_counter() - began)
    off = max((p - q).abs().max().item() for p, q in zip(params, twins, strict=True))
    size = sum(p.numel() for p in params)
    return off < 1e-5, f"{size / 1e6:.0f}M parameters are off by {off:.2g}; {1e3 * min(times):.0f} ms a step"


def resume() -> tuple[bool, str]:
    runs = []
    for stop in (False, True):
        params = parameters(torch.bfloat16)
        optimizer = AdEMAMix(params, lr=0.01, state="compact", **BETAS)
        for step in range(8):
            if stop and step == 4:
                with tempfile.TemporaryDirectory() as folder:
                    torch.save({"optimizer": optimizer.state_dict(), "params": params}, f"{folder}/saved.pt")
                    saved = torch.load(f"{folder}/saved.pt", map_location="cpu", weights_only=True)
                params = [p.detach().to(DEVICE).requires_grad_() for p in saved["params"]]
                optimizer = AdEMAMix(params, lr=0.01, state="compact", **BETAS)
                optimizer.load_state_dict(saved["optimizer"])
            gradients(params, step)
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
        runs.append(everything(params, optimizer))
    return equal(*runs, "saved, loaded by way of the CPU, continued: equal to the bit")


def memory_of_a_step() -> tuple[bool, str]:
    params = [torch.randn(s, device=DEVICE).requires_grad_() for s in gpt2_shapes()]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = AdEMAMix(params)
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    sync()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    sync()
    extra = torch.cuda.max_memory_allocated() - before
    state = sum(t.nbytes for s in optimizer.state.values() for t in s.values())
    return extra < 0.01 * state, f"{extra / 1e6:.2f} MB beside {state / 1e6:.0f} MB of state"


def fsdp() -> tuple[bool, str]:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29513", "RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {**where, "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}  # there may be no other network
    dist.init_process_group("cpu:gloo,cuda:nccl" if CUDA else "gloo")
    try:
        runs = []
        for sharded in (False, True):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)).to(DEVICE)
            if sharded:
                fully_shard(net, mesh=init_device_mesh(DEVICE.type, (1,)))
            optimizer = AdEMAMix(net.parameters(), lr=1e-2, state="compact")
            for step in range(4):
                x = torch.randn(32, 256, generator=generator(step)).to(DEVICE)
                (net(x) - x).square().mean().backward()
                optimizer.clip_grad_norm_(1.0)
                optimizer.step()
                optimizer.zero_grad()
            runs.append([getattr(p, "_local_tensor", p).detach().clone() for p in net.parameters()])
    finally:
        dist.destroy_process_group()
    off = max((a - b).abs().max().item() for a, b in zip(*runs, strict=True))
    return off < 1e-6, f"off by {off:.2g}"


CHECKS: dict[str, Check] = {
    "GradScaler in a training run": grad_scaler,
    "GradScaler, against plain steps": scaled_steps_are_plain_ones,
    "clip_grad_norm_, against torch's": clip_as_torch,
    "offload, float32 parameters": lambda: offload(torch.float32),
    "offload, bfloat16 parameters": lambda: offload(torch.bfloat16),
    "offload, against the GPU": offload_in_chunks,
    "saved and resumed": resume,
    **({"memory of a step": memory_of_a_step} if CUDA else {}),
    "FSDP2 on one process": fsdp,
}
