"""Is what the GPU computes right? Writes gpu-correct.md, a row for each check.

    python -m gpu.correct training|streams|exact

Each in a process of its own: an error that a GPU does not recover from ends only one of them.
"""

import importlib
import sys
from collections import Counter

from gpu.report import Page, check

TITLES = {
    "training": "In training",
    "streams": "Streams, graphs, and waiting",
    "exact": "Against float64 and eager",
}


def main() -> None:
    name = sys.argv[1]
    about = "Each rule against float64 and against eager, and what training runs, streams and graphs do with it."
    page = Page("gpu-correct.md", "Correctness on a GPU", about)
    page.table(TITLES[name], ["check", "verdict", "what", "time"])
    checks = importlib.import_module(f"gpu.{name}").CHECKS
    verdicts = Counter(check(page, what, act) for what, act in checks.items())
    page.add("", f"{TITLES[name]}: {', '.join(f'{count} {verdict}' for verdict, count in verdicts.items())}", "")
    sys.exit(0 if set(verdicts) == {"ok"} else 1)


if __name__ == "__main__":
    main()
