"""Build the package as it is published, and use it as somebody does who has nothing but it: `make package`.

The wheel is built from the source distribution, so a file that one of them lacks is missed here. Needs `build` and
`twine`, and a package index.
"""

import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from email import message_from_string
from pathlib import Path

ROOT = Path(__file__).parents[1]
RELATIVE = re.compile(r"""\]\((?!https?:|#)([^)#\s]+)|(?:src|srcset|href)="(?!https?:|#)([^"#]+)""")
STEP = """
import torch
from ademamix import AdEMAMix
p = torch.ones(3, requires_grad=True)
p.sum().backward()
AdEMAMix([p], lr=0.1).step()
assert (p < 1).all()
"""


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True, cwd=ROOT)


def links(text: str) -> set[str]:
    """The relative links and pictures of a page."""
    return {link or picture for link, picture in RELATIVE.findall(text)}


def check_sdist(path: Path) -> None:
    """Every file that README links to is there, as is what its commands and the tests need."""
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = {str(parent) for name in names for parent in Path(name).parents}
    needed = links((ROOT / "README.md").read_text(encoding="utf-8"))
    needed |= {"Makefile", "constraints.txt", "constraints-lowest.txt", "CONTRIBUTING.md", ".ci/prose.py"}
    needed |= {"tests/conftest.py", "benchmarks/step.py"}
    missing = sorted(name for name in needed if name.rstrip("/") not in names | folders)
    assert not missing, f"the source distribution lacks {', '.join(missing)}"


def check_wheel(path: Path) -> None:
    """The page on the index has no relative links, which lead nowhere there."""
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        page = str(message_from_string(archive.read(name).decode()).get_payload())
    assert page.startswith("# ademamix")
    assert not links(page), f"relative links in the package's description: {', '.join(sorted(links(page)))}"


def use(wheel: Path, environment: Path) -> None:
    """Take a step in an empty environment; without the lab, the command says in one line what is missing."""
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--constraint", "constraints.txt", wheel)
    run(python, "-c", STEP)
    command = environment / "bin" / "ademamix"
    run(command, "--version")
    done = subprocess.run([command, "compare"], capture_output=True, text=True)
    assert done.returncode == 2, done
    (line,) = done.stderr.splitlines()
    assert 'pip install "ademamix[lab]"' in line, line


with tempfile.TemporaryDirectory() as folder:
    out = Path(folder, "dist")
    run(sys.executable, "-m", "build", "--outdir", out)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)
    check_sdist(sdist)
    check_wheel(wheel)
    use(wheel, Path(folder, "environment"))
    print(f"{sdist.name} and {wheel.name} can be published")
