"""Every rule, state and dtype against float64 written from the papers' equations, and against eager to the bit."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from step import compiled
from torch import Tensor

from ademamix import KEMA, AdamW, ADana, AdEMAMix, RuleOptimizer, SimplifiedAdEMAMix
from gpu.report import CUDA, DEVICE, FUSED, Check

SHAPES = [(64, 96), (5,), (3, 7000), (), (128, 1024), (7, 3, 5, 5), (1000,), (257, 513), (0, 4), (1, 70000)]
LR, DECAY, EPS = 1e-2, 0.1, 1e-8
WARMUP = STEPS = 12
SCALES = (1e-4, 30.0, 0.0, 1.0)  # of the gradients of further steps
Run = list[Tensor]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def parameters(dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    """The same ones in each call."""
    random = generator(0)
    return [torch.randn(s, generator=random).to(DEVICE, dtype).requires_grad_() for s in shapes]


def gradients(params: Sequence[Tensor], step: int, scale: float = 1.0, in_place: bool = False) -> None:
    """Give the parameters a step's gradients, elsewhere than those before unless ``in_place``."""
    random = generator(1000 + step)
    for p in params:
        g = (torch.randn(p.shape, generator=random) * scale).to(DEVICE, p.dtype)
        p.grad = p.grad.copy_(g) if in_place and p.grad is not None else g


def in_float64(tensors: Sequence[Tensor]) -> Run:
    """Copies on the CPU."""
    return [t.detach().to("cpu", torch.float64, copy=True) for t in tensors]


def everything(params: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> Run:
    """Copies of parameters and state."""
    return [t.detach().clone() for p in params for t in (p, *(v for _, v in sorted(optimizer.state[p].items())))]


def equal(a: Run, b: Run, what: str = "equal to the bit") -> tuple[bool, str]:
    """Whether two runs ended with the same numbers.

    On a CPU torch's square root is off by a unit in the last place now and then: what is said of eager is not exact.
    """
    apart = [(x.cpu().double() - y.cpu().double()).abs() for x, y in zip(a, b, strict=True)]
    bad = [(i, d) for i, d in enumerate(apart) if not torch.equal(d, torch.zeros_like(d))]
    if not bad:
        return True, what
    i, d = bad[0]
    most = max(d.max().item() for _, d in bad)
    words = f"{len(bad)} of {len(a)} tensors differ, by {most:.3g} at most"
    return not CUDA and most < 0.01, f"{words}; number {i} {tuple(d.shape)} in {int((d != 0).sum())} elements"


# ------------------------------------------------------------------------------------- the equations, in float64


def half_life(t: int, start: float, end: float) -> float:
    """A decay that grows from start to end in WARMUP steps, linearly in its half-life."""
    share = min(t / WARMUP, 1.0)
    halves = [math.log(0.5) / math.log(beta) for beta in (start, end)]
    return 0.5 ** (1 / ((1 - share) * halves[0] + share * halves[1]))


def stepped(p: Tensor, numerator: Tensor, v: Tensor, lr: float = LR) -> Tensor:
    return p - lr * (numerator / (v.sqrt() + EPS) + DECAY * p)


def ademamix(p: Tensor, grads: Sequence[Tensor]) -> Tensor:
    """arXiv 2409.03137, betas (0.9, 0.99, 0.999), alpha 5."""
    fast = slow = v = torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        beta3 = half_life(t, 0.9, 0.999)
        fast = 0.9 * fast + 0.1 * g
        slow = beta3 * slow + (1 - beta3) * g
        v = 0.99 * v + 0.01 * g**2
        p = stepped(p, fast / (1 - 0.9**t) + 5.0 * min(t / WARMUP, 1.0) * slow, v / (1 - 0.99**t))
    return p


def adamw(p: Tensor, grads: Sequence[Tensor]) -> Tensor:
    """arXiv 1711.05101, betas (0.9, 0.99)."""
    m = v = torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        m = 0.9 * m + 0.1 * g
        v = 0.99 * v + 0.01 * g**2
        p = stepped(p, m / (1 - 0.9**t), v / (1 - 0.99**t))
    return p


def simplified(p: Tensor, grads: Sequence[Tensor]) -> Tensor:
    """arXiv 2502.02431, betas (0.99, 0.95), b1 from 0.8 on, alpha 3."""
    m = v = torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        m = half_life(t, 0.8, 0.99) * m + g
        v = 0.95 * v + 0.05 * g**2
        p = stepped(p, m + 3.0 * g, v / (1 - 0.95**t))
    return p


def adana(p: Tensor, grads: Sequence[Tensor]) -> Tensor:
    """arXiv 2602.05298, delta 8, kappa 0.85."""
    m = v = torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        beta = 1 - 8.0 / (8.0 + t)
        m = beta * m + (1 - beta) * g
        v = beta * v + (1 - beta) * g**2
        p = stepped(p, g + (1 + t) ** 0.15 * m, v)
    return p


def kema(p: Tensor, grads: Sequence[Tensor]) -> Tensor:
    """KEMA's docstring: three EMAs, horizons 5, 20, 80, power 0.6, beta2 0.99."""
    horizons, first = (5.0, 20.0, 80.0), 1 - 1 / 5.0
    averages = [torch.zeros_like(p)] * 3
    v = torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        betas = [half_life(t, first, 1 - 1 / h) for h in horizons]
        averages = [b * m + (1 - b) * g for b, m in zip(betas, averages, strict=True)]
        weights = [1 / (1 - first**t), *(min(t / WARMUP, 1.0) * (h / 5.0) ** 0.4 for h in horizons[1:])]
        v = 0.99 * v + 0.01 * g**2
        p = stepped(p, sum(a * m for a, m in zip(weights, averages, strict=True)), v / (1 - 0.99**t))
    return p


@dataclass(frozen=True)
class Rule:
    """An optimizer, its settings, and the same from its paper."""

    kind: type[RuleOptimizer]
    settings: dict[str, Any]
    reference: Callable[[Tensor, Sequence[Tensor]], Tensor]

    def make(self, params: Sequence[Tensor], **options: Any) -> RuleOptimizer:
        return self.kind(params, lr=LR, weight_decay=DECAY, eps=EPS, **self.settings, **options)


BETAS = {"betas": (0.9, 0.99, 0.999), "alpha": 5.0, "alpha_warmup": WARMUP, "beta3_warmup": WARMUP}
SUM = {"betas": (0.99, 0.95), "alpha": 3.0, "beta1_warmup": WARMUP, "min_beta1": 0.8}
EMAS = {"count": 3, "power": 0.6, "shortest": 5.0, "longest": 80.0, "beta2": 0.99, "warmup": WARMUP}
RULES = {
    "AdEMAMix": Rule(AdEMAMix, BETAS, ademamix),
    "AdamW": Rule(AdamW, {"betas": (0.9, 0.99)}, adamw),
    "SimplifiedAdEMAMix": Rule(SimplifiedAdEMAMix, SUM, simplified),
    "ADana": Rule(ADana, {"delta": 8.0, "kappa": 0.85}, adana),
    "KEMA": Rule(KEMA, EMAS, kema),
}
# How far what the parameters move by may be off, as a share of it: what codes of state and of parameters lose in 12
# steps. A float32 parameter loses 3e-8 of its size, about 1, in a step of 1e-2; a bfloat16 one 2e-3, at random.
OF_STATE = {"float32": 1e-5, "bfloat16": 0.02, "compact": 0.1}
OF_DTYPE = {torch.float32: 0.0, torch.float16: 0.05, torch.bfloat16: 0.3}
KINDS = [
    *itertools.product(OF_STATE, (torch.float32, torch.bfloat16)),
    ("float32", torch.float16),
    ("compact", torch.float16),
    ("float32", torch.float64),  # which keeps all state in float64
]


def rule_is_right(rule: Rule, state: str, dtype: torch.dtype) -> tuple[bool, str]:
    runs, seen, moved = [], [], []
    start = in_float64(parameters(dtype))
    for backend in (FUSED, "eager"):
        params = parameters(dtype)
        optimizer = rule.make(params, backend=backend, state=state)
        for step in range(STEPS):
            gradients(params, step)
            if backend == FUSED:
                seen.append(in_float64([p.grad for p in params]))
            optimizer.step()
        if backend == FUSED:
            moved = in_float64(params)
        for step, scale in enumerate(SCALES, STEPS):
            gradients(params, step, scale)
            optimizer.step()
        runs.append(everything(params, optimizer))
    want = [rule.reference(p, grads) for p, grads in zip(start, zip(*seen, strict=True), strict=True)]
    off = torch.cat([(m - w).flatten() for m, w in zip(moved, want, strict=True)])
    error = (off.norm() / torch.cat([(w - s).flatten() for w, s in zip(want, start, strict=True)]).norm()).item()
    bias = (off.mean() / (off.std() / math.sqrt(len(off)))).item()
    bound = 1e-12 if dtype == torch.float64 else OF_STATE[state] + OF_DTYPE[dtype]
    same, how = equal(*runs)
    right = error < bound and (dtype != torch.bfloat16 or abs(bias) < 6.0)  # rounding at random has no direction
    return (
        same and right,
        f"eager: {how}; float64: off by {error:.2g} of the way (bound {bound:.2g}), bias {bias:+.1f} s.e.",
    )


# ------------------------------------------------------------------------------------------ what memory is like


def on_both(run: Callable[[str], Run]) -> tuple[bool, str]:
    return equal(run(FUSED), run("eager"))


def layouts(state: str) -> tuple[bool, str]:
    """Unaligned views, channels_last, transposed; gradients that move between two multiples of 16 bytes."""

    def run(backend: str) -> Run:
        memory = torch.randn(2, 8193, generator=generator(1)).to(DEVICE)
        last = torch.randn(4, 8, 20, 20, generator=generator(2)).to(DEVICE).to(memory_format=torch.channels_last)
        turned = torch.randn(96, 64, generator=generator(3)).to(DEVICE).t()
        views = [memory[0, 1:4097].view(64, 64), memory[1, 3:4099].view(16, 256)]
        aligned = torch.randn(64, 512, generator=generator(4)).to(DEVICE)
        params = [t.requires_grad_() for t in (*views, last, turned, aligned)]
        optimizer = AdEMAMix(params, lr=0.1, backend=backend, state=state)
        for step in range(4):
            other = torch.randn(2, 4100, generator=generator(step)).to(DEVICE)
            gradients(params[2:], step)
            for p, g, at in zip(params[:2], other, (step % 4, 2 * step % 4), strict=True):
                p.grad = g[at : at + 4096].view(p.shape)
            optimizer.step()
        return everything(params, optimizer)

    return on_both(run)


def options(**more: Any) -> tuple[bool, str]:
    """Further settings of AdEMAMix, with compact state."""

    def run(backend: str) -> Run:
        params = parameters()
        optimizer = AdEMAMix(params, lr=0.05, backend=backend, state="compact", **more)
        for step in range(4):
            gradients(params, step)
            optimizer.step()
        return everything(params, optimizer)

    return on_both(run)


def many_tensors(count: int) -> tuple[bool, str]:
    def run(backend: str) -> Run:
        params = parameters(shapes=[((i * 37) % 91, (i * 53) % 77) for i in range(count)])
        optimizer = AdEMAMix(params, lr=0.05, backend=backend, state="compact")
        for step in range(2):
            gradients(params, step)
            optimizer.step()
        return everything(params, optimizer)

    return on_both(run)


def huge(state: str, dtype: torch.dtype) -> tuple[bool, str]:
    """More than 2**31 elements: the last rows become what they are on their own, up to stochastic rounding's noise."""
    rows, part = (70_000 if CUDA else 70), 64
    random = torch.Generator(DEVICE).manual_seed(0)
    whole = torch.empty(rows, 32768, device=DEVICE, dtype=dtype).normal_(generator=random)
    grad = torch.empty_like(whole).normal_(generator=random)
    alone = whole[-part:].clone()
    for p, g in ((whole, grad), (alone, grad[-part:].clone())):
        optimizer = AdEMAMix([p.requires_grad_()], lr=0.05, state=state, backend=FUSED)
        p.grad = g
        compiled(optimizer).step()
        p.grad = None
        del optimizer
    off = (whole.detach()[-part:].double() - alone.detach().double()).abs()
    # Two steps at random, each of 2**-7 of the parameter at most, in moves of 0.05. A few elements may differ by more,
    # those whose gradients are far smaller than others' in their block: codes of 8 bits are noise to them.
    noisy = (state, dtype) != ("float32", torch.float32)
    bound = 0.04 * (1.0 + alone.detach().double().abs()) if noisy else 0.0
    within = (off <= bound).double().mean().item()
    said = f"{whole.numel():,} elements; of the last {part} rows {within:.1%} are what they become on their own"
    return within > (0.9 if noisy else 1.0 - 1e-9), said


CHECKS: dict[str, Check] = {
    **{
        f"{name}, {state} state, {str(dtype)[6:]} parameters": lambda r=rule, s=state, d=dtype: rule_is_right(r, s, d)
        for state, dtype in KINDS
        for name, rule in RULES.items()
    },
    **{f"layouts and alignment, {state} state": lambda s=state: layouts(s) for state in OF_STATE},
    "beta1 = 0": lambda: options(betas=(0.0, 0.9, 0.99)),
    "schedules in log-time": lambda: options(beta3_schedule="log-time"),
    "capturable": lambda: options(capturable=True, alpha_warmup=3, beta3_warmup=3),
    "3000 tensors": lambda: many_tensors(3000 if CUDA else 100),
    "more than 2**31 elements, float32": lambda: huge("float32", torch.float32),
    "more than 2**31 elements, compact, bfloat16": lambda: huge("compact", torch.bfloat16),
}
