"""The reference of the command line: the help texts of all commands, as the command prints them."""

import os
import re
import subprocess
import sys
from typing import Any

COMMANDS = ("", "compare", "run", "run lm", "train", "data", "plan", "report")


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    if page.file.src_uri != "reference/cli.md":
        return markdown
    return markdown + "\n" + "\n".join(map(_section, COMMANDS))


def _section(command: str) -> str:
    words = ["ademamix", *command.split()]
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    run = [sys.executable, "-m", *words, "--help"]
    text = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text).rstrip()
    return f"## `{' '.join(words)}`\n\n```text\n{plain}\n```\n"
