"""DTensors in Muon's geometry. All that needs several processes is checked by exchange_processes.py."""

from pathlib import Path

import pytest
import torch

from processes import assert_passed, started_together

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

outcomes, CHECKS = started_together(Path(__file__).with_name("exchange_processes.py"))


@pytest.mark.first
@pytest.mark.parametrize("name", CHECKS)
def test_on_four_processes(name: str, outcomes: list[dict[str, str]]) -> None:
    assert_passed(name, outcomes)
