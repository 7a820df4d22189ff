"""Other memories of past gradients than AdEMAMix's two EMAs, each an optimizer of the same shape."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ademamix import geometries, memories
from ademamix.backends import Rule
from ademamix.engine.arguments import Options, check_number
from ademamix.engine.optimizer import RuleOptimizer
from ademamix.engine.tracing import composed
from ademamix.optimizers.hyperparameters import (
    UNLIMITED,
    adam_coefficients,
    average,
    check_beta,
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


class SimplifiedAdEMAMix(RuleOptimizer):
    """Simplified AdEMAMix (Morwani, Vyas, Zhang and Kakade, arXiv 2502.02431): one sum of gradients, and the gradient.

    With g_t the gradient in step t = 1, 2, ...::

        m_t = b1_t m_{t-1} + g_t
        v_t = b2 v_{t-1} + (1 - b2) g_t^2
        p_t = p_{t-1} - lr ((m_t + alpha g_t) / (sqrt(v_t / (1 - b2^t)) + eps) + weight_decay p_{t-1})

    and with ``slow_limit``, h_t^2 / m_t in the place of m_t where |m_t| exceeds
    h_t = slow_limit max(1 / (1 - b1_t), 1 / (1 - b2)) sqrt(v_t / (1 - b2^t)).

    It has one buffer less than AdEMAMix. Since m_t is a sum and not an average, ``lr`` is far below AdamW's: its
    authors advise sqrt((1 - min_beta1) (1 - b1)) times AdamW's, with AdamW's beta1 as min_beta1 (0.032 for 0.9 and
    0.99). lr multiplies weight decay, which has to be larger by the inverse for the same effect.

    Args:
        params: parameters, (name, parameter) pairs, or dicts that define parameter groups.
        lr: learning rate, a number or a tensor of one element.
        betas: decays (b1, b2) of the sum and of the squared gradient's EMA, each in [0, 1).
        alpha: weight of the gradient itself, >= 0. It falls as the batch grows: the authors' best is about 100 at
            32,000 tokens per batch and about 0.05 at a million.
        beta1_warmup: steps over which b1_t grows from ``min_beta1`` to b1, linearly in the half-life; None for b1 at
            once. The authors warm up over the whole run.
        eps: added to the denominator, >= 0.
        weight_decay: decoupled weight decay, multiplied by lr, >= 0.
        min_beta1: where b1_t starts, in [0, 1).
        slow_limit: as in :class:`AdEMAMix`, of m_t.
        maximize, state, backend, stochastic_rounding, seed, capturable, skip_nonfinite, offload, geometry, ...: as in
            :class:`AdEMAMix`. state="compact" takes about 3.0 bytes per parameter.

    State of a parameter: ``step``, ``exp_avg`` (m_t), ``exp_avg_sq``. Arguments and keys are the authors'.

    Raises:
        ValueError: an argument is out of its range; the message names its value and what is allowed.
    """

    memory = staticmethod(memories.simplified_ademamix)
    rule = staticmethod(composed(memories.simplified_ademamix, geometries.adam_limited))
    stepping = (*RuleOptimizer.stepping, "slow_limit")
    compact: ClassVar[Mapping[str, str]] = {"exp_avg": "int16", "exp_avg_sq": "float8"}
    earlier = UNLIMITED

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
        slow_limit: float | None = 1.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), **options)

    @staticmethod
    def check(group: Mapping[str, Any]) -> None:
        check_common(group, "alpha")
        check_betas(group, 2)
        check_warmups(group, "beta1_warmup")
        check_beta("min_beta1", group["min_beta1"])
        check_slow_limit(group)

    @staticmethod
    def coefficients(step: Any, group: Mapping[str, Any]) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        w = 1.0 - beta3_schedule(step, group["min_beta1"], beta1, group["beta1_warmup"])
        one = average("1", w)
        return {
            **adam_coefficients(step, group, beta2),
            **limit(step, group, beta2, (1.0 / w, w)),
            "alpha": group["alpha"],
            "stay1": one["stay1"],
            "pull1": w * one["pull1"],  # of the sum, not of w times the sum
        }


class ADana(RuleOptimizer):
    """ADana (Ferbach, Paquette, Gidel, Everett and Paquette, arXiv 2602.05298): memory that grows with the run.

    With g_t the gradient in step t = 1, 2, ... and b_t = 1 - delta / (delta + t) for both moments::

        m_t = b_t m_{t-1} + (1 - b_t) g_t
        v_t = b_t v_{t-1} + (1 - b_t) g_t^2
        p_t = p_{t-1} - lr ((g_t + (1 + t)^(1 - kappa) m_t) / (sqrt(v_t) + eps) + weight_decay p_{t-1})
                      - lr / peak_lr omega / t p_{t-1}

    Both moments forget alike, so that |m_t| <= sqrt(v_t) whatever the gradients are: there is nothing to limit. It
    has no bias correction and does not depend on the length of the run. This is the paper's formula. The published
    program of its authors adds m_t once more, that is, (1 + t)^(1 - kappa) + 1 times m_t, and decays by
    omega / (T + t). It has AdamW's memory.

    Args:
        params: parameters, (name, parameter) pairs, or dicts that define parameter groups.
        lr: learning rate, a number or a tensor of one element.
        delta: the averages' horizon is about t / delta, > 0.
        kappa: damping of the momentum, in (0, 1]; the smaller, the larger its weight. The paper advises 0.75 to 0.9.
        eps: added to the denominator, >= 0.
        weight_decay: plain decoupled weight decay, multiplied by lr, >= 0.
        omega: the paper's weight decay, >= 0: omega / t, multiplied by lr's schedule but not by its peak. The paper's
            value is 4; with more than 1, let lr warm up, or the first steps flip the sign of parameters.
        peak_lr: what ``lr`` is divided by to get its schedule, > 0; needed if ``omega`` is not 0.
        maximize, state, backend, stochastic_rounding, seed, capturable, skip_nonfinite, offload, geometry, ...: as in
            :class:`AdEMAMix`. state="compact" takes about 3.0 bytes per parameter.

    State of a parameter: ``step``, ``exp_avg``, ``exp_avg_sq``.

    Raises:
        ValueError: an argument is out of its range; the message names its value and what is allowed.
    """

    memory = staticmethod(memories.adana)
    rule = staticmethod(composed(memories.adana, geometries.adam))
    stepping = (*RuleOptimizer.stepping, "omega", "peak_lr")
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
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), **options)

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
        w = log_time_weight(step, group["delta"])
        return {
            "lr": group["lr"],
            "weight_decay": group["weight_decay"] + decay,
            "eps": group["eps"],
            "alpha": log_time_alpha(step, group["kappa"]),
            **average("1", w),
            **average("2", w),
            "debias2": 1.0,
        }


class KEMA(RuleOptimizer):
    """K EMAs of the gradients, whose weighted sum remembers a gradient by a power of its age; AdEMAMix is K = 2.

    The k-th EMA's horizon h_k, in steps, goes geometrically from ``shortest`` (k = 1) to ``longest`` (k = K), its decay
    is b_k = 1 - 1 / h_k and its weight a_k = (h_k / h_1)^(1 - power). With g_t the gradient in step t = 1, 2, ...::

        m_k,t = b_k m_k,t-1 + (1 - b_k) g_t
        v_t   = b2 v_{t-1} + (1 - b2) g_t^2
        p_t   = p_{t-1} - lr ((m_1,t / (1 - b_1^t) + sum_{k>1} a_k m_k,t) / (sqrt(v_t / (1 - b2^t)) + eps)
                              + weight_decay p_{t-1})

    and with ``slow_limit``, h_t^2 / S in the place of the sum S over k > 1 where |S| exceeds
    h_t = slow_limit sum_{k>1} a_k max(1, (1 - b_k) / (1 - b2)) sqrt(v_t / (1 - b2^t)).

    In the numerator a gradient has, ``age`` steps later, the weight ::

        w(age) = sum_k a_k / h_k (1 - 1 / h_k)^age  ~  age^-power   for ages from shortest to longest,

    since a_k / h_k exp(-age / h_k) is proportional to h_k^-power exp(-age / h_k), and the integral of that over the
    logarithm of the horizon is Gamma(power) age^-power. With power = 1 all weights are 1; the smaller the power, the
    more the old gradients weigh. AdEMAMix with alpha = 8, b1 = 0.9, b3 = 0.9999 is K = 2, power = 0.699, horizons 10
    and 10,000.

    Args:
        params: parameters, (name, parameter) pairs, or dicts that define parameter groups.
        lr: learning rate, a number or a tensor of one element.
        count: K, an integer from 2 to 8, the same in all groups.
        power: exponent of the memory's decay, >= 0.
        shortest: horizon of the first EMA in steps, >= 1. With 1 the gradient itself takes the first EMA's place, and
            that is not stored.
        longest: horizon of the last EMA in steps, >= shortest. A tenth to a third of the run is a good start.
        beta2: decay of the squared gradient's EMA, in [0, 1).
        eps: added to the denominator, >= 0.
        weight_decay: decoupled weight decay, multiplied by lr, >= 0.
        warmup: steps over which the weights of all EMAs but the first grow linearly from 0, and their horizons from
            ``shortest`` (linearly in the half-life), as AdEMAMix's alpha and beta3 do; None for both at once.
        slow_limit: as in :class:`AdEMAMix`, of the sum of all EMAs but the first.
        maximize, state, backend, stochastic_rounding, seed, capturable, skip_nonfinite, offload, geometry, ...: as in
            :class:`AdEMAMix`. state="compact" takes about 2 K bytes per parameter.

    State of a parameter: ``step``, ``exp_avg_1`` (absent with shortest = 1) to ``exp_avg_K``, ``exp_avg_sq``.

    Raises:
        ValueError: an argument is out of its range; the message names its value and what is allowed.
    """

    stepping = (*RuleOptimizer.stepping, "beta2", "slow_limit")
    memory = staticmethod(memories.kema(3))  # of the default count
    compact: ClassVar[Mapping[str, str]] = {
        "exp_avg_1": "int8",
        **{f"exp_avg_{k}": "int16" for k in range(2, 9)},
        "exp_avg_sq": "float8",
    }
    earlier = UNLIMITED

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        count: int = 3,
        power: float = 0.7,
        shortest: float = 10.0,
        longest: float = 1000.0,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup: float | None = None,
        *,
        slow_limit: float | None = 1.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), **options)

    @staticmethod
    def check(group: Mapping[str, Any]) -> None:
        check_common(group, "power")
        check_number("count", group["count"], "an integer from 2 to 8", lambda x: x in range(2, 9))
        check_number("shortest", group["shortest"], "a number of steps >= 1", lambda x: x >= 1.0)
        longest = f"a number of steps >= shortest ({group['shortest']!r})"
        check_number("longest", group["longest"], longest, lambda x: x >= group["shortest"])
        check_beta("beta2", group["beta2"])
        check_warmups(group, "warmup")
        check_slow_limit(group)

    @classmethod
    def memory_of(cls, group: Mapping[str, Any]) -> Rule:
        return memories.kema(int(group["count"]))

    @classmethod
    def adam_rule_of(cls, group: Mapping[str, Any]) -> Rule:
        return composed(cls.memory_of(group), geometries.adam_limited)

    @classmethod
    def stored(cls, group: Mapping[str, Any]) -> tuple[str, ...]:
        names = super().stored(group)
        return names if group["shortest"] > 1.0 else names[1:]

    @staticmethod
    def coefficients(step: Any, group: Mapping[str, Any]) -> dict[str, Any]:
        shortest, warmup = group["shortest"], group["warmup"]
        ratio, beta1 = group["longest"] / shortest, 1.0 - 1.0 / shortest
        values = {
            **adam_coefficients(step, group, group["beta2"]),
            **average("_1", 1.0 - beta1),
            "a_1": debias(step, beta1),
        }
        slow = []
        for k in range(2, int(group["count"]) + 1):
            longer = ratio ** ((k - 1) / (group["count"] - 1))  # h_k / h_1
            beta = 1.0 - 1.0 / (shortest * longer)
            w = 1.0 - beta3_schedule(step, beta1, beta, warmup)
            a = alpha_schedule(step, longer ** (1.0 - group["power"]), warmup)
            values |= {**average(f"_{k}", w), f"a_{k}": a}
            slow.append((a, w))
        return values | limit(step, group, group["beta2"], *slow)
