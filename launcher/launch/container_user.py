"""Whose a run's files are in a container, and where what is fetched is kept.

A container is not root unless the spec says so, for root has other ways out of it. What it
writes must belong to whoever calls, or for root to somebody who is none.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from launcher.errors import EnvironmentNotReady
from launcher.plan.types import Plan
from launcher.render.docker import Cache, Caller, container_name
from launcher.runs.directory import RunDirectory

# The first user of most systems, and the image's own.
ORDINARY_USER = 1000
# Where what the Hub offers is kept, unless all of it lies below HF_HOME.
CACHE_VARIABLES = ("HF_HUB_CACHE", "HF_DATASETS_CACHE")
OWN_CACHE = "cache"


def container_user(run_directory: Path, said: str | None) -> tuple[int, int]:
    """Numbers of the user and the group inside.

    Args:
        run_directory: absolute; it need not be there.
        said: `docker.user` of the spec.
    """
    if said is not None:
        user, _, group = said.partition(":")
        return int(user), int(group or user)
    if os.geteuid() != 0:
        return os.getuid(), os.getgid()
    # A root that works in somebody's folder works for them.
    there = next(path for path in (run_directory, *run_directory.parents) if path.is_dir())
    owner = there.stat()
    if owner.st_uid != 0:
        return owner.st_uid, owner.st_gid
    return ORDINARY_USER, ORDINARY_USER


def other_groups(user: int, group: int) -> tuple[int, ...]:
    """Further groups of this process, where the container is the same user: shared data."""
    if user != os.getuid() or user == 0:
        return ()
    return tuple(sorted({*os.getgroups()} - {group}))


def caches(user: int, run_directory: Path, hub_names: Iterable[str]) -> tuple[Cache, ...]:
    """Folders of what was fetched and will be.

    This user's own where the container is the same one. Another one may not write there: it
    reads what is complete, and keeps the rest in the run directory.

    Args:
        user: of the container.
        run_directory: absolute.
        hub_names: the Hub's names of model and data, as its cache spells them.
    """
    home = _home()
    if user == os.getuid():
        said = (Cache(os.environ[n], n) for n in CACHE_VARIABLES if os.environ.get(n))
        return (Cache(str(home), "HF_HOME"), *said)
    own = Cache(str(run_directory / OWN_CACHE), "HF_HOME")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    names = list(hub_names)
    if names and all((hub / name / "snapshots").is_dir() for name in names):
        return (own, Cache(str(hub), "HF_HUB_CACHE", writable=False))
    return (own,)


def _home() -> Path:
    """As huggingface_hub finds it (constants.py)."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or f"{base}/huggingface").expanduser()


def hub_names(plan: Plan) -> list[str]:
    """A run's model and data that are names of the Hub, as its cache spells them."""
    data = plan.worker.dataset
    named = {"models": plan.worker.model["path"], "datasets": data["path"] if data else None}
    return [
        f"{kind}--{name.replace('/', '--')}"
        for kind, name in named.items()
        if name and not name.startswith("/")
    ]


def make_ready(run: RunDirectory, caller: Caller, hosts: Sequence[str | None] = ()) -> None:
    """Record a run's container before it starts, for then the record is its own to write.

    Args:
        run: whose files are written.
        caller: whose the container is.
        hosts: daemons that start one each, where it is not the client's own choice.
    """
    for cache in caller.caches:
        if cache.writable:
            _make(cache)
    name = container_name(str(run.path))
    record = {"container": name, **({"hosts": list(hosts)} if hosts else {})}
    run.update_status(state="running", stage="starting", docker=record)
    hand_over(run.path, caller.user, caller.group)


def _make(cache: Cache) -> None:
    try:
        Path(cache.path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentNotReady(
            "cache_unwritable",
            f"the folder for models and data, {cache.path}, cannot be made: {error.strerror}",
            fix=f"set {cache.variable} to a folder that you may write",
        ) from None


def hand_over(run_directory: Path, user: int, group: int) -> None:
    """Give a run's files to the container's user; only root can, and only for another one."""
    if os.geteuid() != 0 or user == 0:
        return
    for path in (run_directory, *run_directory.rglob("*")):
        found = path.lstat()
        if (found.st_uid, found.st_gid) != (user, group):
            os.chown(path, user, group, follow_symlinks=False)


def keep_owner(run_directory: Path) -> None:
    """Give what root has written into a run's folder to the folder's owner."""
    found = run_directory.stat()
    hand_over(run_directory, found.st_uid, found.st_gid)


def refuse_unreadable(paths: Iterable[str], user: int, groups: Iterable[int]) -> None:
    """Refuse a model and data that the container's user may not read.

    What stands above them does not matter: a mount is entered by its own path.

    Raises:
        EnvironmentNotReady: with the first file.
    """
    members = set(groups)
    for name in paths:
        path = Path(name)
        for found in (path, *(path.iterdir() if path.is_dir() else ())):
            if not _may_read(found, user, members):
                raise EnvironmentNotReady(
                    "unreadable",
                    f"{found} cannot be read by user {user}, who the container runs as",
                    fix=f"chmod -R a+rX {name}, or name another user in docker.user",
                )


def _may_read(path: Path, user: int, groups: set[int]) -> bool:
    try:
        found = path.stat()
    except OSError:
        return True  # what is not there is said elsewhere
    shift = 6 if found.st_uid == user else 3 if found.st_gid in groups else 0
    needed = 0o5 if stat.S_ISDIR(found.st_mode) else 0o4
    return user == 0 or (found.st_mode >> shift) & needed == needed
