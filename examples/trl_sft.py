"""Fine-tune a language model on prompts and completions with TRL's SFTTrainer and AdEMAMix.

    pip install ademamix trl peft
    python examples/trl_sft.py                             # a new, small model learns to say what functions do
    python examples/trl_sft.py --model PATH_OR_NAME --data my.jsonl --lr 1e-5
    python examples/trl_sft.py --model PATH_OR_NAME --data my.jsonl --lora 16 --lr 1e-4

A line of my.jsonl is {"prompt": ..., "completion": ...}, or {"messages": [...]} for a model with a chat template.
"""

import argparse
import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

from ademamix.integrations.transformers import register

register()  # optim="ademamix" and "ademamix_8bit" are ademamix.AdEMAMix from here on


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a JSON lines file; by default functions of Python's library and their purpose")
    parser.add_argument("--model", help="a folder or a name on the Hub; by default a new, small model of bytes")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train adapters of this rank only")
    parser.add_argument("--optim", default="ademamix", help="ademamix, ademamix_8bit, adamw_torch, ...")
    parser.add_argument("--lr", type=float, default=1e-3, help="for AdEMAMix, half of AdamW's is a good start")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=16, help="examples per step")
    parser.add_argument("--out", default="trl_sft_out")
    return parser.parse_args()


def functions() -> Iterator[dict[str, str]]:
    """What the functions of Python's library are called, and the first lines of their docstrings."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                signature = f"{path.stem}.{node.name}({ast.unparse(node.args)})"
                yield {"prompt": f"What does {signature} do?\n", "completion": text.splitlines()[0]}


def small_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A model of bytes, and a tokenizer that makes a token of each byte."""
    vocab = {token: i for i, token in enumerate(["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = LlamaConfig(vocab_size=len(vocab), num_key_value_heads=4, **sizes, **ends)
    return LlamaForCausalLM(config), PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>"
    )


def main() -> None:
    options = arguments()
    set_seed(0)
    data = Dataset.from_json(options.data) if options.data else Dataset.from_list(list(functions()))
    model: Any = options.model
    tokenizer = None  # of the model's folder
    if model is None:
        model, tokenizer = small_model()
    args = SFTConfig(
        options.out,
        optim=options.optim,
        learning_rate=options.lr,
        lr_scheduler_type="cosine",
        warmup_steps=options.steps // 20,
        max_steps=options.steps,
        max_length=256,
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        per_device_train_batch_size=options.batch,
        logging_steps=max(options.steps // 20, 1),
        save_strategy="no",
        report_to="none",
    )
    lora = None if options.lora is None else LoraConfig(r=options.lora, target_modules="all-linear")
    trainer = SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, peft_config=lora)
    result = trainer.train()
    trainer.save_model()
    print(f"mean training loss: {result.training_loss:.4f} nats per token")


if __name__ == "__main__":
    main()
