"""AdEMAMix in Lightning's Trainer and in Fabric, against a plain loop."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ademamix import AdEMAMix, suggest
from ademamix.integrations.lightning import settings
from integrations.loops import (
    MAX_NORM,
    MAX_VALUE,
    SETTINGS,
    STEPS,
    Batch,
    assert_same,
    batches,
    loss,
    model,
    plain_loop,
)
from pages import run_blocks, run_example

lightning = pytest.importorskip("lightning", reason="Lightning is not installed")
from lightning.pytorch.plugins.precision import MixedPrecision  # noqa: E402

# Lightning's own: of its dependencies, of loaders without workers, of loggers that are switched off.
pytestmark = pytest.mark.filterwarnings("ignore")


class Module(lightning.LightningModule):
    """Lightning's automatic optimization."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.net, self.options = model(), {**SETTINGS, **options}

    def configure_optimizers(self) -> AdEMAMix:
        self.made = AdEMAMix(self.net.parameters(), **self.options)
        return self.made

    def training_step(self, batch: Batch, _: int) -> Tensor | None:
        return loss(self.net, batch)


class Manual(Module):
    """Manual optimization, with our clipping called on what Lightning hands out."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: Batch, _: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(loss(self.net, batch))
        optimizer.clip_grad_norm_(MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()


class Closure(Manual):
    def training_step(self, batch: Batch, _: int) -> None:
        optimizer = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss(self.net, batch)
            self.manual_backward(value)
            optimizer.clip_grad_norm_(MAX_NORM)
            return value

        optimizer.step(closure)


class ClippedWithin(Module):
    """Our clipping within Lightning's automatic optimization."""

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        optimizer.clip_grad_norm_(gradient_clip_val)


def trainer(**options: Any) -> Any:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return lightning.Trainer(accelerator="cpu", devices=1, **{"max_epochs": 1, **quiet, **options})


def loader(data: Any) -> DataLoader[Any]:
    return DataLoader(data, batch_size=None)


def fitted(module: Module, data: list[Batch], **options: Any) -> Module:
    trainer(**options).fit(module, loader(data))
    return module


def with_our_clipping(max_norm: float, data: list[Batch]) -> nn.Module:
    """A plain loop with our own clipping."""
    net = model()
    optimizer = AdEMAMix(net.parameters(), **SETTINGS)
    for batch in data:
        loss(net, batch).backward()
        optimizer.clip_grad_norm_(max_norm)
        optimizer.step()
        optimizer.zero_grad()
    return net


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_trainer_ends_with_the_weights_of_a_plain_loop(accumulate: int) -> None:
    data = batches(STEPS * accumulate)
    module = fitted(Module(), data, accumulate_grad_batches=accumulate)
    assert_same(module.net, plain_loop(data, accumulate=accumulate))


@pytest.mark.parametrize(
    ("algorithm", "limit", "plain"), [("norm", MAX_NORM, "max_norm"), ("value", MAX_VALUE, "max_value")]
)
def test_gradient_clip_val_is_the_clipping_of_a_plain_loop(algorithm: str, limit: float, plain: str) -> None:
    data = batches(2 * STEPS)
    options = {"gradient_clip_algorithm": algorithm, "gradient_clip_val": limit, "accumulate_grad_batches": 2}
    assert_same(fitted(Module(), data, **options).net, plain_loop(data, accumulate=2, **{plain: limit}))


def test_gradients_are_clipped_in_bfloat16_mixed_precision() -> None:
    module = fitted(Module(), batches(), precision="bf16-mixed", gradient_clip_val=MAX_NORM)
    autocast = torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
    assert_same(module.net, plain_loop(batches(), max_norm=MAX_NORM, autocast=autocast))


@pytest.mark.parametrize("ours", [False, True])
def test_gradients_are_clipped_in_float16_mixed_precision_and_an_overflow_is_skipped(ours: bool) -> None:
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**20) for _ in range(2)]  # too large for float16 at first
    plugin = MixedPrecision("16-mixed", "cpu", scalers[0])
    module = fitted(ClippedWithin() if ours else Module(), batches(), plugins=plugin, gradient_clip_val=MAX_NORM)

    net = model()
    optimizer = AdEMAMix(net.parameters(), **SETTINGS)
    for batch in batches():
        with torch.autocast("cpu", torch.float16):
            value = loss(net, batch)
        scalers[1].scale(value).backward()
        scalers[1].unscale_(optimizer)
        if ours:
            optimizer.clip_grad_norm_(MAX_NORM)
        else:
            nn.utils.clip_grad_norm_(net.parameters(), MAX_NORM)
        scalers[1].step(optimizer)
        scalers[1].update()
        optimizer.zero_grad()

    assert_same(module.net, net)
    skipped = round(20 - math.log2(scalers[0].get_scale()))  # each halved the scale
    assert 0 < skipped < STEPS / 2
    assert module.made.state[module.net[0].weight]["step"] == STEPS - skipped
    assert module.made.skipped_steps == (skipped if ours else 0)  # the scaler skips the others before the optimizer


@pytest.mark.parametrize("kind", [Manual, Closure])
def test_our_clipping_works_on_the_optimizer_that_manual_optimization_hands_out(kind: Callable[..., Module]) -> None:
    assert_same(fitted(kind(), batches()).net, with_our_clipping(MAX_NORM, batches()))


def test_our_clipping_works_in_the_hook_of_automatic_optimization() -> None:
    module = fitted(ClippedWithin(), batches(), gradient_clip_val=MAX_NORM)
    assert_same(module.net, with_our_clipping(MAX_NORM, batches()))


@pytest.mark.parametrize("make", [lambda: Module(skip_nonfinite=True), ClippedWithin, Manual, Closure])
def test_a_batch_with_a_nan_changes_nothing(make: Callable[[], Module]) -> None:
    data, good = batches(bad=[20]), [b for i, b in enumerate(batches()) if i != 20]
    module = make()
    fitted(module, data, gradient_clip_val=MAX_NORM if module.automatic_optimization else None)
    ours = not (module.automatic_optimization and type(module) is Module)
    assert_same(module.net, with_our_clipping(MAX_NORM, good) if ours else plain_loop(good, max_norm=MAX_NORM))
    assert module.made.skipped_steps == 1


@pytest.mark.parametrize("options", [{}, {"state": "compact"}, {"skip_nonfinite": True}])
def test_a_run_resumes_exactly_from_lightning_s_checkpoint(tmp_path: Path, options: dict[str, Any]) -> None:
    epoch = batches(STEPS // 2)
    first = trainer(max_epochs=1)
    first.fit(Module(**options), loader(epoch))
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Module(**options)
    for p in resumed.parameters():  # it continues only from what is in the file
        nn.init.zeros_(p)
    trainer(max_epochs=2).fit(resumed, loader(epoch), ckpt_path=tmp_path / "half.ckpt")
    assert_same(resumed.net, plain_loop(2 * epoch, **options))


def test_settings_are_those_for_the_trainer_s_number_of_steps() -> None:
    seen = []

    class Asked(Module):
        def configure_optimizers(self) -> AdEMAMix:
            seen.append(settings(self.trainer, beta2=0.95))
            return AdEMAMix(self.parameters(), lr=1e-3, **seen[-1])

    data = batches(300)
    trainer(max_epochs=4, accumulate_grad_batches=2).fit(Asked(), loader(data))
    trainer(fast_dev_run=True).fit(Asked(), loader(data))
    assert [s.pop("skip_nonfinite") for s in seen] == [True, True]
    assert seen == [suggest(600, beta2=0.95), suggest(100, beta2=0.95)]


@pytest.mark.parametrize("steps", [-1, float("inf")])
def test_settings_of_a_run_without_an_end_are_those_for_unknown_length(steps: float) -> None:
    class Endless:
        estimated_stepping_batches = steps

    assert settings(Endless()) == {**suggest(None), "skip_nonfinite": True}


# ---------------------------------------------------------------------------------------------- Fabric


def with_fabric(data: list[Batch], clip: Callable[[Any, Any, Any], Any], **options: Any) -> tuple[nn.Module, Any]:
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    net = model()
    net, optimizer = fabric.setup(net, AdEMAMix(net.parameters(), **{**SETTINGS, **options}))
    for batch in data:
        fabric.backward(loss(net, batch))
        clip(fabric, net, optimizer)
        optimizer.step()
        optimizer.zero_grad()
    return net.module, optimizer


def test_fabric_s_clipping_is_that_of_a_plain_loop() -> None:
    net, _ = with_fabric(
        batches(), lambda fabric, net, optimizer: fabric.clip_gradients(net, optimizer, max_norm=MAX_NORM)
    )
    assert_same(net, plain_loop(batches(), max_norm=MAX_NORM))


def test_our_clipping_works_on_the_optimizer_that_fabric_hands_out() -> None:
    good = [b for i, b in enumerate(batches()) if i != 20]
    net, optimizer = with_fabric(batches(bad=[20]), lambda fabric, net, optimizer: optimizer.clip_grad_norm_(MAX_NORM))
    assert_same(net, with_our_clipping(MAX_NORM, good))
    assert optimizer.skipped_steps == 1


def test_a_run_resumes_exactly_from_fabric_s_checkpoint(tmp_path: Path) -> None:
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    weights = []
    for part in (batches()[: STEPS // 2], batches()[STEPS // 2 :]):
        net = model()
        net, optimizer = fabric.setup(net, AdEMAMix(net.parameters(), **SETTINGS, state="compact"))
        state = {"net": net, "optimizer": optimizer}
        if weights:
            fabric.load(tmp_path / "half.ckpt", state)
        for batch in part:
            fabric.backward(loss(net, batch))
            optimizer.step()
            optimizer.zero_grad()
        fabric.save(tmp_path / "half.ckpt", state)
        weights.append(net.module)
    assert_same(weights[-1], plain_loop(batches(), state="compact"))


@pytest.mark.slow
def test_fsdp2_by_lightning_s_strategy_is_a_plain_loop_and_resumes(tmp_path: Path) -> None:
    file = Path(__file__).with_name("lightning_processes.py")
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(file), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-m", *command], env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-5000:]


def test_the_page_s_examples_run() -> None:
    data = DataLoader(list(batches(8)), batch_size=None)
    run_blocks("tools/lightning.md", {"build": model, "loss": loss, "data": data, "batches": batches(8)})


def test_the_example_trains_its_model_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, saved = tmp_path / "text", []
    text.write_bytes(b"a tiny text, again and again. " * 500)
    for epochs in (1, 3):
        options = ["--text", str(text), "--epochs", str(epochs), "--out", str(tmp_path)]
        run_example("lightning_module.py", options, monkeypatch)
        saved.append(torch.load(tmp_path / "last.ckpt", weights_only=False))
    assert [each["epoch"] for each in saved] == [0, 2]
    assert saved[1]["global_step"] == 3 * saved[0]["global_step"]
