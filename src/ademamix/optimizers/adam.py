"""AdEMAMix and AdamW: their hyperparameters, the ranges of these, and the coefficients they give the rule."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as xp
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ademamix import geometries, memories
from ademamix.engine.arguments import Options, check_number
from ademamix.engine.optimizer import RuleOptimizer
from ademamix.engine.tracing import composed
from ademamix.optimizers.hyperparameters import (
    UNLIMITED,
    adam_coefficients,
    average,
    check_betas,
    check_common,
    check_log_time,
    check_slow_limit,
    check_warmups,
    debias,
    hyperparameters,
    limit,
)
from ademamix.schedules import alpha_schedule, beta3_schedule, log_time_alpha, log_time_weight

BETA3_SCHEDULES = ("half-life", "log-time")
WARMUPS = ("beta3_warmup", "alpha_warmup")


class AdEMAMix(RuleOptimizer):
    """AdEMAMix (Pagliardini, Ablin and Grangier, arXiv 2409.03137): AdamW with a second, slow EMA of the gradients.

    With g_t the gradient in step t = 1, 2, ...::

        m1_t = b1 m1_{t-1} + (1 - b1) g_t
        m2_t = b3_t m2_{t-1} + (1 - b3_t) g_t
        v_t  = b2 v_{t-1} + (1 - b2) g_t^2
        p_t  = p_{t-1} - lr ((m1_t / (1 - b1^t) + alpha_t m2_t) / (sqrt(v_t / (1 - b2^t)) + eps) + weight_decay p_{t-1})

    With ``slow_limit``, the step uses h_t^2 / m2_t instead of m2_t if |m2_t| exceeds
    h_t = slow_limit max(1, (1 - b3_t) / (1 - b2)) sqrt(v_t / (1 - b2^t)).

    Positional arguments, their defaults and the state's keys match the reference implementation. These defaults
    (alpha = 2, no warmups) are rarely the best choice. For a run of T steps, start from :func:`ademamix.suggest`,
    half of AdamW's ``lr``, and AdamW's ``weight_decay``, beta1 and beta2 (docs/how-to/choosing-settings.md).

    Args:
        params: parameters, (name, parameter) pairs, or dicts that define parameter groups.
        lr: learning rate, a number or a tensor of one element.
        betas: decays (b1, b2, b3) of the fast EMA, of the squared gradient's EMA and of the slow EMA, each in [0, 1).
            With b1 = 0 the gradient itself takes the fast EMA's place, and no fast EMA is stored.
        alpha: weight of the slow EMA, >= 0.
        beta3_warmup: steps over which b3_t grows from b1 to b3, linearly in the half-life; None for b3 at once.
        alpha_warmup: steps over which alpha_t grows linearly from 0 to alpha; None for alpha at once.
        schedule_start: steps done before the schedules of alpha and b3 begin, an integer >= 0. The schedules see step
            max(0, t - schedule_start). For a run that AdamW began: :func:`ademamix.convert.from_adamw` sets it.
        eps: added to the denominator, >= 0.
        weight_decay: decoupled weight decay, multiplied by lr, >= 0.
        beta3_schedule: "half-life", with the warmups above, or "log-time", which needs no T, so that a run can be
            stopped or extended at any step: b3_t = 1 - delta / (delta + t), alpha_t = alpha (1 + t)^(1 - kappa)
            (schedules of ADana, arXiv 2602.05298, where alpha is 1). Both warmups must be None then; b3 is not used.
        delta: of "log-time": the slow EMA's horizon is about t / delta, > 0.
        kappa: of "log-time": in (0, 1]; with 1, alpha_t stays alpha.
        slow_limit: how large the slow EMA may be compared with the root mean square of the gradients, > 0; None for the
            paper's update without a limit. If gradients stop (a token that no longer occurs, an expert that is no
            longer chosen), v_t decays faster than m2_t, and the paper's steps grow to 1e5 lr and more
            (docs/explanation/gradients-that-stop.md). While gradients continue, no mean exceeds their root mean square,
            and the limit changes nothing. Older state dicts, whose groups lack it, load as None.
        maximize: maximize the objective instead of minimizing it.
        state: how state is stored: "float32" (float64 for float64 parameters), "bfloat16", "compact" (about 4.1 bytes
            per parameter), or a mapping of slots to formats. All but float32 round stochastically. With "compact", an
            element whose gradients are below 2e-5 of the largest in its 256 elements of a row takes too small steps.
        backend: "auto" (what is fused for the device, else eager), "eager", "cpu" or "triton" (CUDA and ROCm).
        stochastic_rounding: round bfloat16 parameters stochastically, so that updates far below half a unit in the
            last place move them by the right amount on average; False rounds to nearest, as torch.optim does.
        seed: of the noise for stochastic rounding, an integer >= 0.
        capturable: count steps and compute coefficients on the parameters' devices, so that a CUDA graph can capture
            the step; on a device ``step`` is a tensor there. Make ``lr`` a tensor on the device if it is to change.
        skip_nonfinite: a NaN or an infinity that enters the slow EMA would stay for tens of thousands of steps. True:
            a step whose gradients' norm is not finite leaves parameters, state and ``step`` as they are, and
            ``skipped_steps`` counts it. None: only after :meth:`clip_grad_norm_`, which computes the norm, and under a
            GradScaler; other steps use the gradients as they are, as in torch.optim. False: only under a GradScaler.
        offload: keep state, and float32 master weights of low-precision parameters, in the host's memory. Gradients are
            sent there, the CPU computes the step, and parameters are sent back, in chunks that overlap.
        flat_parameters: True if parameters of one dimension are flattened ones or shards of these, as with DeepSpeed
            ZeRO, FSDP1 and Megatron. Those of at least 4096 elements then have the state that ``state`` asks for, in
            blocks of 256 elements. False: they are norms and biases, and keep full precision
            (docs/reference/compatibility.md).
        fused: as in torch.optim; True for a fused backend: "auto", unless ``backend`` names one, and not "eager". A
            GradScaler then leaves unscaling and skipping to the step, so the host does not wait for the device
            (docs/how-to/mixed-precision.md). None or False: it does both itself, unless :meth:`clip_grad_norm_` was
            called.
        foreach: as in torch.optim; True for ``backend="eager"``.
        differentiable, amsgrad: of torch.optim's optimizers; must be False.
        geometry: how the numerator above becomes a step. "adam": as above. "muon", for parameters of 2 dimensions or
            more: it is orthogonalized as a matrix (all dimensions after the first are flattened), there is no
            exp_avg_sq and no ``slow_limit``, and eps is the least norm that it is divided by. See :class:`Muon`.
        adjust_lr_fn: of "muon": "match_rms_adamw" or None: updates are scaled by 0.2 sqrt(max(rows, columns)), so that
            lr and weight_decay are as large as in "adam"; "original": by sqrt(max(1, rows / columns)).
        ns_coefficients: of "muon": (a, b, c) of the polynomial a s + b s^3 + c s^5 of singular values s that is applied
            ``ns_steps`` times (Newton-Schulz), or "polar_express" (arXiv 2505.16932) for better ones.
        ns_steps: of "muon": an integer from 1 to 99.

    State of a parameter: ``step``, ``exp_avg_fast`` (absent with b1 = 0), ``exp_avg_slow``, ``exp_avg_sq``.

    Raises:
        ValueError: an argument is out of its range; the message names its value and what is allowed.

    Example:
        >>> optimizer = AdEMAMix(model.parameters(), lr=5e-4, weight_decay=0.1, **suggest(256_000, beta2=0.95))
    """

    memory = staticmethod(memories.ademamix)
    rule = staticmethod(composed(memories.ademamix, geometries.adam_limited))
    stepping = (*RuleOptimizer.stepping, "slow_limit")
    compact: ClassVar[Mapping[str, str]] = {"exp_avg_fast": "int8", "exp_avg_slow": "int16", "exp_avg_sq": "float8"}
    earlier = UNLIMITED

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 2.0,
        beta3_warmup: float | None = None,
        alpha_warmup: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        schedule_start: float = 0.0,
        beta3_schedule: str = "half-life",
        delta: float = 8.0,
        kappa: float = 0.85,
        slow_limit: float | None = 1.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), **options)

    @staticmethod
    def check(group: Mapping[str, Any]) -> None:
        check_common(group, "alpha")
        check_betas(group, 3)
        check_warmups(group, *WARMUPS)
        if group["beta3_schedule"] not in BETA3_SCHEDULES:
            raise ValueError(f"beta3_schedule must be one of {BETA3_SCHEDULES}, got {group['beta3_schedule']!r}")
        check_log_time(group)
        check_slow_limit(group)
        check_number("schedule_start", group["schedule_start"], "an integer >= 0", lambda x: x >= 0 and x == int(x))
        if group["beta3_schedule"] == "log-time" and any(group[name] is not None for name in WARMUPS):
            given = {name: group[name] for name in WARMUPS}
            raise ValueError(f"warmups must be None with beta3_schedule='log-time', which has no end, got {given}")

    @classmethod
    def stored(cls, group: Mapping[str, Any]) -> tuple[str, ...]:
        names = super().stored(group)
        return names if group["betas"][0] > 0.0 else names[1:]

    @staticmethod
    def coefficients(step: Any, group: Mapping[str, Any]) -> dict[str, Any]:
        beta1, beta2, beta3 = group["betas"]
        scheduled = xp.maximum(step - group["schedule_start"], 0.0)
        if group["beta3_schedule"] == "log-time":
            alpha = group["alpha"] * log_time_alpha(scheduled, group["kappa"])
            w3 = log_time_weight(scheduled, group["delta"])
        else:
            alpha = alpha_schedule(scheduled, group["alpha"], group["alpha_warmup"])
            w3 = 1.0 - beta3_schedule(scheduled, beta1, beta3, group["beta3_warmup"])
        return {
            **adam_coefficients(step, group, beta2),
            **average("1", 1.0 - beta1),
            **average("3", w3),
            **limit(step, group, beta2, (alpha, w3)),
            "alpha": alpha,
            "debias1": debias(step, beta1),
        }


class AdamW(RuleOptimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) on the same engine: the baseline.

    Arguments, defaults and state keys (``step``, ``exp_avg``, ``exp_avg_sq``) are those of torch.optim.AdamW.

    Args:
        params: parameters, (name, parameter) pairs, or dicts that define parameter groups.
        lr: learning rate, a number or a tensor of one element.
        betas: decays (b1, b2) of the EMAs of the gradient and of its square, each in [0, 1).
        eps: added to the denominator, >= 0.
        weight_decay: decoupled weight decay, multiplied by lr, >= 0.
        maximize, state, backend, stochastic_rounding, seed, capturable, skip_nonfinite, offload, geometry, ...: as in
            :class:`AdEMAMix`. state="compact" takes about 2.0 bytes per parameter.

    Raises:
        ValueError: an argument is out of its range; the message names its value and what is allowed.
    """

    memory = staticmethod(memories.adamw)
    rule = staticmethod(composed(memories.adamw, geometries.adam))
    compact: ClassVar[Mapping[str, str]] = {"exp_avg": "int8", "exp_avg_sq": "float8"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), **options)

    @staticmethod
    def check(group: Mapping[str, Any]) -> None:
        check_common(group)
        check_betas(group, 2)

    @staticmethod
    def coefficients(step: Any, group: Mapping[str, Any]) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        return {
            **adam_coefficients(step, group, beta2),
            **average("1", 1.0 - beta1),
            "debias1": debias(step, beta1),
        }
