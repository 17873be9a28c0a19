"""Which keys make it another run: every key of the spec is decided one way or the other."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from launcher.plan.same_run import FREE, differences
from launcher.spec.arguments import OWNED, sft_fields
from launcher.spec.schema import Spec

MODEL, DATA = {"path": "/models/llama"}, {"path": "/data/rows.jsonl"}
# Keys that decide what is learnt from which row in which step. A new key of the spec belongs
# either here or into FREE; `test_every_key_is_decided` fails until it is in one of them.
IDENTITY = (
    "batch.global_batch_size",
    "dataset.columns",
    "dataset.drop_bad",
    "dataset.eval_path",
    "dataset.eval_share",
    "dataset.eval_split",
    "dataset.name",
    "dataset.path",
    "dataset.sources",
    "dataset.split",
    "dataset.weight",
    "lora.alpha",
    "lora.dropout",
    "lora.rank",
    "lora.target_modules",
    "lora.virtual_tokens",
    "loss",
    "method",
    "model.dtype",
    "model.path",
    "model.revision",
    "model.trust_remote_code",
    "quantization",
    "training.bf16",
    "training.fp16",
    "training.learning_rate",
    "training.lr_scheduler_type",
    "training.max_grad_norm",
    "training.max_length",
    "training.max_steps",
    "training.num_train_epochs",
    "training.optim",
    "training.packing",
    "training.seed",
    "training.warmup_steps",
    "training.weight_decay",
)
VALUES: dict[Any, tuple[Any, Any]] = {
    bool: (True, False),
    int: (3, 4),
    float: (0.25, 0.5),
    str: ("5m", "6m"),  # also a duration
    list: (["a"], ["a", "b"]),
    dict: ({"a": "b"}, {"a": "c"}),
}


def _parts(annotation: Any) -> list[Any]:
    """An annotation without Annotated, and its union's members without None."""
    if get_origin(annotation) is Annotated:
        return _parts(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        inner = [part for member in get_args(annotation) for part in _parts(member)]
        return [part for part in inner if part is not type(None)]
    return [annotation]


def keys(model: type[BaseModel] = Spec, prefix: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Every dotted key below a model with two valid values of it."""
    for name, field in model.model_fields.items():
        part = _parts(field.annotation)[0]
        if isinstance(part, type) and issubclass(part, BaseModel):
            yield from keys(part, f"{prefix}{name}.")
        elif get_origin(part) is Literal:
            yield f"{prefix}{name}", get_args(part)[:2]
        elif get_origin(part) is list and get_origin(get_args(part)[0]) is Literal:
            words = get_args(get_args(part)[0])
            yield f"{prefix}{name}", (list(words[:1]), list(words[:2]))
        else:
            yield f"{prefix}{name}", VALUES[get_origin(part) or part]


SOURCE = {"name": None, "split": "train", "columns": {}, "weight": None}
# Written out: one name becomes a list of it, a source is a mapping, some texts have a form.
KEYS = {
    **dict(keys()),
    "docker.hosts": (["ssh://a"], ["ssh://a", "ssh://b"]),
    "docker.mounts": (["/a"], ["/a", "/b"]),
    "docker.user": ("1000", "1000:1000"),
    "lora.target_modules": (["q_proj"], ["q_proj", "v_proj"]),
    "dataset.sources": tuple([{**SOURCE, "path": path}] for path in "ab"),
}
CONTAINER = {"runtime": "pyxis", "image": "image"}


def at(values: dict[str, Any]) -> Spec:
    """A spec with values at dotted keys."""
    data: dict[str, Any] = {"model": dict(MODEL), "dataset": dict(DATA)}
    for key, value in values.items():
        *parents, last = key.split(".")
        here = data
        for parent in parents:
            start = CONTAINER if parent == "container" else {}
            here = here.setdefault(parent, dict(start))
        here[last] = value
    return Spec.model_validate(data)


def is_free(key: str) -> bool:
    return key not in IDENTITY


def test_every_key_is_decided() -> None:
    """Exactly one way, and FREE names nothing that is not there."""
    free = {key for key in KEYS if key.startswith(FREE)}
    assert len(KEYS) > 50
    assert set(IDENTITY) <= set(KEYS)
    assert free - {"model.path"} == set(KEYS) - set(IDENTITY)
    known = {*KEYS, *(f"training.{name}" for name in sft_fields())}
    for entry in FREE:
        assert any(key.startswith(entry) for key in known), f"{entry} is no key"


def test_a_free_key_frees_no_other_that_starts_alike() -> None:
    known = {*KEYS, *(f"training.{name}" for name in sft_fields() if name not in OWNED)}
    for entry in FREE:
        if not entry.endswith("."):
            assert {key for key in known if key.startswith(entry)} == {entry}


@pytest.mark.parametrize("key", sorted(KEYS))
def test_a_key_is_really_free_or_really_differs(key: str) -> None:
    one, two = KEYS[key]
    old, new = at({key: one}), at({key: two})
    assert differences(old, old) == []
    found = differences(old, new)
    if is_free(key):
        assert found == []
        return
    expected = f"{key}.a" if isinstance(one, dict) else key
    inner = (one["a"], two["a"]) if isinstance(one, dict) else (one, two)
    assert found == [(expected, *inner)]
    assert differences(new, old) == [(expected, *reversed(inner))]


@pytest.mark.parametrize("key", sorted(set(KEYS) - {"model.path", "dataset.path"}))
def test_a_key_that_was_not_said_before_is_like_one_that_changed(key: str) -> None:
    default = at({})
    values = [value for value in KEYS[key] if at({key: value}) != default]
    for value in values:
        assert bool(differences(default, at({key: value}))) != is_free(key)


@pytest.mark.parametrize(
    ("extra", "free"),
    [
        ({"logging_steps": 5}, True),
        ({"dataloader_num_workers": 2}, True),
        ({"neftune_noise_alpha": 5.0}, False),
        ({"label_smoothing_factor": 0.1}, False),
        ({"data_seed": 3}, False),
        ({"train_sampling_strategy": "sequential"}, False),
        ({"max_grad_norm": 2.0, "logging_steps": 2}, False),
    ],
)
def test_fields_beyond_the_schema(extra: dict[str, Any], free: bool) -> None:
    values = {f"training.{name}": value for name, value in extra.items()}
    assert bool(differences(at({}), at(values))) != free


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("/models/llama", "/mnt/elsewhere/llama", True),
        ("/models/llama/", "/models/llama", True),
        ("meta/llama", "/cache/llama", True),
        ("/models/llama", "/models/qwen", False),
        ("llama", "llama-2", False),
        ("/a/llama", "/llama/a", False),
    ],
)
def test_another_folder_may_hold_the_same_model(old: str, new: str, same: bool) -> None:
    found = differences(at({"model.path": old}), at({"model.path": new}))
    assert found == ([] if same else [("model.path", old, new)])


def test_a_dataset_that_went_away_differs() -> None:
    without = at({}).model_copy(update={"dataset": None})
    assert ("dataset.path", DATA["path"], None) in differences(at({}), without)
    assert differences(without, without) == []


def test_all_differences_are_named_in_order() -> None:
    new = at(
        {
            "training.seed": 1,
            "method": "full",
            "lora.rank": 8,
            "model.path": "other",
            "strategy": "ddp",
        }
    )
    found = [key for key, _, _ in differences(at({}), new)]
    assert found == ["lora.rank", "method", "training.seed", "model.path"]


HELD_OUT = {"dataset.eval_path", "dataset.eval_split", "dataset.eval_share"}
CHANGES = st.dictionaries(st.sampled_from(sorted(KEYS)), st.booleans(), max_size=6).filter(
    lambda found: len(HELD_OUT & found.keys()) < 2
)


@given(CHANGES)
def test_a_change_of_free_keys_only_is_the_same_run(changes: dict[str, bool]) -> None:
    values = {key: KEYS[key][second] for key, second in changes.items()}
    old, new = at({key: KEYS[key][0] for key in changes}), at(values)
    changed = {key for key, second in changes.items() if second}
    found = {key.removesuffix(".a") for key, _, _ in differences(old, new)}
    assert found == changed & set(IDENTITY)
