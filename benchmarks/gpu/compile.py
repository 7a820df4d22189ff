"""Compile kernels for the parts to come, into Triton's cache: `python -m gpu.compile I N`, every N-th from the I-th on.

Nothing is timed here, so several processes do this while other parts run that are not timed either.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from step import TINY, made, programs

from ademamix.engine.kinds import STATES
from gpu import sweep
from gpu.exact import KINDS, RULES, gradients, parameters
from gpu.report import DEVICE, left, said


def of_rule(name: str, state: str, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    gradients(params, 0)
    RULES[name].make(params, state=state).step()


def of_steps() -> None:
    params = {torch.float32: made(TINY["gpt2"][1], DEVICE)}
    params[torch.bfloat16] = [p.detach().bfloat16().requires_grad_() for p in params[torch.float32]]
    for p in params[torch.bfloat16]:
        p.grad = torch.randn_like(p)
    for _ in programs(params, STATES):
        pass


def of_variant(variant: sweep.Variant, kind: str) -> None:
    variant.use()
    try:
        sweep.optimizer(kind, [(64, 512)]).step()
    finally:
        sweep.Variant().use()


KERNELS: list[Callable[[], Any]] = [
    of_steps,
    *(lambda n=n, s=s, d=d: of_rule(n, s, d) for s, d in KINDS for n in RULES),
    *(lambda v=v, k=k: of_variant(v, k) for v in sweep.VARIANTS.values() for k in sweep.KINDS),
]


def main() -> None:
    first, every = map(int, sys.argv[1:])
    for compile in KERNELS[first::every]:
        if left() < 5.0:
            break
        try:
            compile()
        except Exception as error:  # the part that needs it will say so
            print(said(error))


if __name__ == "__main__":
    main()
