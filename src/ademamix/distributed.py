"""What is computed over all gradients at once."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor


def global_norm(grads: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, a tensor of no dimensions on the first one's device; each is read once.

    Norms are accumulated in float32 at least, whatever the gradients' dtype.
    """
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for g in grads:
        if g.layout != torch.strided:
            raise RuntimeError(f"the norm of the gradients takes dense ones (torch.strided) alone, got {g.layout}")
        real = torch.view_as_real(g.resolve_conj()) if g.is_complex() else g
        alike[real.device, real.dtype].append(real)
    norms: list[Tensor] = []
    for (_, dtype), members in alike.items():
        norms += torch._foreach_norm(members, 2.0, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    if not norms:
        return torch.zeros(())
    together = torch.stack([n.float().to(norms[0].device, non_blocking=True) for n in norms])
    norm: Tensor = torch.linalg.vector_norm(together)
    return norm
