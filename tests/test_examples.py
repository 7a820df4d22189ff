"""The examples run, on small local data, and resume where they stopped."""

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import integrations.torchvision_for_cpu  # noqa: F401
from ademamix import AdEMAMix, suggest
from pages import DOCS, EXAMPLES, ROOT, run_example
from small_models import same

TEXTS = [ROOT / "README.md", *DOCS.rglob("*.md"), *EXAMPLES.glob("*.py")]
COMMANDS = sorted(
    {
        line
        for path in TEXTS
        for line in re.findall(
            r"^ *(?:python|torchrun .*) examples/(\w+\.py.*)$", path.read_text("utf-8"), re.MULTILINE
        )
    }
)


def run(name: str, *arguments: Any, launcher: tuple[str, ...] = ()) -> str:
    command = [sys.executable, *launcher, str(EXAMPLES / name), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short(example: Path) -> None:
    assert len(example.read_text(encoding="utf-8").splitlines()) < 100


@pytest.mark.parametrize("command", COMMANDS)
def test_an_example_takes_the_arguments_of_the_pages(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser: argparse.ArgumentParser) -> None:
        parse(parser)  # exits with 2 if it does not know an argument
        sys.exit(0)

    name, *arguments = shlex.split(command, comments=True)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    with pytest.raises((SystemExit, ModuleNotFoundError)) as stopped:
        run_example(name, arguments, monkeypatch)
    if isinstance(stopped.value, ModuleNotFoundError):
        pytest.skip(str(stopped.value))
    assert stopped.value.code == 0


@pytest.mark.slow
def test_nanogpt_learns_and_resumes_exactly(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} bottles of beer on the wall. " for i in range(500)))
    size = ("--steps", 100, "--batch", 8, "--context", 32, "--layers", 1, "--width", 32, "--lr", 1e-2)
    whole = run("nanogpt.py", text, *size, "--out", tmp_path / "whole.pt")
    loss = float(whole.split("validation loss ")[-1].split(",")[0])
    assert loss < 1.5  # the text's letters drawn one by one: 3.0
    for stop in (40, 100):
        run("nanogpt.py", text, *size, "--out", tmp_path / "parts.pt", "--stop", stop)
    one, other = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "parts"))
    assert same(one, other)
    assert "validation loss" in run(
        "nanogpt.py", text, *size, "--optimizer", "adamw", "--bf16", "--out", tmp_path / "adamw.pt", "--stop", 5
    )


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this torch's fully_shard needs a GPU")
def test_fsdp2_resumes_exactly_on_two_processes(tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    whole = run("fsdp2.py", "--steps", 100, "--out", tmp_path / "whole", launcher=launcher)
    for stop in (60, 100):
        parts = run("fsdp2.py", "--steps", 100, "--stop", stop, "--out", tmp_path / "parts", launcher=launcher)
    first, last = ([line for line in out.splitlines() if line.startswith("step ")] for out in (whole, parts))
    assert first[-1].startswith("step 100: ")
    assert first[-1] == last[-1]
    assert float(first[-1].split("loss ")[1].split(",")[0]) < 0.5  # at the start 2, the variance of x - x.flip(1)


def test_a_running_run_of_adamw_becomes_one_of_ademamix(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adamw, 1000)

    def train(optimizer: torch.optim.Optimizer) -> None:
        for _ in range(5):
            model(torch.randn(8, 6)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    train(adamw)
    schedule.step()
    saved = {"model": model.state_dict(), "optimizer": adamw.state_dict(), "schedule": schedule.state_dict(), "step": 5}
    torch.save(saved, tmp_path / "adamw.pt")
    said = run("convert_running_run.py", tmp_path / "adamw.pt", "--steps-left", 995, "--out", tmp_path / "ours.pt")
    assert "2 parameters" in said
    loaded = torch.load(tmp_path / "ours.pt", weights_only=True)
    assert same({**loaded, "optimizer": None}, {**saved, "optimizer": None})
    ours = AdEMAMix([{"params": [model.weight]}, {"params": [model.bias]}], **suggest(995))
    ours.load_state_dict(loaded["optimizer"])
    for group, old in zip(ours.param_groups, adamw.param_groups, strict=True):
        assert (group["lr"], group["weight_decay"], group["betas"][:2]) == (old["lr"], old["weight_decay"], (0.9, 0.95))
        assert (group["alpha"], group["alpha_warmup"], group["schedule_start"]) == (8.0, 995, 5)
    for p in model.parameters():
        assert torch.equal(ours.state[p]["exp_avg_fast"], adamw.state[p]["exp_avg"])
        assert torch.equal(ours.state[p]["exp_avg_sq"], adamw.state[p]["exp_avg_sq"])
        assert ours.state[p]["step"] == 5
    train(ours)
    assert all(ours.state[p]["exp_avg_slow"].any() for p in model.parameters())
