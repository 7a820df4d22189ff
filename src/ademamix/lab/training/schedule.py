"""The learning rate over a run, as pure functions of the step."""

import math

from ademamix.lab.config import Shape

WSD_DECAY = 0.2  # the share of all steps over which a "wsd" schedule decays


def lr_factor(step: int, steps: int, warmup: int, shape: Shape, final: float = 0.0) -> float:
    """Return the learning rate of one step as a fraction of its peak.

    Args:
        step: the step, from 1 to `steps`.
        steps: length of the run.
        warmup: steps of linear warmup, step `warmup` being the first at the peak; less than `steps`.
        shape: "cosine" and "linear" decay from the end of the warmup; "wsd" (warmup, stable, decay) stays at the peak
            and decays linearly over the last fifth of the run.
        final: the fraction reached at the last step.
    """
    if step <= warmup:
        return step / warmup
    start = warmup if shape != "wsd" else max(warmup, steps - round(WSD_DECAY * steps))
    progress = max(0.0, (step - start) / max(1, steps - start))
    left = 0.5 * (1 + math.cos(math.pi * progress)) if shape == "cosine" else 1 - progress
    return final + (1 - final) * left
