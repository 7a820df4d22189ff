"""AdEMAMix's settings to start from."""

from numbers import Integral
from typing import Any

from ademamix.optimizers.hyperparameters import check_beta

LARGEST_BETA3 = 0.9999  # the paper's, for up to 1.5 million steps


def suggest(total_steps: int | None, *, beta1: float = 0.9, beta2: float = 0.999) -> dict[str, Any]:
    """Keyword arguments of AdEMAMix for a run of so many steps: ``AdEMAMix(params, lr=..., **suggest(256_000))``.

    The slow EMA reaches back an eighth of the run: beta3 = 1 - 8 / total_steps, after arXiv 2602.05298, but not above
    the 0.9999 of the AdEMAMix paper (arXiv 2409.03137, 256,000 steps and more) and not below beta1. alpha is that
    paper's 8, and both warmups take the whole run, as there. docs/how-to/choosing-settings.md has the evidence, and
    where others have chosen differently.

    ``suggest(None)`` is for a run of unknown length. With beta3_schedule="log-time" the slow EMA reaches back an eighth
    of the steps so far, so the run can be stopped or extended at any step. alpha_t = (1 + t)^0.15 as in arXiv
    2602.05298, which is 2.8 after 1,000 steps and 8 after a million. If you know that the run is much longer than
    100,000 steps, ``suggest(100_000)`` gives the settings of Apertus 8B and 70B (arXiv 2509.14233), which last for any
    length.

    Args:
        total_steps: optimizer steps of the whole run, at least 100, since shorter runs have no old gradients to use;
            None if unknown.
        beta1: decay of the fast EMA, in [0, 1): AdamW's. The paper's is 0.9.
        beta2: decay of the squared gradient's EMA, in [0, 1): AdamW's. The paper's is 0.999.

    Returns:
        ``betas``, ``alpha``, ``alpha_warmup`` and ``beta3_warmup``; for None ``betas``, ``alpha`` and
        ``beta3_schedule``.

    Raises:
        ValueError: total_steps is neither None nor a whole number >= 100, or a decay is not in [0, 1).
    """
    check_beta("beta1", beta1)
    check_beta("beta2", beta2)
    beta1, beta2 = float(beta1), float(beta2)
    if total_steps is None:  # log-time does not use beta3
        return {"betas": (beta1, beta2, max(beta1, LARGEST_BETA3)), "alpha": 1.0, "beta3_schedule": "log-time"}
    if not isinstance(total_steps, Integral) or total_steps < 100:
        allowed = "a whole number >= 100"
        raise ValueError(f"total_steps must be {allowed}, got {total_steps!r}; None for a run of unknown length")
    steps = int(total_steps)
    beta3 = max(beta1, min(1.0 - 8.0 / steps, LARGEST_BETA3))
    return {"betas": (beta1, beta2, beta3), "alpha": 8.0, "alpha_warmup": steps, "beta3_warmup": steps}
