"""Everything that has to run on a GPU, in at most ten minutes; `make gpu` (docs/how-to/gpu.md) calls it.

Set in the environment: DEVICE (cuda; cpu for a dry run), OUT (folder for the results, runs/gpu), WHEELS (folder of
wheels that the lab needs, .whl), LIMIT (seconds for all of it, 570).
"""

import importlib.util
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from gpu import lab
from gpu.driver import Driver, Part
from gpu.summary import summary

ROOT = Path(__file__).parents[2]
PAGES = (
    "summary.md",
    "step-gpu.md",
    "muon-step-gpu.md",
    "gpu-correct.md",
    "lm-gpu.md",
    "sweep.md",
    "tests.txt",
    "log.txt",
)
KEPT = 0.4  # the share of the time that is kept for what is timed
COMPILING = 6  # processes that compile in the background
SECTIONS = ("SpeedOfLight", "Occupancy", "LaunchStats", "WarpStateStats")
COUNTERS = ("kernel", "Registers Per", "Occupancy", "Throughput", "Duration", "No Eligible", "Elapsed Cycles")


def module(name: str, *words: str) -> list[str]:
    return [sys.executable, "-m", f"gpu.{name}", *words]


def with_tests() -> list[str]:
    """The files that have tests for a GPU; others may import what is not installed here."""
    return [
        str(f.relative_to(ROOT)) for f in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in f.read_text()
    ]


def run(driver: Driver, out: Path, work: Path, wheels: Path, device: str) -> None:
    """All parts, those that are timed after all that are not."""
    python, cuda = sys.executable, device == "cuda"
    scale = 1.0 if cuda else 2.0  # a dry run's machine is slow
    driver.kept = KEPT * driver.left
    driver.run(Part("environment", module("environment"), 40 * scale, work / "environment.txt"))
    driver.run(Part("smoke", module("smoke"), 90 * scale))

    lacking = {name: lab.missing(name, wheels) for name in lab.NEEDED}
    for name, packages in lacking.items():
        if packages:
            driver.skip(name, f"no {', '.join(packages)}, neither installed nor in {wheels.name}/")
    if not lacking["train"] and (found := sorted(map(str, wheels.glob("*.whl")))):
        pip = [python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--target"]
        driver.run(Part("wheels", [*pip, str(work / "site"), *found], 60 * scale))
    if cuda:
        for i in range(COMPILING):
            driver.start(Part(f"compile {i}", module("compile", str(i), str(COMPILING)), 150))
    if not lacking["lm"]:
        driver.start(Part("lm", lab.command("lm", device, work / "lm"), 190))

    if importlib.util.find_spec("pytest"):
        pytest = [python, "-m", "pytest", "-m", "gpu", "-v", "-ra", "--durations=5", "-p", "no:cacheprovider"]
        pytest += ["-W", "default", "-W", "error:ademamix"]  # a fallback to eager is an error, others' warnings are not
        pytest += ["-n", "6"] if importlib.util.find_spec("xdist") and cuda else []
        driver.run(Part("tests", [*pytest, *with_tests()], 100 * scale, out / "tests.txt"))
    else:
        driver.skip("tests", "no pytest")
    driver.run(Part("correct: training", module("correct", "training"), 50 * scale))
    if cuda:
        driver.run(Part("correct: streams", module("correct", "streams"), 60))
    else:
        driver.skip("correct: streams", "a GPU's own")
    driver.run(Part("correct: exact", module("correct", "exact"), 110 * scale))
    driver.wait()
    driver.kept = 0.0
    if not lacking["lm"]:
        lab.lm_page(out / "lm-gpu.md", work / "lm" / "report.md")

    step = [python, "benchmarks/step.py", "--device", device, "--out", os.path.relpath(out / "step-gpu.md", ROOT)]
    driver.run(Part("step", [*step, *([] if cuda else ["--tiny", "--rounds", "1"])], 130 * scale))
    muon = [python, "benchmarks/muon.py", "--device", device, "--out", os.path.relpath(out / "muon-step-gpu.md", ROOT)]
    driver.run(Part("muon", [*muon, *([] if cuda else ["--tiny", "--rounds", "1"])], 30 * scale))
    if cuda or importlib.util.find_spec("triton"):
        driver.run(Part("sweep", module("sweep"), 70 * scale))
    else:
        driver.skip("sweep", "no triton")
    if not lacking["train"]:
        driver.run(Part("train", lab.command("train", device, work / "train"), 75 * scale))
        with open(out / "lm-gpu.md", "a") as page:
            page.write(lab.train_rows(device, work / "train" / "result.json"))
    if cuda and shutil.which("ncu"):
        ncu = ["ncu", "--clock-control", "none", "-k", "ademamix_kernel", "-c", "8"]
        for name in SECTIONS:
            ncu += ["--section", name]
        driver.run(Part("ncu", [*ncu, *module("counters")], 45, work / "ncu.txt"))
        add_counters(out / "sweep.md", work / "ncu.txt")
    else:
        driver.skip("ncu", "not there" if cuda else "a GPU's own")


def add_counters(page: Path, output: Path) -> None:
    """What ncu says of the kernels, as it says it, and less of it."""
    lines = output.read_text(errors="replace").splitlines() if output.exists() else []
    kept = [line for line in lines if any(word in line for word in COUNTERS)]
    with open(page, "a") as file:
        file.write("\n".join(["", "### Nsight Compute", "", "```", *kept[:120], "```", ""]))


def main() -> None:
    device, out = os.environ.get("DEVICE", "cuda"), Path(os.environ.get("OUT", "runs/gpu")).absolute()
    wheels = Path(os.environ.get("WHEELS", ".whl")).absolute()
    if device not in lab.LM:
        sys.exit(f"DEVICE must be one of {', '.join(lab.LM)}, got {device!r}")
    out.mkdir(parents=True, exist_ok=True)
    for name in PAGES:
        (out / name).unlink(missing_ok=True)
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory(prefix="ademamix-gpu-", ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        paths = [ROOT / "src", ROOT / "benchmarks", work / "site", os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "DEVICE": device,
            "OUT": str(out),
            "PYTHONPATH": os.pathsep.join(map(str, paths)).rstrip(os.pathsep),
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }

        def written() -> str:
            text = summary(out, driver.outcomes, work / "environment.txt")
            (out / "summary.md").write_text(text)
            return text

        seconds = float(os.environ.get("LIMIT", "570"))
        driver = Driver(seconds, out / "log.txt", work, environment, written)
        signal.signal(signal.SIGTERM, stopped)
        try:
            run(driver, out, work, wheels, device)
        finally:  # also when it is stopped: what is known is said
            driver.stop()
            print(f"\n{written()}\nResults: {os.path.relpath(out, ROOT)}: {', '.join(sorted(os.listdir(out)))}")
    sys.exit(0 if all(outcome.fine for outcome in driver.outcomes) else 1)


def stopped(*_: Any) -> None:
    sys.exit("stopped")


if __name__ == "__main__":
    main()
