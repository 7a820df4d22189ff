"""The experiments, the paper's and two beyond it: one file each, all on the one training loop.

A module has WHAT, a line for the help; PRESETS, its settings by the name of the preset; and ``run(settings, trials)``,
which trains what it needs and returns the report.
"""

from importlib import import_module
from types import ModuleType

NAMES = ("lm", "forgetting", "switch", "sweep", "horizon", "vit", "mamba", "valley", "beyond", "geometry")
EXPERIMENTS: dict[str, ModuleType] = {name: import_module(f"{__name__}.{name}") for name in NAMES}
