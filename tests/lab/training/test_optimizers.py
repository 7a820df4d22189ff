"""Any optimizer trains in the lab: the library's by its name, and a rule of the user's by its file."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ademamix
from ademamix import KEMA, AdamW, ADana, AdEMAMix, Muon, RuleOptimizer, SimplifiedAdEMAMix, split_parameters
from ademamix.lab.config import AdEMAMixSettings, BadInputError, Job, Recipe
from ademamix.lab.training.checkpoints import FOLDER, complete, weights
from ademamix.lab.training.loop import _Run, train
from ademamix.lab.training.optimizers import (
    arguments_of,
    buffers_of,
    kind_of,
    optimizer_of,
    pinned,
    settings_of,
    title,
)
from ademamix.lab.training.schedule import lr_factor
from ademamix.lab.training.tasks import task_of

PAGE = Path(__file__).parents[3] / "docs" / "tutorials" / "your-own-memory.md"
RULE = """\
import numpy as xp
from ademamix import optimizer_from
LEAK = 0.25
def helped(m):
    return 2.0 * m
def mine(p, g, m, *, lr=0.1, leak=0.5):
    m = m + leak * (LEAK * g - m)
    return p - lr * helped(m), m
Mine = optimizer_from(mine)
"""


@pytest.fixture
def recipe(tokens: Path) -> Recipe:
    small = {"layers": 1, "width": 16, "context": 16, "batch": 4, "steps": 20, "warmup": 2}
    return dataclasses.replace(Recipe(), data=str(tokens), eval_every=20, eval_sequences=8, **small)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(RULE)
    return tmp_path / "mine.py"


def by_hand(recipe: Recipe, optimizer_of: Any, *peaks: float, split: bool = False) -> dict[str, torch.Tensor]:
    """The weights after a run, by a loop of the test's own; split: hidden matrices and all others apart."""
    task = task_of(recipe)
    model = task.model()
    parts = [list(model.parameters())]
    if split:
        named = dict(model.named_parameters())
        hidden = [name for name in named if re.search(r"(attn|mlp)\..*_proj\.weight$", name)]
        parts = [[named.pop(name) for name in hidden], list(named.values())]
    optimizer = optimizer_of(*parts)
    for step in range(1, recipe.steps + 1):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * lr_factor(step, recipe.steps, recipe.warmup, recipe.schedule)
        task.loss(model, task.batch(step)).backward()
        optimizer.clip_grad_norm_(recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


RUNS: dict[str, tuple[dict[str, Any], Any, float]] = {  # by name: settings, the optimizer that they mean, its peak lr
    "simplified_ademamix": (
        {"betas": (0.95, 0.99), "alpha": 3.0},
        lambda p: SimplifiedAdEMAMix(p, betas=(0.95, 0.99), alpha=3.0),
        1e-4,
    ),
    "ADana": ({"lr": 3e-3, "state": "bfloat16"}, lambda p: ADana(p, state="bfloat16"), 3e-3),
    "kema": (
        {"lr": 2e-3, "longest": "T", "shortest": 5, "warmup": "0.5T"},
        lambda p: KEMA(p, shortest=5, longest=20.0, warmup=10.0),
        2e-3,
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_has_the_settings_of_its_recipe(name: str, recipe: Recipe, tmp_path: Path) -> None:
    settings, optimizer_of, peak = RUNS[name]
    recipe = dataclasses.replace(recipe, settings=settings)
    result = train(name, recipe, Job(device="cpu"), tmp_path)
    expected = by_hand(recipe, optimizer_of, peak)
    stored = weights(complete(tmp_path / FOLDER)[-1])
    assert all(torch.equal(stored[key], expected[key]) for key in expected)
    assert result.optimizer == pinned(name)


def in_muons(kind: Any, **settings: Any) -> Any:
    return lambda hidden, others: kind(
        [{"params": hidden, "geometry": "muon"}, {"params": others, "geometry": "adam"}], **settings
    )


MUONS: dict[str, tuple[dict[str, Any], Any, tuple[float, float]]] = {  # settings, what they mean, the peaks of lr
    "muon": (
        {"lr": 4e-3, "rest_lr": 1e-3, "adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.2},
        in_muons(Muon, adjust_lr_fn="match_rms_adamw", weight_decay=0.2),
        (4e-3, 1e-3),
    ),
    "adana": ({"lr": 4e-3, "geometry": "muon", "ns_steps": 3}, in_muons(ADana, ns_steps=3), (4e-3, 4e-3)),
    "ademamix": (
        {"geometry": "muon", "rest_lr": 1e-3},  # all else is the section's
        in_muons(AdEMAMix, betas=(0.9, 0.99, 0.8), alpha=8.0, alpha_warmup=20, beta3_warmup=20, weight_decay=0.1),
        (2e-3, 1e-3),
    ),
    "adamw": ({"geometry": "muon"}, in_muons(AdamW, betas=(0.9, 0.99), weight_decay=0.1), (4e-3, 4e-3)),
}


@pytest.fixture
def short(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, ademamix=dataclasses.replace(recipe.ademamix, beta3=0.8))


@pytest.mark.parametrize("name", MUONS)
def test_in_muons_geometry_hidden_matrices_are_a_group_of_their_own(name: str, short: Recipe, tmp_path: Path) -> None:
    settings, optimizer_of, peaks = MUONS[name]
    short = dataclasses.replace(short, settings=settings)
    train(name, short, Job(device="cpu"), tmp_path)
    expected = by_hand(short, optimizer_of, *peaks, split=True)
    stored = weights(complete(tmp_path / FOLDER)[-1])
    assert all(torch.equal(stored[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["muon", "ademamix"])
def test_a_run_in_muons_geometry_is_resumed_to_the_same_bits(
    name: str, short: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = dataclasses.replace(short, settings=MUONS[name][0])
    whole = train(name, short, Job(device="cpu"), tmp_path / "whole")
    advance = _Run.advance
    monkeypatch.setattr(_Run, "advance", lambda run: 1 / 0 if run.step == 12 else advance(run))
    with pytest.raises(ZeroDivisionError):
        train(name, short, Job(device="cpu", save_every=5), tmp_path / "cut")
    monkeypatch.undo()
    assert train(name, short, Job(device="cpu"), tmp_path / "cut").valid_loss == whole.valid_loss
    both = [weights(complete(tmp_path / run / FOLDER)[-1]) for run in ("whole", "cut")]
    assert all(torch.equal(both[0][key], both[1][key]) for key in both[0])


def test_a_run_switched_from_adamw_keeps_its_two_groups(short: Recipe, tmp_path: Path) -> None:
    short = dataclasses.replace(short, switch_at=10, settings={"geometry": "muon", "rest_lr": 1e-3})
    still = dataclasses.replace(short.ademamix, alpha=0.0, lr=4e-3)  # AdamW's own steps
    train("ademamix", dataclasses.replace(short, ademamix=still), Job(device="cpu"), tmp_path)
    expected = by_hand(short, in_muons(AdamW, betas=(0.9, 0.99), weight_decay=0.1), 4e-3, 1e-3, split=True)
    stored = weights(complete(tmp_path / FOLDER)[-1])
    # 20 steps in float32, whose roundings Adam's quotient and the polynomials make larger.
    assert all(torch.allclose(stored[key], expected[key], rtol=1e-3, atol=1e-4) for key in expected)


def test_the_groups_of_the_lab_are_those_of_split_parameters_with_decay_everywhere(recipe: Recipe) -> None:
    model = task_of(recipe).model()
    optimizer = optimizer_of("muon", dataclasses.replace(recipe, settings={"weight_decay": 0.3}), model)
    split = split_parameters(model)
    assert [group["geometry"] for group in optimizer.param_groups] == ["muon", "adam"]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.3]
    for group, of_split in zip(optimizer.param_groups, split, strict=True):
        assert list(map(id, group["params"])) == [id(p) for _, p in of_split["params"]]


def test_a_rule_of_the_users_trains_like_its_class(recipe: Recipe, mine: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(recipe, settings={"leak": 0.25})
    kind = kind_of(f"{mine}:Mine")
    expected = by_hand(recipe, lambda p: kind(p, leak=0.25), 0.1)
    for name in ("mine", "Mine"):
        result = train(f"{mine}:{name}", recipe, Job(device="cpu"), tmp_path / name)
        stored = weights(complete(tmp_path / name / FOLDER)[-1])
        assert all(torch.equal(stored[key], expected[key]) for key in expected)
        assert result.state_bytes_per_parameter == pytest.approx(4, rel=0.01)
    assert title(f"{mine}:mine") == "Mine"


def test_every_class_that_the_library_exports_has_its_name_here(monkeypatch: pytest.MonkeyPatch) -> None:
    exported = [getattr(ademamix, name) for name in ademamix.__all__]
    kinds = {x for x in exported if isinstance(x, type) and issubclass(x, RuleOptimizer)} - {RuleOptimizer}
    assert {kind_of(kind.__name__) for kind in kinds} == kinds
    assert pinned("Simplified_AdEMAMix") == "simplifiedademamix"
    monkeypatch.setattr(ademamix, "Newer", type("Newer", (AdamW,), {}), raising=False)
    monkeypatch.setattr(ademamix, "__all__", [*ademamix.__all__, "Newer"])
    assert kind_of("newer").__name__ == "Newer"


def test_what_a_recipe_plans_is_what_schedules_are_made_for(recipe: Recipe) -> None:
    def warmup(**changes: Any) -> tuple[float, float]:
        changed = dataclasses.replace(recipe, settings={"longest": "0.5T", "warmup": "T"}, **changes)
        mixed, kema = arguments_of("ademamix", changed)[1], arguments_of("kema", changed)[1]
        assert kema["longest"] == kema["warmup"] / 2
        return mixed["beta3_warmup"], kema["warmup"]

    assert warmup() == (20, 20)
    assert warmup(planned=80) == (80, 80)
    assert warmup(planned=80, steps=160) == (80, 80)


def test_log_time_has_no_warmups(recipe: Recipe) -> None:
    section = AdEMAMixSettings(beta3_schedule="log-time", delta=4.0, kappa=0.9, alpha=0.5)
    kind, given = arguments_of("ademamix", dataclasses.replace(recipe, ademamix=section))
    assert kind is AdEMAMix
    names = ("alpha_warmup", "beta3_warmup", "delta", "kappa", "alpha", "beta3_schedule")
    assert [given[name] for name in names] == [None, None, 4.0, 0.9, 0.5, "log-time"]


def test_settings_and_buffers_are_those_of_the_optimizer(recipe: Recipe) -> None:
    recipe = dataclasses.replace(recipe, settings={"count": 4, "longest": "T", "shortest": 1})
    assert settings_of("kema", recipe)["longest"] == 20.0
    assert settings_of("kema", recipe)["power"] == 0.7  # the class's own
    assert settings_of("adamw", recipe) == dataclasses.asdict(recipe.adamw)
    assert buffers_of("kema", recipe) == ("exp_avg_2", "exp_avg_3", "exp_avg_4", "exp_avg_sq")
    assert buffers_of("adamw", recipe) == ("exp_avg", "exp_avg_sq")
    muon = dataclasses.replace(recipe, settings={"geometry": "muon", "ns_steps": 3, "rest_lr": 1e-3})
    assert settings_of("adamw", muon) == dataclasses.asdict(recipe.adamw) | dict(muon.settings)
    assert settings_of("adana", muon)["rest_lr"] == 1e-3
    assert buffers_of("adamw", muon) == ("exp_avg",)


@pytest.mark.parametrize("schedule", ["half-life", "log-time"])
def test_exactly_the_settings_that_are_not_shown_have_no_effect(schedule: Any, recipe: Recipe) -> None:
    def trained(section: AdEMAMixSettings) -> torch.Tensor:
        p = torch.nn.Parameter(torch.ones(8))
        kind, given = arguments_of("ademamix", dataclasses.replace(recipe, ademamix=section))
        optimizer = kind([p], **given)
        for step in range(5):
            p.grad = torch.arange(8.0) - step
            optimizer.step()
        return p.detach()

    section = AdEMAMixSettings(lr=0.1, beta3_schedule=schedule)
    shown = settings_of("ademamix", dataclasses.replace(recipe, ademamix=section))
    for name, value in {"beta1": 0.8, "beta3": 0.99, "warmup": 0.5, "delta": 3.0, "kappa": 0.7}.items():
        other = dataclasses.replace(section, **{name: value})  # type: ignore[arg-type]
        assert torch.equal(trained(section), trained(other)) is (name not in shown), name


def test_the_settings_of_muons_geometry_are_not_shown_for_adams(recipe: Recipe) -> None:
    iteration = {"adjust_lr_fn", "ns_coefficients", "ns_steps"}
    assert not iteration & settings_of("kema", recipe).keys()
    muon = dataclasses.replace(recipe, settings={"geometry": "muon"})
    assert iteration <= settings_of("kema", muon).keys()


# --------------------------------------------------------------------------------- the digest of a rule


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("\ndef helped", "\n\n# A helper.\ndef helped", True),
        ("m + leak", "m - leak", False),
        ("2.0 * m", "3.0 * m", False),
        ("LEAK = 0.25", "LEAK = 0.5", False),
        ("leak=0.5", "leak=0.6", False),
    ],
)
def test_a_digest_is_that_of_what_is_computed(old: str, new: str, same: bool, mine: Path) -> None:
    before = pinned(f"{mine}:mine")
    assert re.fullmatch(rf"{re.escape(str(mine))}:mine@[0-9a-f]{{8}}", before)
    assert pinned(before) == before
    mine.write_text(RULE.replace(old, new))
    assert (pinned(f"{mine}:mine") == before) is same
    if not same:
        with pytest.raises(BadInputError, match=r"mine.py:mine has changed since: its digest was [0-9a-f]+ and is"):
            kind_of(before)


AROUND = """
def around(share, times):
    def weight(step, n): return weight(step, n - 1) / step if n else share
    def inner(p, g, m, *, lr=0.1, w):
        m = m + (lambda x: w * times(x))(g)
        return p - lr * m, m
    return optimizer_from(inner, lambda step: {"w": (lambda x: abs(weight(x, 2)))(step)})
Around = around(0.5, lambda x: 2.0 * x)
"""


def test_a_digest_is_the_same_in_every_process(mine: Path) -> None:
    mine.write_text(RULE + AROUND)
    names = [f"{mine}:{name}" for name in ("Mine", "Around")]
    code = f"from ademamix.lab.training.optimizers import pinned; print(*map(pinned, {names}), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    digests = [pinned(name) for name in names]
    assert done.stdout.splitlines() == digests
    for old, new in (
        ("0.5, lambda", "0.25, lambda"),
        ("2.0 * x", "3.0 * x"),
        ("abs(weight", "-(weight"),
        ("n - 1", "n - 2"),
    ):
        mine.write_text(RULE + AROUND.replace(old, new))
        assert [pinned(name) == digest for name, digest in zip(names, digests, strict=True)] == [True, False]


def test_a_changed_rule_does_not_go_on(cli: Any, tiny: tuple[str, ...], mine: Path, capsys: Any) -> None:
    assert cli("train", *tiny, "--optimizer", "mine.py:mine", "--settings", "leak=0.25", "--out", "run") == 0
    Path("run/result.json").unlink()
    again = ("train", "--resume", "run", "--optimizer", "mine.py:mine")
    assert cli(*again) == 0
    Path("run/result.json").unlink()
    digest = json.loads(Path("run/config.json").read_text())["optimizer"]
    mine.write_text(RULE.replace("0.25", "0.5"))
    capsys.readouterr()
    assert cli(*again[:-1], digest) == 2
    assert "mine.py:mine has changed since" in capsys.readouterr().err
    assert cli(*again) == 2
    assert "run is a run with other settings: optimizer (mine.py:mine@" in capsys.readouterr().err
    assert cli(*again, "--settings", "leak=0.5") == 2


def test_a_checkpoint_is_of_one_rule(recipe: Recipe, mine: Path, tmp_path: Path) -> None:
    train(f"{mine}:mine", recipe, Job(device="cpu"), tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    mine.write_text(RULE.replace("0.25", "0.5"))
    with pytest.raises(BadInputError, match="run is a run with other settings: optimizer"):
        train(f"{mine}:mine", recipe, Job(device="cpu"), tmp_path / "run")


# --------------------------------------------------------------------------------- refusals


def refused(*words: str, **files: str) -> tuple[tuple[str, ...], dict[str, str]]:
    return words, files


RAISES = "def mine(p, g): pass\n1 / 0"
NO_LR = "def mine(p, g, m, *, rate=0.1):\n    m = m + g\n    return p - rate * m, m"
HANDS_ON = """
from ademamix import AdEMAMix


class Mine(AdEMAMix):
    def __init__(self, params, alpha=3.0, **options):
        super().__init__(params, alpha=alpha, **options)
"""
REFUSED = {
    "unknown optimizer lion; there are": refused("lion"),
    "unknown optimizer mine.py; there are": refused("mine.py"),
    "KEMA has no setting lenght; it has lr, count,": refused("kema", "--settings", "lenght=3"),
    "KEMA has no setting params": refused("kema", "--settings", "params=3"),
    "Mine has no setting kappa; it has lr, leak, maximize, state,": refused("mine.py:mine", "--settings", "kappa=1"),
    "Mine has no setting weight_decy; it has alpha,": refused(
        "mine.py:Mine", "--settings", "weight_decy=1", mine=HANDS_ON
    ),
    "count must be an integer from 2 to 8, got 'x'": refused("kema", "--settings", "count=x"),
    "kappa must be a number in (0, 1], got 2": refused("adana", "--settings", "kappa=2"),
    "leak must be a finite number, got (1.0, 2.0)": refused("mine.py:mine", "--settings", "leak=1,2"),
    "AdamW and AdEMAMix have sections of their own: lr=1 is": refused("ademamix", "--settings", "lr=1", "ns_steps=3"),
    "geometry must be one of ('adam', 'muon'), got 'moon'": refused("ademamix", "--settings", "geometry=moon"),
    "ns_steps must be an integer": refused("ademamix", "--settings", "geometry=muon", "ns_steps=0"),
    "rest_lr must be a finite number >= 0, got -1": refused("adana", "--settings", "geometry=muon", "rest_lr=-1"),
    "rest_lr is for geometry=muon": refused("adana", "--settings", "rest_lr=1"),
    "rest_lr=1 is for": refused("ademamix", "--settings", "rest_lr=1"),
    "for Mine, which is made of a whole rule and not a memory, got 'muon'": refused(
        "mine.py:mine", "--settings", "geometry=muon"
    ),
    "no such file: nowhere.py": refused("nowhere.py:mine"),
    "mine.py has no rule or optimizer LEAK; it defines helped, mine, Mine": refused("mine.py:LEAK"),
    "mine.py has no rule or optimizer yours; it defines": refused("mine.py:yours"),
    "mine.py:4, in the rule helped: a rule takes (p, g, *slots": refused("mine.py:helped"),
    "raises.py cannot be run (ZeroDivisionError: division by zero)": refused("raises.py:mine", raises=RAISES),
    "exits.py cannot be run (SystemExit: 3)": refused("exits.py:mine", exits="raise SystemExit(3)"),
    "a rule returns a tuple of 1, the new (p,), got no tuple": refused(
        "plain.py:mine", plain="def mine(p, g, *, lr=0.1):\n    return p - lr * g\n"
    ),
    "broken.py cannot be run (SyntaxError": refused("broken.py:mine", broken="def"),
    "power.py:3, in the rule mine: ** is not there": refused("power.py:mine", power=NO_LR.replace("* m,", "* m**2,")),
    "Mine has no lr, which the schedule": refused("rate.py:mine", rate=NO_LR),
    "the coefficients of Mine lack ['rate'], which its rule takes": refused(
        "lacks.py:mine", lacks=NO_LR.replace("rate=0.1", "rate")
    ),
}


@pytest.mark.parametrize("message", REFUSED)
@pytest.mark.parametrize("command", ["train", "compare"])
def test_what_cannot_be_used_is_refused_before_anything_is_written(
    command: str, message: str, cli: Any, tiny: tuple[str, ...], mine: Path, capsys: Any
) -> None:
    words, files = REFUSED[message]
    for stem, text in files.items():
        Path(f"{stem}.py").write_text(text)
    before = set(Path().iterdir())
    assert cli(command, *tiny, "--optimizer", *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert set(Path().iterdir()) == before


def test_adamw_is_not_compared_with_itself(cli: Any, tiny: tuple[str, ...], capsys: Any) -> None:
    assert cli("compare", *tiny, "--optimizer", "AdamW") == 2
    assert "optimizer must be another one than AdamW" in capsys.readouterr().err


def test_a_setting_without_a_value_is_refused(cli: Any, tiny: tuple[str, ...], capsys: Any) -> None:
    assert cli("train", *tiny, "--optimizer", "kema", "--settings", "count") == 2
    assert "expected NAME=VALUE, got 'count'" in capsys.readouterr().err


# --------------------------------------------------------------------------------- the page


def test_the_page_s_commands_run_on_the_page_s_rule(cli: Any, tiny: tuple[str, ...], monkeypatch: Any) -> None:
    """As they are written, on a tiny model: only the size is added."""
    text = PAGE.read_text(encoding="utf-8")
    Path("my_file.py").write_text(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0])
    (compared,) = re.findall(r"^    ademamix (compare .*)$", text, re.MULTILINE)
    assert cli(*shlex.split(compared), *tiny, "--out", "out") == 0
    report = Path("out/report.md").read_text()
    assert report.startswith("# AdamW against Agreeing\n")
    assert "| optimizer | AdamW | Agreeing |" in report
    assert {path.parent.name for path in Path("out").glob("*/result.json")} == {"adamw", "my_file-agreeing"}
