"""Signatures of optimizer classes: each option once, in the base and in Options, and shown by every class."""

import inspect
import pydoc
from abc import ABC
from typing import Any, get_type_hints

import pytest
import torch
from typing_extensions import Unpack

from ademamix import KEMA, AdamW, ADana, AdEMAMix, RuleOptimizer, SimplifiedAdEMAMix, optimizer_from
from ademamix.engine.arguments import Options

OPTIONS = [q for q in inspect.signature(RuleOptimizer).parameters.values() if q.kind is q.KEYWORD_ONLY]


def plain(p: Any, g: Any, m: Any, *, lr: Any = 0.1) -> Any:
    return p - lr * m, m + g


Plain = optimizer_from(plain)
GEOMETRY = ("geometry", "adjust_lr_fn", "ns_coefficients", "ns_steps")
KINDS = [AdEMAMix, AdamW, SimplifiedAdEMAMix, ADana, KEMA, Plain]


class Own(RuleOptimizer):
    """As before the base had ``maximize``: with it among its defaults, and ``**options`` of no type."""

    rule = AdamW.rule
    check = staticmethod(AdamW.check)
    coefficients = staticmethod(AdamW.coefficients)

    def __init__(self, params: Any, *, maximize: bool = False, **options: Any) -> None:
        defaults = {"lr": 0.1, "maximize": maximize, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
        super().__init__(params, defaults, **options)


def one() -> list[torch.Tensor]:
    return [torch.ones(3, requires_grad=True)]


def test_options_are_those_of_the_base() -> None:
    assert get_type_hints(Options) == {q.name: q.annotation for q in OPTIONS}
    assert list(get_type_hints(Options)) == [q.name for q in OPTIONS]
    assert Options.__required_keys__ == frozenset()
    assert all(q.default is not q.empty for q in OPTIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_signature_shows_every_option(kind: type[RuleOptimizer]) -> None:
    parameters = list(inspect.signature(kind).parameters.values())
    assert parameters[0].name == "params"
    assert parameters[-len(OPTIONS) :] == OPTIONS
    shown = pydoc.render_doc(kind, renderer=pydoc.plaintext)
    assert all(str(q) in shown for q in OPTIONS)  # such as "seed: int = 0"


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_arguments_are_refused(kind: Any) -> None:
    with pytest.raises(TypeError, match=f"{kind.__name__} got an unexpected .*'momentum'; .* lr, .* seed,"):
        kind(one(), momentum=0.9)


@pytest.mark.parametrize("kind", KINDS)
def test_hyperparameters_come_first_and_options_last_in_the_defaults(kind: Any) -> None:
    optimizer = kind(one(), maximize=True, seed=3)
    own = [name for name in inspect.signature(kind).parameters if name not in ("params", *(q.name for q in OPTIONS))]
    assert list(optimizer.defaults) == [*own, "maximize", "stochastic_rounding", "seed", "capturable", *GEOMETRY]
    assert optimizer.param_groups[0]["maximize"] is True
    assert optimizer.defaults["seed"] == 3


@pytest.mark.parametrize("kind", [*KINDS, Own])
def test_maximize_is_checked_in_every_class(kind: Any) -> None:
    for value in (0, 1):
        with pytest.raises(ValueError, match=f"maximize must be True or False, got {value}"):
            kind(one(), maximize=value)


def test_defaults_of_a_subclass_come_before_those_of_the_base() -> None:
    optimizer = Own(one(), maximize=True, state="bfloat16")
    assert optimizer.defaults["maximize"] is True
    assert list(optimizer.defaults)[:2] == ["lr", "maximize"]
    assert list(inspect.signature(Own).parameters) == ["params", "maximize", "options"]


def test_a_subclass_shows_options_that_it_does_not_name_itself() -> None:
    class Seeded(AdamW):
        def __init__(self, params: Any, seed: int = 7, **options: Unpack[Options]) -> None:  # type: ignore[misc]
            super().__init__(params, seed=seed, **options)

    class Same(Seeded):
        pass

    others = [q.name for q in OPTIONS if q.name != "seed"]
    assert list(inspect.signature(Same).parameters) == ["params", "seed", *others]
    assert Same(one()).defaults["seed"] == 7


def test_options_are_shown_where_annotations_are_text() -> None:
    class Later(AdamW):
        def __init__(self, params: Any, **options: "Unpack[Options]") -> None:  # type: ignore[misc]
            super().__init__(params, **options)

    assert list(inspect.signature(Later).parameters.values())[1:] == OPTIONS


def test_an_option_wins_over_the_same_among_the_defaults() -> None:
    class Fixed(Own):
        def __init__(self, params: Any, **options: Any) -> None:
            defaults = {
                "lr": 0.1,
                "betas": (0.9, 0.999),
                "eps": 1e-8,
                "weight_decay": 0.0,
                "maximize": False,
                "seed": 1,
            }
            RuleOptimizer.__init__(self, params, defaults, **options)

    assert Fixed(one(), seed=5, maximize=True).defaults["seed"] == 5
    assert Fixed(one(), maximize=True).defaults["maximize"] is True


def test_what_a_subclass_computes_may_depend_on_every_option_of_a_group() -> None:
    class Asking(AdEMAMix):
        @staticmethod
        def coefficients(step: Any, group: Any) -> Any:
            return {
                **AdEMAMix.coefficients(step, group),
                "lr": 0.5 if group["maximize"] and group["seed"] == 3 else 0.0,
            }

    p = torch.zeros(1, requires_grad=True)
    p.grad = torch.ones(1)
    Asking([p], maximize=True, seed=3, alpha=0.0).step()
    torch.testing.assert_close(p.detach(), torch.tensor([0.5]))


def test_a_subclass_may_name_torch_s_optimizer_among_its_bases() -> None:
    class Mixed(AdEMAMix, torch.optim.Optimizer, ABC):
        pass

    assert isinstance(Mixed(one()), AdEMAMix)
