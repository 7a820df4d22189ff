"""A run's weights, for programs that continue with them: ``weights`` of the newest of its ``complete`` checkpoints."""

from ademamix.lab.training.checkpoints import complete, weights

__all__ = ["complete", "weights"]
