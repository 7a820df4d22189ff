"""AdEMAMix for everyone who trains models: the optimizer of arXiv 2409.03137 at AdamW's cost."""

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
