import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote_to_bytes, urljoin, urlsplit

import pytest

from ademamix.lab.reports.claims import Finding
from ademamix.lab.reports.pictures import Chart, Line
from ademamix.lab.reports.report import Report, write, write_index

NASTY = "</script><script>alert(1)</script><img src=x onerror='alert(2)'>\"$|\n<b>"
NAMES = ["javascript:alert(1)", "a#b", "a?b", "100%41", "a b&c", "'\"><script>alert(1)<", "..a", "\udcff"]


class Tags(HTMLParser):
    """Every tag of a page with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def report_of(text: str) -> Report:
    chart = Chart(text, "steps", "loss", [Line(text, [1.0, 2.0], [3.0, 4.0]), Line("other", [1.0], [2.0])])
    table = [("name", "value"), (text, 1)]
    return Report(text, [text], [chart], [table], [table], [Finding("tokens", "reproduced", text)])


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Reports in which each text is harmless, and is not."""
    plain, nasty = (tmp_path_factory.mktemp(name) for name in ("plain", "nasty"))
    write(report_of("text"), plain, ["ademamix train"], 1.0)
    write(report_of(NASTY), nasty, [f"ademamix train --data '{NASTY}'"], 1.0)
    return plain, nasty


def test_texts_are_text_in_a_page(pages: tuple[Path, Path]) -> None:
    plain, nasty = ((folder / "report.html").read_text() for folder in pages)
    assert Tags(nasty).found == Tags(plain).found
    script = nasty.rpartition("const pictures = ")[2].partition(";\n")[0]
    (picture,) = json.loads(script)
    assert "<" not in script
    assert picture["traces"][0]["name"].startswith("&lt;/script&gt;")  # Plotly makes it tags otherwise


def test_texts_are_text_in_markdown(pages: tuple[Path, Path]) -> None:
    rows = [line for line in (pages[1] / "report.md").read_text().splitlines() if line.startswith("| &lt;/script")]
    assert len(rows) == 2
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 and "<" not in row for row in rows)


@pytest.mark.parametrize("name", NAMES)
def test_an_index_links_to_a_folder_of_any_name(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    finding = {"claim": "tokens", "verdict": "reproduced", "ours": NASTY}
    outcome = {"title": NASTY, "headlines": [NASTY + "\ud800"], "findings": [finding]}
    (folder / "outcome.json").write_text(json.dumps(outcome))
    page = write_index(tmp_path).read_text(encoding="utf-8")
    tags = Tags(page).found
    links = [a["href"] for tag, a in tags if tag == "a"] + [a["src"] for tag, a in tags if tag == "img"]
    links += [a["srcset"] for tag, a in tags if tag == "source"]
    assert len(links) == 5
    for link in links:
        address = urlsplit(urljoin("file:///runs/index.html", link))
        assert (address.scheme, address.netloc, address.query, address.fragment) == ("file", "", "", "")
        path, _, file = address.path.rpartition("/")
        assert unquote_to_bytes(path) == b"/runs/" + os.fsencode(name)
        assert file in ("report.html", "pictures-light.svg", "pictures-dark.svg")
    assert not [a for tag, a in tags if "onerror" in a or (tag == "script" and "alert" in str(a))]
    assert "<script>alert" not in page
