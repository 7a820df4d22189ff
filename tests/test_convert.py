"""State dicts of other optimizers: runs that continue from them are compared with the equations in float64."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

import ademamix
from ademamix import AdEMAMix
from ademamix.convert import from_adamw, from_authors, from_bitsandbytes, from_pytorch_optimizer, to_adamw
from optimizer_table import FIRST

SHAPES = ((6, 4), (5,))
SCHEDULED: dict[str, Any] = {"alpha": 5.0, "alpha_warmup": 6, "beta3_warmup": 8}
BACKENDS = pytest.mark.parametrize("backend", ["cpu", "eager"])


def parameters(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in SHAPES]


def gradient(i: int, t: int) -> torch.Tensor:
    return torch.randn(SHAPES[i], generator=torch.Generator().manual_seed(97 * i + t), dtype=torch.float64)


def train(params: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for t in steps:
        for i, p in enumerate(params):
            p.grad = gradient(i, t).to(p.dtype)
        optimizer.step()


class Equations:
    """AdamW's and AdEMAMix's steps of one parameter, in float64, as the papers have them."""

    def __init__(self, p: torch.Tensor) -> None:
        self.p, self.m1, self.m2, self.v = p.detach().clone(), *(torch.zeros_like(p.detach()) for _ in range(3))

    def step(self, g: torch.Tensor, t: int, *, betas: Any, alpha: float, lr: float, weight_decay: float) -> None:
        b1, b2, b3 = betas
        self.m1 = b1 * self.m1 + (1 - b1) * g
        self.m2 = b3 * self.m2 + (1 - b3) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        update = (self.m1 / (1 - b1**t) + alpha * self.m2) / ((self.v / (1 - b2**t)).sqrt() + 1e-8)
        self.p = self.p - lr * (update + weight_decay * self.p)


def scheduled_beta3(reached: float, beta1: float, beta3: float) -> float:
    half_lives = [math.log(0.5) / math.log(b) for b in (beta1, beta3)]
    reached = min(reached, 1.0)
    return 0.5 ** (1.0 / ((1.0 - reached) * half_lives[0] + reached * half_lives[1]))


# --------------------------------------------------------------------------------- from AdamW


@BACKENDS
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("source", [torch.optim.AdamW, ademamix.AdamW])
def test_a_training_switched_from_adamw_follows_the_equations(source: Any, capturable: bool, backend: str) -> None:
    switch, end = 7, 20
    params = parameters()
    adamw = source(params, lr=0.01, betas=(0.8, 0.95), weight_decay=0.2)
    train(params, adamw, range(1, switch + 1))
    optimizer = AdEMAMix(params, lr=0.5, betas=(0.1, 0.2, 0.99), backend=backend, capturable=capturable, **SCHEDULED)
    saved = adamw.state_dict()
    before = copy.deepcopy(saved)
    optimizer.load_state_dict(from_adamw(saved, optimizer))
    assert str(saved) == str(before)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.01, (0.8, 0.95, 0.99), 0.2)
    assert (group["alpha"], group["schedule_start"], group["capturable"]) == (5.0, switch, capturable)
    train(params, optimizer, range(switch + 1, end))

    for i, (p, start) in enumerate(zip(params, parameters(), strict=True)):
        exact = Equations(start)
        for t in range(1, end):
            since = t - switch
            if since == 1:
                exact.m2.zero_()
            b3 = scheduled_beta3(max(since, 0) / 8, 0.8, 0.99)
            alpha = 5.0 * min(max(since, 0) / 6, 1.0)
            exact.step(gradient(i, t), t, betas=(0.8, 0.95, b3), alpha=alpha, lr=0.01, weight_decay=0.2)
        # 20 steps of a dozen float64 roundings on either side.
        torch.testing.assert_close(p.detach(), exact.p, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(optimizer.state[p]["exp_avg_slow"], exact.m2, rtol=1e-12, atol=1e-12)


@BACKENDS
def test_a_training_in_muons_geometry_goes_on_as_it_was_with_nothing_of_the_slow_average(backend: str) -> None:
    (a, b), (c, d) = parameters(), parameters()
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.2, "backend": backend}
    adamw = ademamix.AdamW([{"params": [a], "geometry": "muon"}, {"params": [b]}], betas=(0.8, 0.95), **options)
    mixed = AdEMAMix([{"params": [c], "geometry": "muon"}, {"params": [d]}], alpha=0.0, **options)
    train([a, b], adamw, range(1, 8))
    for p, q in ((a, c), (b, d)):
        q.data.copy_(p.data)
    mixed.load_state_dict(from_adamw(copy.deepcopy(adamw.state_dict()), mixed))
    assert set(mixed.state[c]) == {"step", "exp_avg_fast", "exp_avg_slow"}
    train([a, b], adamw, range(8, 15))
    train([c, d], mixed, range(8, 15))
    # 7 steps in float64, whose roundings the polynomials make larger by 3.4 each of 5 times.
    torch.testing.assert_close(c, a, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(d, b, rtol=1e-11, atol=1e-11)


def test_a_second_moment_has_no_place_in_muons_geometry() -> None:
    p, _ = parameters()
    adamw = torch.optim.AdamW([p])
    train([p], adamw, range(1, 3))
    mixed = AdEMAMix([{"params": [p], "geometry": "muon"}])
    mixed.load_state_dict(from_adamw(copy.deepcopy(adamw.state_dict()), mixed))
    train([p], mixed, range(3, 4))
    assert set(mixed.state[p]) == {"step", "exp_avg_fast", "exp_avg_slow"}


def test_a_schedule_that_has_not_begun_stands_at_its_start() -> None:
    """A parameter that fell behind the others of its group has not reached the switch: its step is AdamW's."""
    (p, q), (r, s) = parameters(), parameters()
    late = AdEMAMix([p, q], schedule_start=3, betas=(0.9, 0.999, 0.99), **SCHEDULED)
    adamw = ademamix.AdamW([r, s], weight_decay=0.0)
    train([p, q], late, range(3))
    train([r, s], adamw, range(3))
    assert torch.equal(p, r)
    assert torch.equal(q, s)
    train([p, q], late, range(3, 4))
    train([r, s], adamw, range(3, 4))
    assert not torch.equal(p, r)


@pytest.mark.parametrize("state", ["compact", "bfloat16"])
@pytest.mark.parametrize("target", ["float32", "compact"])
def test_low_bit_adamw_states_are_taken_over(state: str, target: str) -> None:
    p = nn.Parameter(torch.randn(64, 70))
    adamw = ademamix.AdamW([p], state=state, backend="eager")
    for _ in range(3):
        p.grad = torch.randn_like(p)
        adamw.step()
    optimizer = AdEMAMix([p], state=target, backend="eager")
    optimizer.load_state_dict(from_adamw(adamw.state_dict(), optimizer))
    fresh = AdEMAMix([q := nn.Parameter(p.detach().clone())], state=target, backend="eager")
    q.grad = torch.zeros_like(q)
    fresh.step()
    layout = {k: (v.dtype, v.shape) for k, v in fresh.state[q].items()}
    assert {k: (v.dtype, v.shape) for k, v in optimizer.state[p].items()} == layout
    if state == target:
        assert torch.equal(optimizer.state[p]["exp_avg_fast"], adamw.state[p]["exp_avg"])
        assert torch.equal(optimizer.state[p]["exp_avg_fast_scale"], adamw.state[p]["exp_avg_scale"])
    assert not optimizer.state[p]["exp_avg_slow"].any()


def test_adamw_of_beta1_zero_brings_no_fast_average() -> None:
    p = nn.Parameter(torch.randn(64, 70))
    adamw = ademamix.AdamW([p], betas=(0.0, 0.99), state="compact", backend="eager")
    p.grad = torch.randn_like(p)
    adamw.step()
    optimizer = AdEMAMix([p], state="compact", backend="eager")
    optimizer.load_state_dict(from_adamw(adamw.state_dict(), optimizer))
    fresh = AdEMAMix(
        [q := nn.Parameter(p.detach().clone())], betas=(0.0, 0.99, 0.999), state="compact", backend="eager"
    )
    q.grad = p.grad
    fresh.step()
    assert optimizer.state[p].keys() == fresh.state[q].keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_weights_in_host_memory_move_along(dtype: torch.dtype) -> None:
    params = parameters(dtype)
    adamw = ademamix.AdamW(params, lr=0.01, offload=True, backend="eager")
    train(params, adamw, range(3))
    masters = [adamw.state[p]["master"].clone() for p in params]
    assert not all(torch.equal(m, m.to(dtype)) for m in masters)
    optimizer = AdEMAMix(params, offload=True, backend="eager")
    optimizer.load_state_dict(from_adamw(adamw.state_dict(), optimizer))
    back = ademamix.AdamW(params, offload=True, backend="eager")
    back.load_state_dict(to_adamw(optimizer.state_dict()))
    for p, m in zip(params, masters, strict=True):
        assert torch.equal(optimizer.state[p]["master"], m)
        assert torch.equal(back.state[p]["master"], m)
    plain = torch.optim.AdamW(params)
    plain.load_state_dict(to_adamw(optimizer.state_dict()))
    train(params, plain, range(3, 5))


@pytest.mark.parametrize("name", sorted(FIRST.keys() - {"AdEMAMix"}))
def test_only_ademamix_goes_on_from_adamw(name: str) -> None:
    with pytest.raises(ValueError, match=f"from_adamw: optimizer must be an ademamix.AdEMAMix, got {name}"):
        from_adamw(adamw_state(), FIRST[name](parameters()))


def test_an_optimizer_in_the_place_of_its_state_dict_is_named() -> None:
    optimizer = AdEMAMix(parameters())
    with pytest.raises(ValueError, match=r"to_adamw: state_dict must be what .* returned, got AdEMAMix"):
        to_adamw(optimizer)  # type: ignore[arg-type]


def test_schedulers_and_group_entries_go_on() -> None:
    params = parameters()
    adamw = torch.optim.AdamW([("a", params[0]), ("b", params[1])], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(adamw, 10)
    train(params, adamw, range(3))
    scheduler.step()
    optimizer = AdEMAMix(params)
    optimizer.load_state_dict(from_adamw(adamw.state_dict(), optimizer))
    group = optimizer.param_groups[0]
    assert group["initial_lr"] == 0.1
    assert group["lr"] == adamw.param_groups[0]["lr"] != 0.1
    assert group["param_names"] == ["a", "b"]
    assert "foreach" not in group


def adamw_state(**options: Any) -> dict[str, Any]:
    params = parameters()
    adamw = torch.optim.AdamW(params, **options)
    train(params, adamw, range(2))
    return adamw.state_dict()


def without(state: dict[str, Any], key: str) -> dict[str, Any]:
    del state["state"][1][key]
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"model": 1}, r"from_adamw: an optimizer's state dict has 'state', this one has \['model'\]"),
        (without(adamw_state(), "exp_avg_sq"), r"the state of parameter 1 has no 'exp_avg_sq'; it has \['exp_avg', "),
        (adamw_state(amsgrad=True), "amsgrad=True is not supported by AdEMAMix; allowed: False"),
        (
            torch.optim.SGD(parameters(), lr=1.0, momentum=0.9).state_dict(),
            r"parameter group 0 has no 'betas'; it has \['dampening', ",
        ),
        (AdEMAMix(parameters()).state_dict(), r"'betas' of parameter group 0 must be 2, got \(0.9, 0.999, 0.9999\)"),
        (
            torch.optim.Adam(parameters(), weight_decay=0.1).state_dict(),
            "decoupled_weight_decay=False is not supported by AdEMAMix; allowed: True",
        ),
        (
            torch.optim.AdamW([{"params": [p]} for p in parameters()]).state_dict(),
            "the state dict has 2 parameter groups, the optimizer 1",
        ),
    ],
    ids=range(7),
)
def test_a_foreign_state_dict_is_refused_by_the_name_of_its_key(state: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_adamw(state, AdEMAMix(parameters()))


# --------------------------------------------------------------------------------- from other programs' AdEMAMix

HYPER: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95, 0.99), "eps": 1e-8, "weight_decay": 0.2, "alpha": 5.0}


def authors(i: int, exact: Equations, t: int) -> tuple[dict[str, Any], dict[str, Any]]:
    slots = {"exp_avg_fast": exact.m1, "exp_avg_slow": exact.m2, "exp_avg_sq": exact.v}
    return {"step": t, **slots}, {"beta3_warmup": 12, "alpha_warmup": 12}


def bitsandbytes(i: int, exact: Equations, t: int) -> tuple[dict[str, Any], dict[str, Any]]:
    tensors = {"state1": torch.stack([exact.m1, exact.m2]), "state2": exact.v}
    state = (
        {"step": t, "__bnb_optimizer_quant_state__": tensors} if i else {"step": t, **tensors}
    )  # both that there are
    return state, {"t_alpha": 12, "t_beta3": 12}


def pytorch_optimizer(i: int, exact: Equations, t: int) -> tuple[dict[str, Any], dict[str, Any]]:
    group = {"weight_decouple": True, "fixed_decay": False, "t_alpha_beta3": 12, "foreach": None, "step": t}
    return {"exp_avg": exact.m1, "exp_avg_sq": exact.v, "exp_avg_slow": exact.m2}, group


PROGRAMS: dict[str, Any] = {
    "authors": (authors, from_authors),
    "bitsandbytes": (bitsandbytes, from_bitsandbytes),
    "pytorch_optimizer": (pytorch_optimizer, from_pytorch_optimizer),
}


def foreign(layout: Any, steps: int) -> tuple[list[Equations], dict[str, Any]]:
    """Runs of both parameters, and the state dict that a program of that layout would have saved."""
    trainings = [Equations(p) for p in parameters()]
    for i, exact in enumerate(trainings):
        advance(exact, i, range(1, steps + 1))
    kept = [layout(i, exact, steps) for i, exact in enumerate(trainings)]
    group = {**HYPER, **kept[0][1], "params": [0, 1]}
    return trainings, {"state": {i: state for i, (state, _) in enumerate(kept)}, "param_groups": [group]}


def advance(exact: Equations, i: int, steps: range) -> None:
    for t in steps:
        b3, alpha = scheduled_beta3(t / 12, 0.8, 0.99), 5.0 * min(t / 12, 1.0)
        exact.step(gradient(i, t), t, betas=(0.8, 0.95, b3), alpha=alpha, lr=0.01, weight_decay=0.2)


@BACKENDS
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_training_of_another_program_goes_on_by_the_equations(program: str, backend: str) -> None:
    layout, convert = PROGRAMS[program]
    trainings, saved = foreign(layout, 7)
    params = [exact.p.clone().requires_grad_() for exact in trainings]
    optimizer = AdEMAMix(params, lr=0.5, backend=backend)
    optimizer.load_state_dict(convert(copy.deepcopy(saved)))
    train(params, optimizer, range(8, 20))
    for i, (p, exact) in enumerate(zip(params, trainings, strict=True)):
        advance(exact, i, range(8, 20))
        torch.testing.assert_close(p.detach(), exact.p, rtol=1e-12, atol=1e-12)  # 12 steps of a dozen roundings
        torch.testing.assert_close(optimizer.state[p]["exp_avg_slow"], exact.m2, rtol=1e-12, atol=1e-12)


def eight_bits(shape: tuple[int, ...]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    blocks = -(-math.prod(shape) // 256)
    return {
        "state1": torch.randint(0, 256, (2, *shape), dtype=torch.uint8, generator=generator),
        "state2": torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        "qmap1": torch.linspace(-1.0, 1.0, 256) ** 3,
        "qmap2": torch.linspace(0.0, 1.0, 256) ** 3,
        "absmax1": torch.rand(2, blocks, generator=generator),
        "absmax2": torch.rand(blocks, generator=generator),
    }


def eight_bit_dict(shape: tuple[int, ...] = (70, 61)) -> dict[str, Any]:
    group = {**HYPER, "t_alpha": None, "t_beta3": 0, "params": [0]}
    return {"state": {0: {"step": 3, "__bnb_optimizer_quant_state__": eight_bits(shape)}}, "param_groups": [group]}


def test_eight_bits_of_bitsandbytes_are_looked_up_in_the_checkpoint_s_tables() -> None:
    """Blocks of 256 elements run through rows: 70 x 61 elements are 16 full blocks and one of 174."""
    p = nn.Parameter(torch.zeros(70, 61))
    optimizer = AdEMAMix([p], alpha_warmup=3)
    optimizer.load_state_dict(from_bitsandbytes(eight_bit_dict()))
    t = {key: value.tolist() for key, value in eight_bits((70, 61)).items()}
    names = ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq")
    tables = ((t["qmap1"], t["absmax1"][0]), (t["qmap1"], t["absmax1"][1]), (t["qmap2"], t["absmax2"]))
    for name, codes, (qmap, absmax) in zip(names, (*t["state1"], t["state2"]), tables, strict=True):
        for row in range(70):
            for column in range(61):
                expected = torch.tensor(qmap[codes[row][column]]) * torch.tensor(absmax[(61 * row + column) // 256])
                assert optimizer.state[p][name][row, column] == expected
    group = optimizer.param_groups[0]
    assert (group["alpha_warmup"], group["beta3_warmup"], group["lr"]) == (None, None, 0.01)
    compact = AdEMAMix([p], state="compact")
    compact.load_state_dict(from_bitsandbytes(eight_bit_dict()))
    assert compact.state[p]["exp_avg_slow"].dtype == torch.int16


def bitsandbytes_adamw(saved: dict[str, Any]) -> dict[str, Any]:
    """A torch.optim.AdamW's state dict as bitsandbytes' AdamW would have saved it."""
    state = {
        i: {
            "step": int(s["step"]),
            "__bnb_optimizer_quant_state__": {"state1": s["exp_avg"], "state2": s["exp_avg_sq"]},
        }
        for i, s in saved["state"].items()
    }
    kept = ("params", "lr", "betas", "eps", "weight_decay")
    own = {"alpha": 0.0, "t_alpha": None, "t_beta3": None}
    groups = [{**{name: group[name] for name in kept}, **own} for group in saved["param_groups"]]
    return {"state": state, "param_groups": groups}


@pytest.mark.parametrize("target", [torch.optim.AdamW, ademamix.AdamW])
def test_an_adamw_of_bitsandbytes_goes_on_as_adamw(target: Any) -> None:
    params, other = parameters(), parameters()
    reference, adamw = (torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.95), weight_decay=0.2) for p in (params, other))
    train(params, reference, range(1, 20))
    train(other, adamw, range(1, 8))
    resumed = target(other, lr=0.5)
    resumed.load_state_dict(from_bitsandbytes(bitsandbytes_adamw(adamw.state_dict())))
    train(other, resumed, range(8, 20))
    for p, q in zip(params, other, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=0)  # float64, and 20 steps in another order of operations


def test_eight_bits_of_an_adamw_of_bitsandbytes_are_looked_up_too() -> None:
    state = eight_bit_dict()
    state["param_groups"][0] |= {"betas": (0.9, 0.999), "alpha": 0.0}
    t = state["state"][0]["__bnb_optimizer_quant_state__"]
    t |= {"state1": t["state1"][0], "absmax1": t["absmax1"][0]}
    converted = from_bitsandbytes(state)["state"][0]
    blocks = torch.arange(70 * 61).view(70, 61) // 256
    assert torch.equal(converted["exp_avg"], t["qmap1"][t["state1"].int()] * t["absmax1"][blocks])
    assert torch.equal(converted["exp_avg_sq"], t["qmap2"][t["state2"].int()] * t["absmax2"][blocks])
    assert converted.keys() == {"step", "exp_avg", "exp_avg_sq"}


def altered(layout: Any, **changes: Any) -> dict[str, Any]:
    """A state dict whose group entries and entries of the first state are changed; None takes one away."""
    _, saved = foreign(layout, 2)
    for place in (saved["param_groups"][0], saved["state"][0]):
        for key, value in changes.items():
            if key in place or isinstance(value, torch.Tensor):
                place[key] = value
            if value is None:
                place.pop(key, None)
    return saved


BROKEN = [
    (from_authors, altered(authors, alpha=None), "parameter group 0 has no 'alpha'; it has"),
    (from_authors, altered(authors, exp_avg_slow=None), "state of parameter 0 has no 'exp_avg_slow'; it has"),
    (from_authors, altered(authors, exp_avg_fast=None), "state of parameter 0 has no 'exp_avg_fast'; it has"),
    (from_authors, altered(authors, step=None), "parameter 0 has a state but no 'step'"),
    (from_authors, altered(authors, exp_avg_sq=1.0), "has a float as 'exp_avg_sq'; expected: a tensor"),
    (from_authors, altered(bitsandbytes), "parameter group 0 has no 'beta3_warmup'; it has"),
    (from_bitsandbytes, altered(authors), "parameter 0 has no 'state1'; it has"),
    (
        from_bitsandbytes,
        altered(bitsandbytes, state1=torch.zeros(6, 4)),
        r"'state1' of parameter 0 has shape \(6, 4\); expected: \(2, 6, 4\)",
    ),
    (
        from_bitsandbytes,
        altered(bitsandbytes, unorm_vec=torch.zeros(1)),
        "has 'unorm_vec', which has no place here; expected:",
    ),
    (from_pytorch_optimizer, altered(pytorch_optimizer, step=None), "parameter 0 has a state but no 'step'"),
    (from_pytorch_optimizer, altered(pytorch_optimizer, exp_avg_slow=None), "has no 'exp_avg_slow'; it has"),
    (
        from_pytorch_optimizer,
        altered(pytorch_optimizer, weight_decouple=False),
        "weight_decouple=False is not supported by AdEMAMix; allowed: True",
    ),
    (from_pytorch_optimizer, altered(authors), "parameter group 0 has no 't_alpha_beta3'"),
    (to_adamw, adamw_state(), "parameter group 0 has no 'alpha'"),
]


@pytest.mark.parametrize(("convert", "state", "message"), BROKEN, ids=range(len(BROKEN)))
def test_a_broken_or_foreign_state_dict_is_refused(convert: Any, state: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        convert(state)
    assert str(caught.value).startswith(f"{convert.__name__}: ")


@pytest.mark.parametrize("key", ["qmap1", "qmap2", "absmax1", "absmax2"])
def test_broken_tables_are_named(key: str) -> None:
    state = eight_bit_dict()
    tensors = state["state"][0]["__bnb_optimizer_quant_state__"]
    tensors[key] = tensors[key][..., :-1]
    with pytest.raises(ValueError, match=rf"'{key}' of parameter 0 has shape .*; expected: \("):
        from_bitsandbytes(state)
    del tensors[key]
    with pytest.raises(ValueError, match=f"has no '{key}'; it has"):
        from_bitsandbytes(state)


def test_authors_of_beta1_zero_store_no_fast_average() -> None:
    saved = altered(authors, exp_avg_fast=None)
    saved["param_groups"][0]["betas"] = (0.0, 0.9, 0.99)
    del saved["state"][1]
    optimizer = AdEMAMix(parameters())
    optimizer.load_state_dict(from_authors(saved))
    assert sorted(optimizer.state[optimizer.param_groups[0]["params"][0]]) == ["exp_avg_slow", "exp_avg_sq", "step"]


# --------------------------------------------------------------------------------- to AdamW


@pytest.mark.parametrize("target", [torch.optim.AdamW, ademamix.AdamW])
@pytest.mark.parametrize("beta1", [0.8, 0.0])
def test_adamw_goes_on_from_ademamix(beta1: float, target: Any) -> None:
    params = parameters()
    optimizer = AdEMAMix(params, lr=0.01, betas=(beta1, 0.95, 0.99), alpha=0.0, weight_decay=0.2)
    train(params, optimizer, range(1, 8))
    adamw = target(params, lr=0.5)
    adamw.load_state_dict(to_adamw(optimizer.state_dict()))
    train(params, adamw, range(8, 20))
    reference = parameters()
    torch_s = torch.optim.AdamW(reference, lr=0.01, betas=(beta1, 0.95), weight_decay=0.2)
    train(reference, torch_s, range(1, 20))
    for p, q in zip(params, reference, strict=True):  # with alpha = 0 all of it is AdamW
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_codes_become_numbers_for_adamw() -> None:
    p = nn.Parameter(torch.randn(64, 70))
    optimizer = AdEMAMix([p], state="compact", backend="eager")
    for _ in range(3):
        p.grad = torch.randn_like(p)
        optimizer.step()
    exact = AdEMAMix([p], state="float32", backend="eager")
    exact.load_state_dict(optimizer.state_dict())
    converted = to_adamw(optimizer.state_dict())
    for name, slot in (("exp_avg", "exp_avg_fast"), ("exp_avg_sq", "exp_avg_sq")):
        assert torch.equal(converted["state"][0][name], exact.state[p][slot])
    torch.optim.AdamW([p]).load_state_dict(converted)
    broken = optimizer.state_dict()
    del broken["state"][0]["exp_avg_sq_scale"]
    with pytest.raises(ValueError, match=r"has codes of torch\.uint8 as 'exp_avg_sq' but no 'exp_avg_sq_scale'"):
        to_adamw(broken)
