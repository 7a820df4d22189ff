"""The lab on a GPU, in minutes: `ademamix run lm`, and the tokens per second of `ademamix train`; writes lm-gpu.md."""

import importlib.util
import json
import sys
from pathlib import Path

TRAINING = ("tyro", "rich", "optuna", "transformers", "filelock")
NEEDED = {"lm": (*TRAINING, "matplotlib"), "train": TRAINING}  # a report has pictures
SEEDS = ["--seeds", "0", "1", "--budgets", "1.5"]
ONE_EACH = [f"--tuning.{name}" for name in ("adamw-lr", "adamw-beta2", "ademamix-lr", "ademamix-beta3")]
LM = {
    "cuda": ["--preset", "gpu", "--steps", "150", "--warmup", "15", "--eval-every", "75", "--workers", "4", *SEEDS],
    "cpu": [
        *("--preset", "cpu", "--steps", "2", "--warmup", "1", "--eval-every", "2", "--eval-sequences", "4"),
        *("--batch", "2", "--workers", "2", *SEEDS),
        *(
            word
            for name, value in zip(ONE_EACH, ("4e-3", "0.99", "2e-3", "0.9"), strict=True)
            for word in (name, value)
        ),
    ],
}
TRAIN = {
    "cuda": ["--preset", "10m", "--steps", "400", "--warmup", "40", "--eval-every", "200", "--log-every", "20"],
    "cpu": [
        *("--preset", "demo", "--steps", "4", "--warmup", "1", "--eval-every", "4"),
        *("--eval-sequences", "8", "--batch", "4"),
    ],
}


def missing(which: str, wheels: Path) -> list[str]:
    """Which packages are neither installed nor in the folder of wheels."""
    there = {file.name.split("-")[0].lower() for file in wheels.glob("*.whl")}
    return [name for name in NEEDED[which] if name not in there and importlib.util.find_spec(name) is None]


def command(which: str, device: str, folder: Path) -> list[str]:
    words = ["run", "lm", *LM[device]] if which == "lm" else ["train", *TRAIN[device]]
    return [sys.executable, "-m", "ademamix", *words, "--device", device, "--out", str(folder)]


def lm_page(page: Path, report: Path) -> None:
    """The report of `run lm` without its picture and the folders it was written to."""
    text = (
        report.read_text()
        if report.exists()
        else "# AdamW against AdEMAMix\n\n`ademamix run lm` did not come to its end.\n"
    )
    lines = [line for line in text.splitlines() if not line.startswith("<picture>")]
    page.write_text("\n".join(lines).replace(str(report.parent), "FOLDER") + "\n")


def train_rows(device: str, result: Path) -> str:
    """What `ademamix train` says of its speed."""
    if not result.exists():
        return "\n## Tokens per second\n\n`ademamix train` did not come to its end.\n"
    found = json.loads(result.read_text())
    rows = {
        "tokens per second": f"{found['seen'] / found['seconds']:,.0f}",
        "optimizer, ms per step": f"{found['optimizer_ms']:.2f}",
        "validation loss": f"{found['valid_loss']:.3f}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    words = f"`ademamix train {' '.join(TRAIN[device])}`"
    return f"\n## Tokens per second\n\n{words}:\n\n| | |\n|---|--:|\n{table}\n"
