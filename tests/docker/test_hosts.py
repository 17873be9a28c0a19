"""A run on several Docker hosts: started, stopped, ended and refused together."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher.launch.container_user import make_ready
from launcher.plan.types import plan_from_json
from launcher.render.docker import VERSION_LABEL, Caller, docker_argv
from launcher.render.docker_place import Place
from launcher.render.files import run_files
from launcher.runs.directory import RunDirectory
from launcher.spec.load import load_spec
from tests.docker.conftest import Contained, popen, recipe, sft
from tests.docker.engine import IMAGE, SYSTEM_PATH, Engine

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1200)]
SAME_CURVE = 1e-5
STEPS = 24
PREEMPTED = 75
PORT = 29_871
# A host must say something within this; docker.ask waits 20 s.
ANSWER_SECONDS = 40.0  # on a machine that has other things to do
OTHER, MISSING = "sftlaunch:on-one-host", "sftlaunch:on-the-first-host"
TWO_NODES = ("--gpus=2", "--nodes=2", "--strategy=fsdp")
# A folder that the second host has under the same name, and with nothing in it.
HIDE = 'mount -t tmpfs none "$0" && exec "$@"'


@dataclass(frozen=True)
class Hosts:
    """Two daemons with the same image, as two machines."""

    first: Engine
    second: Engine
    hidden: Path
    """A folder whose content the second one does not see."""

    @property
    def both(self) -> tuple[Engine, Engine]:
        return self.first, self.second

    @property
    def flags(self) -> tuple[str, ...]:
        return tuple(f"--docker-host=unix://{engine.socket}" for engine in self.both)

    @property
    def containers(self) -> str:
        return "".join(engine.docker("ps", "--all", "--quiet") for engine in self.both)


@pytest.fixture(scope="module")
def hosts(engine: Engine) -> Iterator[Hosts]:
    folder = Path(tempfile.mkdtemp(prefix="sftlaunch-docker-"))
    hidden = folder / "hidden"
    hidden.mkdir()
    within = ("unshare", "--mount", "sh", "-c", HIDE, str(hidden))
    second = Engine(folder / "second", number=1, within=within)
    try:
        carry_image(engine, second)
        yield Hosts(engine, second, hidden)
    finally:
        second.stop()
        subprocess.run(["rm", "-rf", "--one-file-system", str(folder)], check=True)


def carry_image(source: Engine, target: Engine) -> None:
    """Start a daemon with another one's images: its layers linked, where they are plain folders.

    Layers are never written to. `docker save | docker load` reads and writes all of them.
    """
    layers, images = (source.folder / "data" / name for name in ("overlay2", "image"))
    if layers.is_dir() and images.is_dir():
        data = target.folder / "data"
        data.mkdir(parents=True)
        # The daemon has mounted its folder onto itself, and there are no links across mounts.
        link = 'umount --lazy "$1" || true; cp -a "$1/image" "$2"; cp -a --link "$1/overlay2" "$2"'
        run_quietly(
            *("unshare", "--mount", "sh", "-euc", link, "sh", str(layers.parent), str(data))
        )
    target.start()
    if not target.docker("image", "inspect", IMAGE):
        carry = f"docker save {IMAGE} | docker --host=unix://{target.socket} load"
        subprocess.run(["bash", "-euo", "pipefail", "-c", carry], check=True, timeout=600)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, engine: Engine) -> dict[int, float]:
    """The curve of one process outside that nobody disturbed."""
    output = tmp_path_factory.mktemp("alone") / "run"
    done = sft(*recipe(STEPS), "--gpus=1", f"--output={output}")
    assert done.returncode == 0, done.stderr
    return Contained(RunDirectory(output), engine).losses


def same_curve(found: dict[int, float], expected: dict[int, float]) -> None:
    assert found.keys() == expected.keys()
    worst = max(abs(found[step] - expected[step]) for step in expected)
    assert worst < SAME_CURVE


OnHosts = Callable[..., Contained]


@pytest.fixture
def on_hosts(hosts: Hosts, tmp_path: Path) -> Iterator[OnHosts]:
    """Start the recipe tiny on both hosts, watched; nothing may be left of it."""
    started: list[Contained] = []

    def start(*flags: str, steps: int = STEPS) -> Contained:
        output = tmp_path / "run"
        process = popen(*recipe(steps), *TWO_NODES, *hosts.flags, f"--output={output}", *flags)
        started.append(Contained(RunDirectory(output), hosts.first, process))
        return started[-1]

    yield start
    for one in started:
        assert one.process is not None
        one.process.kill()
        one.process.wait()
        for engine in hosts.both:
            engine.docker("rm", "--force", one.name)


# --- runs ----------------------------------------------------------------------------------


def test_stopped_cancelled_and_resumed_to_the_same_curve(
    on_hosts: OnHosts, hosts: Hosts, uninterrupted: dict[int, float]
) -> None:
    one = on_hosts()
    one.until_step(2)
    assert all(len(engine.docker("ps", "--quiet").split()) == 1 for engine in hosts.both)
    assert "running" in sft("status", str(one.run.path)).stdout
    assert sft("logs", str(one.run.path), "--rank=1").returncode == 0
    assert one.process is not None
    os.killpg(one.process.pid, signal.SIGINT)
    code, words = one.wait()
    assert code == PREEMPTED, words
    assert (hosts.containers, one.status["state"]) == ("", "preempted"), words
    saved = one.saved
    assert 2 <= saved == max(one.losses) < STEPS

    again = sft("resume", str(one.run.path), *hosts.flags, "--detach")
    assert again.returncode == 0, again.stderr
    one.until_step(saved + 2)
    twice = sft("resume", str(one.run.path), *hosts.flags)
    assert (twice.returncode, "is running" in twice.stderr) == (4, True), twice.stderr
    done = sft("cancel", str(one.run.path))
    assert (done.returncode, "is whole" in done.stdout) == (0, True), done.stderr
    assert (hosts.containers, one.status["state"]) == ("", "preempted")
    assert saved < one.saved < STEPS

    last = sft("resume", str(one.run.path), *hosts.flags)
    assert last.returncode == 0, last.stderr
    assert (hosts.containers, one.status["state"]) == ("", "completed")
    assert one.status["attempt"] == 3
    assert "step" in one.run.container_log.read_text()
    same_curve(one.losses, uninterrupted)


def test_a_node_that_is_killed_ends_the_others(on_hosts: OnHosts, hosts: Hosts) -> None:
    one = on_hosts("--set=training.max_steps=10000")
    one.until_step(2)
    hosts.second.docker("kill", one.name)
    code, words = one.wait()
    assert (code, hosts.containers) == (1, ""), words
    errors = [line for line in words.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, words
    assert "failed first: it was ended from outside" in errors[0]
    assert one.status["state"] == "failed"


@pytest.mark.slow
def test_nodes_that_docker_starts_again_find_each_other(
    on_hosts: OnHosts, hosts: Hosts, uninterrupted: dict[int, float]
) -> None:
    one = on_hosts("--set=docker.restarts=5", "--set=checkpoints.every_steps=2")
    one.until("a checkpoint", lambda: one.saved >= 4)
    # Not by `docker kill`, after which a restart policy does not act.
    os.kill(int(hosts.second.docker("inspect", "--format={{.State.Pid}}", one.name)), 9)
    code, words = one.wait()
    assert (code, hosts.containers) == (0, ""), words
    assert one.status["attempt"] >= 2
    assert one.status["resumed_from"].startswith("checkpoint-")
    same_curve(one.losses, uninterrupted)


@pytest.fixture
def network(engine: Engine) -> Iterator[str]:
    """A network on which containers know each other by name."""
    name = f"sft{os.getpid()}"
    assert engine.docker("network", "create", "--opt=com.docker.network.driver.mtu=1400", name)
    yield name
    engine.docker("network", "rm", name)


def test_two_containers_on_a_network(
    engine: Engine, network: str, tmp_path: Path, uninterrupted: dict[int, float]
) -> None:
    """What the scripts of a plan start on two machines, here on one daemon."""
    run = RunDirectory(tmp_path / "run")
    asked = (*recipe(STEPS), *TWO_NODES, "--on=docker", f"--output={run.path}")
    planned = sft("plan", "--json", *asked)
    assert planned.returncode == 0, planned.stderr
    plan = plan_from_json(json.loads(planned.stdout))
    run.create(run_files(plan))
    spec = load_spec(run.spec).spec
    names = [f"{network}-{rank}" for rank in range(2)]
    for rank, name in enumerate(names):
        place = Place(
            rank=rank,
            nodes=2,
            address=name,
            endpoint=f"{names[0]}:{PORT}",
            network=network,
            wait_seconds=60,
        )
        caller = Caller(IMAGE, 1000, 1000, name, place=place)
        if rank == 0:
            make_ready(run, caller)
        argv = docker_argv(plan, spec, str(run.path), caller)
        words = [f"--name={name}" if w.startswith("--name=") else w for w in argv[1:]]
        started = engine.ask(*words)
        assert started.returncode == 0, started.stderr
    try:
        codes = [engine.docker("wait", name) for name in names]
        said = "".join(engine.ask("logs", name).stderr for name in names)
    finally:
        engine.docker("rm", "--force", *names)
    one = Contained(run, engine)
    assert codes == ["0", "0"], said + one.told()
    assert one.status["state"] == "completed"
    same_curve(one.losses, uninterrupted)


def test_scripts_that_were_carried_to_the_nodes(
    hosts: Hosts, tmp_path: Path, uninterrupted: dict[int, float]
) -> None:
    """No launcher attends them: each node's script has all that it needs."""
    run = RunDirectory(tmp_path / "run")
    addresses = "--set=docker.addresses=[127.0.0.1, 127.0.0.2]"
    asked = (*recipe(STEPS), *TWO_NODES, "--on=docker", f"--output={run.path}", addresses)
    planned = sft("plan", "--json", *asked)
    assert planned.returncode == 0, planned.stderr
    files = json.loads(planned.stdout)["files"]
    one = Contained(run, hosts.first)
    try:
        for rank, engine in enumerate(hosts.both):
            done = subprocess.run(
                ["bash", "-s"],
                input=files[f"docker-node-{rank}.sh"],
                env={**os.environ, **engine.environment},
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
        codes = [engine.docker("wait", one.name) for engine in hosts.both]
    finally:
        for engine in hosts.both:
            engine.docker("rm", "--force", one.name)
    assert codes == ["0", "0"], one.told()
    assert one.status["state"] == "completed"
    same_curve(one.losses, uninterrupted)


# --- refusals ------------------------------------------------------------------------------


def refused(output: Path, hosts: Hosts, *flags: str) -> tuple[int, str, str]:
    """Exit code, code and words of a refusal that leaves nothing."""
    done = sft(*recipe(STEPS), *TWO_NODES, f"--output={output}", "--json", *flags)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert not output.exists()
    assert hosts.containers == ""
    code: str = json.loads(done.stdout.splitlines()[-1])["error"]["code"]
    return done.returncode, code, errors[0]


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_host_that_does_not_answer(hosts: Hosts, silent_port: int, tmp_path: Path) -> None:
    first = f"--docker-host=unix://{hosts.first.socket}"
    for url in (
        f"tcp://127.0.0.1:{silent_port}",
        "ssh://nobody@127.0.0.1:1",
        f"unix://{tmp_path}/nothing",
    ):
        started = time.monotonic()
        found = refused(tmp_path / "run", hosts, first, f"--docker-host={url}")
        assert time.monotonic() - started < ANSWER_SECONDS
        assert found[:2] == (4, "docker_down")
        assert f"the Docker daemon of {url} does not answer" in found[2]


def test_one_daemon_by_two_names(hosts: Hosts, tmp_path: Path) -> None:
    link = tmp_path / "socket"
    link.symlink_to(hosts.first.socket)
    found = refused(tmp_path / "run", hosts, hosts.flags[0], f"--docker-host=unix://{link}")
    assert found[:2] == (2, "docker_hosts")
    assert "are the same Docker daemon" in found[2]


@pytest.mark.parametrize("name", [MISSING, OTHER])
def test_an_image_that_one_host_lacks(name: str, hosts: Hosts, tmp_path: Path) -> None:
    # A daemon that is kept from session to session has it from the last one.
    hosts.second.docker("rmi", "--no-prune", name)
    hosts.first.docker("tag", IMAGE, name)
    if name == OTHER:
        label = f"LABEL {VERSION_LABEL}=0.0.1"
        program = str(hosts.second.folder / "bin" / "docker")
        subprocess.run(
            [program, "build", f"--tag={name}", "-"],
            input=f"FROM {IMAGE}\n{label}\n",
            text=True,
            check=True,
            capture_output=True,
            env={**os.environ, **hosts.second.environment, "DOCKER_BUILDKIT": "0"},
        )
    found = refused(tmp_path / "run", hosts, *hosts.flags, f"--set=docker.image={name}")
    assert found[:2] == (4, "image_version" if name == OTHER else "no_image")
    assert f"docker save {name} | docker --host unix://{hosts.second.socket} load" in found[2]


def test_a_port_that_is_in_use(hosts: Hosts, tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        found = refused(tmp_path / "run", hosts, *hosts.flags, f"--set=docker.port={port}")
    assert found[:2] == (4, "port_in_use")
    assert str(port) in found[2]


def test_files_that_a_host_does_not_see(hosts: Hosts, tmp_path: Path) -> None:
    found = refused(hosts.hidden / "run", hosts, *hosts.flags)
    assert found[:2] == (4, "not_shared")
    assert f"unix://{hosts.second.socket} does not see the run directory" in found[2]
    rows = hosts.hidden / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 40)
    flags = (f"--dataset={rows}", "--set=dataset.eval_path=null", "--set=loss=all")
    found = refused(tmp_path / "run", hosts, *hosts.flags, *flags)
    assert found[:2] == (4, "mount_missing")
    assert f"Docker host unix://{hosts.second.socket}" in found[2]
    assert str(rows) in found[2]


def test_an_address_that_is_not_known(hosts: Hosts, tmp_path: Path) -> None:
    named = "--set=docker.addresses=[nowhere.invalid, 127.0.0.2]"
    found = refused(tmp_path / "run", hosts, *hosts.flags, named)
    assert found[:2] == (4, "address")


# --- ssh -----------------------------------------------------------------------------------


@pytest.fixture
def by_ssh(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[[], None]]:
    """A real sshd on this machine, by which the host `sft-loopback` has the daemon; stops it."""
    folder = tmp_path / "ssh"
    (folder / "bin").mkdir(parents=True)
    server = Server(folder)
    server.start(engine)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    yield server.stop
    server.stop()


@dataclass
class Server:
    """sshd with keys and a user of its own; nothing of this system's ssh is touched."""

    folder: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self, engine: Engine) -> None:
        for name in ("host", "me"):
            run_quietly(
                "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{self.folder}/{name}"
            )
        program, libraries = self._program()
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self._write_settings(port, engine)
        # It asks for a user `sshd` and a folder /run/sshd: it has them to itself.
        users = self.folder / "passwd"
        known = Path("/etc/passwd").read_text()
        users.write_text(f"{known.rstrip()}\nsshd:x:65534:65534::/run/sshd:/usr/sbin/nologin\n")
        prepare = (
            'mount --bind "$0" /etc/passwd && mount -t tmpfs -o mode=755 none /run '
            '&& mkdir /run/sshd && exec "$@"'
        )
        server = (program, "-D", "-e", "-f", str(self.folder / "sshd_config"))
        log = (self.folder / "log").open("wb")
        self.process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", prepare, str(users), *server],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "LD_LIBRARY_PATH": libraries},
        )
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1).close()
                return
            assert self.process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def _program(self) -> tuple[str, str]:
        """sshd, and where its libraries are; unpacked where it is not installed."""
        found = shutil.which("sshd", path=SYSTEM_PATH)
        if found is not None:
            return found, ""
        root = self.folder / "root"
        subprocess.run(
            ["apt-get", "download", "openssh-server", "libwrap0"],
            cwd=self.folder,
            check=True,
            capture_output=True,
            timeout=120,
        )
        for package in self.folder.glob("*.deb"):
            run_quietly("dpkg", "-x", str(package), str(root))
        libraries = {str(path.parent) for path in root.rglob("*.so.*")}
        return str(root / "usr/sbin/sshd"), ":".join(sorted(libraries))

    def _write_settings(self, port: int, engine: Engine) -> None:
        folder = self.folder
        (folder / "sshd_config").write_text(
            f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile none\n"
            f"AuthorizedKeysFile {folder}/me.pub\nStrictModes no\nUsePAM no\n"
            f"PermitRootLogin prohibit-password\n"
            f"SetEnv DOCKER_HOST=unix://{engine.socket} PATH={engine.folder}/bin:{SYSTEM_PATH}\n"
        )
        key = (folder / "host.pub").read_text()
        (folder / "known").write_text(f"[127.0.0.1]:{port} {key}")
        (folder / "config").write_text(
            f"Host sft-loopback\nHostName 127.0.0.1\nPort {port}\nUser root\n"
            f"IdentityFile {folder}/me\nIdentitiesOnly yes\nUserKnownHostsFile {folder}/known\n"
        )
        # Docker calls ssh by its name, with its user's settings: these are the test's.
        ssh = folder / "bin" / "ssh"
        ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/config "$@"\n')
        ssh.chmod(0o755)

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()


def run_quietly(*argv: str) -> None:
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_one_host_by_ssh(by_ssh: Callable[[], None], engine: Engine, tmp_path: Path) -> None:
    output = tmp_path / "run"
    asked = (*recipe(STEPS), "--docker-host=ssh://sft-loopback", f"--output={output}", "--gpus=2")
    done = sft(*asked)
    assert done.returncode == 0, done.stderr
    assert "docker --host=ssh://sft-loopback" in (output / "docker.sh").read_text()
    one = Contained(RunDirectory(output), engine)
    assert (one.there(), one.status["state"]) == (False, "completed")
    by_ssh()
    gone = sft(*asked[:-2], f"--output={tmp_path / 'other'}")
    assert gone.returncode == 4
    assert "Connection refused" in gone.stderr
