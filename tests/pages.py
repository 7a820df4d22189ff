"""The Python blocks of the documentation and the examples, run as they stand."""

import re
import runpy
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DOCS, EXAMPLES = ROOT / "docs", ROOT / "examples"


def python_blocks(page: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return [dedent(block) for block in re.findall(r"^ *```python\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)]


def run_blocks(page: str, namespace: dict[str, Any]) -> dict[str, Any]:
    """Run a page's Python blocks one after the other in a namespace, which is returned."""
    for number, block in enumerate(python_blocks(page), 1):
        exec(compile(block, f"{page}, block {number}", "exec"), namespace)
    return namespace


def run_example(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run an example with these arguments in this process; returned are its globals."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")
