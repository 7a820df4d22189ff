"""The short of it, from what the parts have written."""

import re
from collections.abc import Sequence
from pathlib import Path

from gpu.driver import Outcome


def section(page: Path, title: str) -> list[str]:
    """The lines below a heading, up to the next; none if there is no such page or heading."""
    lines = page.read_text().splitlines() if page.exists() else []
    starts = [i for i, line in enumerate(lines) if line.lstrip("#").strip().startswith(title) and line.startswith("#")]
    if not starts:
        return []
    below = lines[starts[0] + 1 :]
    end = next((i for i, line in enumerate(below) if line.startswith("#")), len(below))
    return "\n".join(below[:end]).strip().splitlines()


def tests(output: Path) -> list[str]:
    """How many tests passed, and which did not: pytest's own last line is not there if it was killed."""
    lines = output.read_text(errors="replace").splitlines() if output.exists() else []
    if not lines:
        return []
    said = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b")
    seen = [
        match[1]
        for line in lines
        if "::" in line and not line.startswith(("FAILED", "ERROR", "SKIPPED")) and (match := said.search(line))
    ]
    counts = [f"{seen.count(word)} {word.lower()}" for word in ("PASSED", "FAILED", "ERROR", "SKIPPED") if word in seen]
    bad = [f"- {line[:200]}" for line in lines if line.startswith(("FAILED", "ERROR"))]
    return [", ".join(counts) or "no test ended", *bad[:12]]


def correct(page: Path) -> list[str]:
    lines = page.read_text().splitlines() if page.exists() else []
    rows = [line.split(" | ") for line in lines if line.startswith("| ") and line.count(" | ") >= 3]
    verdicts = [row[1] for row in rows]
    counts = [
        f"{verdicts.count(word)} {word.strip('*')}" for word in ("ok", "**FAILED**", "not run") if word in verdicts
    ]
    bad = [f"- {row[0][2:]}: {row[2][:160]}" for row in rows if row[1] == "**FAILED**"]
    return [", ".join(counts), *bad[:16]] if counts else []


def summary(out: Path, outcomes: Sequence[Outcome], environment: Path) -> str:
    """A page of Markdown: parts, goals, and what failed."""
    parts = [
        "| part | end | seconds |",
        "|---|---|--:|",
        *(f"| {o.name} | {o.end} | {o.seconds:.0f} |" for o in outcomes),
    ]
    step = out / "step-gpu.md"
    found = {
        "Parts": parts,
        "Goals": section(step, "Goals") or ["not measured"],
        "Correctness": correct(out / "gpu-correct.md"),
        "Tests": tests(out / "tests.txt"),
        "The host's time": section(step, "The host's time"),
        "Launches": section(step, "Clipped, moving"),
        "Muon's geometry": section(out / "muon-step-gpu.md", "12 of GPT-2's"),
        "The kernel": section(out / "sweep.md", "Best"),
        "Training": section(out / "lm-gpu.md", "Tokens per second"),
        "Environment": environment.read_text().splitlines() if environment.exists() else [],
    }
    lines = ["# `make gpu`"]
    for title, rows in found.items():
        if rows:
            lines += ["", f"## {title}", "", *rows]
    return "\n".join(lines) + "\n"
