"""README's example runs as it is written there."""

import re
from pathlib import Path
from typing import Any


def test_the_example_trains_its_model() -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    scope: dict[str, Any] = {}
    exec(example, scope)
    error = (scope["model"](scope["x"]) - scope["x"].sum(1, keepdim=True)).square().mean().item()
    assert error < 6.4  # a tenth of the start's: 64, the variance of a sum of 64
