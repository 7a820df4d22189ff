"""What came out: as one HTML page that needs no network, as pictures, as Markdown, and as tables on the terminal."""

import base64
import dataclasses
import html
import json
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from rich.table import Table

from ademamix.lab.config import BadInputError, from_json, to_json, write_whole
from ademamix.lab.console import OUT, say
from ademamix.lab.reports.claims import CLAIMS, PAPER, Finding
from ademamix.lab.reports.pictures import INK, SCHEMES, Chart, Picture, styles_of
from ademamix.lab.reports.stops import stops_of
from ademamix.lab.reports.svg import panel, svg

PAGE, MARKDOWN, OUTCOME, INDEX = "report.html", "report.md", "outcome.json", "index.html"
PICTURES = {scheme: f"pictures-{scheme}.svg" for scheme in SCHEMES}
PACKAGES = ("ademamix", "torch", "transformers", "optuna", "numpy", "numba")
MARKS = {"reproduced": "✔", "contradicted": "✘", "undecided": "?", "not tested at this size": "○"}
NOT_RUN = "not run"  # of a claim that no experiment in the folder says anything about
NATS = (
    "Losses are in nats; divided by ln 2 they are in bits. Lower is better: a loss that is lower by 0.01 nats is a "
    "perplexity that is lower by about 1 %."
)

Cells = Sequence[Any]
Rows = Sequence[Cells]  # the heads first


@dataclass(frozen=True)
class Report:
    """What one command found."""

    title: str
    headlines: list[str]  # a sentence each
    pictures: list[Picture]
    tables: list[Rows]
    settings: list[Rows]
    findings: list[Finding] = field(default_factory=list)

    @property
    def takeaway(self) -> str:
        """The title of its pictures: what it found, in a sentence."""
        return self.headlines[0] if self.headlines else self.title


def sentence(text: str) -> str:
    """The text with a capital letter."""
    return text[0].upper() + text[1:]


def machine() -> str:
    """This machine, in words."""
    import torch

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():  # Linux has the processor's name nowhere else
        lines = (line for line in cpuinfo.read_text().splitlines() if line.startswith("model name"))
        name = next(lines, f": {name}").partition(": ")[2]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join([*gpus, name, f"{os.cpu_count()} cores", platform.system()])


def versions() -> dict[str, str]:
    """Python's version and those of the packages that decide the numbers."""

    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    return {"python": platform.python_version()} | {name: of(name) for name in PACKAGES}


def write(report: Report, out: Path, commands: Sequence[str], seconds: float) -> None:
    """Write everything that a report consists of to a folder."""
    made = {"machine": machine(), **versions(), "date": time.strftime("%Y-%m-%d"), "minutes": f"{seconds / 60:.1f}"}
    for scheme, name in PICTURES.items():
        write_whole(out / name, svg(report.takeaway, report.pictures, scheme))
    drawn = _drawn(report.pictures)
    body = _body(report, drawn, commands, made)
    _write(out / PAGE, _page(report.title, report.takeaway, body, [d.values for d in drawn]))
    _write(out / MARKDOWN, _markdown(report, commands, made))
    outcome = {"title": report.title, "headlines": report.headlines, "made": made, "commands": list(commands)}
    to_json(out / OUTCOME, {**outcome, "findings": [dataclasses.asdict(f) for f in report.findings]})


def show(report: Report) -> None:
    """Print a report's tables and sentences."""
    for rows in report.tables:
        table = Table(*map(str, rows[0]))
        for row in rows[1:]:
            table.add_row(*map(str, row))
        OUT.print(table)
    for line in (*report.headlines, *(_sentence(f) for f in report.findings)):
        say(line)


def write_index(folder: Path) -> Path:
    """Write an index of the reports in a folder's folders, with the paper's figure next to ours, claim by claim.

    Raises:
        BadInputError: there is no report, or what one says is damaged.
    """
    outcomes = {path.parent: _outcome(path) for path in sorted(folder.glob(f"*/{OUTCOME}"))}
    if not outcomes:
        raise BadInputError(f"{folder} holds no reports: `ademamix run` writes them, each to a folder of its own")
    title = "AdEMAMix: the paper's claims, and what came out here"
    _write(folder / INDEX, _page(title, title, _index(outcomes)))
    return folder / INDEX


def _outcome(path: Path) -> dict[str, Any]:
    found = from_json(path)
    try:
        title, headlines, findings = found["title"], found["headlines"], [Finding(**f) for f in found["findings"]]
    except (KeyError, TypeError) as error:
        raise BadInputError(f"{path} is damaged, or of another version of ademamix ({error})") from error
    texts = [title, *(text for f in findings for text in (f.claim, f.verdict, f.ours))]
    if not (isinstance(headlines, list) and all(isinstance(text, str) for text in texts + headlines)):
        raise BadInputError(f"{path} is damaged: title, headlines and findings must be text")
    for f in findings:
        for what, name, known in (("claim", f.claim, CLAIMS), ("verdict", f.verdict, MARKS)):
            if name not in known:
                allowed = ", ".join(map(repr, known))
                raise BadInputError(f"{path} is damaged, or of another version: no {what} is {name!r}, but {allowed}")
    return {"title": title, "headlines": headlines, "findings": findings}


def _documentation() -> str | None:
    """Where this package's documentation is, as its metadata say."""
    try:
        urls = metadata("ademamix").get_all("Project-URL", [])
    except PackageNotFoundError:
        return None
    return dict(url.split(", ", 1) for url in urls).get("Documentation")


def _write(path: Path, text: str) -> None:
    write_whole(path, text.encode(errors="replace"))  # names of files may not be text


def _sentence(finding: Finding) -> str:
    return f"{MARKS[finding.verdict]} {finding.verdict}: {CLAIMS[finding.claim].text}. Here: {finding.ours}."


# --------------------------------------------------------------------------------- HTML


@dataclass(frozen=True)
class Drawn:
    """A picture as the page has it."""

    image: str  # its element
    values: dict[str, Any]  # for page.js: the box of the axes, the names of lines with their colors, and the stops


def _drawn(pictures: Sequence[Picture]) -> list[Drawn]:
    styles = styles_of(pictures)
    drawn = []
    for picture in pictures:
        panels = [panel(picture, styles, scheme) for scheme in SCHEMES]
        light, dark = (f"data:image/svg+xml;base64,{base64.b64encode(image).decode()}" for image, _ in panels)
        if isinstance(picture, Chart):
            names = [(line.name, *styles[line.name].colors) for line in picture.lines]
        else:
            names = [(picture.z_label, *INK)]
        box = [round(part, 4) for part in panels[0][1]]
        values = {"box": box, "names": names, "stops": stops_of(picture)}
        drawn.append(Drawn(_picture(light, dark, picture.described), values))
    return drawn


def _page(title: str, takeaway: str, body: str, values: Sequence[Mapping[str, Any]] = ()) -> str:
    page, script = ((Path(__file__).parent / name).read_text(encoding="utf-8") for name in ("page.html", "page.js"))
    said = {"title": _text(title), "takeaway": _text(takeaway), "body": body + _foot(body)}
    return Template(page).substitute(said, values=_script(values), script=script)


def _foot(body: str) -> str:
    """The unit of losses, where it is used, and where to read more."""
    nats = f"<p>{NATS}</p>" if re.search(r"\bnats\b", body) else ""
    urls = {"the paper, arXiv 2409.03137": PAPER, "documentation": _documentation()}
    links = ", ".join(f"<a href='{_text(url)}'>{text}</a>" for text, url in urls.items() if url)
    return f"<footer class=soft>{nats}<p>More: {links}</p></footer>"


def _body(report: Report, drawn: Sequence[Drawn], commands: Sequence[str], made: Mapping[str, str]) -> str:
    pictures = (
        f"<section><h2>{_text(p.title)}</h2><div class=picture>{d.image}</div>"
        f"{f'<p class=soft>{_text(p.caption)}</p>' if p.caption else ''}</section>"
        for p, d in zip(report.pictures, drawn, strict=True)
    )
    return "".join(
        [
            f"<p class=soft>{_text(report.title)}</p>",
            f"<div class=lead>{''.join(f'<p>{_text(line)}.</p>' for line in report.headlines[1:])}</div>",
            f"<div class=pictures>{''.join(pictures)}</div>",
            "".join(map(_verdict, report.findings)),
            "<h2>Results</h2>",
            "".join(map(_table, report.tables)),
            f"<h2>Command</h2><pre>{_text(chr(10).join(commands))}</pre>",
            "<details><summary>Settings</summary><div class=settings>",
            *(f"<div>{_table(rows)}</div>" for rows in (*report.settings, [("machine", ""), *made.items()])),
            "</div></details>",
        ]
    )


def _index(outcomes: Mapping[Path, dict[str, Any]]) -> str:
    found = [(at, f) for at, outcome in outcomes.items() for f in outcome["findings"]]
    rows = []
    for key, claim in CLAIMS.items():
        here = [(at, f) for at, f in found if f.claim == key]
        ours = [
            f"<p>{_badge(f.verdict)} {_text(f.ours)} (<a href='{_address(at)}/{PAGE}'>{_text(at.name)}</a>)</p>"
            for at, f in here
        ] or [f"<p>{_badge(NOT_RUN)} <code>ademamix run {claim.experiment}</code> tests it</p>"]
        rows.append(
            f"<section class=claim><h2>{_text(sentence(claim.text))}</h2>"
            f"<dl><dt>The paper</dt><dd>{_text(claim.paper)}</dd>"
            f"<dt>Here</dt><dd>{''.join(ours)}</dd><dt>Criterion</dt><dd class=soft>{_text(claim.criterion)}</dd></dl>"
            "</section>"
        )
    cards = [
        f"<section><h2><a href='{_address(at)}/{PAGE}'>{_text(outcome['title'])}</a></h2>"
        f"<a href='{_address(at)}/{PAGE}'>"
        f"{_shown(_address(at) + '/', [outcome['title'], *outcome['headlines'][:1]])}</a>"
        f"{''.join(f'<p>{_text(line)}.</p>' for line in outcome['headlines'])}</section>"
        for at, outcome in outcomes.items()
    ]
    counts = {v: sum(any(f.claim == key and f.verdict == v for _, f in found) for key in CLAIMS) for v in MARKS}
    decided = ("reproduced", "contradicted", "undecided")
    left = len(CLAIMS) - sum(counts[verdict] for verdict in decided)
    not_run = len(CLAIMS.keys() - {f.claim for _, f in found})
    lead = f"Of {len(CLAIMS)} claims: {', '.join(f'{counts[v]} {v}' for v in decided)}, "
    lead += f"{left - not_run} not tested at this size, {not_run} {NOT_RUN}"
    body = f"<div class=lead><p>{lead}.</p></div>{''.join(rows)}"
    return f"{body}<h2>The experiments</h2><div class=pictures>{''.join(cards)}</div>"


def _shown(folder: str, said: Sequence[str]) -> str:
    """Both files of pictures, of which a reader sees that for the own scheme."""
    light, dark = (folder + PICTURES[scheme] for scheme in SCHEMES)
    return _picture(light, dark, " ".join(": ".join(said).split()))


def _picture(light: str, dark: str, said: str) -> str:
    """The image at one of two addresses, and what it says."""
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{_text(said)}" src="{light}"></picture>'
    )


def _verdict(finding: Finding) -> str:
    claim = CLAIMS[finding.claim]
    return (
        f"<div class=verdict><p>{_badge(finding.verdict)} {_text(sentence(claim.text))}.</p>"
        f"<p>Here: {_text(finding.ours)}. The paper: {_text(claim.paper)}.</p>"
        f"<p class=soft>Criterion: {_text(claim.criterion)}.</p></div>"
    )


def _badge(verdict: str) -> str:
    mark = MARKS.get(verdict, "○")
    return f"<b class='badge {verdict.split()[0]}'>{mark} {verdict}</b>"


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _address(at: Path) -> str:
    """Of a folder next to the page. Without the dot, what stands before a colon would be a scheme."""
    return "./" + quote(os.fsencode(at.name), safe="")


def _script(value: Any) -> str:
    """The value in JavaScript; HTML knows nothing of its strings, and would end the script within one."""
    return json.dumps(value).replace("<", "\\u003c")


def _table(rows: Rows) -> str:
    def row(cells: Cells, tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in cells) + "</tr>"

    lines = f"{row(rows[0], 'th')}{''.join(row(cells, 'td') for cells in rows[1:])}"
    return f"<div class=table><table>{lines}</table></div>"


# --------------------------------------------------------------------------------- Markdown


def _plain(value: Any) -> str:
    """On one line, and no tag of HTML, which Markdown would pass on."""
    return " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;")


def _markdown(report: Report, commands: Sequence[str], made: Mapping[str, str]) -> str:
    def table(rows: Rows) -> Iterator[str]:
        for number, row in enumerate(rows):
            yield "| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in row) + " |"
            if number == 0:
                yield "| --- |" + " --: |" * (len(row) - 1)
        yield ""

    lines = [f"# {report.title}", "", _shown("", [report.title, report.takeaway]), ""]
    lines += [f"- {line}." for line in report.headlines]
    for f in report.findings:
        lines += [f"- **{f.verdict}**: {CLAIMS[f.claim].text}. Here: {f.ours}. The paper: {CLAIMS[f.claim].paper}."]
        lines += [f"  Criterion: {CLAIMS[f.claim].criterion}."]
    lines += [""]
    for rows in report.tables:
        lines += table(rows)
    lines += ["## How", "", *(f"    {command}" for command in commands), ""]
    lines += [", ".join(f"{key}: {value}" for key, value in made.items()) + ".", ""]
    for rows in report.settings:
        lines += table(rows)
    return "\n".join(lines)
