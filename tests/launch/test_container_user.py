"""Who a container runs as, what it may read, and where it keeps what it fetches."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.errors import EnvironmentNotReady
from launcher.launch import container_user as users
from launcher.render.docker import Cache


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "getuid", lambda: 0)


def owned_by(monkeypatch: pytest.MonkeyPatch, user: int) -> None:
    """Every folder belongs to this user and group."""
    plain = Path.stat

    def stat(self: Path, **options: bool) -> os.stat_result:
        words = list(plain(self, **options))
        words[4:6] = [user, user]
        return os.stat_result(words)

    monkeypatch.setattr(Path, "stat", stat)


def test_a_user_is_who_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    monkeypatch.setattr(os, "getuid", lambda: 1234)
    monkeypatch.setattr(os, "getgid", lambda: 99)
    monkeypatch.setattr(os, "getgroups", lambda: [99, 7])
    assert users.container_user(tmp_path, None) == (1234, 99)
    assert users.other_groups(1234, 99) == (7,)


@pytest.mark.parametrize(("owner", "expected"), [(0, 1000), (1001, 1001)])
@pytest.mark.usefixtures("root")
def test_root_is_somebody_else(
    owner: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owned_by(monkeypatch, owner)
    assert users.container_user(tmp_path / "not" / "there", None) == (expected, expected)
    assert users.other_groups(expected, expected) == ()


@pytest.mark.parametrize(("said", "expected"), [("0:0", (0, 0)), ("12", (12, 12)), ("1:2", (1, 2))])
@pytest.mark.usefixtures("root")
def test_the_spec_decides(said: str, expected: tuple[int, int], tmp_path: Path) -> None:
    assert users.container_user(tmp_path, said) == expected


def test_ones_own_cache_is_used_as_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_CACHE", "/data/hub")
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    assert users.caches(os.getuid(), Path("/run"), ["models--a--b"]) == (
        Cache(str(tmp_path / "hf"), "HF_HOME"),
        Cache("/data/hub", "HF_HUB_CACHE"),
    )


def test_anothers_cache_is_read_where_it_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    other = os.getuid() + 1
    own = Cache("/run/cache", "HF_HOME")
    assert users.caches(other, Path("/run"), ["models--a--b"]) == (own,)
    (tmp_path / "hub" / "models--a--b" / "snapshots").mkdir(parents=True)
    assert users.caches(other, Path("/run"), ["models--a--b"]) == (
        own,
        Cache(str(tmp_path / "hub"), "HF_HUB_CACHE", writable=False),
    )
    assert users.caches(other, Path("/run"), []) == (own,)


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    weights = model / "model.safetensors"
    weights.write_bytes(b"")
    other = os.getuid() + 1
    users.refuse_unreadable([str(model)], other, ())
    weights.chmod(0o640)
    with pytest.raises(EnvironmentNotReady, match=r"model\.safetensors cannot be read"):
        users.refuse_unreadable([str(model)], other, ())
    users.refuse_unreadable([str(model)], other, (weights.stat().st_gid,))
    users.refuse_unreadable([str(model)], os.getuid(), ())
    users.refuse_unreadable([str(model), str(tmp_path / "not-there")], 0, ())
