"""Does the fused backend run at all? One step with the numbers that it must give."""

import time

import torch
from step import compiled

from ademamix import AdEMAMix
from gpu.report import DEVICE, FUSED


def main() -> None:
    began = time.perf_counter()
    p = torch.nn.Parameter(torch.ones(64, 512, device=DEVICE))
    p.grad = torch.ones_like(p)
    compiled(AdEMAMix([p], lr=0.1, backend=FUSED))
    found = p[0, 0].item()
    # In the first step both EMAs over sqrt(v) are 1 after debiasing; the slow one, not debiased, is 1 - beta3 of that.
    expected = 1.0 - 0.1 * (1.0 + 2.0 * 1e-4)
    print(f"{FUSED}: first step and its compilation {time.perf_counter() - began:.1f} s, p = {found:.7f}")
    if abs(found - expected) > 1e-6:
        raise SystemExit(f"p must be {expected:.7f}")


if __name__ == "__main__":
    main()
