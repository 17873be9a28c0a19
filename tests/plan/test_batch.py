"""The batch equation and the topology as properties."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from launcher.errors import PlanRefused
from launcher.plan.batch import (
    UNKNOWN_MEMORY_MICRO_BATCH,
    default_global_batch_size,
    divisors,
    equation,
    solve_batch,
)
from launcher.plan.strategy import check_strategy
from launcher.plan.topology import decide_topology
from launcher.plan.types import Batch, Topology
from launcher.spec.schema import HardwareSpec

SIZES = st.integers(1, 4096)
RANKS = st.integers(1, 512)


def _solve(total: int, ranks: int, micro: int | None = None, largest: int | None = 10**9) -> Batch:
    """Solve where a micro batch up to `largest` fits; None: memory is unknown."""

    def fits(size: int) -> bool | None:
        return None if largest is None else size <= largest

    return solve_batch(
        global_batch_size=total,
        micro_batch_size=micro,
        data_parallel_size=ranks,
        max_length=100,
        fits=fits,
    )


@given(SIZES, RANKS, st.none() | st.integers(1, 64), st.none() | st.integers(1, 64))
def test_the_equation_holds_or_it_is_refused(
    total: int, ranks: int, micro: int | None, largest: int | None
) -> None:
    divides = total % (ranks * (micro or 1)) == 0
    if not divides:
        with pytest.raises(PlanRefused) as caught:
            _solve(total, ranks, micro, largest)
        assert caught.value.code == "batch_does_not_divide"
        return
    batch = _solve(total, ranks, micro, largest)
    assert batch.global_batch_size == total
    assert batch.micro_batch_size * batch.gradient_accumulation_steps * ranks == total
    assert micro in (None, batch.micro_batch_size)
    assert batch.tokens_per_step == total * 100
    numbers = [int(number) for number in re.findall(r"\d+", equation(batch, ranks))]
    assert numbers[0] == numbers[1] * numbers[2] * numbers[3] == total


@given(SIZES, RANKS, st.none() | st.integers(1, 64))
def test_the_nearest_batches_of_a_refusal_are_the_nearest(
    total: int, ranks: int, micro: int | None
) -> None:
    assume(micro in (None, 1) or total % ranks == 0)
    _check_nearest(total, ranks, micro)


@given(SIZES, RANKS, st.integers(2, 64))
def test_the_nearest_batches_heed_the_micro_batch(total: int, ranks: int, micro: int) -> None:
    assume(total % ranks != 0)
    _check_nearest(total, ranks, micro)


def _check_nearest(total: int, ranks: int, micro: int | None) -> None:
    try:
        _solve(total, ranks, micro)
    except PlanRefused as refusal:
        said = re.search(r"--global-batch-size (\d+)(?: or (\d+))?", refusal.fix)
        assert said is not None
        offered = [int(number) for number in said.groups() if number]
        unit = ranks * (micro or 1)
        search = range(1, total + unit + 1)
        below = [size for size in search if size < total and size % unit == 0]
        above = [size for size in search if size > total and size % unit == 0]
        assert offered == [*below[-1:], above[0]]
        for size in offered:
            _solve(size, ranks, micro)


@given(SIZES, RANKS, st.integers(2, 64))
def test_the_micro_batches_of_a_refusal_work(total: int, ranks: int, micro: int) -> None:
    try:
        _solve(total, ranks, micro)
    except PlanRefused as refusal:
        said = re.search(r"--micro-batch-size (\d+)(?: or (\d+))?", refusal.fix)
        assert (said is not None) == (total % ranks == 0)
        for size in said.groups() if said else ():
            if size:
                _solve(total, ranks, int(size))


@given(st.integers(1, 64), RANKS, st.integers(1, 64))
def test_an_open_micro_batch_is_the_largest_divisor_that_fits(
    per_rank: int, ranks: int, largest: int
) -> None:
    batch = _solve(per_rank * ranks, ranks, None, largest)
    dividing = [size for size in range(1, per_rank + 1) if per_rank % size == 0]
    assert batch.micro_batch_size == max(size for size in dividing if size <= largest)


def test_an_open_micro_batch_is_one_where_nothing_fits() -> None:
    assert _solve(64, 8, None, 0).micro_batch_size == 1


@given(st.integers(1, 500), RANKS)
def test_an_open_micro_batch_is_small_where_memory_is_unknown(per_rank: int, ranks: int) -> None:
    batch = _solve(per_rank * ranks, ranks, None, None)
    assert batch.micro_batch_size <= UNKNOWN_MEMORY_MICRO_BATCH


@given(st.integers(1, 20000))
def test_divisors_are_all_divisors(number: int) -> None:
    found = divisors(number)
    assert found == sorted(set(found))
    assert found == [size for size in range(1, number + 1) if number % size == 0]


@given(RANKS)
def test_the_default_batch_divides_and_is_the_first_from_64(ranks: int) -> None:
    size = default_global_batch_size(ranks)
    assert size % ranks == 0
    assert 64 <= size < 64 + ranks


# --- topology -----------------------------------------------------------------------------

MAYBE = st.none() | st.integers(1, 64)


@given(MAYBE, MAYBE, MAYBE, st.integers(0, 8))
def test_a_topology_multiplies_and_keeps_what_was_said(
    gpus: int | None, nodes: int | None, per_node: int | None, present: int
) -> None:
    hardware = HardwareSpec(gpus=gpus, nodes=nodes, gpus_per_node=per_node)
    possible = gpus is None or (
        gpus % (nodes or 1) == 0
        and gpus >= (nodes or 1)
        and (
            per_node is None
            or (gpus % per_node == 0 and gpus // per_node == (nodes or gpus // per_node))
        )
    )
    if not possible:
        with pytest.raises(PlanRefused) as caught:
            decide_topology(hardware, present, "cuda")
        assert caught.value.code == "nodes_do_not_divide"
        return
    found = decide_topology(hardware, present, "cuda")
    assert found.nodes * found.gpus_per_node == found.gpus == found.data_parallel_size
    assert gpus in (None, found.gpus)
    assert nodes in (None, found.nodes)
    assert per_node in (None, found.gpus_per_node)


@given(st.integers(1, 64), st.integers(1, 64), MAYBE)
def test_the_numbers_of_a_refused_topology_work(
    gpus: int, nodes: int, per_node: int | None
) -> None:
    hardware = HardwareSpec(gpus=gpus, nodes=nodes, gpus_per_node=per_node)
    try:
        decide_topology(hardware, 0, "cuda")
    except PlanRefused as refusal:
        per_node_fix = re.search(r"--gpus-per-node (\d+)", refusal.fix)
        if per_node_fix:
            changed = hardware.model_copy(update={"gpus_per_node": int(per_node_fix[1])})
            assert decide_topology(changed, 0, "cuda").gpus == gpus
        said = re.search(r"--gpus (\d+)(?: or (\d+))?", refusal.fix)
        assert said is not None
        for size in filter(None, said.groups()):
            update = {"gpus": int(size)}
            if not per_node_fix:  # the flag --gpus drops the file's gpus_per_node
                update["gpus_per_node"] = None  # type: ignore[assignment]
            decide_topology(hardware.model_copy(update=update), 0, "cuda")


@pytest.mark.parametrize("present", [0, 1, 8])
def test_nothing_said_takes_the_gpus_that_are_here(present: int) -> None:
    assert decide_topology(HardwareSpec(), present, "cuda").gpus == max(1, present)


def _topology(gpus: int, nodes: int = 1) -> Topology:
    return decide_topology(HardwareSpec(gpus=gpus, nodes=nodes), 0, "cuda")


@given(st.integers(1, 32), st.integers(1, 16))
def test_a_hybrid_mesh_multiplies_and_shards_over_at_least_two(per_node: int, nodes: int) -> None:
    gpus = per_node * nodes
    try:
        found = check_strategy("hsdp", _topology(gpus, nodes), "none")
    except PlanRefused:
        assert gpus < 4 or per_node == 1 or (nodes == 1 and per_node % 2)
        return
    assert gpus % found.replicate_size == 0
    assert gpus // found.replicate_size >= 2
    assert found.replicate_size >= 2
    assert found.data_parallel_size == gpus, "both mesh sides see different data"
    if nodes > 1:
        assert gpus // found.replicate_size == per_node, "shards stay inside a node"
