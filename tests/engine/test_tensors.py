"""Kinds of parameters, gradients and state: layouts, dtypes, views, wrappers; and no memory besides them."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

from ademamix import AdamW, AdEMAMix, backends
from optimizer_table import FIRST, Case, every_case, first_cases
from small_models import BACKENDS, same


@every_case
@BACKENDS
def test_layouts_do_not_matter(make: Case, backend: str) -> None:
    """Channels-last, transposed, strided, zero-element, scalar and expanded tensors: the values of contiguous ones."""
    torch.manual_seed(0)
    values = [
        torch.randn(2, 3, 4, 5),
        torch.randn(6, 4),
        torch.randn(5, 3),
        torch.randn(0, 3),
        torch.randn(()),
        torch.randn(7),
    ]

    def odd() -> list[torch.Tensor]:
        storage = torch.zeros(10, 6)
        strided = storage[::2, ::2]
        strided.copy_(values[2])
        layouts = [values[0].clone().to(memory_format=torch.channels_last), values[1].T.clone().T, strided]
        return [t.requires_grad_() for t in (*layouts, *(v.clone() for v in values[3:]))]

    plain, strange = [v.clone().requires_grad_() for v in values], odd()
    optimizers = [make(ps, backend=backend) for ps in (plain, strange)]
    for t in range(4):
        for p, q in zip(plain, strange, strict=True):
            g = torch.randn(p.shape)
            p.grad, q.grad = g, g.clone()
        strange[0].grad = strange[0].grad.to(memory_format=torch.channels_last if t % 2 else torch.contiguous_format)
        constant = torch.randn(())
        plain[5].grad, strange[5].grad = constant.repeat(7), constant.expand(7)
        for o in optimizers:
            o.step()
        for p, q in zip(plain, strange, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=0)
    for p, q in zip(plain, strange, strict=True):
        assert same(optimizers[0].state[p], optimizers[1].state[q])
    assert strange[0].is_contiguous(memory_format=torch.channels_last)

    again = odd()  # state saved from contiguous parameters serves parameters of another layout
    resumed = make(again, backend=backend)
    for p, q in zip(plain, again, strict=True):
        q.data.copy_(p)
    resumed.load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for p, q in zip(plain, again, strict=True):
        p.grad = torch.randn(p.shape)
        q.grad = p.grad.clone()
    optimizers[0].step()
    resumed.step()
    for p, q in zip(plain, again, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


@every_case
@BACKENDS
def test_complex_parameters_are_pairs_of_real_ones(make: Case, backend: str) -> None:
    torch.manual_seed(0)
    z = torch.randn(5, 3, dtype=torch.complex64, requires_grad=True)
    pair = torch.view_as_real(z.detach()).clone().requires_grad_()
    optimizers = make([z], backend=backend), make([pair], backend=backend)
    for t in range(4):
        g = torch.randn(5, 3, dtype=torch.complex64)
        z.grad = g.conj() if t % 2 else g  # a lazily conjugated one too
        pair.grad = torch.view_as_real(z.grad.resolve_conj()).clone()
        for o in optimizers:
            o.step()
    assert torch.equal(torch.view_as_real(z), pair)
    assert {optimizers[0].state[z][slot].dtype for slot in make.slots} == {torch.complex64}


@every_case
@BACKENDS
def test_lazily_negated_tensors_count_as_what_they_are(make: Case, backend: str) -> None:
    """The imaginary part of a conjugate is a view that says "minus" of its memory; a backward leaves such gradients."""
    torch.manual_seed(0)
    z = torch.randn(5, dtype=torch.complex64)
    lazy = [z.clone().conj().imag.requires_grad_(), torch._neg_view(torch.randn(3, 4)).requires_grad_()]
    plain = [p.detach().clone().resolve_neg().requires_grad_() for p in lazy]
    small = [torch.ones(1, requires_grad=True) for _ in range(2)]
    optimizers = [make([*ps, s], backend=backend) for ps, s in zip((lazy, plain), small, strict=True)]
    for t in range(3):
        for p, q in zip(lazy, plain, strict=True):
            p.grad = torch._neg_view(torch.randn(p.shape, generator=torch.Generator().manual_seed(t)))
            q.grad = p.grad.resolve_neg()
        small[0].grad = None
        (torch.complex(torch.ones(1), small[0]).conj() * (1.0 + 2.0j)).real.sum().backward()
        small[1].grad = torch.full((1,), 2.0)
        norms = [o.clip_grad_norm_(1.0) for o in optimizers]
        assert norms[0] == norms[1]
        for o in optimizers:
            o.step()
        assert all(p.is_neg() for p in lazy)
        assert small[0].grad.is_neg()
        for p, q in zip([*lazy, small[0]], [*plain, small[1]], strict=True):
            torch.testing.assert_close(p.resolve_neg(), q, rtol=0, atol=0)


@every_case
def test_state_is_float32_for_low_precision_and_float64_for_double(make: Case) -> None:
    for dtype, expected in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ):
        p = torch.ones(3, dtype=dtype, requires_grad=True)
        p.grad = torch.ones_like(p)
        optimizer = make([p], lr=0.02, backend="eager")
        optimizer.step()
        assert {v.dtype for k, v in optimizer.state[p].items() if k != "step"} == {expected}
        assert optimizer.state[p]["step"].dtype == torch.float32
        assert p.dtype == dtype
        assert (p < 1).all()


@every_case
@BACKENDS
def test_parameters_whose_gradient_was_missing_get_their_own_coefficients(make: Case, backend: str) -> None:
    late, always, alone = (nn.Parameter(torch.ones(4)) for _ in range(3))
    both = make([late, always], backend=backend)
    single = make([alone], backend=backend)
    for t in range(8):
        always.grad = torch.full((4,), 1.0 + t)
        late.grad = torch.full((4,), 2.0 - t) if t % 3 == 1 else None
        both.step()
        if late.grad is not None:
            alone.grad = late.grad.clone()
            single.step()
    assert (both.state[late]["step"].item(), both.state[always]["step"].item()) == (3.0, 8.0)
    assert torch.equal(late, alone)


@BACKENDS
def test_state_exchanged_by_the_user_is_used(backend: str) -> None:
    p, q = (nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    one, two = (FIRST["AdEMAMix"]([x], backend=backend) for x in (p, q))
    for _ in range(2):
        p.grad, q.grad = torch.ones(4, 3), torch.ones(4, 3)
        one.step()
        two.step()
    one.state[p]["exp_avg_slow"].zero_()
    two.state[q]["exp_avg_slow"] = torch.zeros(3, 4).T  # another tensor, of another layout
    p.data = p.data.clone()
    one.step()
    two.step()
    assert torch.equal(p, q)
    one.param_groups[0]["betas"] = two.param_groups[0]["betas"] = (0.0, 0.999, 0.9999)
    one.step()
    two.step()
    assert torch.equal(p, q)
    two.state[q]["exp_avg_sq"] = torch.zeros(5)
    before = copy.deepcopy((q.detach(), two.state[q]))
    with pytest.raises(
        ValueError, match=r"'exp_avg_sq' has shape \(5,\); a parameter of shape \(4, 3\) needs \(4, 3\)"
    ):
        two.step()
    assert same((q.detach(), two.state[q]), before)


@BACKENDS
def test_a_parameter_given_another_view_of_its_memory_is_that_view(backend: str) -> None:
    """Where it begins stays the same: a transposed one was taken for the old one, a pruned one for all of it."""
    p, q = (nn.Parameter(torch.arange(9.0).view(3, 3)) for _ in range(2))
    ours, reference = AdamW([p], lr=0.1, backend=backend), torch.optim.AdamW([q], lr=0.1)
    for t in range(4):
        for w, optimizer in ((p, ours), (q, reference)):
            if t == 2:
                w.data = w.data.t()
            w.grad = torch.arange(9.0).view(3, 3)
            optimizer.step()
        torch.testing.assert_close(p, q, rtol=0, atol=4e-6)  # a few units in the last place of numbers up to 8
    p.data = p.data[:2]
    p.grad = torch.ones(2, 3)
    before = p.detach().clone()
    with pytest.raises(ValueError, match=r"'exp_avg' has shape \(3, 3\); a parameter of shape \(2, 3\) needs"):
        ours.step()
    assert torch.equal(p, before)


@BACKENDS
def test_a_stale_backward_is_caught(backend: str) -> None:
    w = nn.Parameter(torch.ones(3))
    optimizer = AdEMAMix([w], backend=backend)
    loss = (w**3).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@first_cases
@BACKENDS
def test_no_gradient_is_written(make: Case, backend: str) -> None:
    w = nn.Parameter(torch.ones(1000))
    w.grad = torch.randn(1000)
    before, version = w.grad.clone(), w.grad._version
    make([w], maximize=True, backend=backend).step()
    assert torch.equal(w.grad, before)
    assert w.grad._version == version


def test_tensors_made_of_other_tensors() -> None:
    """There is nothing where such a tensor's pointer leads to: fused backends once wrote there."""

    def pair(value: float) -> TwoTensor:
        return TwoTensor(torch.full((3,), value), torch.full((3,), 2.0 * value))

    p, wrapped = nn.Parameter(torch.ones(3)), nn.Parameter(pair(1.0))
    optimizer = AdEMAMix([p, wrapped], lr=0.0, backend="cpu")
    p.grad = torch.ones(3)
    optimizer.step()
    for q in (p, wrapped):
        q.grad = pair(1.0)
        with pytest.raises(RuntimeError, match=r"in group 0 is a TwoTensor.*; only allowed with backend='eager'"):
            optimizer.step()
        assert torch.equal(p, torch.ones(3))
        assert optimizer.state[p]["step"] == 1.0
        q.grad = None
    p.grad = AsyncCollectiveTensor(torch.ones(3))  # a sum under way: waited for
    optimizer.step()
    assert optimizer.state[p]["step"] == 2.0

    eager = AdEMAMix([wrapped], lr=0.1, backend="eager")
    plain = [nn.Parameter(torch.full((3,), value)) for value in (1.0, 2.0)]
    reference = AdEMAMix(plain, lr=0.1, backend="eager")
    for t in range(3):
        wrapped.grad = pair(t + 1.0)
        for k, q in enumerate(plain):
            q.grad = torch.full((3,), (k + 1) * (t + 1.0))
        eager.step()
        reference.step()
    assert same([wrapped.data.a, wrapped.data.b], [q.data for q in plain])


class Rounded(torch.Tensor):
    """A weight of 8 bits with a scale for each row: writing rounds to nearest, and what is computed of it is plain."""

    codes: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, numbers: torch.Tensor) -> "Rounded":
        made = cls._make_wrapper_subclass(cls, numbers.shape, dtype=numbers.dtype)  # type: ignore[attr-defined]
        made.write(numbers)
        return made  # type: ignore[no-any-return]

    def write(self, numbers: torch.Tensor) -> None:
        self.scale = numbers.abs().amax(1, keepdim=True).float() / 127
        self.codes = (numbers.float() / self.scale).round().to(torch.int8)

    def numbers(self) -> torch.Tensor:
        return (self.codes * self.scale).to(self.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            same = cls._make_wrapper_subclass(cls, args[0].shape, dtype=args[0].dtype)  # type: ignore[attr-defined]
            vars(same).update(vars(args[0]))
            return return_and_correct_aliasing(func, args, kwargs or {}, same)
        if func is torch.ops.aten.copy_.default and isinstance(args[0], cls):
            numbers = args[1]
            args[0].scale.copy_(numbers.abs().amax(1, keepdim=True).float() / 127)
            args[0].codes.copy_((numbers.float() / args[0].scale).round())
            return args[0]
        return func(*tree_map_only(cls, cls.numbers, args), **tree_map_only(cls, cls.numbers, kwargs or {}))


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """No warning has been given yet."""
    monkeypatch.setattr(backends, "_unavailable", set())


@pytest.mark.parametrize("options", [{}, {"state": "compact"}, {"geometry": "muon"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("unknown")
def test_quantized_weights_are_computed_in_float32_and_written_by_themselves(options: Any, dtype: torch.dtype) -> None:
    """As a plain loop that takes each step with a copy, and writes it back."""
    torch.manual_seed(0)
    start = torch.randn(64, 80).to(dtype)
    weights = [nn.Parameter(Rounded(start)) for _ in range(2)]
    bias, copied = torch.zeros(64, requires_grad=True), torch.zeros(64, 80, requires_grad=True)
    state, geometry = options.get("state", "float32"), options.get("geometry", "adam")
    ours = AdEMAMix([{"params": weights[:1], "geometry": geometry}, {"params": [bias]}], lr=0.1, state=state)
    loop = AdEMAMix([copied], lr=0.1, backend="eager", **options)

    def train() -> None:
        for t in range(20):
            g = torch.randn(64, 80, generator=torch.Generator().manual_seed(t)).to(dtype)
            weights[0].grad, copied.grad, bias.grad = g, g.float(), torch.ones(64)
            copied.data.copy_(weights[1].data.numbers())
            ours.step()
            loop.step()
            weights[1].data.copy_(copied.data)

    with pytest.warns(UserWarning, match="the 'cpu' backend cannot read parameters of type Rounded") as caught:
        train()
    assert len(caught) == 1
    assert ours.backends_in_use == ("cpu", "eager")
    one, other = (w.data for w in weights)
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scale, other.scale)
    assert not torch.equal(one.codes, Rounded(start).codes)
    assert same(ours.state[weights[0]], loop.state[copied])
    assert {type(t) for t in ours.state[weights[0]].values()} == {torch.Tensor}
    again = AdEMAMix(ours.param_groups, state=state)
    again.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert same(again.state[weights[0]], loop.state[copied])


@pytest.mark.parametrize(
    ("options", "allowed"),
    [({"backend": "cpu"}, "backend='eager'"), ({"offload": True}, "offload=False")],
)
def test_where_quantized_weights_cannot_be_served(options: Any, allowed: str) -> None:
    p, bias = nn.Parameter(Rounded(torch.ones(4, 4))), torch.zeros(4, requires_grad=True)
    optimizer = AdEMAMix([bias, p], **options)
    p.grad, bias.grad = torch.ones(4, 4), torch.ones(4)
    with pytest.raises(
        RuntimeError, match=f"a parameter in group 0 is a Rounded, .* no memory .*; only allowed with {allowed}"
    ):
        optimizer.step()
    assert not optimizer.state
    assert torch.equal(bias, torch.zeros(4))


@BACKENDS
@pytest.mark.parametrize(
    ("device", "dtype"), [("meta", torch.float32), ("cpu", torch.float64), ("cpu", torch.bfloat16)], ids=str
)
def test_torch_s_default_device_and_dtype_change_nothing(backend: str, device: str, dtype: torch.dtype) -> None:
    """Scales were made in the default dtype: kernels, which write float32, wrote behind those of bfloat16."""

    def run() -> Any:
        optimizer = AdEMAMix(nets.pop().parameters(), state="compact", backend=backend)
        for g in grads:
            for p, value in zip(optimizer.param_groups[0]["params"], g, strict=True):
                p.grad = value
            optimizer.clip_grad_norm_(1.0, grad_scale=3.0)
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
        return optimizer.param_groups[0]["params"], optimizer.state_dict()["state"]

    torch.manual_seed(0)
    net = nn.Linear(600, 10)
    nets = [net, copy.deepcopy(net)]
    grads = [[torch.randn_like(p) for p in net.parameters()] for _ in range(2)]
    expected = run()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            found = run()
    finally:
        torch.set_default_dtype(before)
    assert same(found, expected)


def test_no_temporary_of_parameter_size() -> None:
    """The high-water mark of the process rises by less than 1 MB + 1 % of the state in a step of 16M parameters."""
    resource = pytest.importorskip("resource")
    p = nn.Parameter(torch.ones(1 << 24))
    p.grad = torch.ones(1 << 24)
    optimizer = AdEMAMix([p], backend="cpu")
    optimizer.step()
    state_bytes = 3 * 4 * p.numel()
    spike = torch.ones(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    current = _resident()
    spike = torch.ones(max(0, before * 1024 - current) // 4)  # fill up to the mark, so that a temporary raises it
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    optimizer.step()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    del spike
    assert (after - before) * 1024 <= (1 << 20) + state_bytes // 100


def _resident() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:
        pytest.skip("needs /proc")
