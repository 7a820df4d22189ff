"""README's examples run as they are written there."""

import re
from pathlib import Path
from typing import Any


def test_the_examples_run_one_after_the_other_and_train_their_model() -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    scope: dict[str, Any] = {}
    for example in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(example, scope)
    error = (scope["model"](scope["x"]) - scope["x"].sum(1, keepdim=True)).square().mean().item()
    assert error < 6.4  # a tenth of the start's: 64, the variance of a sum of 64
