"""Reading a spec: YAML that means what people write, overrides, and errors that never escape."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.errors import SpecError
from launcher.render.files import yaml_text
from launcher.spec.arguments import OLDER, OWNED, kind_fits, sft_fields
from launcher.spec.explain import all_keys
from launcher.spec.load import Override, load_spec, local_path, parse_set
from launcher.spec.schema import Spec


def _load(folder: Path, text: str | bytes, *settings: str) -> Spec:
    file = folder / "sft.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_spec(file, [parse_set(setting) for setting in settings], "sft.yaml").spec


def _refusal(call: Callable[[], object]) -> SpecError | None:
    """The refusal of a call that must end in one or in a value; anything else escapes."""
    try:
        call()
    except SpecError as refusal:
        return refusal
    return None


# --- values -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("2e-4", 2e-4),
        ("2E-4", 2e-4),
        ("2.0e-4", 2e-4),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("1_000.5", 1000.5),
        ("3", 3.0),
    ],
)
def test_numbers_as_people_write_them(written: str, value: float, tmp_path: Path) -> None:
    assert (
        _load(
            tmp_path, f"model: m\ntraining: {{learning_rate: {written}}}\n"
        ).training.learning_rate
        == value
    )
    assert parse_set(f"training.learning_rate={written}").value == value


@pytest.mark.parametrize(
    "text", ["2024-05-01", "12:00:00", "1-00:00:00", "010", "1e", "0x", "v1.0"]
)
def test_what_only_looks_like_a_number_or_a_date_is_text(text: str, tmp_path: Path) -> None:
    assert _load(tmp_path, f"model: {{path: m, revision: {text}}}\n").model.revision == text
    assert parse_set(f"slurm.time_limit={text}").value == text


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("0", 0),
        ("-3", -3),
        ("1_000", 1000),
        ("0x10", 16),
        ("true", True),
        ("null", None),
        ("", None),
    ],
)
def test_other_scalars(written: str, value: object) -> None:
    assert parse_set(f"a.b={written}").value == value


def test_short_forms_are_the_long_ones(tmp_path: Path) -> None:
    short = _load(tmp_path, "model: a/b\ndataset: c/d\n")
    long = _load(tmp_path, "model: {path: a/b}\ndataset: {path: c/d}\n")
    assert short == long


def test_one_target_is_a_list_of_one(tmp_path: Path) -> None:
    """PEFT reads bare text as a pattern of the whole module path, which would match nothing."""
    assert _load(tmp_path, "model: m\nlora: {target_modules: q_proj}\n").lora.target_modules == [
        "q_proj"
    ]
    assert (
        _load(tmp_path, "model: m\nlora: {target_modules: all-linear}\n").lora.target_modules
        == "all-linear"
    )


def test_a_byte_order_mark_and_windows_lines_are_read(tmp_path: Path) -> None:
    spec = _load(tmp_path, b"\xef\xbb\xbfmodel: m\r\ntraining:\r\n  seed: 3\r\n")
    assert (spec.model.path, spec.training.seed) == ("m", 3)


def test_anchors_and_merges_work(tmp_path: Path) -> None:
    text = "model: m\ntraining: &t {seed: 3, packing: false}\nlora: {rank: 4}\n"
    assert _load(tmp_path, text).training.seed == 3
    text = "model: m\ncheckpoints: &c {every_steps: 5}\nevaluation: {<<: *c}\n"
    assert _load(tmp_path, text).evaluation.every_steps == 5


def test_sft_fields_pass_through_as_written(tmp_path: Path) -> None:
    spec = _load(tmp_path, "model: m\ntraining: {neftune_noise_alpha: 5, adam_beta2: 0.95}\n")
    assert spec.training.sft_fields() == {"neftune_noise_alpha": 5, "adam_beta2": 0.95}


# --- paths --------------------------------------------------------------------------------


def test_paths_start_from_the_spec_s_folder(tmp_path: Path) -> None:
    folder = tmp_path / "deep"
    folder.mkdir()
    (folder / "rows.jsonl").touch()
    (folder / "held.jsonl").touch()
    text = "model: ../m\ndataset: {path: rows.jsonl, eval_path: held.jsonl}\n"
    spec = _load(folder, text)
    assert spec.model.path == str(tmp_path / "m")
    assert spec.dataset is not None
    assert spec.dataset.path == str(folder / "rows.jsonl")
    assert spec.dataset.eval_path == str(folder / "held.jsonl")


def test_a_hub_name_stays_one(tmp_path: Path) -> None:
    assert (
        _load(tmp_path, "model: meta-llama/Llama-3.1-8B\n").model.path == "meta-llama/Llama-3.1-8B"
    )


def test_paths_of_overrides_start_from_this_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "rows.jsonl").touch()
    monkeypatch.chdir(here)
    spec = _load(tmp_path, "model: m\n", "dataset=rows.jsonl")
    assert spec.dataset is not None
    assert spec.dataset.path == str(here / "rows.jsonl")


@settings(deadline=None)
@given(st.text(max_size=30))
def test_any_name_is_a_path_or_itself(name: str) -> None:
    found = local_path(name, Path("/nowhere"))
    assert found == name or os.path.isabs(found)  # noqa: PTH117


# --- overrides ----------------------------------------------------------------------------


def test_an_override_is_the_same_as_the_file(tmp_path: Path) -> None:
    said = _load(tmp_path, "model: m\ntraining: {seed: 5}\nlora: {rank: 4}\n")
    assert _load(tmp_path, "model: m\n", "training.seed=5", "lora={rank: 4}") == said


def test_the_last_override_wins_and_neighbours_stay(tmp_path: Path) -> None:
    text = "model: m\ntraining: {seed: 1, max_length: 9}\n"
    training = _load(tmp_path, text, "training.seed=2", "training.seed=3").training
    assert (training.seed, training.max_length) == (3, 9)


def test_an_override_below_a_short_form_keeps_the_path(tmp_path: Path) -> None:
    spec = _load(tmp_path, "model: a/b\n", "model.revision=v2")
    assert (spec.model.path, spec.model.revision) == ("a/b", "v2")


@given(st.text(st.characters(exclude_characters="="), min_size=1).filter(str.strip))
def test_a_setting_without_a_value_is_refused(text: str) -> None:
    with pytest.raises(SpecError):
        parse_set(text)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40))
def test_any_setting_is_an_override_or_refused(text: str) -> None:
    refusal = _refusal(lambda: parse_set(f"training.x={text}"))
    assert refusal is None or refusal.fix


def test_every_key_says_where_it_was_set(tmp_path: Path) -> None:
    file = tmp_path / "sft.yaml"
    file.write_text("model: m\ntraining:\n  seed: 1\n", encoding="utf-8")
    said = load_spec(file, [Override("lora.rank", 4, "--set lora.rank")], "sft.yaml").said
    assert said["model"] == "sft.yaml:1"
    assert said["training.seed"] == "sft.yaml:3"
    assert said["lora.rank"] == "--set lora.rank"


# --- nothing escapes ----------------------------------------------------------------------

_LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(all_keys()), _VALUES)
def test_any_value_at_any_key_is_a_spec_or_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: Any
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text("model: m\ndataset: d\n", encoding="utf-8")
    refusal = _refusal(lambda: load_spec(file, [Override(key, value, "--set")]))
    if refusal is not None:
        assert refusal.what
        assert refusal.fix
        assert "--set" in refusal.what, "the place is named"


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=60) | st.text("ab:[]{}-#&*!|>'\"%@`, \n\t?0", max_size=60).map(str.encode)
)
def test_any_file_is_a_spec_or_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(content)
    refusal = _refusal(lambda: load_spec(file))
    if refusal is not None:
        assert refusal.fix
        assert "any.yaml" in refusal.what


@settings(deadline=None)
@given(_VALUES)
def test_a_dumped_mapping_reads_back(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    """What `spec.yaml` of a run says is what is read again, whatever the text looks like."""
    text = yaml_text({"prompts": value})
    again = parse_set(f"samples={text}").value["prompts"]
    assert json.dumps(again) == json.dumps(value)


# --- tables -------------------------------------------------------------------------------


def test_every_older_name_leads_to_a_key_that_exists() -> None:
    keys, flags = set(all_keys()), {"--resume", "nothing"}
    for older, (new, _) in OLDER.items():
        target = new.split(":")[0].split(" ")[0]
        assert target in keys | flags, f"{older} -> {new}"
        assert older not in Spec.model_fields or older in ("gpus",), older


def test_every_owned_field_leads_to_a_key_that_exists_and_is_trl_s() -> None:
    keys = {*all_keys(), "--resume", "nothing", "the"}
    for owned, new in OWNED.items():
        assert new.split(":")[0].split(" ")[0] in keys, f"{owned} -> {new}"
    assert not set(OWNED) & set(OLDER)


def test_the_named_training_keys_are_fields_of_trl() -> None:
    from launcher.plan.worker import TRAINING_KEYS

    assert set(TRAINING_KEYS) <= set(sft_fields())
    assert len(sft_fields()) > 100


@pytest.mark.parametrize(
    ("value", "kinds", "fits"),
    [
        (1, ["int"], True),
        (1, ["float"], True),
        (1.0, ["int"], False),
        (True, ["int"], False),
        (True, ["bool"], True),
        (None, ["null", "str"], True),
        (None, ["str"], False),
        ("a", ["str"], True),
        ([1], ["list"], True),
        ({"a": 1}, ["dict"], True),
        ({"a": 1}, ["str"], False),
    ],
)
def test_kinds(value: object, kinds: list[str], fits: bool) -> None:
    assert kind_fits(value, kinds) is fits
