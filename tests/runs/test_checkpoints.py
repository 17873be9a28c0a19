"""Checkpoints: what is whole is found, what is not is named, and the last whole one stays."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.runs.checkpoints import (
    SEAL,
    SET_ASIDE,
    Checkpoint,
    Skipped,
    checkpoint_folders,
    describe,
    digests,
    file_names,
    folder_name,
    move_aside,
    newest_whole,
    read_seal,
    remove,
    remove_unsealed,
    rotate,
    seal,
    set_aside,
    whole,
)

FILES = {"state/part-0.bin": bytes(range(256)), "progress.pt": b"schedule", "random-0.pt": b"r"}
RECORD = {"epoch": 0.5, "world": 2, "global_batch_size": 32, "strategy": "fsdp", "seconds": 1.5}


def make(root: Path, step: int, *, sealed: bool = True, files: dict[str, bytes] = FILES) -> Path:
    """A checkpoint's folder with small files."""
    folder = root / folder_name(step)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    if sealed:
        seal(folder, {"step": step, **RECORD}, digests(folder, file_names(folder)))
    return folder


def reason(folder: Path, *, contents: bool = True) -> str:
    """Why a checkpoint cannot be used; it must say so without an error."""
    found = whole(folder, contents=contents)
    assert isinstance(found, Skipped), found
    assert found.name == folder.name
    return found.reason


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


# --- the seal -----------------------------------------------------------------------------


def test_a_sealed_checkpoint_is_whole_and_says_what_it_holds(tmp_path: Path) -> None:
    folder = make(tmp_path, 120)
    record = json.loads((folder / SEAL).read_text(encoding="utf-8"))
    assert set(record["files"]) == set(FILES)
    assert record["files"]["progress.pt"] == {
        "bytes": len(b"schedule"),
        "sha256": hashlib.sha256(b"schedule").hexdigest(),
    }
    for contents in (True, False):
        found = whole(folder, contents=contents)
        assert isinstance(found, Checkpoint)
        assert (found.path, found.step, found.record) == (folder, 120, record)
        assert found.record["global_batch_size"] == 32


def test_sealing_leaves_nothing_but_the_seal_behind(tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    assert set(file_names(folder)) == {*FILES, SEAL}


def test_a_save_that_did_not_finish_is_skipped(tmp_path: Path) -> None:
    assert "did not finish" in reason(make(tmp_path, 3, sealed=False))


GARBAGE = [
    b"",
    b"\0" * 512,
    b"{",
    b"[]",
    b"null",
    b"3",
    b'"complete"',
    b"\xff\xfe{}",
    b'{"step": 1}',
    b'{"files": {}}',
    b'{"step": "one", "files": {}}',
    b'{"step": null, "files": {}}',
]
# JSON that a torn or bit-flipped seal may still be.
WRONG_SHAPE = [
    b'{"step": 1, "files": []}',
    b'{"step": 1, "files": null}',
    b'{"step": 1, "files": {"progress.pt": null}}',
    b'{"step": 1, "files": {"progress.pt": {}}}',
    b'{"step": 1, "files": {"progress.pt": {"bytes": 8}}}',
    b'{"step": 1, "files": {"a\\u0000b": {"bytes": 8, "sha256": ""}}}',
    b'{"step": 1e999, "files": {}}',
]


@pytest.mark.parametrize("content", GARBAGE)
def test_a_seal_that_cannot_be_read_vouches_for_nothing(content: bytes, tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    (folder / SEAL).write_bytes(content)
    assert "complete.json" in reason(folder)


@pytest.mark.parametrize("content", WRONG_SHAPE)
def test_a_seal_of_another_shape_vouches_for_nothing(content: bytes, tmp_path: Path) -> None:
    make(tmp_path, 1)
    broken = make(tmp_path, 2)
    (broken / SEAL).write_bytes(content)
    found, skipped = newest_whole(tmp_path)
    assert found is not None
    assert found.step == 1, "the older one is whole"
    assert [one.name for one in skipped] == [broken.name]


def test_a_seal_that_is_a_folder_is_skipped(tmp_path: Path) -> None:
    folder = make(tmp_path, 1, sealed=False)
    (folder / SEAL).mkdir()
    assert "complete.json" in reason(folder)


# --- the files ----------------------------------------------------------------------------


@pytest.mark.parametrize("contents", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found(name: str, contents: bool, tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    (folder / name).unlink()
    assert reason(folder, contents=contents) == f"{name} is missing"


@pytest.mark.parametrize("contents", [True, False])
@pytest.mark.parametrize("size", [0, 1, 255, 257, 1256])
def test_a_file_of_another_size_is_found(size: int, contents: bool, tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    name = "state/part-0.bin"
    (folder / name).write_bytes((FILES[name] * 5)[:size])
    assert reason(folder, contents=contents) == f"{name} has {size:,} of 256 bytes"


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("intact"), 7)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_flipped_bit_is_found(intact: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(FILES)))
    bit = data.draw(st.integers(0, 8 * len(FILES[name]) - 1))
    damaged = bytearray(FILES[name])
    damaged[bit // 8] ^= 1 << bit % 8
    (intact / name).write_bytes(damaged)
    try:
        assert reason(intact) == f"{name} is damaged (its checksum differs)"
        assert isinstance(whole(intact, contents=False), Checkpoint), "sizes alone cannot tell"
    finally:
        (intact / name).write_bytes(FILES[name])
    assert isinstance(whole(intact), Checkpoint)


@pytest.fixture(scope="module")
def flipped_seals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Every bit of a small seal flipped: what became an error, and what was taken for whole.

    The files' own checksums are left out: they are held against the files.
    """
    folder = make(tmp_path_factory.mktemp("seal"), 4, sealed=False, files={"a": b"0123"})
    seal(folder, {"step": 4, "global_batch_size": 32}, digests(folder, ["a"]))
    good = (folder / SEAL).read_bytes()
    checksum = range(good.index(b'"sha256'), good.rindex(b'"'))
    found: dict[str, list[str]] = {"errors": [], "altered": []}
    for bit in range(8 * len(good)):
        if bit // 8 in checksum or chr(good[bit // 8]).isspace():
            continue
        text = bytearray(good)
        text[bit // 8] ^= 1 << bit % 8
        (folder / SEAL).write_bytes(text)
        line = text.decode(errors="replace")[: bit // 8 + 3].splitlines()[-1]
        try:
            checkpoint = read_seal(folder)
        except Exception as error:
            found["errors"].append(f"{line}: {error!r}")
            continue
        if isinstance(checkpoint, Checkpoint):
            found["altered"].append(line)
    return found


def test_a_flipped_bit_of_the_seal_is_never_an_error(flipped_seals: dict[str, list[str]]) -> None:
    assert flipped_seals["errors"] == []


def test_every_flipped_bit_of_the_seal_is_found(flipped_seals: dict[str, list[str]]) -> None:
    assert flipped_seals["altered"] == []


# --- the newest ---------------------------------------------------------------------------


def _a_bad_week(root: Path) -> None:
    """Whole at 2 and 9, then one checkpoint of each kind of damage."""
    make(root, 2)
    make(root, 9)
    damaged = make(root, 10) / "state/part-0.bin"
    damaged.write_bytes(b"\1" + damaged.read_bytes()[1:])
    (make(root, 30) / "progress.pt").write_bytes(b"")
    (make(root, 200) / "random-0.pt").unlink()
    make(root, 1000, sealed=False)


def test_the_newest_whole_one_is_chosen_and_the_newer_ones_named(tmp_path: Path) -> None:
    _a_bad_week(tmp_path)
    found, skipped = newest_whole(tmp_path)
    assert found is not None
    assert found.step == 9
    assert [one.name for one in skipped] == [f"checkpoint-{n}" for n in (1000, 200, 30, 10)]
    told: list[str] = []
    describe(skipped, told.append)
    for text, why in zip(told, ("did not finish", "is missing", "0 of 8", "damaged"), strict=True):
        assert text.startswith("skipped checkpoint-")
        assert why in text


def test_sizes_alone_take_a_file_s_contents_on_trust(tmp_path: Path) -> None:
    _a_bad_week(tmp_path)
    found, skipped = newest_whole(tmp_path, contents=False)
    assert found is not None
    assert found.step == 10
    assert len(skipped) == 3


def test_where_none_is_whole_all_are_named(tmp_path: Path) -> None:
    for step in (5, 50):
        make(tmp_path, step, sealed=False)
    found, skipped = newest_whole(tmp_path)
    assert found is None
    assert [one.name for one in skipped] == ["checkpoint-50", "checkpoint-5"]


@pytest.mark.parametrize("name", ["", "nowhere", "file"])
def test_without_any_there_is_none(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert newest_whole(tmp_path / name) == (None, ())


NO_CHECKPOINTS = (
    "checkpoint-",
    "checkpoint-x",
    "checkpoint--1",
    "checkpoint-3.tmp",
    "checkpoint-3.1",
    ".checkpoint-3",
    "old-checkpoint-3",
    "Checkpoint-3",
    "checkpoint-3 ",
    SET_ASIDE,
)


@pytest.mark.parametrize("name", NO_CHECKPOINTS)
def test_names_that_are_no_checkpoints_are_left_alone(name: str, tmp_path: Path) -> None:
    make(tmp_path, 1)
    make(tmp_path, 2)
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / name)
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["checkpoint-2", "checkpoint-1"]
    rotate(tmp_path, 1)
    remove_unsealed(tmp_path)
    assert names(tmp_path) == {name, "checkpoint-2"}


def test_a_file_with_a_checkpoint_s_name_stops_nobody(tmp_path: Path) -> None:
    make(tmp_path, 1)
    (tmp_path / "checkpoint-2").write_text("notes")
    found, skipped = newest_whole(tmp_path)
    assert found is not None
    assert (found.step, len(skipped)) == (1, 1)
    assert remove_unsealed(tmp_path) == []
    assert (tmp_path / "checkpoint-2").read_text() == "notes"


# --- rotation -----------------------------------------------------------------------------

KINDS = ("whole", "unsealed", "missing", "cut")
SMALL = {"a": {"bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}}


@pytest.fixture
def root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _fill(root: Path, kinds: dict[int, str]) -> None:
    for step, kind in kinds.items():
        folder = make(root, step, sealed=False, files={"a": b"abc"})
        if kind != "unsealed":
            seal(folder, {"step": step}, SMALL)
        if kind == "missing":
            (folder / "a").unlink()
        elif kind == "cut":
            (folder / "a").write_bytes(b"a")


@settings(max_examples=30, deadline=None)
@given(
    kinds=st.dictionaries(st.integers(0, 120), st.sampled_from(KINDS), max_size=7),
    keep=st.integers(0, 4),
    protected=st.sets(st.integers(0, 120), max_size=2),
)
def test_rotation_never_takes_the_last_whole_one(
    kinds: dict[int, str], keep: int, protected: set[int]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        _fill(root, kinds)
        wholes = sorted((step for step, kind in kinds.items() if kind == "whole"), reverse=True)
        removed = rotate(root, keep, {folder_name(step) for step in protected})
        newest, _ = newest_whole(root)
        assert (newest.step if newest else None) == (wholes[0] if wholes else None)
        stay = (
            {*wholes[: max(keep, 1)], *protected, *(s for s in kinds if s > max(wholes))}
            if (wholes)
            else set(kinds)
        )
        assert names(root) == {folder_name(step) for step in stay & kinds.keys()}
        assert set(removed) == {folder_name(step) for step in kinds.keys() - stay}
        assert len(removed) == len(set(removed))
        assert rotate(root, keep, {folder_name(step) for step in protected}) == []


def test_rotation_keeps_the_newest_and_the_protected_ones(root: Path) -> None:
    _fill(root, dict.fromkeys((1, 2, 3, 4, 5, 10), "whole"))
    removed = rotate(root, 2, {"checkpoint-2", "checkpoint-77"})
    assert names(root) == {"checkpoint-10", "checkpoint-5", "checkpoint-2"}
    assert sorted(removed) == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]


def test_what_lies_above_the_newest_whole_one_may_still_be_written(root: Path) -> None:
    _fill(root, {1: "unsealed", 2: "whole", 3: "unsealed", 4: "cut"})
    assert rotate(root, 3) == ["checkpoint-1"]
    assert names(root) == {"checkpoint-2", "checkpoint-3", "checkpoint-4"}


@pytest.mark.parametrize("keep", [1, 2])
def test_checkpoints_after_the_one_just_sealed_neither_count_nor_go(keep: int, root: Path) -> None:
    """Such as those that a run went back behind."""
    _fill(root, {1: "whole", 2: "whole", 3: "whole", 8: "whole", 9: "cut", 10: "unsealed"})
    removed = rotate(root, keep, newest=3)
    assert sorted(removed) == [f"checkpoint-{step}" for step in range(1, 4 - keep)]
    assert {"checkpoint-3", "checkpoint-8", "checkpoint-9", "checkpoint-10"} <= names(root)


def test_remove_unsealed_takes_nothing_that_was_sealed(root: Path) -> None:
    _fill(root, {1: "whole", 2: "unsealed", 3: "cut", 4: "missing", 5: "unsealed"})
    assert remove_unsealed(root) == ["checkpoint-5", "checkpoint-2"]
    assert names(root) == {"checkpoint-1", "checkpoint-3", "checkpoint-4"}


# --- setting aside -------------------------------------------------------------------------


def test_damaged_checkpoints_are_set_aside_and_nothing_is_deleted(tmp_path: Path) -> None:
    _a_bad_week(tmp_path)
    before = {name: file_names(tmp_path / name) for name in names(tmp_path)}
    found, skipped = newest_whole(tmp_path)
    set_aside(tmp_path, skipped)
    assert newest_whole(tmp_path)[0] == found
    # What was never sealed is no checkpoint; `remove_unsealed` is for that.
    stay = {"checkpoint-2", "checkpoint-9", "checkpoint-1000"}
    assert names(tmp_path) == {*stay, SET_ASIDE}
    aside = tmp_path / SET_ASIDE
    assert names(aside) == before.keys() - stay
    assert {name: file_names(aside / name) for name in names(aside)} == {
        name: files for name, files in before.items() if name not in stay
    }


def test_what_is_set_aside_keeps_its_name_or_gets_a_free_one(tmp_path: Path) -> None:
    moved = [move_aside(make(tmp_path, step)).name for step in (10, 100, 1, 1, 10, 1)]
    assert moved == [
        "checkpoint-10",
        "checkpoint-100",
        "checkpoint-1",
        "checkpoint-1.2",
        "checkpoint-10.2",
        "checkpoint-1.3",
    ]
    aside = tmp_path / SET_ASIDE
    assert names(aside) == set(moved)
    assert all(isinstance(whole(aside / name), Checkpoint) for name in moved)
    assert checkpoint_folders(tmp_path) == []


# --- removal ------------------------------------------------------------------------------


def test_a_checkpoint_that_is_half_removed_does_not_look_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck, other = make(tmp_path, 1), make(tmp_path, 2)
    really = shutil.rmtree

    def fail(folder: Path, *arguments: Any, **options: Any) -> None:
        assert not (folder / SEAL).exists(), "the seal goes first"
        if folder == stuck:
            raise OSError(5, "Input/output error")
        really(folder, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", fail)
    assert remove([stuck, other]) == ["checkpoint-2"], "one failure must not stop the others"
    assert set(file_names(stuck)) == set(FILES)
    assert "did not finish" in reason(stuck)


def test_removing_what_is_gone_is_no_error(tmp_path: Path) -> None:
    assert remove([tmp_path / "checkpoint-1", make(tmp_path, 2)]) == ["checkpoint-2"]


def test_removing_a_link_leaves_what_it_points_to(tmp_path: Path) -> None:
    elsewhere = make(tmp_path / "other-disk", 1)
    runs = tmp_path / "checkpoints"
    make(runs, 2)
    (runs / "checkpoint-1").symlink_to(elsewhere)
    rotate(runs, 1)
    assert isinstance(read_seal(elsewhere), Checkpoint)
