"""benchmarks/muon.py, with matrices so small that its times mean nothing."""

import muon as benchmark
import pytest
import torch


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon to compare with")
def test_tables_have_a_row_for_each_program_and_its_parts() -> None:
    lines = list(benchmark.tables(1, 32, 1, torch.device("cpu")))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    steps, parts = rows[1 : rows.index(["program", *benchmark.PARTS, "the rest"])], rows[7:]
    state = {name: float(cells[-1]) for name, *cells in steps}
    assert state.pop("ademamix ADana, compact") < 4.0  # blocks are wider than these rows
    assert state == {benchmark.TORCHS: 4.0, "ademamix Muon": 4.0, "ademamix ADana": 4.0, "ademamix AdEMAMix": 8.0}
    assert [name for name, *_ in parts] == [name for name, *_ in steps if name != benchmark.TORCHS]
    assert all(float(cell) >= 0.0 for _, *cells in parts for cell in cells)
