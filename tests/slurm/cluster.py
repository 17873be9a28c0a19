"""A real Slurm cluster on this machine: munged, slurmctld and a few slurmd's, for root.

Everything lies in a folder of its own and listens on ports of its own; nothing under /etc
is read or changed, and only what was started here is stopped. Nodes share this host, so
what differs between hosts (interfaces, clocks, file systems) is not shown by it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
SYSTEM_PATH = "/usr/sbin:/sbin"
READY_SECONDS = 20.0
STOP_SECONDS = 5.0
POLL_SECONDS = 0.1
GPUS, CPUS, MEMORY_MB = 8, 8, 16_000
SWITCH = "switch"
GPU_MAJOR = 195  # NVIDIA's; nothing opens these
PARTITIONS = """\
PartitionName=main Nodes=ALL Default=YES MaxTime=1-00:00:00 State=UP PriorityTier=10 \
PreemptMode=REQUEUE GraceTime=0
PartitionName=urgent Nodes=ALL MaxTime=1-00:00:00 State=UP PriorityTier=100 PreemptMode=OFF
PartitionName=short Nodes=n1 MaxTime=00:10:00 State=UP PriorityTier=10
"""
# Reacts within a second, keeps jobs apart, needs neither systemd, cgroups nor a database.
CONFIGURATION = """\
ClusterName=sftlaunch-tests
SlurmctldHost={host}({address})
SlurmUser=root
SlurmdUser=root
SlurmctldPort={controller_port}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/pid/slurmctld
SlurmdPidFile={folder}/pid/%n
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/%n
PlugStackConfig={folder}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=100000,\
bf_interval=1,defer_batch
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=30
CompleteWait=0
MinJobAge=300
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=5
MessageTimeout=5
TCPTimeout=2
GresTypes=gpu
{nodes}
{partitions}"""


def missing() -> str | None:
    """Why there can be no cluster here; None where there can."""
    if os.geteuid() != 0:
        return "Slurm tests need root"
    absent = [name for name in DAEMONS if _program(name) is None]
    return f"Slurm tests need {', '.join(absent)} (slurm-wlm, munge)" if absent else None


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:{SYSTEM_PATH}")


@dataclass
class Cluster:
    """A cluster that runs from `start` to `stop`."""

    folder: Path
    nodes: int = 2
    pids: dict[str, int] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """What Slurm's commands need to find this cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def start(self) -> None:
        """Bring it up; raises where its nodes are not idle in time."""
        for name in ("munge", "state", "spool", "pid", "log"):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        self._start_munge()
        self._write_configuration()
        os.environ.update(self.environment)
        self._daemon("slurmctld", "slurmctld", "-c")
        for name in self.names:
            (self.folder / "spool" / name).mkdir()
            self.start_node(name)
        self._until_idle()

    @property
    def names(self) -> list[str]:
        """Names of the nodes."""
        return [f"n{number}" for number in range(1, self.nodes + 1)]

    def start_node(self, name: str) -> None:
        """Start one node's slurmd."""
        self._daemon(name, "slurmd", "-N", name)

    def stop(self) -> None:
        """End all jobs, then exactly the daemons that were started here."""
        with contextlib.suppress(subprocess.SubprocessError):
            jobs = command("squeue", "--noheader", "--format=%A").split()
            if jobs:
                kill = ["scancel", "--signal=KILL", "--full", *jobs]
                subprocess.run(kill, timeout=10, check=False)
            deadline = time.monotonic() + STOP_SECONDS
            while time.monotonic() < deadline and command("squeue", "--noheader"):
                time.sleep(POLL_SECONDS)
        for name in reversed(list(self.pids)):
            self.end(name)

    def end(self, name: str) -> None:
        """Stop one daemon: by its own pid, politely first."""
        pid = self.pids.pop(name)
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            deadline = time.monotonic() + STOP_SECONDS
            while time.monotonic() < deadline:
                if not _runs(pid):
                    return
                time.sleep(POLL_SECONDS)

    def crash(self, name: str) -> None:
        """A power cut of one node: its daemon, its steps and all they started end at once."""
        tasks = with_environment(f"SLURMD_NODENAME={name}")
        steps = {step for task in tasks for step in _ancestors(task, "slurmstepd")}
        for pid in (self.pids.pop(name), *steps, *tasks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        key = folder / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        folder.chmod(0o755)
        self._daemon(
            "munge",
            "munged",
            f"--socket={folder / 'socket'}",
            f"--key-file={key}",
            f"--pid-file={self.folder / 'pid' / 'munge'}",
            f"--log-file={folder / 'log'}",
            f"--seed-file={folder / 'seed'}",
            "--num-threads=2",
        )

    def address(self, name: str) -> tuple[str, str]:
        """Host name and address of a node."""
        return _host(), "127.0.0.1"

    @property
    def controller_address(self) -> str:
        """Where the nodes find the controller."""
        return "127.0.0.1"

    def _write_configuration(self) -> None:
        controller, *ports = free_ports(self.nodes + 1)
        places = [self.address(name) for name in self.names]
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr={address} Port={port} CPUs={CPUS} "
            f"RealMemory={MEMORY_MB} Gres=gpu:{GPUS} State=UNKNOWN"
            for name, (host, address), port in zip(self.names, places, ports, strict=True)
        )
        text = CONFIGURATION.format(
            host=_host(),
            address=self.controller_address,
            folder=self.folder,
            controller_port=controller,
            nodes=nodes,
            partitions=PARTITIONS,
        )
        (self.folder / "slurm.conf").write_text(text, encoding="utf-8")
        # GPUs must be device nodes, or Slurm counts none of them.
        for number in range(GPUS):
            device = os.makedev(GPU_MAJOR, number)
            os.mknod(self.folder / f"gpu{number}", 0o600 | stat.S_IFCHR, device)
        files = f"{self.folder}/gpu[0-{GPUS - 1}]"
        gres = f"NodeName=n[1-{self.nodes}] Name=gpu File={files}\n"
        (self.folder / "gres.conf").write_text(gres, encoding="utf-8")
        (self.folder / "plugstack.conf").touch(mode=0o644)

    def _daemon(self, name: str, program: str, *arguments: str, inside: Sequence[str] = ()) -> None:
        path = _program(program)
        assert path is not None
        file = self.folder / "pid" / name
        file.unlink(missing_ok=True)  # of one that crashed
        subprocess.run([*inside, path, *arguments], check=True, timeout=READY_SECONDS)
        deadline = time.monotonic() + READY_SECONDS
        while not (file.is_file() and file.read_text().strip()):
            assert time.monotonic() < deadline, f"{program} wrote no pid file"
            time.sleep(POLL_SECONDS)
        self.pids[name] = int(file.read_text())

    def _until_idle(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while True:
            idle = command("sinfo", "--noheader", "--states=idle", "--partition=main", "-o%D")
            if idle == str(self.nodes):
                return
            assert time.monotonic() < deadline, (self.folder / "log" / "slurmctld").read_text()
            time.sleep(POLL_SECONDS)


@dataclass
class SeparateHosts(Cluster):
    """Nodes in network, name and mount namespaces of their own: each has its own address.

    What one shared host hides fails here: a name that only one node knows, an interface that
    the others do not reach, a folder that a node does not see.
    """

    holders: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def network(self) -> str:
        """First three parts of the addresses; others of this machine have other ones."""
        return f"10.{200 + os.getpid() % 50}.{os.getpid() // 50 % 250}"

    @property
    def link(self) -> str:
        """This machine's own link to the nodes; a name has 15 characters at most."""
        return f"sft{os.getpid()}"

    @property
    def controller_address(self) -> str:
        return f"{self.network}.1"

    def address(self, name: str) -> tuple[str, str]:
        return name, f"{self.network}.{10 + int(name[1:])}"

    def start(self) -> None:
        """Make the network, then the cluster in it."""
        # A bridge in a namespace of its own: the firewall of this machine does not see it.
        self._hold(SWITCH, "exec sleep infinity", "--net")
        self.within(SWITCH, "ip", "link", "add", "bridge", "type", "bridge")
        self.within(SWITCH, "ip", "link", "set", "bridge", "up")
        peer = ("peer", "name", "uplink", "netns", self._pid(SWITCH))
        run("ip", "link", "add", self.link, "type", "veth", *peer)
        run("ip", "address", "add", f"{self.controller_address}/24", "dev", self.link)
        run("ip", "link", "set", self.link, "up")
        self.within(SWITCH, "ip", "link", "set", "uplink", "master", "bridge", "up")
        hosts = [self.address(name) for name in self.names]
        lines = [f"{address} {name}" for name, address in hosts]
        lines += ["127.0.0.1 localhost", f"{self.controller_address} {_host()}"]
        (self.folder / "hosts").write_text("\n".join([*lines, ""]), encoding="utf-8")
        for name in self.names:
            self._make_host(name)
        super().start()

    def _make_host(self, name: str) -> None:
        become = f'hostname {name}; mount --bind "$0" /etc/hosts; exec sleep infinity'
        self._hold(name, become, "--net", "--uts", "--mount")
        ends = ("netns", self._pid(SWITCH), "type", "veth", "peer", "name", "eth0")
        run("ip", "link", "add", name, *ends, "netns", self._pid(name))
        self.within(SWITCH, "ip", "link", "set", name, "master", "bridge", "up")
        self.within(name, "ip", "address", "add", f"{self.address(name)[1]}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            self.within(name, "ip", "link", "set", link, "up")

    def _hold(self, name: str, script: str, *namespaces: str) -> None:
        """A process that does nothing but keep namespaces."""
        argv = ["unshare", *namespaces, "sh", "-c", script, str(self.folder / "hosts")]
        # Its output is nobody's: a reader of ours would wait for it for ever.
        nowhere = subprocess.DEVNULL
        holder = subprocess.Popen(argv, stdin=nowhere, stdout=nowhere, stderr=nowhere)
        self.holders[name] = holder
        deadline = time.monotonic() + READY_SECONDS
        while "sleep" not in Path(f"/proc/{holder.pid}/comm").read_text():
            assert time.monotonic() < deadline, f"no namespaces for {name}"
            time.sleep(POLL_SECONDS)

    def _pid(self, name: str) -> str:
        return str(self.holders[name].pid)

    def within(self, name: str, *argv: str) -> None:
        """Run a command as a node."""
        run(*self._inside(name), *argv)

    def _inside(self, name: str) -> tuple[str, ...]:
        mounts = () if name == SWITCH else ("--uts", "--mount")
        return ("nsenter", "--target", self._pid(name), "--net", *mounts)

    def start_node(self, name: str) -> None:
        self._daemon(name, "slurmd", "-N", name, inside=self._inside(name))

    def stop(self) -> None:
        """End the cluster, then its hosts, then their network."""
        super().stop()
        for holder in self.holders.values():
            holder.kill()
            holder.wait()
        self.holders.clear()
        # It went with its other end's namespace, unless that is still being taken down.
        subprocess.run(["ip", "link", "delete", self.link], check=False, capture_output=True)


def without_namespaces() -> str | None:
    """Why nodes cannot have hosts of their own here; None where they can."""
    for program in ("ip", "unshare", "nsenter"):
        if _program(program) is None:
            return f"there is no {program}"
    link = f"sftx{os.getpid()}"
    argv = ("ip", "link", "add", link, "type", "bridge")
    made = subprocess.run(argv, check=False, capture_output=True)
    if made.returncode:
        return f"no bridge can be made: {made.stderr.decode().strip()}"
    run("ip", "link", "delete", link)
    return None


def run(*argv: str) -> None:
    """A command that must succeed."""
    subprocess.run(argv, check=True, capture_output=True, timeout=READY_SECONDS)


def _host() -> str:
    return socket.gethostname().split(".")[0]


def command(*argv: str) -> str:
    """What one of Slurm's commands prints; empty where it fails."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=20)
    return done.stdout.strip()


def free_ports(number: int) -> list[int]:
    """Ports that nothing listens on now, below the range of outgoing connections."""
    found: list[int] = []
    port = 7000 + os.getpid() % 2000 * 2
    while len(found) < number:
        port += 1
        with contextlib.closing(socket.socket()) as probe, contextlib.suppress(OSError):
            probe.bind(("0.0.0.0", port))
            found.append(port)
    return found


def _runs(pid: int) -> bool:
    """Whether a process lives; one that ended and that nobody waited for does not."""
    try:
        stat_line = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat_line.rpartition(")")[2].split()[0] != "Z"


def with_environment(setting: str) -> list[int]:
    """Processes that have a variable set to a value."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and setting.encode() in (entry / "environ").read_bytes().split(
                b"\0"
            ):
                found.append(int(entry.name))
    return found


def _ancestors(pid: int, name: str) -> list[int]:
    """A process's ancestors whose program has this name."""
    found = []
    while pid > 1:
        try:
            head, _, rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
        except OSError:
            break
        if head.partition("(")[2] == name:
            found.append(pid)
        pid = int(rest.split()[1])
    return found
