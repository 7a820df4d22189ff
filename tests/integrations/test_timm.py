"""timm's factory, schedulers, checkpoints and train.py with AdEMAMix."""

import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ademamix import AdEMAMix, suggest
from integrations.loops import MAX_NORM, SETTINGS, STEPS, Batch, batches, loss, model
from pages import EXAMPLES, run_blocks

timm = pytest.importorskip("timm", reason="timm is not installed")
from timm.models import resume_checkpoint  # noqa: E402
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs  # noqa: E402
from timm.scheduler import CosineLRScheduler  # noqa: E402
from timm.utils import CheckpointSaver, NativeScaler, dispatch_clip_grad  # noqa: E402

from ademamix.integrations.timm import main, register  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # timm leaves files of images open

PROGRAM = Path(__file__).with_name("timm_program.py")
GIVEN = {"lr": 1e-2, "weight_decay": 0.1, "total_steps": 100}  # SETTINGS, in timm's words


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    register()


def vit() -> Any:
    """A vision transformer of two blocks, for images of 16x16."""
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 4}
    return timm.models.VisionTransformer(**sizes)


def images(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(2, 3, 16, 16, generator=generator), torch.tensor([i % 4, (i + 1) % 4])) for i in range(count)]


def plain_groups(net: nn.Module) -> list[dict[str, Any]]:
    """timm's: no weight decay for what has one dimension."""
    params = list(net.parameters())
    return [
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
        {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.1},
    ]


def trained(optimizer: torch.optim.Optimizer, net: nn.Module, data: list[Batch], max_norm: float | None = None) -> Any:
    for batch in data:
        loss(net, batch).backward()
        if max_norm is not None:
            dispatch_clip_grad(net.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in net.parameters()]


def same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("max_norm", [None, MAX_NORM])
def test_a_run_ends_with_the_weights_of_a_plain_loop(max_norm: float | None) -> None:
    net, plain = model(), model()
    optimizer = create_optimizer_v2(net, opt="ademamix", **GIVEN)
    by_hand = AdEMAMix(plain_groups(plain), **SETTINGS)
    assert type(optimizer) is AdEMAMix
    same(trained(optimizer, net, batches(), max_norm), trained(by_hand, plain, batches(), max_norm))


def test_the_options_of_the_command_line_arrive() -> None:
    options = {"opt": "ademamix", "lr": 1e-3, "weight_decay": 0.05, "momentum": 0.9, "opt_eps": 1e-6}
    args = Namespace(**options, opt_betas=[0.8, 0.95], layer_decay=0.5)
    made = create_optimizer_v2(vit(), **optimizer_kwargs(args), total_steps=1000, alpha=5.0, state="bfloat16")
    assert isinstance(made, AdEMAMix)
    wanted = {**suggest(1000, beta1=0.8, beta2=0.95), "alpha": 5.0, "eps": 1e-6, "lr": 1e-3}
    assert {name: made.defaults[name] for name in wanted} == wanted
    assert (made.state_format, made.skip_nonfinite) == ("bfloat16", True)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, suggest(None)),
        ({"betas": [0.8, 0.95]}, suggest(None, beta1=0.8, beta2=0.95)),
        ({"betas": [0.8, 0.95, 0.99]}, {"betas": (0.8, 0.95, 0.99), "alpha": 2.0, "alpha_warmup": None}),
        ({"betas": [0.8, 0.95, 0.99], "total_steps": 500}, {**suggest(500), "betas": (0.8, 0.95, 0.99)}),
        ({"total_steps": 500, "alpha_warmup": 7}, {**suggest(500), "alpha_warmup": 7}),
    ],
)
def test_what_is_not_given_is_suggested(given: dict[str, Any], wanted: dict[str, Any]) -> None:
    made = create_optimizer_v2(model(), opt="ademamix", **given)
    assert {name: made.defaults[name] for name in wanted} == wanted


@pytest.mark.parametrize("betas", [[0.9], [0.9, 0.95, 0.99, 0.999]])
def test_another_number_of_betas_is_refused(betas: list[float]) -> None:
    with pytest.raises(ValueError, match=r"betas must be 2 or 3 numbers in \[0, 1\), got \[0.9"):
        create_optimizer_v2(model(), opt="ademamix", betas=betas, total_steps=100)


def test_names_are_listed_and_compact_is_compact() -> None:
    assert list_optimizers("ademamix*") == ["ademamix", "ademamixcompact"]
    made = create_optimizer_v2(model(), opt="ademamixcompact")
    assert isinstance(made, AdEMAMix)
    assert made.state_format == "compact"


def test_layer_decay_and_lr_scale_are_those_of_a_plain_loop_under_timm_s_scheduler() -> None:
    net, plain = vit(), vit()
    optimizer = create_optimizer_v2(net, opt="ademamix", layer_decay=0.5, **GIVEN)
    schedule = CosineLRScheduler(optimizer, t_initial=STEPS, warmup_t=5, warmup_lr_init=1e-5, t_in_epochs=False)
    scales = [group["lr_scale"] for group in optimizer.param_groups]
    assert len(set(scales)) == 4  # embeddings, two blocks, head
    names = {p: name for name, p in net.named_parameters()}
    own = dict(plain.named_parameters())
    groups = [
        {"params": [own[names[p]] for p in group["params"]], "weight_decay": group["weight_decay"]}
        for group in optimizer.param_groups
    ]
    by_hand = AdEMAMix(groups, **SETTINGS)
    losses: list[list[float]] = [[], []]
    for step, (x, y) in enumerate(images(STEPS)):
        lr = schedule._get_lr(step)[0]
        for group, scale in zip(by_hand.param_groups, scales, strict=True):
            group["lr"] = lr * scale
        for each, of, record in ((net, optimizer, losses[0]), (plain, by_hand, losses[1])):
            value = nn.functional.cross_entropy(each(x), y)
            value.backward()
            of.step()
            of.zero_grad()
            record.append(value.item())
        schedule.step_update(step + 1)
    assert losses[0] == losses[1]
    same(list(net.parameters()), list(plain.parameters()))


@pytest.mark.parametrize("opt", ["ademamix", "ademamixcompact", "lookahead_ademamix"])
def test_a_run_resumes_exactly_from_timm_s_checkpoint(tmp_path: Path, opt: str) -> None:
    def begun() -> tuple[nn.Module, Any]:
        net = model()
        return net, create_optimizer_v2(net, opt=opt, **GIVEN)

    half = STEPS // 2 + 1  # not where lookahead looks back
    net, optimizer = begun()
    wanted = trained(optimizer, net, batches())
    net, optimizer = begun()
    trained(optimizer, net, batches()[:half])
    saver = CheckpointSaver(net, optimizer, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver.save_checkpoint(epoch=0, metric=0.0)
    net, optimizer = begun()
    for p in net.parameters():  # it continues only from what is in the file
        nn.init.zeros_(p)
    resume_checkpoint(net, str(tmp_path / "last.pth.tar"), optimizer)
    same(trained(optimizer, net, batches()[half:]), wanted)


@pytest.mark.parametrize("max_norm", [None, MAX_NORM])
def test_a_batch_with_a_nan_changes_nothing(max_norm: float | None) -> None:
    net, plain = model(), model()
    optimizer = create_optimizer_v2(net, opt="ademamix", **GIVEN)
    by_hand = AdEMAMix(plain_groups(plain), **SETTINGS)
    good = [batch for i, batch in enumerate(batches()) if i != 20]
    same(trained(optimizer, net, batches(bad=[20]), max_norm), trained(by_hand, plain, good, max_norm))
    assert optimizer.skipped_steps == 1


def test_timm_s_scaler_clips_and_accumulates_as_a_plain_loop() -> None:
    net, plain = model(), model()
    optimizer = create_optimizer_v2(net, opt="ademamix", **GIVEN)
    by_hand = AdEMAMix(plain_groups(plain), **SETTINGS)
    scaler, params = NativeScaler("cpu"), list(net.parameters())
    for i, batch in enumerate(batches(), start=1):
        last = i % 2 == 0
        scaler(loss(net, batch) / 2, optimizer, clip_grad=MAX_NORM, parameters=params, need_update=last)
        (loss(plain, batch) / 2).backward()
        if last:
            optimizer.zero_grad()
            dispatch_clip_grad(plain.parameters(), MAX_NORM)
            by_hand.step()
            by_hand.zero_grad()
    same(params, list(plain.parameters()))  # a scale that is a power of two leaves no trace in float32


# ---------------------------------------------------------------------------------------------- programs


def write_images(folder: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 8), ("validation", 2)):
        for kind in ("cat", "dog"):
            (folder / split / kind).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 255, (16, 16, 3), dtype=torch.uint8, generator=generator).numpy()
                image.fromarray(pixels).save(folder / split / kind / f"{i}.png")


def test_a_training_program_of_timm_s_kind_finds_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path)
    options = ["--data-dir", str(tmp_path), "--opt", "ademamixcompact", "--opt-kwargs", "total_steps=700"]
    monkeypatch.setattr(sys, "argv", ["timm", str(PROGRAM), *options])
    main()
    assert "AdEMAMix, alpha_warmup 700, 1 steps" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
def test_the_example_runs_a_training_program(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    (tmp_path / "sitecustomize.py").write_text("import integrations.torchvision_for_cpu")
    paths = [str(tmp_path), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    sizes = {"EPOCHS": "100", "BATCH": "5", "PYTHON": sys.executable, "PYTHONPATH": os.pathsep.join(paths)}
    command = ["bash", str(EXAMPLES / "timm_train.sh"), str(PROGRAM), str(tmp_path / "images"), "--max-batches", "2"]
    ran = subprocess.run(command, env={**os.environ, **sizes}, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-5000:]
    assert "16 images, 300 steps" in ran.stdout  # of 5 images, one left out in each epoch
    assert "AdEMAMix, alpha_warmup 300, 2 steps" in ran.stdout


def test_the_page_s_example_runs() -> None:
    scope = run_blocks("tools/timm.md", {"model": model()})
    assert scope["optimizer"].defaults["alpha_warmup"] == 375_000
