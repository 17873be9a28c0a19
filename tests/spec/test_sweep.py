"""`--sweep` as it is said: keys, values, names; no plan and no files."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.errors import PlanRefused, Refusal, SpecError
from launcher.spec.load import Override
from launcher.spec.sweep import MOST_RUNS, combinations, full_key, parse_axes, parse_axis
from tests.support import HOSTILE_NAMES

# What neither a shell, nor Slurm's file name patterns, nor a container mount reads otherwise.
PLAIN = re.compile(r"[A-Za-z0-9._+=-]+")


@pytest.mark.parametrize(
    ("said", "key"),
    [
        ("learning_rate", "training.learning_rate"),
        ("training.learning_rate", "training.learning_rate"),
        ("seed", "training.seed"),
        ("rank", "lora.rank"),
        ("neftune_noise_alpha", "training.neftune_noise_alpha"),
        ("method", "method"),
        ("global_batch_size", "batch.global_batch_size"),
        ("dataset.columns.prompt", "dataset.columns.prompt"),
    ],
)
def test_keys_are_found_by_their_last_part(said: str, key: str) -> None:
    assert full_key(said) == key


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("every_steps", ("checkpoints.every_steps", "evaluation.every_steps", "whole key")),
        ("path", ("model.path or dataset.path",)),
        ("learning_rat", ("did you mean training.learning_rate?",)),
        ("lr", ("did you mean training.learning_rate?",)),
        ("gradient_accumulation_steps", ("batch.global_batch_size",)),
        ("nonsense_of_mine", ("schema",)),
    ],
)
def test_keys_that_mean_nothing_or_several_things(said: str, words: tuple[str, ...]) -> None:
    with pytest.raises(SpecError) as refusal:
        full_key(said)
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-4,2e-4", (1e-4, 2e-4)),
        (" 1 , 2", (1, 2)),
        ("010,0x10", ("010", 16)),
        ("yes,no", (True, False)),
        ("[q_proj, v_proj],all-linear", (["q_proj", "v_proj"], "all-linear")),
        ("'a,b',\"c, d\"", ("a,b", "c, d")),
        ("{rank: 8, alpha: 16},{rank: 4}", ({"rank": 8, "alpha": 16}, {"rank": 4})),
        ("it's,2", ("it's", 2)),
    ],
)
def test_values_are_read_as_yaml(text: str, values: tuple[Any, ...]) -> None:
    found = parse_axis(f"seed={text}").values
    assert found == values
    assert [type(value) for value in found] == [type(value) for value in values]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed", "KEY=VALUE"),
        ("=1", "KEY=VALUE"),
        ("seed=", "no value"),
        ("seed= ,", "no value"),
        ("seed=1,", "empty value"),
        ("seed=1,,2", "correct the YAML"),
        ("seed=1], [2", "correct the YAML"),
        ("seed=[1", "correct the YAML"),
        ("seed=1,2,1", "value 1 twice"),
        ("seed=1,1.0", "also as 1"),
        ("learning_rate=1e-4,0.0001", "also as 1e-4"),
        ("optim=a,'a'", "value a twice"),
    ],
)
def test_values_that_are_refused(text: str, words: str) -> None:
    with pytest.raises(SpecError, match=re.escape(words)):
        parse_axis(text)


def test_true_is_not_one() -> None:
    assert parse_axis("packing=1,true").values == (1, True)


@pytest.mark.parametrize(
    ("texts", "overrides", "target"),
    [
        (("seed=1", "training.seed=2"), (), "local"),
        (("lora.rank=1", "lora={rank: 2}"), (), "local"),
        (("model=a", "model.path=b"), (), "local"),
        (("seed=1",), (Override("training.seed", 1, "--set training.seed"),), "local"),
        (("model.path=a",), (Override("model", "b", "--model b"),), "local"),
        (("output=a,b",), (), "local"),
        (("slurm.partition=a,b",), (), "local"),
        (("time_limit=1h,2h",), (), "slurm"),
        (("gpus=1,2",), (), "slurm"),
        (("hardware={gpus: 1}",), (), "slurm"),
        (("max_restarts=1,2",), (), "slurm"),
    ],
)
def test_keys_that_meet_or_are_not_swept(
    texts: tuple[str, ...], overrides: tuple[Override, ...], target: str
) -> None:
    with pytest.raises(Refusal) as refusal:
        parse_axes(texts, overrides, target)
    assert refusal.value.code == "sweep_key"


def test_hardware_is_swept_on_this_machine() -> None:
    total = Override("hardware.gpus_per_node", None, "--gpus")  # what a flag takes back
    (axis,) = parse_axes(["gpus_per_node=1,2"], [total], "local")
    assert axis.key == "hardware.gpus_per_node"


def test_a_sweep_has_an_end() -> None:
    many = ",".join(map(str, range(MOST_RUNS // 2 + 1)))
    with pytest.raises(PlanRefused, match="10,002 runs"):
        parse_axes([f"seed={many}", "rank=1,2"], [], "local")


def test_the_product_in_order() -> None:
    axes = parse_axes(["learning_rate=1e-4,2e-4", "seed=1,2,3"], [], "slurm")
    found = combinations(axes)
    assert [one.name for one in found] == [
        f"{3 * i + j}-learning_rate={rate}+seed={seed}"
        for i, rate in enumerate(("1e-4", "2e-4"))
        for j, seed in enumerate((1, 2, 3))
    ]
    last = {override.key: override.value for override in found[-1].overrides}
    assert last == {"training.learning_rate": 2e-4, "training.seed": 3}
    assert found[-1].title == "run 5 (learning_rate=2e-4, seed=3)"


def test_names_sort_as_the_runs_do() -> None:
    names = [
        one.name for one in combinations([parse_axis("seed=" + ",".join(map(str, range(11))))])
    ]
    assert names == sorted(names)
    assert names[3] == "03-seed=3"


def test_keys_with_the_same_last_part_are_told_apart() -> None:
    axes = [parse_axis("model.path=a"), parse_axis("dataset.path=b")]
    assert combinations(axes)[0].name == "0-model.path=a+dataset.path=b"


def check_name(name: str) -> None:
    assert PLAIN.fullmatch(name), name
    assert name not in (".", "..")
    assert len(name) <= 200


@pytest.mark.parametrize("value", [*HOSTILE_NAMES, "a/../../b", "..", "new\nline", "x" * 5000, ""])
def test_hostile_values_make_plain_names(value: str) -> None:
    quoted = '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    axis = parse_axis(f"model.revision={quoted}")
    assert axis.values == (value,)
    check_name(combinations([axis])[0].name)


@given(st.lists(st.text(min_size=1), min_size=1, max_size=4, unique=True))
@settings(max_examples=200, deadline=None)
def test_any_values_make_plain_names_of_their_own(values: list[str]) -> None:
    import json

    text = ",".join(json.dumps(value) for value in values)
    try:
        axis = parse_axis(f"model.revision={text}")
    except SpecError:
        return  # no YAML text: halves of surrogate pairs and the like
    names = [one.name for one in combinations([axis])]
    assert len(set(names)) == len(values)
    for name in names:
        check_name(name)
