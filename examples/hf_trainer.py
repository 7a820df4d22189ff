"""Train a language model with the Trainer of Hugging Face transformers and AdEMAMix.

pip install ademamix "transformers[torch]" datasets
python examples/hf_trainer.py                        # a small model of bytes, on the source of Python's library
python examples/hf_trainer.py --optim adamw_torch --lr 2e-3                        # the same with AdamW
python examples/hf_trainer.py --model PATH_OR_NAME --text my.txt --lr 1e-5         # continue a pretrained model
python examples/hf_trainer.py --resume                                             # from the last checkpoint
"""

import argparse
import sysconfig
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from ademamix.integrations.transformers import register

register()  # optim="ademamix" and "ademamix_8bit" are ademamix.AdEMAMix from here on


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", help="text files; by default the source of Python's library")
    parser.add_argument("--model", help="a folder or a name on the Hub; by default a new, small model of bytes")
    parser.add_argument("--optim", default="ademamix", help="ademamix, ademamix_8bit, adamw_torch, ...")
    parser.add_argument("--optim-args", help="such as beta3=0.999,alpha=5; by default ademamix.suggest chooses")
    parser.add_argument("--lr", type=float, default=1e-3, help="for AdEMAMix, half of AdamW's is a good start")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16, help="sequences per step")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--out", default="hf_trainer_out")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in --out")
    return parser.parse_args()


def tokens_of(text: str, length: int, tokenizer: Any = None) -> Dataset:
    """Sequences of so many tokens; without a tokenizer, of bytes."""
    ids = list(text.encode()) if tokenizer is None else tokenizer(text)["input_ids"]
    rows = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def small_model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, num_key_value_heads=4, **sizes))


def main() -> None:
    options = arguments()
    set_seed(0)
    files = options.text or sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in files)
    if options.model is None:
        model, tokenizer = small_model(), None
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    parts = tokens_of(text, options.length, tokenizer).train_test_split(test_size=0.05, seed=0)
    args = TrainingArguments(
        options.out,
        optim=options.optim,
        optim_args=options.optim_args,
        learning_rate=options.lr,
        lr_scheduler_type="cosine",
        warmup_steps=options.steps // 20,
        weight_decay=0.1,
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        eval_strategy="steps",
        eval_steps=max(options.steps // 5, 1),
        save_steps=max(options.steps // 5, 1),
        save_total_limit=1,
        logging_steps=max(options.steps // 20, 1),
        report_to="none",
    )
    data = {"train_dataset": parts["train"], "eval_dataset": parts["test"], "data_collator": default_data_collator}
    trainer = Trainer(model, args, processing_class=tokenizer, **data)
    trainer.train(resume_from_checkpoint=options.resume)
    print(f"loss on held-out text: {trainer.evaluate()['eval_loss']:.4f} nats per token")


if __name__ == "__main__":
    main()
