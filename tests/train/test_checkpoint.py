"""What a checkpoint holds besides tensors: the rows' digest, the loss scale."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from launcher.train.order import DIGESTED_ROWS, rows_digest

pytestmark = pytest.mark.engine


def _rows(*rows: list[int], masks: list[list[int]] | None = None) -> Any:
    from datasets import Dataset

    columns: dict[str, Any] = {"input_ids": list(rows)}
    if masks is not None:
        columns["completion_mask"] = masks
    return Dataset.from_dict(columns)


def test_equal_rows_have_one_digest() -> None:
    assert rows_digest(_rows([1, 2], [3])) == rows_digest(_rows([1, 2], [3]))


@pytest.mark.parametrize(
    "other",
    [
        ([1, 2], [4]),
        ([3], [1, 2]),
        ([1], [2, 3]),
        ([1, 2, 3],),
        ([1, 2], [3], [3]),
    ],
)
def test_other_rows_have_another(other: tuple[list[int], ...]) -> None:
    assert rows_digest(_rows([1, 2], [3])) != rows_digest(_rows(*other))


def test_what_the_loss_is_taken_of_counts() -> None:
    one, two = ([[0, 1]], [[1, 1]])
    assert rows_digest(_rows([1, 2], masks=one)) != rows_digest(_rows([1, 2], masks=two))


def test_a_row_more_in_many_is_seen() -> None:
    rows = [[number] for number in range(2 * DIGESTED_ROWS)]
    assert rows_digest(_rows(*rows)) != rows_digest(_rows(*rows[:-1]))
    assert rows_digest(_rows(*rows)) != rows_digest(_rows(*rows[:-1], [0]))


def test_deepspeed_s_loss_scale_goes_on() -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    from launcher.train.checkpoint import loss_scale, put_back_loss_scale

    def trainer(scaler: Any) -> Any:
        wrapped = SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler))
        return SimpleNamespace(accelerator=SimpleNamespace(scaler=None), model_wrapped=wrapped)

    def scaler() -> Any:
        return DynamicLossScaler(2.0**16, 2.0, 4, 1.0, 1, False, dtype=None)

    old, new = scaler(), scaler()
    vars(old).update(cur_scale=1024.0, cur_iter=7, last_overflow_iter=3)
    put_back_loss_scale(trainer(new), loss_scale(trainer(old)))
    assert vars(new) == vars(old)
    assert loss_scale(trainer(SimpleNamespace(dynamic=False))) is None


def test_torch_s_loss_scale_goes_on() -> None:
    import torch

    from launcher.train.checkpoint import loss_scale, put_back_loss_scale

    def trainer(scale: float) -> Any:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return SimpleNamespace(accelerator=SimpleNamespace(scaler=scaler), model_wrapped=None)

    old, new = trainer(64.0), trainer(2.0)
    put_back_loss_scale(new, loss_scale(old))
    assert new.accelerator.scaler.get_scale() == 64.0
    put_back_loss_scale(new, None)
    put_back_loss_scale(new, {"kind": "deepspeed", "cur_scale": 1.0})
    assert new.accelerator.scaler.get_scale() == 64.0
