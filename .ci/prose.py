"""A linter of prose: habits of ours that a reader stumbles over, by patterns. `make lint` runs it, beside codespell.

It reads Markdown, and the comments and strings of Python files. `[tool.prose]` in pyproject.toml says of which paths; a
path on the command line is read in place of those. Code in backticks is not read. The exit code is 1 if anything was
found.
"""

import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[1]
UNITS = "bytes|nats|ms|milliseconds|seconds|steps|tokens|sequences|images|launches|once|twice|examples|bits|one"
EACH = "parameter|byte|step|token|second|element|gpu|run|sequence|row|core|process|tensor|slot|block|matrix|seed|time"
RULES = {  # what to write: the pattern of what not to write, where a space is any white space
    "name the thing, without 'what it is is'": r"what (\w+ ){1,4}(is|are|does) (is|are)",
    "'a run' or 'a training run'": r"trainings|an? training(?= (that|of|with|has|will|needs|is|by)\b|[.,;:])",
    "'per': bytes per parameter": rf"({UNITS}) an? ({EACH})(?! (has|is|was)\b)",
    "'resume' or 'continue'": r"(go|goes|going|went|gone) on(?! (a|the|one|an) )",
    "'next to', 'besides' or 'compared with'": r"beside",
    "'only', before the word that it limits": r"(?<!leave\s)(?<!left\s)(?<!let\s)alone",
    "'is not a', or the positive": r"(?<!there\s)(is|are|was|were) no (?!longer|more|less|larger|smaller|later)\w+"
    r"|is nothing that",
    "a modern word": r"not to be had|at hand|as ever|in earnest|to speak of|mended|likewise|is another's|the house",
    "the noun again": r"that one's|this one's|has nothing of|one alone is",
    "who does what: 'raises ValueError' or 'needs'": r"wants to be|wants? an?",
    "'placeholder'": r"stand-?ins?(?!\.py)",
    "'reference implementation'": r"the authors' (own )?(program|class|script)",
    "'slow EMA'": r"slow averages?",
    "'standard error of the difference'": r"joint standard errors?",
    "subject, verb, object": r"not counted (is|are)|by as much as",
}
PATTERNS = {advice: re.compile(rf"\b({rule.replace(' ', chr(92) + 's+')})\b", re.I) for advice, rule in RULES.items()}
CODE = re.compile(r"^```.*?^```|^ {4,}(?=\S).*?$|``.+?``|`[^`\n]+`|\]\([^)]*\)", re.M | re.S)
FIELD = re.compile(r"\{[^{}\n]*\}")  # of an f-string


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """The prose of a file: the line at which a piece of it begins, and its text."""
    if path.suffix == ".md":
        whole = path.read_text(encoding="utf-8")
        yield 1, CODE.sub(blank, whole)
        return
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            fstring = tokenize.tok_name[token.type] == "FSTRING_MIDDLE"
            if token.type in (tokenize.COMMENT, tokenize.STRING) or fstring:
                yield token.start[0], FIELD.sub(blank, re.sub(r"``.+?``|`[^`\n]+`", blank, token.string))


def blank(code: re.Match[str]) -> str:
    """Nothing that a rule reads, on as many lines."""
    return "\n" * code[0].count("\n") or " _ "


def findings(path: Path) -> Iterator[tuple[int, str, str]]:
    """The line of each phrase that breaks a rule, the phrase, and what to write."""
    for line, text in texts(path):
        for advice, pattern in PATTERNS.items():
            for match in pattern.finditer(text):
                yield line + text.count("\n", 0, match.start()), " ".join(match[0].split()), advice


def files(paths: list[str]) -> Iterator[Path]:
    """The Markdown and Python files of some paths."""
    for path in map(ROOT.joinpath, paths):
        yield from [path] if path.is_file() else sorted([*path.rglob("*.md"), *path.rglob("*.py")])


def main() -> int:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["prose"]
    count = 0
    for path in files(sys.argv[1:] or settings["paths"]):
        for line, phrase, advice in sorted(findings(path)):
            count += 1
            print(f"{path.relative_to(ROOT)}:{line}: {phrase!r}: write {advice}")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
