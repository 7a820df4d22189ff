"""The paper's claims, and the criteria by which our runs decide them. Criteria are fixed before the runs.

A criterion names differences. Each is taken within seeds: both sides have the same initial weights and batches. It is
decided by the 95 % interval of its mean by Student's t, or, where a run diverged, by a sign test at the same level. A
claim is reproduced if every difference that it names is decidedly as it says, contradicted if one is decidedly the
opposite, and undecided otherwise. At 95 %, one in 20 differences that are zero in truth is decided by chance.
"""

from dataclasses import dataclass
from typing import Literal

PAPER = "https://arxiv.org/abs/2409.03137"

Verdict = Literal["reproduced", "contradicted", "undecided", "not tested at this size"]


@dataclass(frozen=True)
class Claim:
    """A claim of arXiv 2409.03137."""

    text: str
    paper: str  # its figure there
    experiment: str  # which decides it
    criterion: str


@dataclass(frozen=True)
class Finding:
    """What an experiment says of a claim."""

    claim: str  # its key in CLAIMS
    verdict: Verdict
    ours: str  # our figure


CLAIMS = {
    "tokens": Claim(
        "AdEMAMix reaches AdamW's final loss with about half the tokens",
        "1.3B parameters: AdamW needs 197B tokens for the loss that AdEMAMix has after 101B (+95 %)",
        "lm",
        "both tuned with the same number of trials, AdEMAMix's loss is below AdamW's, and AdamW needs more than +50 % "
        "tokens for it, by the logarithm of its budget, interpolated within each seed between runs with full schedules",
    ),
    "length": Claim(
        "the gain grows with the number of steps",
        "at 1.3B parameters AdamW needs +95 % tokens where AdEMAMix trains for 770,000 steps; less in shorter runs",
        "length",
        "both tuned at each length, the logarithm of the budget that AdamW needs for AdEMAMix's loss grows with the "
        "logarithm of the number of steps: the slope of a line through each seed's values is above zero",
    ),
    "horizon": Claim(
        "short runs need a shorter slow EMA",
        "beta3 = 0.9999 for 256,000 steps and more; 0.999 and below for short runs",
        "horizon",
        "with the same values of beta3 tried at every length, the slope of log(1 - best beta3) over log(steps), of a "
        "line through each seed's values, is below zero",
    ),
    "warmup": Claim(
        "the schedules of alpha and beta3 are needed, at the best beta3",
        "without them training is unstable early on, or diverges, at beta3 = 0.9999",
        "sweep",
        "at the alpha and beta3 that are best with warmups, the loss with them is below the loss without",
    ),
    "warmup-longest": Claim(
        "the schedules of alpha and beta3 are needed, at the longest beta3",
        "without them training is unstable early on, or diverges, at beta3 = 0.9999",
        "sweep",
        "at the best alpha and the longest beta3 that was tried, the loss with warmups is below the loss without",
    ),
    "beta1": Claim(
        "a larger beta1 in AdamW does not give the same gain",
        "AdamW's loss grows with beta1 above 0.9, at every size",
        "sweep",
        "the loss of AdEMAMix is below that of AdamW with its best larger beta1",
    ),
    "beta1-zero": Claim(
        "beta1 = 0 works, with the memory of AdamW",
        "close to beta1 = 0.9, and better than AdamW, once beta3 is large enough",
        "sweep",
        "the loss of AdEMAMix with beta1 = 0 is below AdamW's",
    ),
    "forgetting": Claim(
        "AdEMAMix forgets training data more slowly than AdamW",
        "the loss on a batch that was seen once stays low for tens of thousands of steps",
        "forgetting",
        "of the largest drop of a batch's loss, the part that is left in the last three quarters of the window is "
        "larger under AdEMAMix",
    ),
    "switch": Claim(
        "a run that AdamW began improves when AdEMAMix takes over, at any time",
        "switching at any time ends below AdamW",
        "switch",
        "the loss after every switch is below AdamW's",
    ),
    "switch-early": Claim(
        "the earlier AdEMAMix takes over from AdamW, the better",
        "earlier switches end lower",
        "switch",
        "the loss after each switch is below the loss after the next later one",
    ),
    "vit": Claim(
        "for vision transformers the gain is there when images are plentiful",
        "24M parameters on 11M images (ImageNet-21k): lower loss",
        "vit",
        "with the most images the loss of AdEMAMix is below AdamW's",
    ),
    "vit-few": Claim(
        "for vision transformers the gain shrinks where the model overfits",
        "86M parameters on 1.3M images: hardly any gain",
        "vit",
        "the gain, AdamW's loss less AdEMAMix's, is smaller with the fewest images than with the most",
    ),
    "mamba": Claim(
        "the gain carries over to Mamba",
        "a 168M Mamba ends lower with AdEMAMix",
        "mamba",
        "both tuned with the same number of trials, the loss of AdEMAMix is below AdamW's",
    ),
    "valley-arrival": Claim(
        "in a narrow valley, at one learning rate, AdEMAMix arrives at the minimum before Adam with a small and with a "
        "large beta1",
        "Rosenbrock's function: AdEMAMix is at the minimum long before both",
        "valley",
        "over starting points around the paper's, the logarithm of the step after which the distance to the minimum is "
        "first below 0.5 is smaller than that of either Adam; an optimizer that never arrives counts as arriving after "
        "the last step",
    ),
    "valley-overshoot": Claim(
        "in a narrow valley, at one learning rate, AdEMAMix overshoots less than Adam with a large beta1",
        "Rosenbrock's function: a large beta1 overshoots, the mixture does not",
        "valley",
        "over starting points from which both arrive, the logarithm of the largest distance to the minimum after the "
        "arrival is smaller than that of Adam with the large beta1",
    ),
}
