import base64
import itertools
import json
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urljoin, urlsplit
from xml.etree import ElementTree

import pytest

from ademamix.lab.reports.claims import PAPER, Finding
from ademamix.lab.reports.pictures import ADEMAMIX, SCHEMES, Chart, Field, HeatMap, Line
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


def values_of(page: str) -> Any:
    """What the page's script reads."""
    (text,) = re.findall(r'<script type="application/json" id="values">([^<]*)</script>', page)
    return json.loads(text)


def images_of(page: str) -> list[bytes]:
    """The pictures, each dark and then light."""
    return [base64.b64decode(text) for text in re.findall(r'"data:image/svg\+xml;base64,([^"]+)"', page)]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Reports in which each text is harmless, and is not."""
    plain, nasty = (tmp_path_factory.mktemp(name) for name in ("plain", "nasty"))
    write(report_of("text"), plain, ["ademamix train"], 1.0)
    write(report_of(NASTY), nasty, [f"ademamix train --data '{NASTY}'"], 1.0)
    return plain, nasty


def test_texts_are_text_in_a_page(pages: tuple[Path, Path]) -> None:
    plain, nasty = ((folder / "report.html").read_text() for folder in pages)
    images = {"alt", "src", "srcset"}  # what differs
    assert [tag for tag, _ in Tags(nasty).found] == [tag for tag, _ in Tags(plain).found]
    for (_, mine), (_, theirs) in zip(Tags(nasty).found, Tags(plain).found, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(value == theirs[key] for key, value in mine.items() if key not in images)
    (values,) = values_of(nasty)
    assert [name for name, *_ in values["names"]] == [NASTY, "other"]
    for drawn in images_of(nasty):
        assert " ".join(NASTY.split()) in "".join(ElementTree.fromstring(drawn).itertext())
        assert {element.tag for element in ElementTree.fromstring(drawn).iter()} == {
            element.tag for element in ElementTree.fromstring(images_of(plain)[0]).iter()
        }


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
    own = [link for link in links if not link.startswith("https://")]
    assert len(own) == 5
    for link in own:
        address = urlsplit(urljoin("file:///runs/index.html", link))
        assert (address.scheme, address.netloc, address.query, address.fragment) == ("file", "", "", "")
        path, _, file = address.path.rpartition("/")
        assert unquote_to_bytes(path) == b"/runs/" + os.fsencode(name)
        assert file in ("report.html", "pictures-light.svg", "pictures-dark.svg")
    assert not [a for tag, a in tags if "onerror" in a or (tag == "script" and "alert" in str(a))]
    assert "<script>alert" not in page


# --------------------------------------------------------------------------------- pictures

STEPS = [100.0, 200.0, 300.0]
CURVES = Chart(
    "Loss",
    "steps",
    "nats, 95 % interval",
    [
        Line("AdamW", STEPS, [2.0, 1.6, 1.3], band=([1.9, 1.5, 1.2], [2.1, 1.7, 1.4])),
        Line("AdEMAMix", STEPS, [2.0, 1.6, 1.25]),
    ],
    reference=((1.5, "AdamW, twice the tokens"),),
    caption="The band is a 95 % interval.",
)
MAP = HeatMap("Sweep", "beta3", "alpha", ["1", "2", "3"], ["8", "9"], [[1.2, 1.1, 1.0], [1.3, 9.0, None]])
PATH = Line("AdEMAMix", [0.0, 0.5, 0.1], [0.0, 0.5, 0.9])
SHADED = Chart("Valley", "x", "y", [PATH], field=Field([0.0, 1.0], [0.0, 1.0], [[0.0, 1.0], [1.0, 2.0]]))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports")
    (folder / "one").mkdir()
    report = Report("One", ["It <is> lower by 0.1", "More"], [CURVES, MAP, SHADED], [[("a",)]], [[("lr", 1)]])
    write(report, folder / "one", ["ademamix run one"], 1.0)
    write_index(folder)
    return folder


@pytest.fixture
def page(written: Path) -> str:
    return (written / "one" / "report.html").read_text()


def test_the_first_headline_is_the_title(written: Path, page: str) -> None:
    assert "<h1>It &lt;is&gt; lower by 0.1</h1>" in page
    assert page.count("It &lt;is&gt; lower by 0.1") == 1
    assert page.count("<p class=soft>The band is a 95 % interval.</p>") == 1
    for scheme in SCHEMES:
        drawn = ElementTree.fromstring((written / "one" / f"pictures-{scheme}.svg").read_bytes())
        texts = " ".join(" ".join(drawn.itertext()).split())
        assert all(text in texts for text in ("It <is> lower by 0.1", CURVES.caption, CURVES.y_label))


def test_a_page_is_small(page: str) -> None:
    assert len(page) < 150_000


@pytest.mark.parametrize(("file", "folder"), [("one/report.md", ""), ("index.html", "./one/")])
def test_pictures_are_shown_for_light_and_dark_with_their_finding_as_text(
    file: str, folder: str, written: Path
) -> None:
    (shown,) = re.findall("<picture>.*?</picture>", (written / file).read_text())
    dark, text, light = re.fullmatch(  # type: ignore[union-attr]
        r'<picture><source media="\(prefers-color-scheme: dark\)" srcset="(.*?)">'
        r'<img alt="(.*?)" src="(.*?)"></picture>',
        shown,
    ).groups()
    assert (dark, light) == (f"{folder}pictures-dark.svg", f"{folder}pictures-light.svg")
    assert text == "One: It &lt;is&gt; lower by 0.1"


def test_every_picture_of_a_page_says_what_it_shows(page: str) -> None:
    assert [a["alt"] for tag, a in Tags(page).found if tag == "img"] == [
        "Chart of nats, 95 % interval by steps: AdamW, AdEMAMix",
        "Heat map of validation loss, nats by beta3 and alpha",
        "Chart of y by x: AdEMAMix",
    ]


def test_settings_are_folded(page: str) -> None:
    before, _, folded = page.partition("<details><summary>Settings</summary>")
    assert "<th>lr</th>" in folded
    assert "<th>lr</th>" not in before


def test_nats_are_explained_where_they_are_used_and_links_lead_on(pages: tuple[Path, Path], page: str) -> None:
    assert page.count("Losses are in nats") == 1
    other = (pages[0] / "report.html").read_text()
    assert "Losses are in nats" not in other
    for text in (page, other):
        assert f"<a href='{PAPER}'>" in text
        assert "/docs'>documentation</a>" in text  # from the package's metadata


def test_the_box_of_the_axes_is_where_they_are_drawn(page: str) -> None:
    for values, drawn in zip(values_of(page)[::2], images_of(page)[1::4], strict=True):
        ((wide, tall),) = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawn.decode())
        (background,) = re.findall(r'<g id="patch_2">\s*<path d="(.*?)"', drawn.decode(), re.DOTALL)
        corners = re.findall(r"([-\d.]+) ([-\d.]+)", background)
        x, y = ([float(corner[i]) / float(size) for corner in corners] for i, size in ((0, wide), (1, tall)))
        left, bottom, width, height = values["box"]
        assert (left, left + width) == pytest.approx((min(x), max(x)), abs=1e-3)
        assert (1 - bottom, 1 - bottom - height) == pytest.approx((max(y), min(y)), abs=1e-3)


# --------------------------------------------------------------------------------- in a browser

# What is shown at a place in the axes of a picture, x from the left and y from the bottom, and how far the mark is off.
POINT = """
const [number, x, y] = arguments, place = document.querySelectorAll(".picture")[number];
const area = place.querySelector("img").getBoundingClientRect();
const [left, bottom, width, height] = JSON.parse(document.getElementById("values").textContent)[number].box;
const clientX = area.left + (left + x * width) * area.width;
const clientY = area.top + (1 - bottom - y * height) * area.height;
place.dispatchEvent(new PointerEvent("pointermove", { clientX, clientY }));
const mark = place.querySelector("span").getBoundingClientRect();
return [place.querySelector("output").innerText, (mark.left + mark.right) / 2 - clientX, mark.bottom - clientY];
"""
LEAVE = """
const [number, pointerType] = arguments;
document.querySelectorAll(".picture")[number].dispatchEvent(new PointerEvent("pointerleave", { pointerType }));
"""
TEXT = """
const shown = document.querySelectorAll(".picture")[arguments[0]].querySelector("output");
return shown.hidden ? "" : shown.innerText;
"""


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_values_are_shown_where_one_points(
    width: int, scheme: str, written: Path, browse: Callable[[Path, int, str], Any]
) -> None:
    with browse(written / "one" / "report.html", width, scheme) as page:
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        assert page.execute_script("return [...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert page.execute_script(TEXT, 0) == ""
        # 200 steps are in the middle of the axis; nearest to a place a little to the right, too.
        text, off, below = page.execute_script(POINT, 0, 0.5, 0.0)
        assert text.split("\n") == ["steps: 200", "AdamW: 1.6000", "AdEMAMix: 1.6000"]
        assert (off, below) == pytest.approx((0, 0), abs=1)  # a pixel: the line is one wide
        assert page.execute_script(POINT, 0, 0.52, 0.5)[0] == text
        text, *_ = page.execute_script(POINT, 0, 0.99, 0.9)
        assert text.split("\n") == ["steps: 300", "AdamW: 1.3000", "AdEMAMix: 1.2500"]
        color = page.execute_script("return getComputedStyle(document.querySelectorAll('output span')[1]).color")
        assert color == "rgb({}, {}, {})".format(*bytes.fromhex(ADEMAMIX[SCHEMES.index(scheme)][1:]))
        for row, column in itertools.product(range(2), range(3)):
            text, *_ = page.execute_script(POINT, 1, (column + 0.6) / 3, (row + 0.4) / 2)
            value = MAP.z[row][column]
            told = "diverged" if value is None else f"{value:.4f}"
            assert text.split("\n") == [f"beta3 {column + 1}, alpha {row + 8}", f"validation loss, nats: {told}"]
        # A path goes back and forth: the nearest of its points counts.
        x_axis, y_axis = SHADED.axes()
        assert page.execute_script(POINT, 2, x_axis.part(0.15), y_axis.part(0.85))[0] == "AdEMAMix: x 0.10, y 0.90"
        page.execute_script(LEAVE, 2, "touch")  # a finger that is lifted: one wants to read
        assert page.execute_script(TEXT, 2) != ""
        page.execute_script(LEAVE, 2, "mouse")
        assert page.execute_script(TEXT, 2) == ""


def test_values_are_shown_by_keys(written: Path, browse: Callable[[Path, int, str], Any]) -> None:
    from selenium.webdriver.common.keys import Keys

    with browse(written / "one" / "report.html", 390, "light") as page:

        def steps(*keys: str) -> str:
            page.switch_to.active_element.send_keys(*keys)
            return str(page.execute_script(TEXT, 0)).split("\n")[0]

        page.find_element("css selector", "body").send_keys(Keys.TAB)
        assert page.execute_script("return document.activeElement.className") == "picture"
        assert steps(Keys.ARROW_LEFT) == "steps: 300"
        assert steps(Keys.ARROW_RIGHT) == "steps: 300"
        assert steps(Keys.ARROW_LEFT, Keys.ARROW_LEFT) == "steps: 100"
        assert steps(Keys.END) == "steps: 300"
        assert steps(Keys.HOME) == "steps: 100"
        assert steps(Keys.ESCAPE) == ""
        assert steps(Keys.ARROW_RIGHT) == "steps: 100"
        assert steps(Keys.TAB) == ""
