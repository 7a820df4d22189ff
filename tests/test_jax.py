"""The optax transformations; the tests themselves are in jax_transformations.py and jax_geometries.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jax", reason="needs the extra [jax]")


@pytest.mark.first
@pytest.mark.parametrize("of", ["transformations", "geometries"])
def test_in_a_process_of_its_own(of: str) -> None:
    """JAX makes virtual devices when it starts, and other tests fork, which its threads would not survive."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(Path(__file__).with_name(f"jax_{of}.py"))]
    done = subprocess.run(command, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
