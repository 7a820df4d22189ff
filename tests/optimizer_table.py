"""The optimizers that all generic tests run over: a new optimizer is one row of ``ROWS``.

What a row says is written down here by hand, not asked of the class: a test compares the two.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from ademamix import KEMA, AdamW, ADana, AdEMAMix, RuleOptimizer, SimplifiedAdEMAMix

Options = Mapping[str, Any]
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True, eq=False)
class Case:
    """An optimizer with hyperparameters. Called, it makes one; what it is called with comes before its own."""

    kind: type[RuleOptimizer]
    options: Options
    slots: Mapping[str, str]  # those that a parameter's state has, and their formats under state="compact"

    def __call__(self, params: Any, **options: Any) -> RuleOptimizer:
        return self.kind(params, **{**self.options, **options})


class Row:
    """An optimizer, its sets of hyperparameters and what it refuses.

    Args:
        kind: the class.
        slots: the state's slots, and their formats under state="compact".
        cases: sets of hyperparameters by name, that of name "" first: it has all warmups, short enough for the few
            steps of a test to pass their end. "slots" among them are what this set stores, if not ``slots``. The
            defaults are a case too.
        refused: arguments that a constructor, a group and a checkpoint must not have, and a part of the message.
        warmups: which hyperparameters are numbers of steps after which everything is as without them.
    """

    def __init__(
        self,
        kind: type[RuleOptimizer],
        slots: Mapping[str, str],
        cases: Mapping[str, Options],
        refused: tuple[tuple[Options, str], ...],
        warmups: tuple[str, ...] = (),
    ) -> None:
        self.kind, self.warmups = kind, warmups
        slot = next(iter(slots))
        self.refused = (
            *REFUSED_BY_ALL,
            ({"state": {"no slot": "int8"}}, rf"state must map slots .*{slot}.* to formats .*, got 'no slot': 'int8'"),
            ({"state": {slot: "int4"}}, rf"state must map slots .* to formats .*float8.*, got '{slot}': 'int4'"),
            *refused,
        )
        every = {**cases, "defaults": cases.get("defaults", {})}
        self.cases = {
            name: Case(kind, {k: x for k, x in given.items() if k != "slots"}, given.get("slots", slots))
            for name, given in every.items()
        }


REFUSED_BY_ALL: tuple[tuple[Options, str], ...] = (
    ({"lr": -1.0}, "lr must be a finite number >= 0, got -1.0"),
    ({"lr": NAN}, "lr must be a finite number >= 0, got nan"),
    ({"lr": INF}, "lr must be a finite number >= 0, got inf"),
    ({"lr": 1e39}, r"lr must be a finite number >= 0, and at most 3.4e\+38 \(float32\), got 1e\+39"),
    (
        {"weight_decay": 1e39},
        r"weight_decay must be a finite number >= 0, and at most 3.4e\+38 \(float32\), got 1e\+39",
    ),
    ({"lr": "0.1"}, "lr must be a finite number >= 0, got '0.1'"),
    ({"lr": True}, "lr must be a finite number >= 0, got True"),
    ({"lr": torch.zeros(2)}, r"lr must be a finite number >= 0, got tensor\(\[0., 0.\]\)"),
    ({"eps": -1e-9}, "eps must be a finite number >= 0, got -1e-09"),
    ({"weight_decay": NAN}, "weight_decay must be a finite number >= 0, got nan"),
    ({"maximize": 1}, "maximize must be True or False, got 1"),
    ({"seed": -1}, r"seed must be an integer in \[0, 2\*\*63\), got -1"),
    ({"stochastic_rounding": 1}, "stochastic_rounding must be True or False, got 1"),
    ({"capturable": 1}, "capturable must be True or False, got 1"),
    ({"state": "int4"}, r"state must be one of \('float32', 'bfloat16', 'compact'\) or a mapping .*, got 'int4'"),
    ({"backend": "gpu"}, r"backend must be one of \('auto', 'eager', 'cpu', 'triton'\), got 'gpu'"),
    ({"skip_nonfinite": "yes"}, "skip_nonfinite must be None, True or False, got 'yes'"),
    ({"offload": 1}, "offload must be True or False, got 1"),
    ({"offload": True, "capturable": True}, "capturable must be False with offload=True"),
    ({"offload": True, "backend": "triton"}, "backend='triton' cannot serve a parameter on 'cpu'"),
)


def averages(*formats: str) -> dict[str, str]:
    """KEMA's slots."""
    return {**{f"exp_avg_{k}": format for k, format in enumerate(formats, start=1)}, "exp_avg_sq": "float8"}


ROWS = (
    Row(
        AdEMAMix,
        {"exp_avg_fast": "int8", "exp_avg_slow": "int16", "exp_avg_sq": "float8"},
        {
            "": {"lr": 0.02, "alpha": 5.0, "beta3_warmup": 5, "alpha_warmup": 7, "weight_decay": 0.1},
            "beta1 = 0": {
                "lr": 0.02,
                "betas": (0.0, 0.99, 0.999),
                "alpha": 5.0,
                "beta3_warmup": 7,
                "slots": {"exp_avg_slow": "int16", "exp_avg_sq": "float8"},
            },
            "log-time": {"lr": 0.01, "alpha": 1.0, "beta3_schedule": "log-time"},
            "schedules that begin late": {"alpha_warmup": 6, "beta3_warmup": 4, "schedule_start": 3},
        },
        (
            ({"alpha": -2}, "alpha must be a finite number >= 0, got -2"),
            ({"betas": (0.9, 0.999)}, r"betas must be 3 numbers in \[0, 1\), got \(0.9, 0.999\)"),
            ({"betas": 0.9}, r"betas must be 3 numbers in \[0, 1\), got 0.9"),
            ({"betas": (1.0, 0.9, 0.9)}, r"betas\[0\] must be a number in \[0, 1\), got 1.0"),
            ({"betas": (0.9, -0.1, 0.9)}, r"betas\[1\] must be a number in \[0, 1\), got -0.1"),
            ({"betas": (0.9, 0.9, NAN)}, r"betas\[2\] must be a number in \[0, 1\), got nan"),
            ({"beta3_warmup": 0}, "beta3_warmup must be None or a number of steps >= 1, got 0"),
            ({"alpha_warmup": -5}, "alpha_warmup must be None or a number of steps >= 1, got -5"),
            ({"alpha_warmup": "all"}, "alpha_warmup must be None or a number of steps >= 1, got 'all'"),
            ({"schedule_start": -1}, "schedule_start must be an integer >= 0, got -1"),
            ({"schedule_start": 2.5}, "schedule_start must be an integer >= 0, got 2.5"),
            ({"schedule_start": "3"}, "schedule_start must be an integer >= 0, got '3'"),
            ({"beta3_schedule": "log"}, r"beta3_schedule must be one of \('half-life', 'log-time'\), got 'log'"),
            ({"slow_limit": 0.0}, "slow_limit must be None or a finite number > 0, got 0.0"),
            ({"slow_limit": NAN}, "slow_limit must be None or a finite number > 0, got nan"),
            ({"delta": -1.0}, "delta must be a finite number > 0, got -1.0"),
            (
                {"beta3_schedule": "log-time", "alpha_warmup": 5},
                "warmups must be None with beta3_schedule='log-time', .*'alpha_warmup': 5",
            ),
            ({"state": {"exp_avg": "int8"}}, r"state must map slots .*exp_avg_slow.* to .*, got 'exp_avg': 'int8'"),
        ),
        warmups=("beta3_warmup", "alpha_warmup"),
    ),
    Row(
        AdamW,
        {"exp_avg": "int8", "exp_avg_sq": "float8"},
        {"": {"lr": 0.02, "weight_decay": 0.1}},
        (({"betas": (0.9, 0.99, 0.9)}, r"betas must be 2 numbers in \[0, 1\), got \(0.9, 0.99, 0.9\)"),),
    ),
    Row(
        SimplifiedAdEMAMix,
        {"exp_avg": "int16", "exp_avg_sq": "float8"},
        {
            "": {
                "lr": 0.02,
                "betas": (0.9, 0.99),
                "alpha": 1.0,
                "min_beta1": 0.8,
                "beta1_warmup": 6,
                "weight_decay": 0.1,
            }
        },
        (
            ({"alpha": -1.0}, "alpha must be a finite number >= 0, got -1.0"),
            ({"min_beta1": 1.0}, r"min_beta1 must be a number in \[0, 1\), got 1.0"),
            ({"beta1_warmup": -1}, "beta1_warmup must be None or a number of steps >= 1, got -1"),
            ({"slow_limit": 0.0}, "slow_limit must be None or a finite number > 0, got 0.0"),
            ({"betas": (0.9,)}, r"betas must be 2 numbers in \[0, 1\), got \(0.9,\)"),
        ),
        warmups=("beta1_warmup",),
    ),
    Row(
        ADana,
        {"exp_avg": "int16", "exp_avg_sq": "float8"},
        {"": {"lr": 0.01, "omega": 0.5, "peak_lr": 0.02}},
        (
            ({"delta": 0.0}, "delta must be a finite number > 0, got 0.0"),
            ({"kappa": 1.5}, r"kappa must be a number in \(0, 1\], got 1.5"),
            ({"omega": -1.0}, "omega must be a finite number >= 0, got -1.0"),
            ({"omega": 4.0}, "peak_lr must be a finite number > 0 .*, got None"),
            ({"peak_lr": 0.0}, "peak_lr must be a finite number > 0 .*, got 0.0"),
        ),
    ),
    Row(
        KEMA,
        averages("int8", "int16", "int16", "int16"),
        {
            "": {"lr": 0.02, "count": 4, "longest": 40.0, "warmup": 6, "weight_decay": 0.1},
            "of two": {"lr": 0.02, "count": 2, "slots": averages("int8", "int16")},
            "of three, the first of them the gradient": {
                "lr": 0.02,
                "shortest": 1.0,
                "slots": {"exp_avg_2": "int16", "exp_avg_3": "int16", "exp_avg_sq": "float8"},
            },
            "defaults": {"slots": averages("int8", "int16", "int16")},
        },
        (
            ({"count": 1}, "count must be an integer from 2 to 8, got 1"),
            ({"count": 2.5}, "count must be an integer from 2 to 8, got 2.5"),
            ({"power": -0.1}, "power must be a finite number >= 0, got -0.1"),
            ({"shortest": 0.5}, "shortest must be a number of steps >= 1, got 0.5"),
            ({"longest": 9}, r"longest must be a number of steps >= shortest \(10.0\), got 9"),
            ({"beta2": 1.0}, r"beta2 must be a number in \[0, 1\), got 1.0"),
            ({"slow_limit": 0.0}, "slow_limit must be None or a finite number > 0, got 0.0"),
            ({"warmup": 0}, "warmup must be None or a number of steps >= 1, got 0"),
        ),
        warmups=("warmup",),
    ),
)

CASES = {row.kind.__name__ + (f", {name}" if name else ""): case for row in ROWS for name, case in row.cases.items()}
FIRST = {row.kind.__name__: row.cases[""] for row in ROWS}

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.kind.__name__)
every_case = pytest.mark.parametrize("make", CASES.values(), ids=CASES)
first_cases = pytest.mark.parametrize("make", FIRST.values(), ids=FIRST)  # where each costs seconds
