"""Code blocks of documentation pages, run as they are written there, and examples."""

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGES, EXAMPLES = ROOT / "docs" / "tools", ROOT / "examples"


def run_blocks(page: Path, namespace: dict[str, Any]) -> dict[str, Any]:
    """Run a page's Python blocks one after the other in a namespace, which is returned."""
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(page), "exec"), namespace)
    return namespace


def run_example(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run an example with these arguments in this process; returned are its globals."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")
