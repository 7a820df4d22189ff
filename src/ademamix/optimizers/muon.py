"""Muon: one EMA, orthogonalized."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ademamix import geometries, memories
from ademamix.engine.arguments import Common, check_flags
from ademamix.engine.optimizer import RuleOptimizer
from ademamix.engine.tracing import composed
from ademamix.optimizers.hyperparameters import (
    adam_coefficients,
    average,
    check_beta,
    check_betas,
    check_common,
    debias,
    hyperparameters,
)


class Muon(RuleOptimizer):
    """Muon (Jordan et al., https://kellerjordan.github.io/posts/muon/) on the same engine: the baseline for matrices.

    With g_t the gradient in step t = 1, 2, ... of a matrix of r rows and c columns::

        m_t = momentum m_{t-1} + (1 - momentum) g_t
        u_t = momentum m_t + (1 - momentum) g_t          (m_t without nesterov)
        p_t = p_{t-1} - lr (scale(r, c) U V^T + weight_decay p_{t-1}),   where u_t = U S V^T

    and U V^T is approximated by ``ns_steps`` polynomials of u_t (:func:`ademamix.geometries.orthogonalized`).
    Arguments, defaults and ``momentum_buffer`` are those of torch.optim.Muon. Its iteration is in bfloat16 everywhere;
    here it is in bfloat16 on GPUs, in float32 on CPUs, and in float64 for float64 parameters.

    Groups with geometry="adam" are AdamW's, with ``betas``: vectors, embeddings and output heads need no optimizer of
    their own (:func:`ademamix.split_parameters`).

    Args:
        params: parameters, (name, parameter) pairs, or dicts that define parameter groups. Those of groups in the
            geometry "muon" have 2 dimensions or more; what lies behind the first is one.
        lr: learning rate, a number or a tensor of one element.
        weight_decay: decoupled weight decay, multiplied by lr, >= 0.
        momentum: decay of the EMA, in [0, 1).
        nesterov: whether u_t looks one step ahead.
        ns_coefficients: (a, b, c) of the polynomial a s + b s^3 + c s^5 of singular values s, or "polar_express".
        eps: the least norm that u_t is divided by, >= 0; in the geometry "adam", AdamW's.
        ns_steps: how many polynomials, an integer from 1 to 99.
        adjust_lr_fn: "original" or None: scale is sqrt(max(1, r / c)); "match_rms_adamw": 0.2 sqrt(max(r, c)), with
            which lr and weight_decay are as large as AdamW's.
        betas: of groups in the geometry "adam": decays of the EMAs of the gradient and of its square, each in [0, 1).
        geometry: "muon" or "adam", for groups that do not say.
        maximize, state, backend, stochastic_rounding, seed, capturable, skip_nonfinite, offload: as in
            :class:`AdEMAMix`. state="compact" takes about 1.0 byte a parameter.

    State of a parameter: ``step``, ``momentum_buffer``; in the geometry "adam" ``exp_avg`` and ``exp_avg_sq``.

    Raises:
        ValueError: an argument is out of its range; the message names its value and what is allowed.
    """

    memory = staticmethod(memories.momentum)
    rule = staticmethod(composed(memories.adamw, geometries.adam))
    scaling = "original"
    stepping = (*RuleOptimizer.stepping, "betas")
    compact: ClassVar[Mapping[str, str]] = {"momentum_buffer": "int8", "exp_avg": "int8", "exp_avg_sq": "float8"}
    earlier: ClassVar[Mapping[str, Any]] = {}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] | str = geometries.NEWTON_SCHULZ,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        geometry: str = "muon",
        **options: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), **options)

    def _by_parameter(self, state_dict: Mapping[str, Any]) -> list[tuple[Tensor, dict[str, Any]]]:
        """torch.optim.Muon counts no steps, and nothing that it keeps needs their number."""
        every = super()._by_parameter(state_dict)
        return [(p, {"step": 0.0, **saved} if "momentum_buffer" in saved else saved) for p, saved in every]

    @staticmethod
    def check(group: Mapping[str, Any]) -> None:
        check_common(group)
        check_beta("momentum", group["momentum"])
        check_flags(group, "nesterov")
        check_betas(group, 2)

    @staticmethod
    def coefficients(step: Any, group: Mapping[str, Any]) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        w = 1.0 - group["momentum"]
        return {
            **adam_coefficients(step, group, beta2),
            **average("1", 1.0 - beta1),
            "debias1": debias(step, beta1),
            **average("_m", w),
            "fresh": w * group["nesterov"],
        }
