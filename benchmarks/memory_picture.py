"""Draw what each optimizer remembers: the weight of a gradient in the update, by its age.

    python benchmarks/memory_picture.py [FOLDER]

The weights are measured on the optimizers themselves, in some minutes, and are the same on every call. Writes
memory-light.svg and memory-dark.svg to the folder (docs/images).
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ademamix import KEMA, AdamW, ADana, AdEMAMix, RuleOptimizer, suggest
from ademamix.lab.config import write_whole
from ademamix.lab.experiments.kernels import ages, memory
from ademamix.lab.reports.pictures import SCHEMES, Chart, Line
from ademamix.lab.reports.svg import svg

STEPS = 20_000
TITLE = "AdamW forgets a gradient within tens of steps; AdEMAMix keeps using it for thousands"
CAPTION = (
    "In step 20,000, with lr = 1. AdamW: beta1 = 0.9. AdEMAMix: suggest(20_000), so alpha = 8 and beta3 = 0.9996. "
    "ADana: its defaults. KEMA: three EMAs, the longest over 3,000 steps."
)
MEMORIES: dict[str, tuple[type[RuleOptimizer], Mapping[str, Any]]] = {
    "AdamW": (AdamW, {}),
    "AdEMAMix": (AdEMAMix, suggest(STEPS)),
    "ADana": (ADana, {}),
    "KEMA": (KEMA, {"count": 3, "longest": 0.15 * STEPS, "warmup": STEPS}),
}


def picture(steps: int = STEPS) -> Chart:
    """The chart of all memories after so many steps."""
    at = ages(steps)
    lines = [
        Line(name, [age + 1.0 for age in at], memory(kind, settings, steps, at))
        for name, (kind, settings) in MEMORIES.items()
    ]
    shown = {"x_range": (1.0, float(steps)), "y_range": (1e-6, 2.0), "log_x": True, "log_y": True}
    x_label = "age of the gradient in steps; the newest is 1"
    return Chart("Weight of a gradient in the update", x_label, "weight", lines, **shown, caption=CAPTION)


def main() -> None:
    torch.set_num_threads(1)  # a few elements
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    chart = picture()
    for scheme in SCHEMES:
        write_whole(folder / f"memory-{scheme}.svg", svg(TITLE, [chart], scheme))


if __name__ == "__main__":
    main()
