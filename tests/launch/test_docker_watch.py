"""Containers on several hosts end together, whoever is silent, lost or restarting."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from launcher.errors import EnvironmentNotReady
from launcher.launch import docker, docker_watch
from launcher.launch.docker import Container
from launcher.launch.docker_watch import Together, Watched
from launcher.launch.local import StopSignals
from launcher.runs.directory import RunDirectory

HOSTS = ("ssh://a", "ssh://b")
RUNNING, SILENT, GONE = "running", "silent", "gone"
# What a host says of its container: one of these, or the code that it exited with.
Said = dict[str, str | int]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Said:
    """What each host says; may be changed on the way."""
    now: Said = dict.fromkeys(HOSTS, RUNNING)

    def look(run: RunDirectory, daemon: str | None = None) -> Container | None:
        word = now[str(daemon)]
        if word == SILENT:
            raise EnvironmentNotReady("docker_down", "nobody", fix="")
        if word == GONE:
            return None
        return Container("id", word == RUNNING, 0 if word == RUNNING else int(word))

    monkeypatch.setattr(docker, "look", look)
    monkeypatch.setattr(Watched, "_wait", lambda self: time.sleep(0.01))
    monkeypatch.setattr(Watched, "_keep_log", lambda self: "error: no more disk\n")
    for name in ("POLL_SECONDS", "ASK_AGAIN_SECONDS"):
        monkeypatch.setattr(docker_watch, name, 0.01)
    monkeypatch.setattr(docker_watch, "LOST_SECONDS", 0.1)
    monkeypatch.setattr(docker_watch, "PEER_GRACE_SECONDS", 0.1)
    return now


@pytest.fixture
def together(said: Said, tmp_path: Path) -> Iterator[Together]:
    """Both, and a stop that ends them with the code 75."""

    def stop(daemons: Sequence[str | None], seconds: int) -> None:
        for daemon in daemons:
            if said[str(daemon)] == SILENT:
                continue
            said[str(daemon)] = 75 if seconds > docker_watch.NO_CHECKPOINT_SECONDS else 137

    watched = [Watched(RunDirectory(tmp_path), rank, host) for rank, host in enumerate(HOSTS)]
    yield Together(watched, 600, stop)
    for one in watched:
        one.close()


def after(seconds: float, action: Callable[[], None]) -> Callable[[], None]:
    """A poll that does something once so much time has passed."""
    start = time.monotonic()

    def poll() -> None:
        if time.monotonic() - start > seconds:
            action()

    return poll


def test_both_to_their_end(together: Together, said: Said) -> None:
    assert together.watch(None, after(0.05, lambda: said.update(dict.fromkeys(HOSTS, 0)))) is None


def test_a_bad_end_ends_the_other_and_is_told(together: Together, said: Said) -> None:
    said["ssh://b"] = 4
    bad = together.watch(None, lambda: None)
    assert bad is not None
    assert (bad.code, bad.words) == (4, "node 1 (ssh://b): no more disk")
    assert said["ssh://a"] == 137


def test_a_host_that_is_silent_while_the_other_answers_is_lost(
    together: Together, said: Said
) -> None:
    said["ssh://b"] = SILENT
    bad = together.watch(None, lambda: None)
    assert bad is not None
    assert bad.words == "node 1 (ssh://b) does not answer any more"
    assert said["ssh://a"] == 137


def test_where_all_are_silent_this_machine_is_cut_off(together: Together, said: Said) -> None:
    """A laptop without a network for a while does not end a run."""
    said.update(dict.fromkeys(HOSTS, SILENT))
    done = dict.fromkeys(HOSTS, 0)
    assert together.watch(None, after(0.4, lambda: said.update(done))) is None


def test_a_stop_does_not_wait_for_hosts_that_are_gone(together: Together, said: Said) -> None:
    said.update(dict.fromkeys(HOSTS, SILENT))
    asked = StopSignals()
    asked.asked = True
    bad = together.watch(asked, lambda: None)
    assert bad is not None
    assert "does not answer any more" in bad.words


def test_a_stop_reaches_both_with_time_to_save(together: Together, said: Said) -> None:
    asked = StopSignals()
    asked.asked = True
    assert together.watch(asked, lambda: None) is None
    assert set(said.values()) == {75}


def test_a_container_that_was_removed_by_somebody_has_ended(together: Together, said: Said) -> None:
    said["ssh://a"] = GONE
    bad = together.watch(None, lambda: None)
    assert bad is not None
    assert "is gone" in bad.words
