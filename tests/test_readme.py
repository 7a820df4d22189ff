"""README's examples run as they are written there; what pages import is there."""

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
IMPORT = r"^\s*((?:from|import) ademamix.*)$"


def test_the_examples_run_one_after_the_other_and_train_their_model() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    scope: dict[str, Any] = {}
    for example in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(example, scope)
    error = (scope["model"](scope["x"]) - scope["x"].sum(1, keepdim=True)).square().mean().item()
    assert error < 6.4  # a tenth of the start's: 64, the variance of a sum of 64


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_imports_is_there(page: Path) -> None:
    for statement in re.findall(IMPORT, page.read_text(encoding="utf-8"), re.MULTILINE):
        if "jax" in statement:
            pytest.importorskip("jax")
        exec(statement, {})


def test_links_to_files_lead_to_files() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"
