"""torchtitan: a container of optimizers that has ours too (docs/tools/torchtitan.md)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

from ademamix import KEMA, ADana, AdEMAMix, Muon, SimplifiedAdEMAMix, suggest

OURS: dict[str, Callable[..., Optimizer]] = {
    optimizer.__name__: optimizer for optimizer in (AdEMAMix, ADana, KEMA, Muon, SimplifiedAdEMAMix)
}


class Container(OptimizersContainer):
    """torchtitan's ``OptimizersContainer``, with our optimizers besides its own.

    ``optimizer_name`` may also be "AdEMAMix", "ADana", "KEMA", "Muon" or "SimplifiedAdEMAMix". Any other name that
    torchtitan does not know raises its NotImplementedError.

    Put arguments of the whole optimizer (``state``, ``backend``, ``skip_nonfinite``, ``offload``) into the config's
    ``optimizer_factory_kwargs_by_name``, those of a group into its ``optimizer_kwargs``.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        pass

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        return OURS[name] if name in OURS else OptimizersContainer._resolve_optimizer_factory(name)


def default_ademamix(lr: float, total_steps: int | None, **options: Any) -> Container.Config:
    """The config of one AdEMAMix for all parameters, instead of torchtitan's ``default_adamw``.

    Args:
        lr: learning rate; start from half of AdamW's.
        total_steps: of the whole run, or None if unknown, for ``suggest(total_steps, beta2=0.95)``.
        options: more arguments of :class:`ademamix.AdEMAMix`. They override ``weight_decay=0.1``,
            ``skip_nonfinite=True`` and the suggested ones.

    Raises:
        ValueError: ``total_steps`` is below 100. AdEMAMix checks the other values when torchtitan builds it.
    """
    settings = {"lr": lr, "weight_decay": 0.1, "skip_nonfinite": True, **suggest(total_steps, beta2=0.95), **options}
    return Container.Config(
        param_groups=[ParamGroupConfig(pattern=".*", optimizer_name="AdEMAMix")],
        optimizer_factory_kwargs_by_name={"AdEMAMix": settings},
    )
