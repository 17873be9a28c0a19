"""A real Docker daemon on this machine, and the project's image in it, for root.

Data, socket, bridge and addresses are the daemon's own, and only what was started here is
stopped. No registry is asked: the base image is made by debootstrap, and the build installs
packages the way that pip and apt do on this machine.
"""

from __future__ import annotations

import ast
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import ROOT

PROGRAMS = ("dockerd", "docker", "debootstrap", "ip", "iptables", "iptables-save")
SYSTEM_PATH = "/usr/bin:/bin:/usr/sbin:/sbin"
READY_SECONDS, STOP_SECONDS, POLL_SECONDS = 30.0, 30.0, 0.1
BUILD_SECONDS = 1800
BASE, IMAGE = "sftlaunch-base:tests", "sftlaunch:tests"
# Base, image, the build's layers and what the tests write; measured 6.
NEEDED_BYTES = 10 * 2**30
# From 23 on the client has no builder of its own.
LAST_BUILDING_CLIENT = 22
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
CGROUPS = Path("/sys/fs/cgroup")
# The build runs beside tests that watch the clock: it takes the processors that they leave.
LOW_SHARE = {"cpu/{name}/cpu.shares": "20", "{name}/cpu.weight": "2"}
# Folder in which layers are kept from one session to the next, for who writes tests.
KEPT = os.environ.get("SFTLAUNCH_DOCKER_TESTS")


def missing() -> str | None:
    """Why there can be no daemon here; None where there can."""
    if os.geteuid() != 0:
        return "Docker tests need root"
    absent = [name for name in PROGRAMS if _program(name) is None]
    if absent:
        return f"Docker tests need {', '.join(absent)} (docker.io, debootstrap, iproute2, iptables)"
    if _client() is None:
        return "Docker tests need a client that builds (docker-buildx)"
    if shutil.disk_usage(KEPT or tempfile.gettempdir()).free < NEEDED_BYTES:
        return "Docker tests need 10 GiB for images"
    return None


def _path() -> str:
    return f"{os.environ['PATH']}:{SYSTEM_PATH}"


def _program(name: str) -> str | None:
    return shutil.which(name, path=_path())


def _client() -> str | None:
    """The first Docker client that can build: with buildx, or with a builder of its own."""
    for folder in dict.fromkeys(_path().split(":")):
        program = shutil.which("docker", path=folder)
        if program is None:
            continue
        if _output(program, "buildx", "version").startswith("github.com/docker/buildx"):
            return program
        version = _output(program, "version", "--format={{.Client.Version}}").partition(".")[0]
        if version.isdecimal() and int(version) <= LAST_BUILDING_CLIENT:
            return program
    return None


def _output(*argv: str) -> str:
    """What a command prints, also where it fails afterwards."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout.strip()


@dataclass
class Engine:
    """A daemon that runs from `start` to `stop`."""

    folder: Path
    number: int = 0
    """Tells several daemons of one session apart."""
    nice: int = 19
    """Of the daemon and all its containers: 0 to measure."""
    within: tuple[str, ...] = ()
    """Command that starts the daemon, such as `unshare`."""
    process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What the Docker client needs to find this daemon, and how to find the client."""
        return {
            "DOCKER_HOST": f"unix://{self.socket}",
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
        }

    @property
    def socket(self) -> Path:
        """Where it listens."""
        return self.folder / "socket"

    @property
    def name(self) -> str:
        """Of its bridge, its cgroup and its containerd's namespace; 15 characters at most."""
        return f"sftd{self.number}x{os.getpid()}"

    @property
    def address(self) -> str:
        """Of its bridge; other sessions of this machine have other ones."""
        return f"10.{100 + self.number}.{os.getpid() % 250}.1/24"

    def start(self) -> None:
        """Bring it up; raises where it does not answer in time."""
        (self.folder / "bin").mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        link, client = self.folder / "bin" / "docker", _client()
        assert client is not None
        link.unlink(missing_ok=True)
        link.symlink_to(client)
        _run("ip", "link", "add", self.name, "type", "bridge")
        _run("ip", "address", "add", self.address, "dev", self.name)
        _run("ip", "link", "set", self.name, "up")
        self._make_cgroup()
        argv = [
            *(*self.within, "nice", "-n", str(self.nice), str(_program("dockerd"))),
            *("--data-root", str(self.folder / "data")),
            *("--exec-root", str(self.folder / "exec")),
            *("--pidfile", str(self.folder / "pid")),
            *("--host", f"unix://{self.socket}"),
            *("--bridge", self.name),
            *("--mtu", str(_mtu())),
            *("--cgroup-parent", f"/{self.name}"),
            *("--containerd-namespace", self.name),
            *("--containerd-plugins-namespace", f"{self.name}p"),
        ]
        with (self.folder / "daemon.log").open("ab") as log:
            self.process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PATH": _path()},
                start_new_session=True,
            )
        deadline = time.monotonic() + READY_SECONDS
        while not self.docker("version", "--format={{.Server.Version}}"):
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(POLL_SECONDS)

    def _make_cgroup(self) -> None:
        """A group of its own with a low share, where this machine has cgroups to make."""
        for pattern, share in LOW_SHARE.items():
            file = CGROUPS / pattern.format(name=self.name)
            if file.parents[1].joinpath("cgroup.procs").exists():
                with contextlib.suppress(OSError):
                    file.parent.mkdir(exist_ok=True)
                    file.write_text(share)

    def stop(self) -> None:
        """End its containers, the daemon, and what it has left in the network."""
        if self.process is not None and self.process.poll() is None:
            containers = self.docker("ps", "--all", "--quiet").split()
            if containers:
                self.docker("rm", "--force", *containers)
            for end in (self.process.terminate, self.process.kill):
                end()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(STOP_SECONDS)
                    break
        self._clear()

    def _clear(self) -> None:
        """Remove its rules of the firewall, its bridge and its cgroups."""
        for table in ("nat", "filter"):
            for rule in _output("iptables-save", "-t", table).splitlines():
                words = rule.split()
                if words[:1] == ["-A"] and self.name in words:
                    _output("iptables", "-t", table, "-D", *words[1:])
        _output("ip", "link", "delete", self.name)
        for group in (*CGROUPS.glob(f"*/{self.name}"), CGROUPS / self.name):
            for folder, _, _ in os.walk(group, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)  # noqa: PTH106 - a group's files are not to be removed

    def docker(self, *arguments: str) -> str:
        """What the client prints; empty where it fails."""
        done = self.ask(*arguments)
        return done.stdout.strip() if done.returncode == 0 else ""

    def ask(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """One call of the client."""
        return subprocess.run(
            [str(self.folder / "bin" / "docker"), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env={**os.environ, **self.environment},
        )

    def said(self) -> str:
        """The end of the daemon's log."""
        return (self.folder / "daemon.log").read_text(errors="replace")[-3000:]


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True, timeout=60)


def _mtu() -> int:
    """Of the link to the outside: larger packets may not pass it."""
    for line in Path("/proc/net/route").read_text().splitlines()[1:]:
        link, destination, *_ = line.split()
        if int(destination, 16) == 0:
            return int(Path(f"/sys/class/net/{link}/mtu").read_text())
    return 1500


@dataclass
class Preparation:
    """A daemon and the image, made in the background while other tests run."""

    engine: Engine
    seconds: dict[str, float] = field(default_factory=dict)
    error: BaseException | None = None
    building: subprocess.Popen[bytes] | None = None
    stopped: bool = False

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._make, daemon=True)
        self.thread.start()

    def wait(self) -> Engine:
        """The daemon with the image in it; raises what went wrong."""
        self.thread.join()
        if self.error is not None:
            raise self.error
        return self.engine

    def stop(self) -> None:
        """End it all, also in the midst of a build."""
        self.stopped = True
        if self.building is not None and self.building.poll() is None:
            os.killpg(self.building.pid, signal.SIGTERM)
        self.thread.join()
        self.engine.stop()
        if KEPT is None:
            _output("rm", "-rf", "--one-file-system", str(self.engine.folder))

    def _make(self) -> None:
        try:
            with self._timed("daemon"):
                self.engine.start()
            if not self.engine.docker("image", "inspect", BASE):
                with self._timed("base"):
                    self._call(["bash", "-euo", "pipefail", "-c", _base_script(self.engine)])
            with self._timed("image"), tempfile.TemporaryDirectory() as folder:
                self._call(_build_argv(Path(folder)))
        except BaseException as error:
            self.error = error  # raised again where it is waited for

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[what] = time.monotonic() - started

    def _call(self, argv: list[str]) -> None:
        """A long command with a log of its own."""
        log = self.engine.folder / "build.log"
        with log.open("ab") as stream:
            assert not self.stopped
            self.building = subprocess.Popen(
                ["nice", "-n", "19", *argv],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env={**os.environ, **self.engine.environment, "PYTHONPATH": str(ROOT)},
                start_new_session=True,
            )
            code = self.building.wait(BUILD_SECONDS)
        assert code == 0, log.read_text(errors="replace")[-4000:]


def _base_script(engine: Engine) -> str:
    """Bash that makes the base image: this system's release, its apt sources and certificates."""
    sources, release = _apt_sources()
    root = engine.folder / "base"
    first = sources[0].split()[1]
    listed = "\n".join(sources)
    proxies = "\n".join(
        line for line in _output("apt-config", "dump").splitlines() if "::Proxy" in line
    )
    return f"""
rm -rf {root}; trap 'rm -rf {root}' EXIT
debootstrap --variant=minbase --include=ca-certificates {release} {root} {first}
rm -rf {root}/var/cache/apt/archives/*.deb {root}/var/lib/apt/lists/*
cat > {root}/etc/apt/sources.list <<'END'
{listed}
END
cat > {root}/etc/apt/apt.conf.d/99host <<'END'
{proxies}
END
[ ! -f {CERTIFICATES} ] || cp {CERTIFICATES} {root}{CERTIFICATES}
tar -C {root} --one-file-system -c . | docker import - {BASE}
"""


def _apt_sources() -> tuple[list[str], str]:
    """Lines of sources.list for this system's own release, and its name."""
    settings = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if line
    )
    release = settings["VERSION_CODENAME"].strip('"')
    asked = "$(IDENTIFIER) deb $(REPO_URI) $(RELEASE) $(COMPONENT)"
    lines = {
        line.removeprefix("Packages ")
        for line in _output("apt-get", "indextargets", "--format", asked).splitlines()
        if line.startswith("Packages ") and line.split()[3].startswith(release)
    }
    # The release itself first; what was added to it comes after.
    return sorted(lines, key=lambda line: (line.split()[2] != release, line)), release


def _build_argv(folder: Path) -> list[str]:
    """`image build` with what this machine's pip knows: index, wheels, certificates."""
    settings = _pip_settings()
    argv = [sys.executable, "-m", "launcher", "image", "build", "--cpu"]
    argv += [f"--base={BASE}", f"--tag={IMAGE}"]
    wheels = folder / "wheels"
    wheels.mkdir()
    for place in settings.pop("find-links", "").split():
        for wheel in Path(place).glob("*.whl"):
            (wheels / wheel.name).symlink_to(wheel)
    if any(wheels.iterdir()):
        argv += [f"--find-links={wheels}"]
    certificate = settings.pop("cert", None)
    if certificate is not None:
        argv += [f"--certificates={certificate}"]
    # An index that is a folder here is none in the build.
    indexes = settings.get("extra-index-url", "").split()
    settings["extra-index-url"] = " ".join(i for i in indexes if not i.startswith("file:"))
    lines = [f"{key} = {value}\n" for key, value in settings.items() if value]
    (folder / "pip.conf").write_text("[global]\n" + "".join(lines), encoding="utf-8")
    return [*argv, f"--pip-config={folder / 'pip.conf'}"]


def _pip_settings() -> dict[str, str]:
    """What pip's files and the environment say, the environment last."""
    found = {}
    listed = _output(sys.executable, "-m", "pip", "config", "list").splitlines()
    for line in sorted(listed, key=lambda line: line.startswith(":env:")):
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if section in ("global", "install", ":env:"):
            found[name] = str(ast.literal_eval(value))
    return found
