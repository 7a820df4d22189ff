"""Whom the cache of compiled kernels trusts. What is read from it is run."""

import os
import pickle
import random
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch

from ademamix import RuleOptimizer
from ademamix.backends import cache, cpu

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has neither owners nor modes like these")
STRANGER = 12345


def rule(p: Any, g: Any, *, lr: Any) -> Any:
    return (p - lr * g,)


class Plain(RuleOptimizer):
    rule = staticmethod(rule)
    check = staticmethod(lambda group: None)
    coefficients = staticmethod(lambda step, group: {"lr": 1.0})


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache folder, not there yet."""
    monkeypatch.setenv("ADEMAMIX_CACHE", str(tmp_path / "cache"))
    cache._distrust.cache_clear()
    yield tmp_path / "cache"
    cache._distrust.cache_clear()


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with a kernel."""
    made = tmp_path_factory.mktemp("filled") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADEMAMIX_CACHE", str(made))
        assert step() == []
    return made


@pytest.fixture
def planted(filled: Path, folder: Path) -> Path:
    """The folder with another pickle in the place of a kernel's: the file that appears if it is read."""
    shutil.copytree(filled, folder)
    marker = folder.parent / "ran"

    class Planted:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(marker),)

    (kernel,) = folder.rglob("*.kernel")
    cache.write(kernel, pickle.dumps(Planted()))
    return marker


def step() -> list[str]:
    """Take a step as a new process would; what was warned of."""
    cpu.kernel.cache_clear()
    p = torch.zeros(3, requires_grad=True)
    p.grad = torch.ones(3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Plain([p], {"maximize": False}, backend="cpu").step()
    np.testing.assert_array_equal(p.detach(), -1.0)
    return [str(one.message) for one in caught]


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("umask", [0, 0o177])
def test_folders_and_files_are_the_user_s_alone_whatever_the_umask(
    umask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADEMAMIX_CACHE", str(tmp_path / "above" / "cache"))
    before = os.umask(umask)
    try:
        assert step() == []
    finally:
        os.umask(before)
    made = [tmp_path / "above", *(tmp_path / "above").rglob("*")]
    assert {path.stat().st_mode & 0o777 for path in made if path.is_dir()} == {0o700}
    assert {path.stat().st_mode & 0o777 for path in made if path.is_file()} == {0o600}
    assert [path.suffix for path in made if path.is_file()] == [".kernel"]
    times = {path: path.stat().st_mtime_ns for path in made if path.is_file()}
    assert step() == []
    assert {path: path.stat().st_mtime_ns for path in files(tmp_path / "above")} == times  # they are used


def test_a_planted_kernel_would_run_code(planted: Path) -> None:
    """Where it has the owner and mode of our own; else it would be no wonder that none runs below."""
    step()
    assert planted.exists()


PLACES = ["", "kernels", ".."]
ROOT = pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root may give files away")


@pytest.mark.parametrize("where", PLACES)
def test_a_folder_that_others_may_write_to_is_not_used(where: str, folder: Path, planted: Path) -> None:
    place = (folder / where).resolve()
    place.chmod(0o777)
    (message,) = step()
    assert f"others may write to {place} (its mode is 777)" in message
    assert step() == []  # one warning
    assert not planted.exists()


@ROOT
@pytest.mark.parametrize("where", PLACES)
def test_a_folder_of_somebody_else_is_not_used(where: str, folder: Path, planted: Path) -> None:
    place = (folder / where).resolve()
    os.chown(place, STRANGER, -1)
    (message,) = step()
    assert f"{place} belongs to user {STRANGER}" in message
    assert not planted.exists()


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720, 0o702, 0o1777])
def test_nobody_else_may_write_to_the_folder_itself(mode: int, folder: Path) -> None:
    folder.mkdir(0o755)
    assert cache.trusted(folder)
    folder.chmod(mode)
    with pytest.warns(UserWarning, match="others may write to"):
        assert not cache.trusted(folder)


@pytest.mark.parametrize("mode", [0o666, 0o620])
def test_a_kernel_that_others_may_write_to_is_made_anew(mode: int, folder: Path, planted: Path) -> None:
    for path in files(folder):
        path.chmod(mode)
    assert step() == []
    assert not planted.exists()
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*.kernel")} == {0o600}


def test_a_kernel_that_is_a_link_is_made_anew(folder: Path, tmp_path: Path, planted: Path) -> None:
    (kernel,) = folder.rglob("*.kernel")
    kernel.rename(tmp_path / "elsewhere")
    kernel.symlink_to(tmp_path / "elsewhere")
    assert step() == []
    assert not planted.exists()
    assert not kernel.is_symlink()


@ROOT
def test_a_kernel_of_somebody_else_is_made_anew(folder: Path, planted: Path) -> None:
    for path in folder.rglob("*.kernel"):
        os.chown(path, STRANGER, -1)
    assert step() == []
    assert not planted.exists()


def test_a_folder_below_one_with_a_sticky_bit_is_used_and_so_is_one_behind_a_link(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o1777)
    (tmp_path / "link").symlink_to("cache")
    monkeypatch.setenv("ADEMAMIX_CACHE", str(tmp_path / "link" / ".." / "link"))
    folder.mkdir(0o755)
    assert cache.trusted(cache.cache_folder())


def test_a_link_to_where_others_may_write_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_to_all = tmp_path / "open"
    (open_to_all / "inner").mkdir(parents=True)
    open_to_all.chmod(0o777)
    (tmp_path / "cache").symlink_to("other")
    (tmp_path / "other").symlink_to(open_to_all / "inner")
    with pytest.warns(UserWarning, match=f"others may write to {open_to_all}"):
        assert not cache.trusted(tmp_path / "cache")


@ROOT
def test_a_link_of_somebody_else_is_not_used(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir(0o700)
    folder.symlink_to("mine")
    os.chown(folder, STRANGER, -1, follow_symlinks=False)
    with pytest.warns(UserWarning, match=f"{folder} belongs to user {STRANGER}"):
        assert not cache.trusted(folder)


def test_a_circle_of_links_is_no_folder(folder: Path) -> None:
    folder.symlink_to(folder)
    assert step() == []


def damages(content: bytes) -> Iterator[bytes]:
    """What disks, networks and users make of a file: bits and bytes changed, parts lost, doubled, zeroed or swapped."""
    chance, size = random.Random(0), len(content)
    for _ in range(20):
        at, length = chance.randrange(size), chance.randrange(1, 4096)
        first, hit, rest = content[:at], content[at : at + length], content[at + length :]
        yield content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :]
        yield first
        yield first + rest
        yield first + hit + hit + rest
        yield first + bytes(byte ^ 0xFF for byte in hit) + rest
        yield rest + first + hit
    yield from (b"", bytes(size), content + b"\0")


def test_a_damaged_file_is_not_read(tmp_path: Path) -> None:
    """Nor is one under another name."""
    path, data = tmp_path / "a.kernel", random.Random(1).randbytes(10_000)
    assert cache.read(path) is None
    cache.write(path, data)
    assert cache.read(path) == data
    content = path.read_bytes()
    for damaged in damages(content):
        path.write_bytes(damaged)
        assert cache.read(path) == (data if damaged == content else None)
    path.write_bytes(content)
    assert cache.read(path.rename(tmp_path / "b.kernel")) is None
    assert [each.name for each in tmp_path.iterdir()] == ["b.kernel"]


@pytest.mark.slow  # it compiles 123 times
def test_a_damaged_kernel_is_compiled_anew(filled: Path, folder: Path) -> None:
    """Machine code is run as it is: what was damaged could end the process, at every start."""
    shutil.copytree(filled, folder)
    (kernel,) = folder.rglob("*.kernel")
    content = kernel.read_bytes()
    for damaged in damages(content):
        kernel.write_bytes(damaged)
        assert step() == []
        assert cache.read(kernel) is not None


def test_a_kernel_is_found_whatever_numba_s_own_cache_folder_is(
    filled: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(filled, folder)
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "numba"))
    (kernel,) = folder.rglob("*.kernel")
    before = kernel.stat().st_mtime_ns
    assert step() == []
    assert kernel.stat().st_mtime_ns == before
    assert not (tmp_path / "numba").exists()
