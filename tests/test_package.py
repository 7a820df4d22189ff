"""What is published: the version stands in one place, and every public name is where it is said to be."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ademamix

ROOT = Path(__file__).parents[1]


def run_python(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_importing_the_library_loads_torch_only_with_its_first_name() -> None:
    heavy = "{'numba', 'triton', 'jax', 'transformers', 'tyro'}"
    run_python(
        "import sys, ademamix; assert 'torch' not in sys.modules\n"
        f"ademamix.AdamW; assert 'torch' in sys.modules; assert not {heavy} & set(sys.modules)"
    )


def test_every_public_name_is_there() -> None:
    run_python(
        "from ademamix import *; import ademamix\n"
        "assert all(name in globals() for name in ademamix.__all__)\n"
        "assert set(ademamix.__all__) <= set(dir(ademamix))"
    )
    at_home = {name for names in ademamix._HOMES.values() for name in names}
    assert at_home == set(ademamix.__all__)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'ademamix' has no attribute 'Adam'"):
        ademamix.Adam  # noqa: B018


def test_the_version_stands_in_one_place() -> None:
    written = re.compile(rf"version\s*[=:]\s*\"?{re.escape(ademamix.__version__)}")
    places = [ROOT / "pyproject.toml", ROOT / "CITATION.cff", *(ROOT / "src").rglob("*.py")]
    found = [str(path.relative_to(ROOT)) for path in places if written.search(path.read_text(encoding="utf-8"))]
    assert found == []
    assert (ROOT / "src/ademamix/__init__.py").read_text().count(f'__version__ = "{ademamix.__version__}"') == 1


def prose():
    spec = importlib.util.spec_from_file_location("prose", ROOT / ".ci" / "prose.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the linters run on Python 3.11 and newer")
def test_the_linter_of_prose_finds_phrases_in_comments_strings_and_pages_but_not_in_code(tmp_path: Path) -> None:
    linter, source, page = prose(), tmp_path / "source.py", tmp_path / "page.md"
    source.write_text(
        'go_on = 1  # a run that goes\n"""Text\nover lines: 12 bytes a\nparameter, `go on`."""\n'
        'f"{x} is no file"\n# go on\n'
    )
    found = sorted((line, phrase) for line, phrase, _ in linter.findings(source))
    assert found == [(3, "bytes a parameter"), (5, "is no file"), (6, "go on")]
    page.write_text("# Title\n\n```\ngo on\n```\n\nA training that `goes on`, [beside](beside.md).\n")
    assert sorted((line, phrase) for line, phrase, _ in linter.findings(page)) == [(7, "A training"), (7, "beside")]
