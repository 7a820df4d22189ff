"""Megatron-core: AdEMAMix instead of its Adam (docs/tools/megatron.md)."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron.core.optimizer import _get_param_groups
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from ademamix import AdEMAMix, RuleOptimizer, suggest
from ademamix.engine.state import slot_formats, state_of


def get_megatron_ademamix(
    config: OptimizerConfig,
    model_chunks: Sequence[nn.Module],
    total_steps: int | None,
    *,
    config_overrides: Mapping[Any, Any] | None = None,
    pg_collection: ProcessGroupCollection | None = None,
    layer_wise: bool = False,
    **options: Any,
) -> MegatronOptimizer:
    """Megatron's ``get_megatron_optimizer``, with AdEMAMix instead of Adam.

    ``lr``, ``weight_decay``, ``adam_beta1``, ``adam_beta2`` and ``adam_eps`` come from the config, and so do clipping
    and the float32 master weights of ``bf16``.

    Args:
        config: Megatron's; float32 or ``bf16``.
        model_chunks: of this rank, each wrapped in Megatron's DistributedDataParallel.
        total_steps: of the whole run, or None if unknown; see :func:`ademamix.suggest`.
        config_overrides: as in ``get_megatron_optimizer``: parameters with another learning rate or weight decay.
        pg_collection: process groups; None for those of ``parallel_state``.
        layer_wise: distribute the state over data-parallel ranks, a whole parameter to one rank.
        options: more arguments of :class:`ademamix.AdEMAMix`. They override ``skip_nonfinite=True`` and those above.

    Returns:
        A ``ChainedOptimizer``; with ``layer_wise``, a ``LayerWiseDistributedOptimizer``.

    Raises:
        ValueError: the config asks for ``fp16`` or for Megatron's distributed optimizer, or a value is out of range.
    """
    for name in ("fp16", "use_distributed_optimizer"):
        if getattr(config, name):
            raise ValueError(f"{name} must be False with AdEMAMix, got True: see docs/tools/megatron.md")
    groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
    settings = {
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "eps": config.adam_eps,
        "skip_nonfinite": True,
        **suggest(total_steps, beta1=config.adam_beta1, beta2=config.adam_beta2),
        **options,
    }
    param_groups = _get_param_groups(model_chunks, config, config_overrides)
    if layer_wise:
        optimizer = AdEMAMix(param_groups, **settings)
        inner = optimizer if config.bf16 else FP32Optimizer(optimizer, config, init_state)
        return LayerWiseDistributedOptimizer([inner], config, groups, [init_state])
    wrapper = Float16OptimizerWithFloat16Params if config.bf16 else FP32Optimizer
    optimizers = []
    for expert, norm_over in ((False, groups.mp), (True, groups.tp_ep_pp)):
        if members := [group for group in param_groups if group["is_expert_parallel"] is expert]:
            arguments = (AdEMAMix(members, **settings), config, *([None] if config.bf16 else []), init_state)
            optimizers.append(wrapper(*arguments))
            optimizers[-1].grad_stats_parallel_group = norm_over
            optimizers[-1].tp_group = groups.tp
    return ChainedOptimizer(optimizers)


def init_state(optimizer: RuleOptimizer, config: OptimizerConfig | None = None) -> None:
    """Make the state of each parameter that has none, for Megatron to load a checkpoint into.

    Args:
        optimizer: the AdEMAMix inside Megatron's wrapper.
        config: unused; Megatron passes it.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if not optimizer.state[p]:
                optimizer.state[p] = state_of(None, p, slot_formats(p, optimizer.formats(group), flat=False))
