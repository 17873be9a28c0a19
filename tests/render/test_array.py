"""The array's script: the single job's, with a run directory by the task's number."""

from __future__ import annotations

import difflib
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import SpecError
from launcher.facts.probe import Facts
from launcher.plan.make import Planned, make_plan
from launcher.render.array import array_script
from launcher.render.slurm import SCRIPT, job_script
from launcher.runs.sweep import SweepDirectory
from launcher.spec.schema import Spec
from tests.render.test_slurm import CONTAINERS, ORIGIN, WITHIN, check_bash, directives_of
from tests.runs.test_sweep import RECORD


def planned(slurm: dict[str, Any], **sections: Any) -> Planned:
    values = {"model": "m", "hardware": {"gpus": 4, "nodes": 2}, "slurm": slurm, **sections}
    facts = Facts(gpus=(), gpu=None, model=None, dataset=None, held_out=None, cpu_count=8)
    return make_plan(Spec.model_validate(values), facts)


def test_it_differs_from_a_single_job_in_nothing_else() -> None:
    one = planned({})
    single = job_script(one.plan, one.spec, "/runs/x", ORIGIN).splitlines()
    array = array_script([one, one, one], "/runs/x", ORIGIN).splitlines()
    changed = [line for line in difflib.ndiff(single, array) if line[0] in "+-"]
    assert changed == [
        "+ #SBATCH --array=0-2",
        "- #SBATCH --output=logs/slurm-%j.log",
        "+ #SBATCH --output=tasks/%a/logs/slurm-%A_%a.log",
        "- run=/runs/x",
        '+ run=$(readlink "tasks/$SLURM_ARRAY_TASK_ID")',
        "+ run=/runs/x/${run##*/}",
        '+ cd "$run"',
        """-   scontrol show job --oneliner "$SLURM_JOB_ID" | tr ' ' '\\n' |""",
        '+   scontrol show job --oneliner "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" '
        "| tr ' ' '\\n' |",
        "-   /runs/x",
        '+   "$run"',
        '- requeue) scontrol requeue "$SLURM_JOB_ID" || exit 75 ;;',
        '+ requeue) scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" || exit 75 ;;',
    ]


@pytest.mark.parametrize("container", CONTAINERS, ids=["none", "pyxis", "apptainer"])
@pytest.mark.parametrize("name", WITHIN)
def test_hostile_names_stay_text(
    name: str, container: dict[str, Any] | None, tmp_path: Path
) -> None:
    folder = tmp_path / name
    sweep = SweepDirectory(folder)
    sweep.create(RECORD)
    for run in sweep.runs:
        run.path.mkdir()
    slurm = {"account": name, "array_throttle": 5, "container": container}
    script = array_script([planned(slurm)] * 2, str(folder), ORIGIN)
    (folder / SCRIPT).write_text(script, encoding="utf-8")
    check_bash(folder / SCRIPT)
    said = directives_of(script)
    assert (said["chdir"], said["job-name"], said["array"]) == (str(folder), name, "0-1%5")
    before = sorted(tmp_path.rglob("*"))
    # Only what it assigns is run here: the run of task 1, and where the ranks would be told of it.
    head, rest = script.split("# Beside the ranks")
    arrays = rest[rest.index("step=(") : rest.index("# A warning")]
    shown = f'{head}\n{arrays}\nprintf "%s\\n" "$run" "$PWD" "${{container[@]}}" "${{ranks[@]}}"'
    done = subprocess.run(
        ["bash", "-c", shown],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
        env={"SLURM_ARRAY_TASK_ID": "1", "PATH": "/usr/bin:/bin"},
    )
    lines = done.stdout.splitlines()
    run = str(sweep.runs[1].path)
    assert (lines[0], lines[1], lines[-1]) == (run, run, run)
    if container is not None:
        assert any(line.endswith(f"{run}:{run}") for line in lines), lines
    assert sorted(tmp_path.rglob("*")) == before


def test_a_task_without_a_run_fails_at_once(tmp_path: Path) -> None:
    sweep = SweepDirectory(tmp_path / "sweep")
    sweep.create(RECORD)
    head, _ = array_script([planned({})] * 2, str(sweep.path), ORIGIN).split("# Beside the ranks")
    done = subprocess.run(
        ["bash", "-c", head],
        capture_output=True,
        check=False,
        cwd=sweep.path,
        env={"SLURM_ARRAY_TASK_ID": "9", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode != 0


def test_a_container_sees_the_data_of_all_runs(tmp_path: Path) -> None:
    slurm = {"container": {"runtime": "pyxis", "image": "i", "mounts": ["/scratch:/scratch"]}}
    runs = [planned(slurm, model=f"/models/{name}") for name in ("one", "two")]
    (mounts,) = [
        line for line in array_script(runs, "/runs/x", ORIGIN).splitlines() if "-mounts=" in line
    ]
    assert "/models/one:/models/one" in mounts
    assert "/models/two:/models/two" in mounts
    assert "/scratch:/scratch" in mounts
    with pytest.raises(SpecError, match="cannot be mounted"):
        array_script([planned(slurm, model="/a"), planned(slurm, model="/a:b")], "/x", ORIGIN)
    with pytest.raises(SpecError, match="cannot be mounted"):
        array_script(runs, "/runs/a,b", ORIGIN)


def test_the_most_patient_run_sets_the_patience() -> None:
    import dataclasses

    one = planned({"time_limit": "12h"})
    limits = {**one.plan.worker.limits, "shutdown_timeout_seconds": 777}
    worker = dataclasses.replace(one.plan.worker, limits=limits)
    slow = dataclasses.replace(one, plan=dataclasses.replace(one.plan, worker=worker))
    script = array_script([one, slow, one], "/runs/x", ORIGIN)
    assert "--shutdown-timeout=777" in script
    assert directives_of(script)["signal"] == "B:USR1@837"


def test_patterns_in_the_folder_are_refused() -> None:
    with pytest.raises(SpecError, match="percent sign"):
        array_script([planned({})], "/runs/100%", ORIGIN)
