from pathlib import Path

import pytest

import integrations.torchvision_for_cpu  # noqa: F401


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tools write checkpoints and logs into the current folder."""
    monkeypatch.chdir(tmp_path)
