"""Prepared rows count only where they are whole and for the same inputs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from launcher.facts.probe import Facts
from launcher.plan.make import make_plan
from launcher.plan.types import Plan
from launcher.runs.directory import RunDirectory
from launcher.runs.prepared import (
    FIELDS,
    RECORD,
    only_prepared,
    read_record,
    settings_of,
    sources_of,
    up_to_date,
    usable,
)
from launcher.spec.arguments import sft_fields
from launcher.spec.schema import Spec
from tests.support import make_model, write_rows

NOTHING = Facts(gpus=(), gpu=None, model=None, dataset=None, held_out=None, cpu_count=8)


@pytest.fixture
def spec(tmp_path: Path) -> dict[str, Any]:
    model, rows = make_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")
    return {"model": str(model), "dataset": str(rows), "hardware": {"device": "cpu"}}


def plan_of(spec: dict[str, Any]) -> Plan:
    return make_plan(Spec.model_validate(spec), NOTHING).plan


@pytest.fixture
def run(spec: dict[str, Any], tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path / "run")
    made.prepared.mkdir(parents=True)
    (made.prepared / "rows.arrow").write_bytes(b"rows")
    settings = settings_of(plan_of(spec))
    record = {"settings": settings, "sources": sources_of(settings), "files": {"rows.arrow": 4}}
    (made.prepared / RECORD).write_text(json.dumps(record), encoding="utf-8")
    return made


def test_whole_for_the_same_inputs(spec: dict[str, Any], run: RunDirectory) -> None:
    assert usable(plan_of(spec), run)
    assert up_to_date(plan_of(spec), run)
    assert only_prepared(run.path)
    (run.path / "plan.json").touch()
    assert not only_prepared(run.path)


@pytest.mark.parametrize("damage", ["no record", "torn record", "a short file", "a file gone"])
def test_what_is_not_whole_does_not_count(
    damage: str, spec: dict[str, Any], run: RunDirectory
) -> None:
    rows, record = run.prepared / "rows.arrow", run.prepared / RECORD
    {
        "no record": record.unlink,
        "torn record": lambda: record.write_text(record.read_text()[:20]),
        "a short file": lambda: rows.write_bytes(b"row"),
        "a file gone": rows.unlink,
    }[damage]()
    assert read_record(run) is None
    assert not usable(plan_of(spec), run)


@pytest.mark.parametrize(
    "change",
    [
        {"training": {"max_length": 77}},
        {"training": {"seed": 7}},
        {"dataset": {"eval_share": 0.1}},
        {"loss": "completion"},
        {"model": {"revision": "v2"}},
    ],
    ids=str,
)
def test_other_settings_make_other_rows(
    change: dict[str, Any], spec: dict[str, Any], run: RunDirectory
) -> None:
    other = dict(spec)
    for section, values in change.items():
        path = {"path": spec[section]} if section in ("model", "dataset") else {}
        other[section] = {**path, **values} if isinstance(values, dict) else values
    assert not usable(plan_of(other), run)


def test_exact_match_needs_the_rows_as_they_were_written(spec: dict[str, Any]) -> None:
    held_out = {**spec, "dataset": {"path": spec["dataset"], "eval_share": 0.1}}
    asked = {**held_out, "evaluation": {"exact_match": True}}
    assert settings_of(plan_of(held_out)) != settings_of(plan_of(asked))


def test_what_no_row_depends_on_may_change(spec: dict[str, Any], run: RunDirectory) -> None:
    training = {"learning_rate": 1e-3, "max_steps": 3}
    assert up_to_date(plan_of({**spec, "training": training, "strategy": "single"}), run)


@pytest.mark.parametrize("name", ["rows.jsonl", "model/tokenizer.json"])
def test_a_changed_source_is_noticed_and_weights_are_none(
    name: str, spec: dict[str, Any], run: RunDirectory, tmp_path: Path
) -> None:
    os.utime(tmp_path / "model" / "model.safetensors", ns=(1, 1))
    assert up_to_date(plan_of(spec), run)
    os.utime(tmp_path / name, ns=(1, 1))
    assert not up_to_date(plan_of(spec), run)
    assert usable(plan_of(spec), run), "ranks take what is there"


def test_fields_are_real_ones() -> None:
    assert set(FIELDS) <= set(sft_fields())


def test_a_submission_that_failed_leaves_what_was_prepared(run: RunDirectory) -> None:
    before = run.snapshot()
    run.create({"plan.json": "{}", "job.sbatch": ""})
    run.logs(1).mkdir(parents=True)
    run.restore(before)
    assert [path.name for path in run.path.iterdir()] == ["prepared"]
