"""Turn the checkpoint of a run that AdamW began into one that AdEMAMix continues.

    python examples/convert_running_run.py adamw.pt --steps-left 20000 --out ademamix.pt

The checkpoint is a dict that torch.save has written, with the state dict of a torch.optim.AdamW as "optimizer".
Everything else in it stays, such as the model and a learning-rate scheduler. Then change one line of the training
script, to `AdEMAMix(params, **suggest(steps_left))` with the same parameters in the same groups, and load the new file.
"""

import argparse
from pathlib import Path

import torch

from ademamix import AdEMAMix, suggest
from ademamix.convert import from_adamw


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--steps-left", type=int, required=True, help="over which alpha and beta3 grow")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    checkpoint = torch.load(args.checkpoint, map_location="cpu", weights_only=True)
    old = checkpoint["optimizer"]
    # An AdEMAMix of the same groups has the settings that AdamW lacks; the conversion reads no parameter.
    groups = [{"params": [torch.empty(0) for _ in group["params"]]} for group in old["param_groups"]]
    new = from_adamw(old, AdEMAMix(groups, **suggest(args.steps_left)))
    torch.save({**checkpoint, "optimizer": new}, args.out)
    start = new["param_groups"][0]["schedule_start"]
    print(f"{args.out}: {len(new['state'])} parameters, {start} steps done by AdamW, {args.steps_left} left")


if __name__ == "__main__":
    main()
