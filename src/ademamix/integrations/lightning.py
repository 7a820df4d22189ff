"""Lightning: settings of AdEMAMix for a Trainer's run."""

import math
from typing import Any

from ademamix.optimizers.settings import suggest

SHORTEST = 100  # steps, of suggest


def settings(trainer: Any, *, beta1: float = 0.9, beta2: float = 0.999) -> dict[str, Any]:
    """Keyword arguments of AdEMAMix for a LightningModule's ``configure_optimizers``.

    ``AdEMAMix(self.parameters(), lr=..., **settings(self.trainer))``: what :func:`ademamix.suggest` returns for the
    Trainer's number of steps, and ``skip_nonfinite=True``, because Lightning clips with torch's function, which lets a
    NaN through. A run of less than 100 steps, as with ``fast_dev_run``, gets the settings for 100. A run without an
    end (``max_epochs=-1``, or an iterable dataset without ``max_steps``) gets those for an unknown length.

    Args:
        trainer: a ``lightning.pytorch.Trainer`` or ``pytorch_lightning.Trainer``. It counts a step for each
            ``accumulate_grad_batches`` batches. With manual optimization that is wrong if ``training_step`` takes
            steps otherwise: call ``suggest`` there.
        beta1: decay of the fast EMA, in [0, 1): AdamW's.
        beta2: decay of the squared gradient's EMA, in [0, 1): AdamW's.

    Raises:
        ValueError: a decay is not in [0, 1).
    """
    steps = trainer.estimated_stepping_batches
    known = 0 <= steps < math.inf  # Lightning's words for no end are -1 and infinity
    return {**suggest(max(int(steps), SHORTEST) if known else None, beta1=beta1, beta2=beta2), "skip_nonfinite": True}
