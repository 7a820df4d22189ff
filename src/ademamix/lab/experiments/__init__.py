"""The experiments, the paper's and some beyond it: one file each, all on the one training loop.

A module has PRESETS, its settings by the name of the preset; and ``run(settings, trials)``, which trains what it needs
and returns the report.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module
from types import ModuleType

WHAT = {
    "lm": "AdamW against AdEMAMix on text, both tuned; AdamW's tokens to the same loss",
    "length": "what AdEMAMix gains by the length of the run, and how old a gradient still helps",
    "forgetting": "how fast AdamW and AdEMAMix forget a batch that they saw once",
    "switch": "AdEMAMix takes over a run from AdamW, at several times",
    "sweep": "alpha x beta3 as a heat map; warmups, beta1 = 0, AdamW's beta1",
    "horizon": "the best beta3 by the number of steps, as a rule of thumb",
    "vit": "AdamW against AdEMAMix on a vision transformer, with more and with fewer images",
    "mamba": "AdamW against AdEMAMix on Mamba, a state-space model, both tuned",
    "valley": "trajectories in a narrow valley, drawn",
    "batch": "AdEMAMix and its relatives by batch size, at equal tokens and at equal steps, tuned at each size",
    "clip": "how hard to clip the gradient's norm: loss, and the share of steps that are clipped",
    "beyond": "memories of past gradients beyond AdEMAMix's, yours too: tuned alike, stopped early, extended, drawn",
    "geometry": "memories of past gradients in Adam's and in Muon's geometry, tuned alike, at several batch sizes",
}


class _Modules(Mapping[str, ModuleType]):
    """The experiments' modules by name. Looking one up imports it, and torch with it: the list of all needs neither."""

    def __getitem__(self, name: str) -> ModuleType:
        if name not in WHAT:
            raise KeyError(name)
        return import_module(f"{__name__}.{name}")

    def __iter__(self) -> Iterator[str]:
        return iter(WHAT)

    def __len__(self) -> int:
        return len(WHAT)


EXPERIMENTS: Mapping[str, ModuleType] = _Modules()
