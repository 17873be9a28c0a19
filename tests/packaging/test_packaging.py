"""What ships: exact file sets of sdist and wheel, and a plan from the unzipped wheel."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path, PurePosixPath

import pytest

from launcher import __version__
from launcher.assets import SOURCES
from tests.support import HEAVY, ROOT, tree

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

pytest.importorskip("build")
pytest.importorskip("hatchling")

# Folders at the root that the launcher reads; each must ship once it holds a file.
ASSETS = ("accelerate_configs", "deepspeed_configs", "slurm", "docker", "recipes")
# Files that an image is built from, beside the assets.
IMAGE_SOURCES = ("pyproject.toml", "constraints.txt", "README.md", "LICENSE")
CACHES = {"__pycache__", ".pytest_cache", ".hypothesis", ".mypy_cache", ".ruff_cache"}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TARGETS = PYPROJECT["tool"]["hatch"]["build"]["targets"]


def _files(folder: str) -> set[str]:
    """Files below a folder of the checkout, as POSIX paths from the root."""
    path = ROOT / folder
    found = [path] if path.is_file() else path.rglob("*")
    names = {file.relative_to(ROOT).as_posix() for file in found if file.is_file()}
    return {name for name in names if not CACHES & set(PurePosixPath(name).parts)}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that is built from the sdist."""
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    assert path.name == f"sftlaunch-{__version__}-py3-none-any.whl"
    return zipfile.ZipFile(path)


def test_wheel_holds_exactly_the_package_and_the_assets(wheel: zipfile.ZipFile) -> None:
    info = f"sftlaunch-{__version__}.dist-info"
    expected = {name for name in _files("launcher") if name.endswith(".py")}
    expected |= {"launcher/spec/sft_fields.json"}
    expected |= {f"launcher/_assets/{name}" for folder in ASSETS for name in _files(folder)}
    expected |= {f"launcher/_assets/{name}" for name in IMAGE_SOURCES}
    expected |= {
        f"{info}/{name}"
        for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")
    }
    assert set(wheel.namelist()) == expected


def test_the_package_folder_holds_nothing_that_would_not_ship() -> None:
    data = {name for name in _files("launcher") if not name.endswith(".py")}
    assert data == {"launcher/spec/sft_fields.json"}


def test_sdist_holds_exactly_the_sources(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    prefix = f"sftlaunch-{__version__}/"
    with tarfile.open(path) as archive:
        names = {member.name for member in archive.getmembers() if member.isfile()}
    expected = {name for each in TARGETS["sdist"]["only-include"] for name in _files(each)}
    expected |= {"pyproject.toml", "PKG-INFO"}
    found = {name.removeprefix(prefix) for name in names} - {".gitignore"}
    assert found == expected


def test_every_folder_of_assets_is_mapped() -> None:
    """hatchling skips a folder that is missing, or not mapped, without a word."""
    sources = TARGETS["wheel"]["sources"]
    for folder in ASSETS:
        if _files(folder):
            assert sources.get(folder) == f"launcher/_assets/{folder}"
            assert folder in TARGETS["wheel"]["only-include"]
            assert folder in TARGETS["sdist"]["only-include"]
    for target in ("wheel", "sdist"):
        for name in TARGETS[target]["only-include"]:
            assert _files(name), f"{target}: {name} is mapped and holds no file"
    assert set(sources) == set(TARGETS["wheel"]["only-include"]) - {"launcher"}


def test_assets_ship_byte_for_byte(wheel: zipfile.ZipFile) -> None:
    for folder in ASSETS:
        for name in _files(folder):
            assert wheel.read(f"launcher/_assets/{name}") == (ROOT / name).read_bytes(), name
    for name in IMAGE_SOURCES:
        assert wheel.read(f"launcher/_assets/{name}") == (ROOT / name).read_bytes(), name


def test_an_image_is_built_from_the_same_files_everywhere(
    wheel: zipfile.ZipFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a checkout and from a wheel the build's context is the same tree."""
    assert set(SOURCES) == {*ASSETS, *IMAGE_SOURCES}
    wheel.extractall(tmp_path / "wheel")
    found = {}
    for name, package in (("checkout", ROOT), ("wheel", tmp_path / "wheel")):
        target = tmp_path / f"context-{name}"
        target.mkdir()
        script = "import pathlib, sys; from launcher import assets; "
        script += "assets.copy_sources(pathlib.Path(sys.argv[1]))"
        subprocess.run(
            [sys.executable, "-c", script, str(target)],
            check=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(package)},
        )
        found[name] = tree(target)
    assert found["checkout"] == found["wheel"]


def test_metadata(wheel: zipfile.ZipFile) -> None:
    text = wheel.read(f"sftlaunch-{__version__}.dist-info/METADATA").decode()
    headers = text.split("\n\n")[0].splitlines()
    assert f"Version: {__version__}" in headers
    assert {"Provides-Extra: train", "Provides-Extra: dev"} <= set(headers)
    needed = [line.removeprefix("Requires-Dist: ") for line in headers if "Requires-Dist" in line]
    light = {_name(each) for each in needed if "extra ==" not in each}
    train = {_name(each) for each in needed if "extra == 'train'" in each.replace('"', "'")}
    assert light == {"click", "pyyaml", "pydantic"}
    assert {"torch", "transformers", "trl", "peft", "accelerate", "datasets"} <= train
    assert {"bitsandbytes", "deepspeed"} <= train
    entry = wheel.read(f"sftlaunch-{__version__}.dist-info/entry_points.txt").decode()
    assert "sftlaunch = launcher.cli:main" in entry


def _name(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found
    return found[0].lower().replace("_", "-")


@pytest.fixture(scope="module")
def light_python(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> str:
    """PYTHONPATH of the unzipped wheel and its light dependencies, and nothing else."""
    target = tmp_path_factory.mktemp("wheel")
    wheel.extractall(target)
    packages = tmp_path_factory.mktemp("light")
    waiting, seen = ["click", "pyyaml", "pydantic"], set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        distribution = metadata.distribution(name)
        waiting += [_name(each) for each in distribution.requires or () if ";" not in each]
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            (packages / top).symlink_to(Path(str(distribution.locate_file(top))))
    assert seen & set(HEAVY) == set()
    return f"{target}{os.pathsep}{packages}"


def _run(python_path: str, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python without site-packages, so that only `python_path` can be imported from."""
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": python_path, "COLUMNS": "100"},
        timeout=60,
    )


def test_a_plan_from_the_unzipped_wheel(light_python: str, tmp_path: Path) -> None:
    """On a login node: no torch, no checkout, the assets from the wheel."""
    assert _run(light_python, tmp_path, "-c", "import torch").returncode != 0
    where = _run(light_python, tmp_path, "-c", "import launcher; print(launcher.__file__)")
    assert where.stdout.startswith(light_python.split(os.pathsep, maxsplit=1)[0]), where.stderr
    flags = ("--gpu", "h100-80gb", "--gpus", "8")
    done = _run(light_python, tmp_path, "-m", "launcher", "plan", *flags)
    assert (done.returncode, done.stderr) == (0, "")
    assert "ddp over 8 GPUs" in done.stdout
    for strategy in ("zero1", "zero2", "zero3", "fsdp", "fsdp1", "hsdp"):
        as_json = _run(
            light_python,
            tmp_path,
            "-m",
            "launcher",
            "plan",
            *flags,
            "--json",
            "--strategy",
            strategy,
        )
        assert as_json.returncode == 0, as_json.stderr
        assert json.loads(as_json.stdout)["strategy"] == strategy
    assert list(tmp_path.iterdir()) == []


def test_a_run_from_the_light_wheel_names_what_to_install(
    light_python: str, tmp_path: Path
) -> None:
    done = _run(light_python, tmp_path, "-m", "launcher", "--device", "cpu")
    assert done.returncode == 4
    assert "pip install 'sftlaunch[train]'" in done.stderr
    assert list(tmp_path.iterdir()) == []
