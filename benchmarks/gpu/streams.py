"""What only a GPU has: a host that is ahead of it, streams, graphs, and waiting that nobody asked for."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ademamix import AdEMAMix
from gpu.exact import BETAS, Run, equal, everything, generator, gradients, parameters
from gpu.report import DEVICE, Check, sync, waiting_is_an_error

BUSY = 100_000_000  # cycles, about 60 ms


def with_and_without(run: Callable[[bool], Run], what: str = "equal to the bit") -> tuple[bool, str]:
    return equal(run(False), run(True), what)


def host_ahead(state: str, clip: bool) -> tuple[bool, str]:
    """With gradients elsewhere in each step: tables and pinned memory must not be used again before they are read."""

    def run(ahead: bool) -> Run:
        params = parameters()
        optimizer = AdEMAMix(params, lr=0.01, state=state, **BETAS)
        every = []
        for step in range(40):
            gradients(params, step)
            every.append([p.grad for p in params])
        sync()
        for step, grads in enumerate(every):
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            if ahead and step % 10 == 0:
                torch.cuda._sleep(BUSY)
            if clip:
                optimizer.clip_grad_norm_(1.0)
            optimizer.param_groups[0]["lr"] = 0.01 / (1 + step)
            optimizer.step()
            if not ahead:
                sync()
        return everything(params, optimizer)

    return with_and_without(run)


def waits_for_nothing(clip: bool = False, move: bool = True, scale: bool = False, **settings: Any) -> str:
    params = parameters()
    optimizer = AdEMAMix(params, fused=scale, **settings)
    scaler = torch.amp.GradScaler("cuda", enabled=scale)
    scaler.scale(torch.zeros((), device=DEVICE, requires_grad=True))
    ready = [[torch.randn_like(p) for p in params] for _ in range(12)]

    def step(n: int) -> None:
        for p, g in zip(params, ready[n if move else 0], strict=True):
            p.grad = g
        if clip:
            optimizer.clip_grad_norm_(1.0, grad_scale=scaler._scale if scale else None)
        if scale:
            # GradScaler's own step asks the GPU what it has found, but for optimizers that look at it themselves.
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()

    for n in range(3):
        step(n)
    sync()
    with waiting_is_an_error():
        for n in range(3, 12):
            step(n)
    return "9 steps, and the host waited for nothing"


def warmed_up(work: Callable[[], Any], times: int = 2) -> None:
    """Steps on another stream, as a capture needs them before it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(times):
            work()
    torch.cuda.current_stream().wait_stream(side)


def graph(state: str, dtype: torch.dtype) -> tuple[bool, str]:
    def run(captured: bool) -> Run:
        params = parameters(dtype)
        lr = torch.tensor(0.02, device=DEVICE)
        optimizer = AdEMAMix(params, lr=lr, state=state, capturable=True, **BETAS)

        def work() -> None:
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()

        gradients(params, 0)
        warmed_up(work)
        made = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(made):
                work()
        for step in range(1, 15):
            gradients(params, step, in_place=True)
            lr.fill_(0.02 / step)
            if step == 5:
                params[0].grad[0, 0] = math.inf
            made.replay() if captured else work()
        return [*everything(params, optimizer), torch.tensor(optimizer.skipped_steps)]

    return with_and_without(run, "14 replays, one step skipped: equal to the bit")


def many_captured(in_one: bool, count: int = 24) -> tuple[bool, str]:
    """Many steps captured with no other between them, in one graph or each in its own."""

    def run(captured: bool) -> Run:
        params = parameters()
        optimizer = AdEMAMix(params, lr=0.01, state="compact", capturable=True)
        gradients(params, 0)
        warmed_up(optimizer.step)
        if not captured:
            for _ in range(2 * count):
                optimizer.step()
            return everything(params, optimizer)
        graphs = [torch.cuda.CUDAGraph() for _ in range(1 if in_one else count)]
        for made in graphs:
            with torch.cuda.graph(made):
                for _ in range(count if in_one else 1):
                    optimizer.step()
        for _ in range(2):
            for made in graphs:
                made.replay()
        return everything(params, optimizer)

    return with_and_without(run, f"{count} captured steps, replayed twice: equal to the bit")


def graph_of_training() -> tuple[bool, str]:
    def run(captured: bool) -> Run:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).to(DEVICE)
        optimizer = AdEMAMix(net.parameters(), lr=1e-3, capturable=True, state="compact")
        x = torch.randn(64, 256, generator=generator(0)).to(DEVICE)

        def work() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = (net(x) - x).square().mean()
            loss.backward()
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            return loss

        warmed_up(work, 3)
        made = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(made):
                loss = work()
        for step in range(20):
            x.copy_(torch.randn(64, 256, generator=generator(step)).to(DEVICE))
            if captured:
                made.replay()
            else:
                loss = work()
        return [*(p.detach().clone() for p in net.parameters()), loss.detach().clone()]

    return with_and_without(run, "forward, backward, clip and step, 20 replays: equal to the bit")


def side_stream() -> tuple[bool, str]:
    def run(side: bool) -> Run:
        params = parameters()
        optimizer = AdEMAMix(params, lr=0.05, state="compact")
        other = torch.cuda.Stream()
        for step in range(6):
            gradients(params, step)
            if side and step % 2:
                other.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(other):
                    torch.cuda._sleep(BUSY // 5)
                    optimizer.step()
                torch.cuda.current_stream().wait_stream(other)
            else:
                optimizer.step()
        return everything(params, optimizer)

    return with_and_without(run)


def lr_on_gpu() -> Tensor:
    return torch.tensor(0.01, device=DEVICE)


CHECKS: dict[str, Check] = {
    "host ahead, float32": lambda: host_ahead("float32", False),
    "host ahead, compact, clipped": lambda: host_ahead("compact", True),
    "waits for nothing": waits_for_nothing,
    "waits for nothing, compact": lambda: waits_for_nothing(state="compact"),
    "waits for nothing, clipped": lambda: waits_for_nothing(clip=True),
    "waits for nothing, lr on the GPU": lambda: waits_for_nothing(lr=lr_on_gpu()),
    "waits for nothing, lr on the GPU, clipped": lambda: waits_for_nothing(clip=True, lr=lr_on_gpu()),
    "waits for nothing, skip_nonfinite": lambda: waits_for_nothing(skip_nonfinite=True),
    "waits for nothing, GradScaler": lambda: waits_for_nothing(scale=True),
    "waits for nothing, GradScaler, clipped": lambda: waits_for_nothing(clip=True, scale=True),
    "waits for nothing, GradScaler, lr on the GPU": lambda: waits_for_nothing(scale=True, lr=lr_on_gpu()),
    "waits for nothing, capturable, clipped": lambda: waits_for_nothing(clip=True, move=False, capturable=True),
    "waits for nothing, eager": lambda: waits_for_nothing(clip=True, backend="eager", state="compact"),
    "CUDA graph, float32": lambda: graph("float32", torch.float32),
    "CUDA graph, compact": lambda: graph("compact", torch.float32),
    "CUDA graph, compact, bfloat16 parameters": lambda: graph("compact", torch.bfloat16),
    "many captured steps in one graph": lambda: many_captured(True),
    "many graphs of one step": lambda: many_captured(False),
    "CUDA graph of a training step": graph_of_training,
    "steps on another stream": side_stream,
}
