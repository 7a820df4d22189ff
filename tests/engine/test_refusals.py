"""Parameters and gradients that are refused: by one clear message, before anything has changed."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from ademamix import AdEMAMix
from ademamix.backends import cpu
from small_models import BACKENDS, model, same


@pytest.mark.parametrize("named", [False, True])
def test_a_parameter_given_twice_is_refused(named: bool) -> None:
    """Two threads would write it, and one of its two states would be lost."""
    net = model()
    params = list(net.named_parameters() if named else net.parameters())
    with pytest.raises(ValueError, match="must have each parameter once, got number 4 a second time"):
        AdEMAMix([*params, params[1]])
    optimizer = AdEMAMix(params[:2])
    with pytest.raises(ValueError, match="must have each parameter once, got number 1 a second time"):
        optimizer.add_param_group({"params": [params[2], params[2]]})
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        optimizer.add_param_group({"params": params[1:]})
    assert len(optimizer.param_groups) == 1


def test_a_device_that_the_backend_cannot_serve() -> None:
    with pytest.raises(ValueError, match="backend='cpu' cannot serve a parameter on 'meta'"):
        AdEMAMix([nn.Parameter(torch.zeros(2, device="meta"))], backend="cpu")
    optimizer = AdEMAMix([nn.Parameter(torch.zeros(2))], backend="cpu")
    with pytest.raises(ValueError, match="allowed there: 'auto', 'eager'"):
        optimizer.add_param_group({"params": nn.Parameter(torch.zeros(2, device="meta"))})
    assert len(optimizer.param_groups) == 1


@BACKENDS
def test_a_refused_gradient_leaves_everything_as_it_was(backend: str) -> None:
    good = nn.Parameter(torch.ones(3))
    embedding = nn.Embedding(4, 2, sparse=True)
    counts = nn.Parameter(torch.zeros(2, dtype=torch.float8_e5m2), requires_grad=False)
    optimizer = AdEMAMix([good, embedding.weight, counts], backend=backend)
    embedding(torch.tensor([1])).sum().backward()
    good.grad = torch.ones(3)
    for _ in range(2):  # at first without state, then with
        before = copy.deepcopy((good.detach(), embedding.weight.detach(), optimizer.state_dict()["state"]))
        with pytest.raises(RuntimeError, match=r"dense gradients .* is torch\.sparse_coo"):
            optimizer.step()
        after = (good.detach(), embedding.weight.detach(), optimizer.state_dict()["state"])
        assert same(before, after)
        sparse, embedding.weight.grad = embedding.weight.grad, torch.ones(4, 2)
        optimizer.step()
        embedding.weight.grad = sparse
    embedding.weight.grad = None
    counts.grad = torch.zeros(2, dtype=torch.float8_e5m2)
    with pytest.raises(RuntimeError, match=r"cannot update a parameter of dtype torch\.float8_e5m2"):
        optimizer.step()


@pytest.mark.parametrize("how", ["step", "skip_nonfinite", "clip_grad_norm_"])
def test_a_sparse_gradient_is_named_by_its_group_and_shape(how: str) -> None:
    """Also where its norm is asked for first."""
    good, embedding = nn.Parameter(torch.ones(3)), nn.Embedding(4, 2, sparse=True)
    optimizer = AdEMAMix(
        [{"params": [good]}, {"params": embedding.parameters()}], skip_nonfinite=how == "skip_nonfinite" or None
    )
    good.grad = torch.ones(3)
    embedding(torch.tensor([1])).sum().backward()
    named = r"AdEMAMix only takes dense gradients .* of a parameter of shape \(4, 2\) in group 1 is torch\.sparse_coo"
    with pytest.raises(RuntimeError, match=named):
        _ = optimizer.clip_grad_norm_(1.0) if how == "clip_grad_norm_" else optimizer.step()
    assert torch.equal(good, torch.ones(3))


def test_a_step_that_fails_leaves_no_state_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = AdEMAMix([p], backend="cpu")

    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(cpu.Launch, "__call__", fail)
    with pytest.raises(MemoryError):
        optimizer.step()
    assert not optimizer.state
    assert torch.equal(p, torch.ones(3))
    monkeypatch.undo()
    optimizer.step()
    assert optimizer.state[p]["step"].item() == 1.0
