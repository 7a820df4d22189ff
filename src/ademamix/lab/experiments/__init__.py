"""The experiments, the paper's and some beyond it: one file each, all on the one training loop.

A module has WHAT, a line for the help; PRESETS, its settings by the name of the preset; and ``run(settings, trials)``,
which trains what it needs and returns the report.
"""

from importlib import import_module
from types import ModuleType

NAMES = (
    "lm", "length", "forgetting", "switch", "sweep", "horizon", "vit", "mamba", "valley",  # the paper's
    "batch", "clip", "beyond", "geometry",
)  # fmt: skip
EXPERIMENTS: dict[str, ModuleType] = {name: import_module(f"{__name__}.{name}") for name in NAMES}
