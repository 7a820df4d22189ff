"""The paper's claims, and how our own runs decide them: by a criterion that is stated beforehand."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["reproduced", "not reproduced", "not tested at this size"]


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
        "the mean loss of AdEMAMix is below AdamW's by more than twice the joint standard error, both tuned with "
        "as many trials, and AdamW needs at least +50 % tokens on full schedules of its own",
    ),
    "horizon": Claim(
        "short runs want a shorter slow average",
        "beta3 = 0.9999 for 256,000 steps and more; 0.999 and below for short runs",
        "horizon",
        "with the same values of beta3 tried at every length, the slope of log(1 - best beta3) over log(steps) is "
        "below zero by more than twice its standard error over the seeds",
    ),
    "warmup": Claim(
        "a large beta3 needs the schedules of alpha and beta3",
        "without them training is unstable early on, or diverges, at beta3 = 0.9999",
        "sweep",
        "without warmups, the mean loss at the best alpha and beta3 is higher by more than twice the joint standard "
        "error",
    ),
    "beta1": Claim(
        "a larger beta1 in AdamW does not give the same gain",
        "AdamW's loss grows with beta1 above 0.9, at every size",
        "sweep",
        "the mean loss of AdamW with its best larger beta1 stays above that of AdEMAMix by more than twice the joint "
        "standard error",
    ),
    "beta1-zero": Claim(
        "beta1 = 0 works, with the memory of AdamW",
        "close to beta1 = 0.9, and better than AdamW, once beta3 is large enough",
        "sweep",
        "the mean loss of AdEMAMix with beta1 = 0 is below AdamW's by more than twice the joint standard error",
    ),
    "forgetting": Claim(
        "AdEMAMix forgets training data more slowly than AdamW",
        "the loss on a batch that was seen once stays low for tens of thousands of steps",
        "forgetting",
        "of the largest drop of a batch's loss, the part that is left at the end of the window is larger under "
        "AdEMAMix by more than twice the joint standard error",
    ),
    "switch": Claim(
        "a training that AdamW began improves when AdEMAMix takes over; the earlier, the better",
        "switching at any time ends below AdamW; earlier switches end lower",
        "switch",
        "the mean loss after every switch is below AdamW's by more than twice the joint standard error, and an "
        "earlier switch never ends higher than a later one by more than that",
    ),
    "vit": Claim(
        "for vision transformers the gain is there when data is plentiful, and shrinks where the model overfits",
        "24M parameters on 11M images (ImageNet-21k): lower loss; 86M on 1.3M images: hardly any gain",
        "vit",
        "with the most images the mean loss of AdEMAMix is below AdamW's by more than twice the joint standard error, "
        "and the gain there is larger than with the fewest by more than twice its own",
    ),
    "mamba": Claim(
        "the gain carries over to Mamba",
        "a 168M Mamba ends lower with AdEMAMix",
        "mamba",
        "the mean loss of AdEMAMix is below AdamW's by more than twice the joint standard error, both tuned with as "
        "many trials",
    ),
    "valley": Claim(
        "in a narrow valley Adam overshoots with a large beta1 and crawls with a small one; the mixture does neither",
        "Rosenbrock's function: AdEMAMix is at the minimum long before both",
        "valley",
        "over starting points around the paper's, the distance to the minimum is smaller on average (of its logarithm) "
        "than that of either Adam by more than twice the joint standard error",
    ),
}


def decide(claim: str, holds: bool, ours: str, *samples: Sequence[float]) -> Finding:
    """A finding; without two seeds behind each sample nothing is decided."""
    enough = all(len(sample) > 1 for sample in samples)
    verdict: Verdict = "not tested at this size" if not enough else "reproduced" if holds else "not reproduced"
    return Finding(claim, verdict, ours)
