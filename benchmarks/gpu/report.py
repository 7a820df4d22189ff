"""What the parts share: where they run, how long they may, and results that are on disk as soon as they are known."""

import contextlib
import gc
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from step import head, machine

OUT = Path(os.environ.get("OUT", "runs/gpu"))
DEVICE = torch.device(os.environ.get("DEVICE", "cuda"))
CUDA = DEVICE.type == "cuda"
FUSED = "triton" if CUDA else "cpu"  # the backend that is looked at
ENDS = float(os.environ.get("ENDS", "inf"))  # by time.time()
LEAST = 6.0  # seconds for a check, with kernels to compile
COMMAND = "make gpu" if CUDA else f"make gpu DEVICE={DEVICE}"
warnings.filterwarnings("error", message="ademamix: ")  # a fallback to eager would make every check pass

Check = Callable[[], "str | tuple[bool, str]"]  # what was found; whether it is right


def left() -> float:
    """Seconds that are left to this part."""
    return ENDS - time.time()


class Page:
    """A page of results, written whenever a line is added to it; one that is there is continued."""

    def __init__(self, name: str, title: str, *about: str) -> None:
        OUT.mkdir(parents=True, exist_ok=True)
        self.path = OUT / name
        if not self.path.exists():
            self.add(f"# {title}", "", *about, "", *machine(DEVICE, COMMAND), "")

    def add(self, *lines: str) -> None:
        with open(self.path, "a") as file:
            for line in lines:
                print(line, flush=True)
                print(line, file=file)

    def table(self, title: str, columns: Sequence[str]) -> None:
        self.add(*head(title, columns, align="---"))

    def row(self, *cells: object) -> None:
        self.add(f"| {' | '.join(map(str, cells))} |")


def check(page: Page, name: str, act: Check) -> str:
    """Carry a check out; its outcome is a row and a word, whatever happens."""
    if left() < LEAST:
        page.row(name, "not run", "no time left", "")
        return "not run"
    began = time.perf_counter()
    try:
        found = act()
        right, what = found if isinstance(found, tuple) else (True, found)
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        right, what = False, said(error)
    verdict = "ok" if right else "**FAILED**"
    page.row(name, verdict, what, f"{time.perf_counter() - began:.1f} s")
    collect()
    return verdict


def said(error: Exception) -> str:
    """An error in a table's cell."""
    return f"{type(error).__name__}: {str(error)[:300]}".replace("\n", " ").replace("|", "/")


def collect() -> None:
    """Give the device's memory back."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def sync() -> None:
    if CUDA:
        torch.cuda.synchronize()


@contextlib.contextmanager
def waiting_is_an_error() -> Iterator[Any]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
