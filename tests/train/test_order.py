"""The same rows in every optimizer step, however they are dealt out, and each once an epoch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from launcher.train.order import GlobalBatchOrder

# torch is imported in the tests: what is deselected must not cost its start.
pytestmark = pytest.mark.engine
ROWS, SEEDS = st.integers(1, 200), st.integers(0, 2**32 - 1)
# Ranks, micro batch and accumulation, each 1 to 5.
SPLITS = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))
LENGTH = 3
# `set_epoch` alone is not enough: on several ranks the loader that skips the batches of a
# resumed epoch does not pass it on (accelerate 1.15, SkipBatchSampler over BatchSamplerShard).
QUICK = settings(max_examples=40, deadline=None)


def make_order(rows: int, total: int, seed: int = 42, *, shuffle: bool = True) -> GlobalBatchOrder:
    from launcher.train.order import GlobalBatchOrder

    return GlobalBatchOrder(rows, total, seed, shuffle=shuffle)


def splits_of(total: int) -> list[tuple[int, int, int]]:
    """Every way to make a global batch: ranks, micro batch, accumulation."""
    sizes = [size for size in range(1, total + 1) if total % size == 0]
    return [(w, m, total // w // m) for w in sizes for m in sizes if total % (w * m) == 0]


def deal(
    order: GlobalBatchOrder, step: int, rank: int, split: tuple[int, int, int]
) -> Iterator[dict[str, Any]]:
    """A rank's micro batches of a step: its rows as input ids and as labels."""
    import torch

    from launcher.train.order import positions

    world, micro, accumulation = split
    start = step % order.steps * order.global_batch_size
    rows = list(order)[start : start + order.global_batch_size]
    for micro_step in range(accumulation):
        mine = [rows[place] for place in positions(micro_step, rank, world, micro)]
        ids = torch.tensor(mine)[:, None].repeat(1, LENGTH)
        yield {"input_ids": ids, "labels": ids.clone()}


def counted(batches: Iterator[dict[str, Any]]) -> Counter[int]:
    """How often each row has labels; those of a row are masked together or not at all."""
    found: Counter[int] = Counter()
    for batch in batches:
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            assert labels in (ids, [-100] * LENGTH)
            found[ids[0]] += labels == ids
    return found


# --- the order ----------------------------------------------------------------------------


@QUICK
@given(ROWS, st.integers(1, 64), SEEDS, st.booleans(), st.integers(0, 3))
def test_every_row_comes_once_an_epoch_then_the_filling(
    rows: int, total: int, seed: int, shuffle: bool, epoch: int
) -> None:
    order = make_order(rows, total, seed, shuffle=shuffle)
    order.epoch = epoch
    dealt = list(order)
    assert len(dealt) == len(order) == order.steps * total
    assert 0 <= len(dealt) - rows < total
    assert sorted(dealt[:rows]) == list(range(rows))
    assert dealt[:rows] == order.order(epoch)
    assert set(dealt[rows:]) <= set(range(rows))


@QUICK
@given(ROWS, st.integers(1, 64), SEEDS, st.integers(0, 3))
def test_the_rows_of_a_step_are_those_that_are_dealt(
    rows: int, total: int, seed: int, epoch: int
) -> None:
    order = make_order(rows, total, seed)
    order.epoch = epoch
    dealt = list(order)
    seen = []
    for step_in_epoch in range(order.steps):
        step = epoch * order.steps + step_in_epoch
        found = order.step_rows(step)
        start = step_in_epoch * total
        assert found == dealt[start : start + len(found)]
        assert len(found) + order.filling(step) == total
        assert order.filling(step) == 0 or step_in_epoch == order.steps - 1
        seen += found
    assert sorted(seen) == list(range(rows))


@QUICK
@given(ROWS, st.integers(1, 64), SEEDS, st.integers(0, 20), st.data())
def test_the_row_at_a_place_is_the_one_that_is_dealt_there(
    rows: int, total: int, seed: int, step: int, data: st.DataObject
) -> None:
    order = make_order(rows, total, seed)
    order.epoch = step // order.steps
    place = data.draw(st.integers(0, total - 1))
    assert order.row_at(step, place) == list(order)[step % order.steps * total + place]


def test_the_order_is_the_seed_s_and_another_one_each_epoch() -> None:
    order = make_order(100, 8)
    epochs = [order.order(epoch) for epoch in range(4)]
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert [make_order(100, 32).order(epoch) for epoch in range(4)] == epochs
    assert make_order(100, 8, seed=7).order(0) != epochs[0]
    assert make_order(100, 8, shuffle=False).order(3) == list(range(100))


# --- dealing ------------------------------------------------------------------------------


@QUICK
@given(SPLITS)
def test_places_are_dealt_out_once_each(split: tuple[int, int, int]) -> None:
    from launcher.train.order import positions

    world, micro, accumulation = split
    places = [
        place
        for micro_step in range(accumulation)
        for rank in range(world)
        for place in positions(micro_step, rank, world, micro)
    ]
    assert places == list(range(world * micro * accumulation))


@QUICK
@given(ROWS, st.sampled_from([1, 2, 6, 12, 16]), SEEDS)
def test_a_step_has_the_same_rows_on_every_split(rows: int, total: int, seed: int) -> None:
    order = make_order(rows, total, seed)
    for step in {0, order.steps - 1}:
        found = [
            Counter(
                row
                for rank in range(split[0])
                for batch in deal(order, step, rank, split)
                for row in batch["input_ids"][:, 0].tolist()
            )
            for split in splits_of(total)
        ]
        assert all(rows_of_step == found[0] for rows_of_step in found)
        assert sum(found[0].values()) == total


def _as_accelerate_deals(order: GlobalBatchOrder, split: tuple[int, int, int]) -> list[Any]:
    """Each rank's loader, as the trainer has it."""
    from accelerate.data_loader import prepare_data_loader
    from torch.utils.data import DataLoader

    world, micro, _ = split
    return [
        prepare_data_loader(
            DataLoader(range(order.rows), batch_size=micro, sampler=order),
            num_processes=world,
            process_index=rank,
            put_on_device=False,
        )
        for rank in range(world)
    ]


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 40), st.sampled_from([1, 4, 6]), st.data())
def test_accelerate_deals_rows_to_these_places(rows: int, total: int, data: st.DataObject) -> None:
    split = data.draw(st.sampled_from(splits_of(total)))
    order = make_order(rows, total)
    for rank, loader in enumerate(_as_accelerate_deals(order, split)):
        expected = [
            batch["input_ids"][:, 0].tolist()
            for step in range(order.steps)
            for batch in deal(order, step, rank, split)
        ]
        assert [batch.tolist() for batch in loader] == expected


def _epoch(loaders: list[Any], epoch: int, done: int) -> list[list[list[int]]]:
    """Each rank's micro batches of an epoch from one on, driven as transformers 5.23 does."""
    from accelerate.data_loader import skip_first_batches

    if done:
        loaders = [skip_first_batches(loader, done) for loader in loaders]
    for loader in loaders:
        loader.set_epoch(epoch)
    return [[batch.tolist() for batch in loader] for loader in loaders]


@pytest.mark.parametrize("split", [(1, 2, 2), (2, 2, 1), (2, 1, 2)])
@pytest.mark.parametrize(
    ("epoch", "steps_done"),
    [
        (0, 0),
        (0, 3),
        (1, 0),
        (2, 0),
        (1, 3),
    ],
)
def test_each_epoch_is_dealt_in_its_own_order_from_where_it_was_left(
    epoch: int, steps_done: int, split: tuple[int, int, int]
) -> None:
    """The rows that are trained on are those that `step_rows` names, also after a resume."""
    _, _, accumulation = split
    from launcher.train.callbacks import AgreementCallback

    order = make_order(16, 4)
    callback = AgreementCallback(SimpleNamespace(order=order))
    state = SimpleNamespace(global_step=epoch * order.steps + steps_done)
    callback.on_epoch_begin(None, state, None)
    dealt = _epoch(_as_accelerate_deals(order, split), epoch, steps_done * accumulation)
    for step in range(order.steps - steps_done):
        part = slice(step * accumulation, (step + 1) * accumulation)
        rows = {row for mine in dealt for batch in mine[part] for row in batch}
        assert rows == set(order.step_rows(epoch * order.steps + steps_done + step))
    assert epoch == 0 or order.order(epoch) != order.order(0)


# --- filling ------------------------------------------------------------------------------


@QUICK
@given(st.integers(1, 40), st.sampled_from([1, 2, 6, 8, 12]), SEEDS, st.data())
def test_each_row_counts_once_an_epoch_on_every_split(
    rows: int, total: int, seed: int, data: st.DataObject
) -> None:
    from launcher.train.order import mask_filling

    order = make_order(rows, total, seed)
    split = data.draw(st.sampled_from(splits_of(total)))
    world, micro, _ = split
    for step in range(order.steps):
        real = total - order.filling(step)
        found: Counter[int] = Counter()
        for rank in range(world):
            batches = mask_filling(
                deal(order, step, rank, split),
                real=real,
                rank=rank,
                world=world,
                micro_batch_size=micro,
            )
            found += counted(batches)
        assert found == Counter(order.step_rows(step))
        assert sum(found.values()) == real


@pytest.mark.parametrize("real", range(7))
def test_only_the_filling_is_masked_and_only_in_the_labels(real: int) -> None:
    import torch

    from launcher.train.order import mask_filling

    ids = torch.arange(6 * LENGTH).reshape(3, 2, LENGTH)
    batches = [
        {"input_ids": part.clone(), "labels": part.clone(), "attention_mask": part * 0 + 1}
        for part in ids
    ]
    masked = list(mask_filling(batches, real=real, rank=0, world=1, micro_batch_size=2))
    labels = torch.cat([batch["labels"] for batch in masked])
    assert torch.equal(labels[:real], ids.reshape(6, LENGTH)[:real])
    assert (labels[real:] == -100).all()
    for batch, part in zip(masked, ids, strict=True):
        assert torch.equal(batch["input_ids"], part)
        assert (batch["attention_mask"] == 1).all()


def test_micro_batches_are_masked_one_by_one_as_they_are_asked_for() -> None:
    """The loader's batches must not all be read ahead."""
    from launcher.train.order import mask_filling

    order, asked = make_order(3, 4), []

    def loader() -> Iterator[dict[str, Any]]:
        for batch in deal(order, 0, 0, (1, 1, 4)):
            asked.append(1)
            yield batch

    masked = mask_filling(loader(), real=3, rank=0, world=1, micro_batch_size=1)
    next(masked)
    assert len(asked) == 1


@QUICK
@given(
    st.lists(st.integers(1, 5), min_size=6, max_size=6),
    st.integers(0, 6),
    st.sampled_from([(1, 6, 1), (1, 3, 2), (2, 3, 1), (3, 2, 1), (1, 1, 6), (3, 1, 2)]),
)
def test_sequences_that_are_laid_end_to_end_are_masked_by_their_lengths(
    lengths: list[int], real: int, split: tuple[int, int, int]
) -> None:
    """As padding-free collators do: labels of 1 x all tokens of the micro batch."""
    import torch

    from launcher.train.order import mask_filling, positions

    world, micro, accumulation = split
    tokens = [[place] * length for place, length in enumerate(lengths)]
    found: Counter[int] = Counter()
    for rank in range(world):
        dealt = [
            [one for place in positions(step, rank, world, micro) for one in tokens[place]]
            for step in range(accumulation)
        ]
        masked = mask_filling(
            [{"labels": torch.tensor([flat])} for flat in dealt],
            real=real,
            rank=rank,
            world=world,
            micro_batch_size=micro,
            length_of=lambda place: lengths[place],
        )
        found += Counter(one for batch in masked for one in batch["labels"][0].tolist())
    assert found.pop(-100, 0) == sum(lengths[real:])
    assert found == Counter({place: lengths[place] for place in range(real)})
