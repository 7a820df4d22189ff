"""``optim="ademamix"`` in the Trainer of transformers, against plain loops, and in what is built on it."""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ademamix import AdEMAMix, suggest
from pages import python_blocks
from small_models import same

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
transformers = pytest.importorskip("transformers", reason="needs transformers")

from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from ademamix.integrations.transformers import register  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # the tools' own

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS = 120
LR, DECAY, BETAS, EPS = 3e-3, 0.1, (0.85, 0.97), 1e-7


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("get_optimizer_cls_and_kwargs", "create_scheduler"):
        monkeypatch.setattr(Trainer, name, Trainer.__dict__[name])  # put back after the test
    register()


def model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, max_position_embeddings=32, **sizes))


def data(count: int = 64) -> list[dict[str, Any]]:
    tokens = torch.randint(0, 64, (count, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": x, "labels": x} for x in tokens]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    own: dict[str, Any] = {
        "optim": "ademamix",
        "max_steps": STEPS,
        "learning_rate": LR,
        "weight_decay": DECAY,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "adam_epsilon": EPS,
        "max_grad_norm": 0.5,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(str(folder), **{**own, **changes})


class Recorder(Trainer):
    """A Trainer that keeps what each call of the model got; the loss of call ``poisoned`` is NaN."""

    poisoned: int | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[tuple[dict[str, Any], Any]] = []

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen.append((dict(inputs), kwargs.get("num_items_in_batch")))
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss * math.nan if len(self.seen) - 1 == self.poisoned else loss


class Stop(TrainerCallback):
    """Ends a run after its first step, and keeps the optimizer's state dict as it was before."""

    def on_train_begin(self, *args: Any, optimizer: Any, **kwargs: Any) -> None:
        self.optimizer = optimizer.optimizer
        self.state = optimizer.state_dict()["state"]
        self.state = {i: {name: value.clone() for name, value in own.items()} for i, own in self.state.items()}
        self.groups = [dict(group) for group in optimizer.param_groups]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = True


def begun(trainer: Trainer, **resume: Any) -> Stop:
    """A Trainer's optimizer as its training begins."""
    stop = Stop()
    trainer.add_callback(stop)
    trainer.train(**resume)
    return stop


def plain_loop(net: Any, backward: Callable[[int], None], without: int | None = None, **options: Any) -> AdEMAMix:
    """What the Trainer does, in a few lines: gradients from ``backward``, linear decay of lr, no decay of norms."""
    matrices = [p for p in net.parameters() if p.ndim > 1]
    norms = [p for p in net.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": norms, "weight_decay": 0.0}]
    advice = suggest(STEPS, beta1=BETAS[0], beta2=BETAS[1])
    optimizer = AdEMAMix(groups, lr=LR, eps=EPS, **advice, **options)
    for t in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LR * ((STEPS - t) / STEPS)
        if t != without:
            backward(t)
            optimizer.step()
            optimizer.zero_grad()
    return optimizer


def of_batches(net: Any, seen: list[tuple[dict[str, Any], Any]], clip: float, accumulate: int = 1) -> Any:
    """A ``backward`` for :func:`plain_loop`."""

    def backward(t: int) -> None:
        for inputs, items in seen[t * accumulate : (t + 1) * accumulate]:
            net(**inputs, num_items_in_batch=items).loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), clip)

    return backward


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize(("optim", "state"), [("ademamix", "float32"), ("ademamix_8bit", "compact")])
def test_weights_are_those_of_a_plain_loop_bit_for_bit(tmp_path: Path, optim: str, state: str, accumulate: int) -> None:
    args = arguments(tmp_path, optim=optim, gradient_accumulation_steps=accumulate)
    trainer = Recorder(model(), args, train_dataset=data())
    trainer.train()
    assert len(trainer.seen) == STEPS * accumulate
    net = model()
    optimizer = plain_loop(net, of_batches(net, trainer.seen, 0.5, accumulate), state=state)
    assert same(dict(trainer.model.named_parameters()), dict(net.named_parameters()))
    assert same(trainer.optimizer.state_dict()["state"], optimizer.state_dict()["state"])
    sizes = {t.dtype for own in optimizer.state.values() for t in own.values()}
    assert (torch.int16 in sizes) == (state == "compact")


@pytest.mark.parametrize("optim", ["ademamix", "ademamix_8bit"])
def test_resume_from_the_trainer_s_checkpoint_is_exact(tmp_path: Path, optim: str) -> None:
    args = arguments(tmp_path, optim=optim, save_strategy="steps", save_steps=STEPS // 2)
    whole = Trainer(model(), args, train_dataset=data())
    whole.train()
    resumed = Trainer(model(), args, train_dataset=data())
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert same(dict(whole.model.named_parameters()), dict(resumed.model.named_parameters()))
    assert same(whole.optimizer.state_dict(), resumed.optimizer.state_dict())
    assert resumed.optimizer.param_groups[0]["alpha_warmup"] == STEPS


@pytest.mark.parametrize("clip", [0.5, 0.0])
def test_a_step_with_a_nan_is_left_out(tmp_path: Path, clip: float) -> None:
    trainer = Recorder(model(), arguments(tmp_path, max_grad_norm=clip), train_dataset=data())
    trainer.poisoned = 20
    trainer.train()
    assert trainer.optimizer.optimizer.skipped_steps == 1
    net = model()
    plain_loop(net, of_batches(net, trainer.seen, clip), without=20)
    assert same(dict(trainer.model.named_parameters()), dict(net.named_parameters()))
    assert all(p.isfinite().all() for p in net.parameters())


def test_the_trainer_s_arguments_are_honored(tmp_path: Path) -> None:
    trainer = Trainer(model(), arguments(tmp_path, lr_scheduler_type="constant"), train_dataset=data())
    decayed, others = begun(trainer).groups
    advice = suggest(STEPS, beta1=BETAS[0], beta2=BETAS[1])
    for group, weight_decay in ((decayed, DECAY), (others, 0.0)):
        assert {name: group[name] for name in advice} == advice
        assert (group["lr"], group["eps"], group["weight_decay"]) == (LR, EPS, weight_decay)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    assert all("norm" in names[id(p)] for p in others["params"])
    assert not any("norm" in names[id(p)] for p in decayed["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(names)


GIVEN: dict[str, dict[str, Any]] = {
    "beta3=0.999, alpha=4": {"betas": (*BETAS, 0.999), "alpha": 4, "alpha_warmup": STEPS, "beta3_warmup": STEPS},
    "beta1=0.0,beta2=0.9": {"betas": (0.0, 0.9, 1 - 8 / STEPS), "alpha": 8.0},
    "alpha_warmup=30,beta3_warmup=40,eps=1e-6": {"alpha_warmup": 30, "beta3_warmup": 40, "eps": 1e-6},
    "t_alpha=30,t_beta3=40": {"alpha_warmup": 30, "beta3_warmup": 40},
    "alpha_warmup=None,slow_limit=None": {"alpha_warmup": None, "beta3_warmup": STEPS, "slow_limit": None},
    "beta3_schedule=log-time": {"beta3_schedule": "log-time", "alpha": 1.0, "alpha_warmup": None, "beta3_warmup": None},
}


@pytest.mark.parametrize("optim_args", GIVEN)
def test_optim_args_come_first(tmp_path: Path, optim_args: str) -> None:
    stop = begun(Trainer(model(), arguments(tmp_path, optim_args=optim_args), train_dataset=data()))
    for group in stop.groups:
        assert {name: group[name] for name in GIVEN[optim_args]} == GIVEN[optim_args]


def test_options_of_the_whole_optimizer_are_optim_args_too(tmp_path: Path) -> None:
    optim_args = "state=bfloat16,skip_nonfinite=False,backend=eager"
    optimizer = begun(Trainer(model(), arguments(tmp_path, optim_args=optim_args), train_dataset=data())).optimizer
    assert (optimizer.state_format, optimizer.skip_nonfinite, optimizer.backend) == ("bfloat16", False, "eager")
    assert optimizer.backends_in_use == ("eager",)


@pytest.mark.parametrize("item", ["beta4=0.9", "weight_decay=0.1", "lr=1.0", "alpha", "alpha="])
def test_unknown_optim_args_are_refused(tmp_path: Path, item: str) -> None:
    trainer = Trainer(model(), arguments(tmp_path, optim_args=f"beta3=0.99,{item}"), train_dataset=data())
    with pytest.raises(ValueError, match=f"optim_args must be NAME=VALUE,..., got '{item}'; names: .*alpha, .*beta3"):
        trainer.train()


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(data())


LENGTHS: dict[str, tuple[Callable[[], Any], dict[str, Any], int]] = {
    "max_steps": (data, {"max_steps": 150}, 150),
    "a stream": (Stream, {"max_steps": 150}, 150),
    "epochs": (data, {"max_steps": -1, "num_train_epochs": 10}, 160),
    "part of an epoch": (data, {"max_steps": -1, "num_train_epochs": 7.5}, 120),
    "accumulation": (data, {"max_steps": -1, "num_train_epochs": 30, "gradient_accumulation_steps": 4}, 120),
    "and what is left": (data, {"max_steps": -1, "num_train_epochs": 30, "gradient_accumulation_steps": 5}, 120),
    "short runs take those of 100": (data, {"max_steps": 10}, 100),
}


@pytest.mark.parametrize("length", LENGTHS)
def test_schedules_have_the_trainer_s_number_of_steps(tmp_path: Path, length: str) -> None:
    dataset, changes, expected = LENGTHS[length]
    trainer = Trainer(model(), arguments(tmp_path, **changes), train_dataset=dataset())
    group = begun(trainer).groups[1]
    assert expected == max(trainer.state.max_steps, 100)
    assert (group["alpha_warmup"], group["beta3_warmup"]) == (expected, expected)
    assert group["betas"][2] == 1 - 8 / expected


def test_a_smaller_batch_that_the_trainer_found_has_its_own_number_of_steps(tmp_path: Path) -> None:
    class Small(Trainer):
        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if len(inputs["labels"]) > 4:
                raise RuntimeError("CUDA out of memory.")
            return super().compute_loss(model, inputs, *args, **kwargs)

    changes = {"auto_find_batch_size": True, "per_device_train_batch_size": 5, "num_train_epochs": 10, "max_steps": -1}
    trainer = Small(model(), arguments(tmp_path, **changes), train_dataset=data())
    trainer.train()
    assert [group["alpha_warmup"] for group in trainer.optimizer.param_groups] == [160, 160]  # 130 in batches of 5


def test_a_search_over_learning_rates_searches(tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="needs optuna")
    stop, used = Stop(), {}

    class Noted(Trainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            used[self.args.learning_rate] = [group["lr"] for group in stop.groups]
            return {"eval_loss": 1.0}

    args = arguments(tmp_path, eval_strategy="epoch", lr_scheduler_type="constant")
    trainer = Noted(args=args, model_init=model, train_dataset=data(), eval_dataset=data(), callbacks=[stop])
    trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-1, log=True)},
        n_trials=3,
        backend="optuna",
    )
    assert len(used) == 3
    assert all(lrs == [lr, lr] for lr, lrs in used.items())


# ------------------------------------------------------------------------------ a run that another optimizer began


def begin_with(folder: Path, optim: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict[str, Any]]:
    """A checkpoint of 60 of 240 steps with transformers' own meaning of optim, and what it holds."""
    with monkeypatch.context() as unregistered:
        for name, own in ORIGINALS.items():
            unregistered.setattr(Trainer, name, own)
        args = arguments(folder, optim=optim, max_steps=240, save_strategy="steps", save_steps=60)

        class Until(TrainerCallback):
            def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                control.should_training_stop = True

        Trainer(model(), args, train_dataset=data(), callbacks=[Until()]).train()
    saved = torch.load(folder / "checkpoint-60" / "optimizer.pt", weights_only=True)
    return str(folder / "checkpoint-60"), saved


ORIGINALS = {name: Trainer.__dict__[name] for name in ("get_optimizer_cls_and_kwargs", "create_scheduler")}
ADAMWS = ["adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_32bit"]


@pytest.mark.parametrize("optim", ADAMWS)
def test_a_run_of_adamw_goes_on(tmp_path: Path, optim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "torch" not in optim:
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    checkpoint, saved = begin_with(tmp_path, optim, monkeypatch)
    args = arguments(tmp_path, max_steps=240, optim_args="convert=True")
    stop = begun(Trainer(model(), args, train_dataset=data()), resume_from_checkpoint=checkpoint)
    for group, old in zip(stop.groups, saved["param_groups"], strict=True):
        assert (group["schedule_start"], group["alpha_warmup"], group["beta3_warmup"]) == (60, 180, 180)
        assert (group["betas"], group["alpha"]) == ((*BETAS, 1 - 8 / 180), 8.0)
        assert (group["lr"], group["weight_decay"]) == (old["lr"], old["weight_decay"])
    for i, old in saved["state"].items():
        assert float(stop.state[i]["step"]) == 60
        assert not stop.state[i]["exp_avg_slow"].any()
        if "torch" in optim:
            assert same(stop.state[i]["exp_avg_fast"], old["exp_avg"])
            assert same(stop.state[i]["exp_avg_sq"], old["exp_avg_sq"])
        elif (tensors := old["__bnb_optimizer_quant_state__"])["state2"].dtype == torch.float32:
            assert same(stop.state[i]["exp_avg_fast"], tensors["state1"])
            assert same(stop.state[i]["exp_avg_sq"], tensors["state2"])
    assert all(p.isfinite().all() for group in stop.groups for p in group["params"])


@pytest.mark.parametrize("optim", ["ademamix", "paged_ademamix_8bit"])
def test_a_run_of_bitsandbytes_ademamix_goes_on(tmp_path: Path, optim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    checkpoint, saved = begin_with(tmp_path, optim, monkeypatch)
    args = arguments(tmp_path, max_steps=240, optim_args="convert=True")
    stop = begun(Trainer(model(), args, train_dataset=data()), resume_from_checkpoint=checkpoint)
    for group, old in zip(stop.groups, saved["param_groups"], strict=True):
        assert (group["betas"], group["alpha"], group["lr"]) == (old["betas"], old["alpha"], old["lr"])
        assert (group["schedule_start"], group["alpha_warmup"]) == (0, None)  # as it ran
    for i, old in saved["state"].items():
        assert float(stop.state[i]["step"]) == 60
        tensors = old["__bnb_optimizer_quant_state__"]
        if tensors["state2"].dtype == torch.float32:
            both = torch.stack([stop.state[i]["exp_avg_fast"], stop.state[i]["exp_avg_slow"]])
            assert same(both, tensors["state1"])


@pytest.mark.parametrize("optim_args", [None, "convert=False"])
def test_another_optimizer_s_state_is_converted_only_when_asked(
    tmp_path: Path, optim_args: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, _ = begin_with(tmp_path, "adamw_torch", monkeypatch)
    trainer = Trainer(model(), arguments(tmp_path, optim_args=optim_args), train_dataset=data())
    with pytest.raises(ValueError, match="state is of AdamW: set optim_args='convert=True' to convert it"):
        trainer.train(resume_from_checkpoint=checkpoint)


def test_a_converted_run_resumes_from_its_own_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, _ = begin_with(tmp_path, "adamw_torch", monkeypatch)
    args = arguments(tmp_path, max_steps=240, optim_args="convert=True", save_strategy="steps", save_steps=60)
    whole = Trainer(model(), args, train_dataset=data())
    whole.train(resume_from_checkpoint=checkpoint)
    resumed = Trainer(model(), args, train_dataset=data())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-120"))
    assert same(dict(whole.model.named_parameters()), dict(resumed.model.named_parameters()))
    assert same(whole.optimizer.state_dict(), resumed.optimizer.state_dict())


def test_a_run_returns_to_adamw_as_the_page_says(tmp_path: Path) -> None:
    changes = {"save_strategy": "steps", "save_steps": 60, "optim": "ademamix_8bit"}
    Trainer(model(), arguments(tmp_path / "out", **changes), train_dataset=data()).train()
    checkpoint = (tmp_path / "out" / "checkpoint-60").rename(tmp_path / "out" / "checkpoint-1000")
    ours = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    (block,) = [block for block in python_blocks("tools/transformers.md") if "to_adamw" in block]
    exec(block, {})
    trainer = Trainer(model(), arguments(tmp_path / "out", optim="adamw_torch"), train_dataset=data())
    stop = begun(trainer, resume_from_checkpoint=str(checkpoint))
    assert type(stop.optimizer) is torch.optim.AdamW
    for i, state in stop.state.items():
        assert float(state["step"]) == 60
        if ours["state"][i]["exp_avg_fast"].dtype == torch.float32:
            assert same(state["exp_avg"], ours["state"][i]["exp_avg_fast"])
    assert [(group["betas"], group["weight_decay"]) for group in stop.groups] == [(BETAS, DECAY), (BETAS, 0.0)]


def test_other_optimizers_mean_what_they_did(tmp_path: Path) -> None:
    register()
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim="adamw_torch"))
    assert (cls, kwargs["betas"]) == (torch.optim.AdamW, BETAS)
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    cls, _ = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim="paged_ademamix_8bit"))
    assert cls.__module__.startswith("bitsandbytes")


def test_an_optimizer_that_the_user_made_is_left_alone(tmp_path: Path) -> None:
    net = model()
    own = AdEMAMix(net.parameters(), alpha=3.0, beta3_warmup=7)
    group = begun(Trainer(net, arguments(tmp_path), train_dataset=data(), optimizers=(own, None))).groups[0]
    assert (group["alpha"], group["beta3_warmup"], group["alpha_warmup"]) == (3.0, 7, None)


# ------------------------------------------------------------------------------------------- what is built on it


def byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {token: i for i, token in enumerate(["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def byte_model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=257, eos_token_id=0, pad_token_id=0, **sizes))


def trl_options(folder: Path, **changes: Any) -> dict[str, Any]:
    own = arguments(folder)
    names = ("optim", "max_steps", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
    names += ("max_grad_norm", "per_device_train_batch_size", "save_strategy", "report_to", "disable_tqdm", "use_cpu")
    kept = {name: getattr(own, name) for name in names}
    return {"output_dir": str(folder), "bf16": False, "max_length": 32, **kept, **changes}


def sentences() -> Any:
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    return datasets.Dataset.from_dict({"text": [f"The number {i} comes before {i + 1}." for i in range(64)]})


class Gradients(TrainerCallback):
    def __init__(self) -> None:
        self.kept: list[list[torch.Tensor]] = []

    def on_pre_optimizer_step(self, *args: Any, model: Any, **kwargs: Any) -> None:
        self.kept.append([p.grad.clone() for p in model.parameters()])


def test_trl_s_sft_has_the_weights_of_a_plain_loop(tmp_path: Path) -> None:
    """Of its own gradients, since it computes the loss in a way of its own."""
    trl = pytest.importorskip("trl", reason="needs trl")
    gradients = Gradients()
    own = {"train_dataset": sentences(), "processing_class": byte_tokenizer(), "callbacks": [gradients]}
    trainer = trl.SFTTrainer(byte_model(), trl.SFTConfig(**trl_options(tmp_path)), **own)
    trainer.train()
    assert len(gradients.kept) == STEPS
    net = byte_model()

    def backward(t: int) -> None:
        for p, g in zip(net.parameters(), gradients.kept[t], strict=True):
            p.grad = g

    plain_loop(net, backward)
    assert same(dict(trainer.model.named_parameters()), dict(net.named_parameters()))


def test_trl_s_sft_trains_adapters_of_peft(tmp_path: Path) -> None:
    trl, peft = (pytest.importorskip(name, reason=f"needs {name}") for name in ("trl", "peft"))
    args = trl.SFTConfig(**trl_options(tmp_path, optim="ademamix_8bit", save_strategy="steps", save_steps=60))
    lora = {"peft_config": peft.LoraConfig(r=2, target_modules="all-linear")}
    whole = trl.SFTTrainer(byte_model(), args, train_dataset=sentences(), processing_class=byte_tokenizer(), **lora)
    whole.train()
    adapters = {name: p for name, p in whole.model.named_parameters() if p.requires_grad}
    assert all("lora" in name for name in adapters)
    assert sum(len(group["params"]) for group in whole.optimizer.param_groups) == len(adapters)
    assert all(p.any() for p in adapters.values())  # lora_B begins at zero
    resumed = trl.SFTTrainer(byte_model(), args, train_dataset=sentences(), processing_class=byte_tokenizer(), **lora)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-60"))
    assert same(adapters, {name: p for name, p in resumed.model.named_parameters() if p.requires_grad})


def test_trl_s_dpo_has_its_number_of_steps(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="needs trl")
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    pairs = {"prompt": [f"{i} is " for i in range(64)], "chosen": ["a number"] * 64, "rejected": ["a word"] * 64}
    args = trl.DPOConfig(**trl_options(tmp_path, max_steps=-1, num_train_epochs=7.5))
    data = datasets.Dataset.from_dict(pairs)
    own = {"args": args, "train_dataset": data, "processing_class": byte_tokenizer(), "ref_model": byte_model()}
    group = begun(trl.DPOTrainer(byte_model(), **own)).groups[0]
    assert (group["alpha_warmup"], group["lr"], group["betas"]) == (STEPS, LR, (*BETAS, 1 - 8 / STEPS))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_zero_of_deepspeed(tmp_path: Path, stage: int) -> None:
    pytest.importorskip("deepspeed", reason="needs deepspeed")
    trainer = Trainer(model(), arguments(tmp_path, max_grad_norm=0.0), train_dataset=data())
    trainer.train()
    ran(Path(__file__).with_name("transformers_deepspeed.py"), str(stage), str(tmp_path))
    whole, resumed = torch.load(tmp_path / "results.pt", weights_only=False)
    assert whole["flat"]
    for group in (*whole["groups"], *resumed["groups"]):
        assert group == {"alpha_warmup": STEPS, "betas": (*BETAS, 1 - 8 / STEPS)}
    assert same(whole["weights"], resumed["weights"])
    # Without clipping, whose norm DeepSpeed computes in another order.
    assert same(whole["weights"], {name: p.detach() for name, p in trainer.model.named_parameters()})


PROGRAM = """
import integrations.torchvision_for_cpu, runpy, sys
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def ran(program: Path, *given: str) -> str:
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests.parent / "src"), str(tests)])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(program), *given],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def small_text(folder: Path) -> str:
    (folder / "text.txt").write_text("All work and no play makes a dull optimizer.\n" * 100)
    return str(folder / "text.txt")


@pytest.mark.slow
def test_the_example_of_the_trainer_runs(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs datasets")
    given = ("--text", small_text(tmp_path), "--batch", "2", "--length", "32", "--out", str(tmp_path / "out"))
    assert "loss on held-out text: " in ran(EXAMPLES / "hf_trainer.py", *given, "--steps", "6")
    assert (tmp_path / "out" / "checkpoint-6" / "optimizer.pt").exists()


@pytest.mark.slow
def test_the_example_of_trl_runs(tmp_path: Path) -> None:
    for name in ("trl", "peft"):
        pytest.importorskip(name, reason=f"needs {name}")
    given = ("--steps", "3", "--batch", "2", "--out", str(tmp_path / "out"))
    assert "mean training loss: " in ran(EXAMPLES / "trl_sft.py", *given)
    assert (tmp_path / "out" / "model.safetensors").exists()
