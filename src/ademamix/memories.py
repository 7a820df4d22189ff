"""Other memories of past gradients than AdEMAMix's two EMAs, each an optimizer of the same shape."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as xp
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ademamix import rules
from ademamix.adam import (
    check_beta,
    check_betas,
    check_common,
    check_log_time,
    check_warmups,
    common_coefficients,
    debias,
)
from ademamix.optimizer import RuleOptimizer, check_number
from ademamix.schedules import beta3_schedule, log_time_alpha, log_time_weight


def _hyperparameters(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a constructor was given for its parameter groups."""
    return {n: value for n, value in arguments.items() if n not in ("self", "params", "options", "__class__")}


class SimplifiedAdEMAMix(RuleOptimizer):
    """Simplified AdEMAMix (Morwani, Vyas, Zhang and Kakade, arXiv 2502.02431): one sum of gradients, and the gradient.

    With g_t the gradient in step t = 1, 2, ...::

        m_t = b1_t m_{t-1} + g_t
        v_t = b2 v_{t-1} + (1 - b2) g_t^2
        p_t = p_{t-1} - lr ((m_t + alpha g_t) / (sqrt(v_t / (1 - b2^t)) + eps) + weight_decay p_{t-1})

    It has one buffer less than AdEMAMix. Since m_t is a sum and not an average, it is 1 / (1 - b1) times as large as
    AdamW's: ``lr`` is about (1 - b1) of AdamW's, and weight decay, which lr multiplies, wants to be larger by as much.

    Args:
        params: parameters, (name, parameter) pairs, or dicts that define parameter groups.
        lr: learning rate, a number or a tensor of one element.
        betas: decays (b1, b2) of the sum and of the squared gradient's EMA, each in [0, 1).
        alpha: weight of the gradient itself, >= 0: about 100 for small batches (32,000 tokens), 0 for large ones.
        beta1_warmup: steps over which b1_t grows from ``min_beta1`` to b1, linearly in the half-life; None for b1 at
            once. The authors warm up over the whole run.
        eps: added to the denominator, >= 0.
        weight_decay: decoupled weight decay, multiplied by lr, >= 0.
        min_beta1: where b1_t starts, in [0, 1).
        maximize: go along the gradient, not against it.
        options: state, backend, stochastic_rounding, seed, capturable, skip_nonfinite: as in :class:`AdEMAMix`.
            state="compact" takes about 3.0 bytes a parameter.

    State of a parameter: ``step``, ``exp_avg`` (m_t), ``exp_avg_sq``. Arguments and keys are the authors'.

    Raises:
        ValueError: an argument is out of its range; the message names its value and what is allowed.
    """

    rule = staticmethod(rules.simplified_ademamix)
    compact: ClassVar[Mapping[str, str]] = {"exp_avg": "int16", "exp_avg_sq": "float8"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.99, 0.95),
        alpha: float = 0.0,
        beta1_warmup: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        min_beta1: float = 0.9,
        *,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(params, _hyperparameters(locals()), **options)

    @staticmethod
    def check(group: Mapping[str, Any]) -> None:
        check_common(group, "alpha")
        check_betas(group, 2)
        check_warmups(group, "beta1_warmup")
        check_beta("min_beta1", group["min_beta1"])

    @staticmethod
    def coefficients(step: Any, group: Mapping[str, Any]) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        return {
            **common_coefficients(group),
            "alpha": group["alpha"],
            "w1": 1.0 - beta3_schedule(step, group["min_beta1"], beta1, group["beta1_warmup"]),
            "w2": 1.0 - beta2,
            "debias2": xp.sqrt(debias(step, beta2)),
        }


class ADana(RuleOptimizer):
    """ADana (Ferbach, Paquette, Gidel, Everett and Paquette, arXiv 2602.05298): memory that grows with the run.

    With g_t the gradient in step t = 1, 2, ... and b_t = 1 - delta / (delta + t) for both moments::

        m_t = b_t m_{t-1} + (1 - b_t) g_t
        v_t = b_t v_{t-1} + (1 - b_t) g_t^2
        p_t = p_{t-1} - lr ((g_t + (1 + t)^(1 - kappa) m_t) / (sqrt(v_t) + eps) + weight_decay p_{t-1})
                      - lr / peak_lr omega / t p_{t-1}

    There is no bias correction, and no length of the run to be known. This is the paper's formula; its authors'
    published program adds m_t once more, that is, (1 + t)^(1 - kappa) + 1 times m_t, and decays by omega / (T + t).
    It has AdamW's memory.

    Args:
        params: parameters, (name, parameter) pairs, or dicts that define parameter groups.
        lr: learning rate, a number or a tensor of one element.
        delta: the averages' horizon is about t / delta, > 0.
        kappa: damping of the momentum, in (0, 1]; the smaller, the larger its weight. The paper advises 0.75 to 0.9.
        eps: added to the denominator, >= 0.
        weight_decay: plain decoupled weight decay, multiplied by lr, >= 0.
        omega: the paper's weight decay, >= 0: omega / t, multiplied by lr's schedule but not by its peak. The paper's
            value is 4; more than 1 wants an lr that warms up, or the first steps would turn the parameters' sign.
        peak_lr: what ``lr`` is divided by to get its schedule, > 0; needed if ``omega`` is not 0.
        maximize: go along the gradient, not against it.
        options: state, backend, stochastic_rounding, seed, capturable, skip_nonfinite: as in :class:`AdEMAMix`.
            state="compact" takes about 3.0 bytes a parameter.

    State of a parameter: ``step``, ``exp_avg``, ``exp_avg_sq``.

    Raises:
        ValueError: an argument is out of its range; the message names its value and what is allowed.
    """

    rule = staticmethod(rules.adana)
    compact: ClassVar[Mapping[str, str]] = {"exp_avg": "int16", "exp_avg_sq": "float8"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        delta: float = 8.0,
        kappa: float = 0.85,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        omega: float = 0.0,
        peak_lr: float | None = None,
        *,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(params, _hyperparameters(locals()), **options)

    @staticmethod
    def check(group: Mapping[str, Any]) -> None:
        check_common(group, "omega")
        check_log_time(group)
        if group["peak_lr"] is not None or group["omega"] > 0.0:
            allowed = "a finite number > 0 (omega / t is multiplied by lr / peak_lr)"
            check_number("peak_lr", group["peak_lr"], allowed, lambda x: x > 0.0)

    @staticmethod
    def coefficients(step: Any, group: Mapping[str, Any]) -> dict[str, Any]:
        decay = 0.0 if group["peak_lr"] is None else group["omega"] / (step * group["peak_lr"])
        return {
            **common_coefficients(group),
            "weight_decay": group["weight_decay"] + decay,
            "alpha": log_time_alpha(step, group["kappa"]),
            "w": log_time_weight(step, group["delta"]),
        }
