"""Whole plans and refusals, one folder a case, compared as full text.

A case is `spec.yaml` (what a user writes) and `facts.yaml` (what a machine would have said);
`expected/` holds every file that the plan renders. A missing or a surplus expected file
fails; `pytest tests/golden --update-golden` rewrites them, and git shows what changed.

facts.yaml, all keys optional:
    model: a folder of tests/golden/models; without it the model is unknown, as on the Hub
    gpus: {name: what nvidia-smi prints, count: GPUs of this machine}
    cpu_count: processors of a node, 64 where unset
    dataset: {format, rows, mean_characters, conversational}
    chat_template: false for a tokenizer without one
    slurm: true for a run on Slurm
    docker: true for a run in containers
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from launcher import __version__
from launcher.cli.on_hosts import on_hosts
from launcher.errors import Refusal
from launcher.facts.dataset import DatasetFacts
from launcher.facts.gpus import Gpu
from launcher.facts.model import probe_model
from launcher.facts.probe import Facts, _planned_gpu
from launcher.plan.make import make_plan
from launcher.plan.types import plan_from_json
from launcher.render.docker import Cache, Caller
from launcher.render.files import with_files
from launcher.render.slurm import Origin
from launcher.render.text import plan_lines
from launcher.spec.load import load_spec
from tests.support import make_model, tree

if TYPE_CHECKING:
    from launcher.facts.model import ModelFacts
    from launcher.plan.types import Plan
    from launcher.spec.schema import Spec

CASES = Path(__file__).parent / "cases"
NAMES = sorted(path.parent.name for path in CASES.glob("*/spec.yaml"))
WIDTH = 100
CALLER = Caller(
    "registry.example/sftlaunch:1", 1000, 1000, "laptop", (Cache("/home/me/cache", "HF_HOME"),)
)
ORIGIN = Origin("sftlaunch spec.yaml --on slurm", "/opt/sft/bin/python", "/opt/sft/lib")


def read_facts(folder: Path, spec: Spec, scratch: Path) -> Facts:
    """The facts of a case, through the same types as the real probes'."""
    said: dict[str, Any] = yaml.safe_load((folder / "facts.yaml").read_text("utf-8")) or {}
    gpus = said.get("gpus", {"name": "", "count": 0})
    here = (Gpu(name=gpus["name"], memory_bytes=0, compute_capability=(0, 0)),) * gpus["count"]
    return Facts(
        gpus=here,
        gpu=_planned_gpu(spec, here),
        model=_model(said, spec, scratch),
        dataset=_dataset(said, spec),
        held_out=None,
        cpu_count=said.get("cpu_count", 64),
    )


def _model(said: dict[str, Any], spec: Spec, scratch: Path) -> ModelFacts | None:
    if "model" not in said:
        return None
    template = said.get("chat_template", True)
    folder = make_model(scratch / said["model"], said["model"], chat_template=template)
    found = probe_model(str(folder))
    assert found is not None
    return dataclasses.replace(found, path=spec.model.path)


def _dataset(said: dict[str, Any], spec: Spec) -> DatasetFacts | None:
    rows = said.get("dataset")
    if rows is None:
        return None
    assert spec.dataset is not None, "the case has rows and no dataset"
    return DatasetFacts(
        path=spec.dataset.path,
        format=rows["format"],
        rows=rows["rows"],
        rows_exact=True,
        sampled_rows=200,
        mean_characters=rows.get("mean_characters", 1200.0),
        max_characters=8000,
        columns=(),
        conversational=rows.get("conversational", False),
        file_bytes=1,
    )


def render_case(name: str, scratch: Path) -> tuple[dict[str, str], Plan | None]:
    """Expected file -> text: a plan's files, or the refusal."""
    folder = CASES / name
    try:
        loaded = load_spec(folder / "spec.yaml", (), "spec.yaml")
        facts = read_facts(folder, loaded.spec, scratch)
        planned = make_plan(loaded.spec, facts)
    except Refusal as refusal:
        return {"refusal.txt": _refusal_text(refusal)}, None
    said = yaml.safe_load((folder / "facts.yaml").read_text("utf-8")) or {}
    try:
        run = f"/runs/{name}"
        target: Any = ORIGIN if said.get("slurm") else None
        if said.get("docker"):
            target = on_hosts(planned.spec, run, planned.plan.topology.nodes, CALLER)
        plan = with_files(planned, run, facts.cpu_count, target)
    except Refusal as refusal:
        return {"refusal.txt": _refusal_text(refusal)}, None
    lines = plan_lines(
        plan,
        planned.spec,
        parameters=facts.model.parameters if facts.model else None,
        rows=facts.dataset.rows if facts.dataset else None,
        output=f"/runs/{name}",
        width=WIDTH,
    )
    record = plan.as_json()
    record["files"] = sorted(record["files"])  # each is an expected file of its own
    texts = {"plan.txt": "\n".join(lines) + "\n", "plan.json": json.dumps(record, indent=1) + "\n"}
    release = f"sftlaunch {__version__}"
    return {
        file: text.replace(release, "sftlaunch X.Y.Z")
        for file, text in {**plan.files, **texts}.items()
    }, plan


def _refusal_text(refusal: Refusal) -> str:
    lines = [
        f"exit: {int(refusal.exit_code)}",
        f"code: {refusal.code}",
        f"what: {refusal.what}",
        f"why: {refusal.why}",
        f"fix: {refusal.fix}",
        f"source: {refusal.source}",
    ]
    return "".join(f"{line.rstrip()}\n" for line in lines)


@pytest.mark.parametrize("name", NAMES)
def test_case(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    actual, plan = render_case(name, tmp_path)
    expected = CASES / name / "expected"
    if request.config.getoption("--update-golden"):
        _rewrite(expected, actual)
    compare(expected, actual)
    if plan is not None:
        assert plan_from_json(plan.as_json()).as_json() == plan.as_json()


def compare(expected: Path, actual: dict[str, str]) -> None:
    """Full-text equality of whole folders; writes nothing."""
    present = {path.name for path in expected.iterdir()} if expected.is_dir() else set()
    assert present == set(actual), "the set of expected files; see --update-golden"
    for file, text in actual.items():
        assert text == (expected / file).read_text(encoding="utf-8"), f"{expected / file}"


def _rewrite(expected: Path, texts: dict[str, str]) -> None:
    expected.mkdir(exist_ok=True)
    for path in expected.iterdir():
        if path.name not in texts:
            path.unlink()
    for file, text in texts.items():
        (expected / file).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("refused-")])
def test_the_resolved_spec_plans_the_same_run(name: str, tmp_path: Path) -> None:
    """spec.yaml of a run directory, read back, decides every thing alike."""
    folder = CASES / name
    first = load_spec(folder / "spec.yaml").spec
    facts = read_facts(folder, first, tmp_path)
    planned = make_plan(first, facts)
    (tmp_path / "spec.yaml").write_text(with_files(planned, "/runs/x", 8).files["spec.yaml"])
    again = make_plan(load_spec(tmp_path / "spec.yaml").spec, facts)
    assert again.spec == planned.spec
    assert again.plan.worker == planned.plan.worker
    assert again.plan.topology == planned.plan.topology
    assert again.plan.memory == planned.plan.memory
    filled = {key: value for key, value in again.plan.defaults.items() if value is not None}
    assert filled == {}


@pytest.mark.parametrize("change", ["missing", "surplus", "edited", "no folder"])
def test_a_difference_fails_and_is_never_recorded(change: str, tmp_path: Path) -> None:
    actual = {"plan.txt": "a\n", "command.sh": "b\n"}
    expected = tmp_path / "expected"
    if change != "no folder":
        _rewrite(expected, actual)
        compare(expected, actual)
    if change == "missing":
        (expected / "plan.txt").unlink()
    elif change == "surplus":
        (expected / "deepspeed.json").touch()
    elif change == "edited":
        (expected / "plan.txt").write_text("a \n", encoding="utf-8")
    before = tree(tmp_path)
    with pytest.raises(AssertionError):
        compare(expected, actual)
    assert tree(tmp_path) == before


def test_cases_cover_every_strategy_and_method() -> None:
    """Planned cases only: a refusal does not count."""
    plans = [json.loads(path.read_text("utf-8")) for path in CASES.glob("*/expected/plan.json")]
    strategies = {plan["strategy"] for plan in plans}
    methods = {plan["adapter"]["method"] for plan in plans}
    assert strategies == {"single", "ddp", "zero1", "zero2", "zero3", "fsdp", "fsdp1", "hsdp"}
    assert methods >= {"full", "lora", "qlora", "dora", "rslora", "ia3", "prompt_tuning"}


def test_no_expected_file_names_this_machine() -> None:
    for path in CASES.glob("*/expected/*"):
        text = path.read_text(encoding="utf-8")
        assert str(CASES.parents[2]) not in text, path
        assert "/tmp/" not in text, path
