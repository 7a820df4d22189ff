"""timm: ``--opt ademamix``, and ``--opt ademamixcompact`` for 4.1 bytes of state per parameter.

In a script of your own, call :func:`register` before ``timm.optim.create_optimizer_v2``. timm's train.py runs unchanged
if this module starts it: ``python -m ademamix.integrations.timm train.py --opt ademamix ...``, or ``torchrun -m``.
"""

import runpy
import sys
from collections.abc import Sequence
from typing import Any

from timm.optim import OptimInfo
from timm.optim._optim_factory import default_registry  # timm has no public way to register
from torch.optim.optimizer import ParamsT

from ademamix import AdEMAMix, suggest


def ademamix(
    params: ParamsT, betas: Sequence[float] = (0.9, 0.999), total_steps: int | None = None, **options: Any
) -> AdEMAMix:
    """AdEMAMix with the settings of :func:`ademamix.suggest` and ``skip_nonfinite=True``: timm's ``--opt ademamix``.

    timm clips with torch's function, which lets a NaN through; hence ``skip_nonfinite``.

    Args:
        params: parameters or parameter groups.
        betas: ``--opt-betas``. Two are AdamW's, and the third comes from ``suggest``. Three are used as they are;
            without ``total_steps``, nothing is suggested then, and what is not in ``options`` has AdEMAMix's defaults.
        total_steps: ``--opt-kwargs total_steps=...``: optimizer steps of the whole run, at least 100; None if unknown.
        options: other arguments of AdEMAMix, which override what is suggested.

    Raises:
        ValueError: an argument is out of its range; the message names its value and what is allowed.
    """
    if len(betas) not in (2, 3):
        raise ValueError(f"betas must be 2 or 3 numbers in [0, 1), got {betas!r}")
    settings = suggest(total_steps, beta1=betas[0], beta2=betas[1])
    if len(betas) == 3:
        settings = {**({} if total_steps is None else settings), "betas": tuple(betas)}
    return AdEMAMix(params, **{"skip_nonfinite": True, **settings, **options})


def register() -> None:
    """Make "ademamix" and "ademamixcompact" names of optimizers for timm; earlier ones of these names are replaced."""
    for name, defaults in (("ademamix", None), ("ademamixcompact", {"state": "compact"})):
        default_registry.register(
            OptimInfo(
                name=name,
                opt_class=ademamix,
                description="AdEMAMix with the settings of ademamix.suggest" + (", low-bit state" if defaults else ""),
                has_betas=True,
                num_betas=3,
                defaults=defaults,
            )
        )


def main() -> None:
    """Run the program that the command line names first, with its options, after :func:`register`.

    Raises:
        SystemExit: the command line names no program.
    """
    if len(sys.argv) < 2:
        sys.exit("usage: python -m ademamix.integrations.timm train.py [options of train.py]")
    register()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
