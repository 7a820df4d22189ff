"""The pages tell the truth: their Python runs, their links lead somewhere, the messages that they quote exist.

A page that shows a fragment sets the stage in a Python block inside an HTML comment, which no reader sees.
"""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from pages import DOCS, ROOT, run_blocks

PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
# Run elsewhere: with JAX, in a process of its own; with the tools that the pages are about.
ELSEWHERE = [DOCS / "how-to" / "jax.md", DOCS / "tutorials" / "your-own-memory.md", *(DOCS / "tools").glob("*.md")]
RUN = [page for page in PAGES if page not in ELSEWHERE and "```python\n" in page.read_text(encoding="utf-8")]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", RUN, ids=name)
def test_the_blocks_of_a_page_run_one_after_the_other(page: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        run_blocks(str(page.relative_to(DOCS)) if DOCS in page.parents else f"../{page.name}", {"__name__": page.stem})
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_the_quickstart_trains_its_model() -> None:
    scope = run_blocks("tutorials/quickstart.md", {})
    error = (scope["model"](scope["x"]) - scope["x"].sum(1, keepdim=True)).square().mean().item()
    assert error < 6.4  # a tenth of the start's: 64, the variance of a sum of 64


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        there = (page.parent / target) if target else page
        assert there.exists(), f"{name(page)} links to {target}"
        assert not anchor or anchor in anchors(there), f"{name(page)} links to {target}#{anchor}"


def messages() -> str:
    """The library's strings, one after the other. What an f-string fills in is left out."""
    found = []
    for path in (ROOT / "src").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value for part in node.values if isinstance(part, ast.Constant)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                found.append(node.value)
    return "\n".join(found)


def test_messages_that_pages_quote_are_the_library_s() -> None:
    """A page quotes in the first cell of a row, or in bold where a paragraph begins; "..." is what is filled in."""
    text = "".join((DOCS / page).read_text(encoding="utf-8") for page in ("troubleshooting.md", "faq.md"))
    quotes = re.findall(r'^(?:\| `|\*\*")(.+?)(?:` \||"\*\*)', text, re.MULTILINE)
    assert len(quotes) > 12
    found = messages()
    assert [quote for quote in quotes if not re.search(re.escape(quote).replace(r"\.\.\.", ".*"), found)] == []
