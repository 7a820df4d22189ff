"""AdEMAMix, the optimizer of arXiv 2409.03137, for PyTorch, with other optimizers that use old gradients."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # at run time `__getattr__` imports them
    from ademamix.clipping import clip_grad_norm_
    from ademamix.engine.optimizer import RuleOptimizer
    from ademamix.groups import split_parameters
    from ademamix.optimizers.adam import AdamW, AdEMAMix
    from ademamix.optimizers.custom import optimizer_from
    from ademamix.optimizers.filter import GradientMemory
    from ademamix.optimizers.muon import Muon
    from ademamix.optimizers.settings import suggest
    from ademamix.optimizers.variants import KEMA, ADana, SimplifiedAdEMAMix

__version__ = "0.1.0"
__all__ = [
    "KEMA",
    "ADana",
    "AdEMAMix",
    "AdamW",
    "GradientMemory",
    "Muon",
    "RuleOptimizer",
    "SimplifiedAdEMAMix",
    "clip_grad_norm_",
    "optimizer_from",
    "split_parameters",
    "suggest",
]

_ROOMS = ("backends", "engine", "formats", "geometries", "groups", "memories", "optimizers", "schedules")
_HOMES = {
    "clipping": ("clip_grad_norm_",),
    "engine.optimizer": ("RuleOptimizer",),
    "groups": ("split_parameters",),
    "optimizers.adam": ("AdamW", "AdEMAMix"),
    "optimizers.custom": ("optimizer_from",),
    "optimizers.filter": ("GradientMemory",),
    "optimizers.muon": ("Muon",),
    "optimizers.settings": ("suggest",),
    "optimizers.variants": ("KEMA", "ADana", "SimplifiedAdEMAMix"),
}


def __getattr__(name: str) -> Any:
    """Import the library when one of its names is first used: torch takes seconds, and `ademamix --help` needs none."""
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for module, names in _HOMES.items():
        home = import_module(f"{__name__}.{module}")
        globals().update({one: getattr(home, one) for one in names})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
