"""The same curve whatever the split."""

from __future__ import annotations

import pytest

from bench.cells import run_cells
from bench.parity import cells, differences, uneven_rows, within

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1500)]


def largest(methods: tuple[str, ...], folder, *, small: bool):
    uneven = uneven_rows(folder / "uneven.jsonl") if not small else None
    rows = differences(run_cells(cells(methods, uneven, small=small), folder))
    assert rows
    return {o.cell.name: (d, o.detail) for o, d in rows if not within(o, d)}


def test_lora_curves_agree(tmp_path) -> None:
    assert not largest(("lora",), tmp_path, small=True)


@pytest.mark.slow
def test_all_curves_agree(tmp_path) -> None:
    assert not largest(("full", "lora", "qlora"), tmp_path, small=False)
