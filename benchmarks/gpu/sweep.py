"""Blocks, warps and registers of the Triton kernel, for steps of 268M aligned elements: writes sweep.md."""

import gc
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from step import Program, timed

from gpu.report import CUDA, DEVICE, Page, collect, left, said

if not CUDA:
    import gpu.standin  # noqa: F401

from triton.compiler import CompiledKernel

from ademamix import AdEMAMix
from ademamix.backends import triton

KINDS = {  # parameters, state
    "float32, float32 state": (torch.float32, "float32"),
    "float32, compact": (torch.float32, "compact"),
    "bfloat16, compact": (torch.bfloat16, "compact"),
    "bfloat16, bfloat16 state": (torch.bfloat16, "bfloat16"),
}
if not CUDA:  # compiling takes long
    KINDS = {"bfloat16, compact": KINDS["bfloat16, compact"]}
ROUNDS = 7 if CUDA else 1


@dataclass(frozen=True)
class Variant:
    """What differs from the backend's own constants."""

    blocks: int = triton.BLOCKS
    options: dict[str, Any] = field(default_factory=dict)

    def use(self) -> None:
        """Make the backend's next kernels so."""
        triton.BLOCKS, triton.OPTIONS = self.blocks, {**OPTIONS, **self.options}
        triton.kernel.cache_clear()


BLOCKS, OPTIONS = triton.BLOCKS, dict(triton.OPTIONS)
VARIANTS = {
    "as it is": Variant(),
    **{f"{blocks} blocks": Variant(blocks) for blocks in (1, 2, 4, 8, 16, 32) if blocks != BLOCKS},
    **{f"{blocks} blocks, 2 warps": Variant(blocks, {"num_warps": 2}) for blocks in (4, 8, 16)},
    "4 warps": Variant(options={"num_warps": 4}),
    **{f"{stages} stages": Variant(options={"num_stages": stages}) for stages in (2, 3)},
    **{f"at most {most} registers": Variant(options={"maxnreg": most}) for most in (64, 96, 128)},
    "fused multiply-add": Variant(options={"enable_fp_fusion": True}),
}


def optimizer(kind: str, shapes: list[tuple[int, ...]]) -> AdEMAMix:
    dtype, state = KINDS[kind]
    params = [torch.randn(s, device=DEVICE).to(dtype).requires_grad_() for s in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return AdEMAMix(params, state=state, backend="triton")


def compiled_kernels() -> list[Any]:
    """All that are alive. Their launcher keeps them where each version of Triton likes to."""
    return [k for k in gc.get_objects() if type(k) is CompiledKernel]


def registers(known: set[int]) -> str:
    """What the driver says of the kernels that were loaded since."""
    found = [k for k in compiled_kernels() if id(k) not in known]
    of_each = {(k.n_regs, k.n_spills) for k in found if getattr(k, "n_regs", None)}
    return ", ".join(f"{registers} registers, {spilt} spilt" for registers, spilt in sorted(of_each)) or "?"


def main() -> None:
    shapes = [(16384, 8192), *[(2048, 2048)] * 32] if CUDA else [(64, 512)]
    page = Page("sweep.md", "Variants of the Triton kernel", "AdEMAMix, ms per step on the GPU.")
    page.add(f"As it is, a program updates {BLOCKS} blocks of 256 elements; options: {OPTIONS}.", "")
    page.table(f"{sum(torch.Size(s).numel() for s in shapes) / 1e6:.0f}M elements", ["variant", *KINDS])
    best: dict[str, tuple[float, str]] = {}
    own: dict[str, float] = {}
    for name, variant in VARIANTS.items():
        cells = []
        for kind in KINDS:
            if left() < 5.0:
                cells.append("not run")
                continue
            variant.use()
            known = set(map(id, compiled_kernels()))
            try:
                program = Program.of(optimizer(kind, shapes))
                taken = timed({name: program}, ROUNDS, DEVICE)[name]
                ms = 1e3 * float(sorted(taken)[len(taken) // 2])
                if variant == Variant():
                    own[kind] = ms
                best[kind] = min(best.get(kind, (ms, name)), (ms, name))
                cells.append(f"{ms:.3f} ({program.bytes / ms / 1e6:.0f} GB/s; {registers(known)})")
            except Exception as error:
                cells.append(said(error)[:120])
            program = None
            collect()
        page.row(name, *cells)
    Variant().use()
    page.add("")
    page.table("Best", ["parameters, state", "ms as it is", "ms at best", "which"])
    for kind, (ms, name) in best.items():
        page.row(kind, f"{own[kind]:.3f}" if kind in own else "-", f"{ms:.3f}", name)
    sys.exit(0 if own.keys() == KINDS.keys() else "the kernel as it is was not measured for everything")


if __name__ == "__main__":
    main()
