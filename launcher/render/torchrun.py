"""The launch of one node's ranks: torchrun's argv and environment, and command.sh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher import __version__
from launcher.plan.types import Topology
from launcher.render.quote import exports, shell_block

HEAD_NODE = "HEAD_NODE:29500"


def torchrun_argv(
    topology: Topology, limits: Mapping[str, Any], run_directory: str, run_name: str
) -> tuple[str, ...]:
    """Argv that starts this node's ranks.

    Args:
        topology: ranks and nodes.
        limits: the worker's: max_restarts, and shutdown_timeout_seconds between torchrun's
            SIGTERM to the ranks and its SIGKILL.
        run_directory: absolute path, or the run directory as the user named it.
        run_name: rendezvous id where there are several nodes.
    """
    rendezvous: tuple[str, ...] = ("--standalone",)
    if topology.nodes > 1:
        rendezvous = (
            f"--nnodes={topology.nodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={HEAD_NODE}",
            f"--rdzv-id={run_name}",
        )
    return ("torchrun", *rendezvous, *rank_options(topology, limits, run_directory))


def rank_options(
    topology: Topology, limits: Mapping[str, Any], run_directory: str, signals: str | None = None
) -> tuple[str, ...]:
    """Torchrun's arguments on one node, without the rendezvous; see `torchrun_argv`.

    `signals`: what torchrun listens to, where it is not what the limits say.
    """
    restarts = limits["max_restarts"]
    return (
        f"--nproc-per-node={topology.gpus_per_node}",
        *([f"--max-restarts={restarts}"] if restarts else []),
        f"--shutdown-timeout={limits['shutdown_timeout_seconds']}",
        f"--signals-to-handle={signals or limits['signals']}",
        "-m",
        "launcher.train",
        run_directory,
    )


def launch_environment(topology: Topology, cpu_count: int, max_restarts: int = 0) -> dict[str, str]:
    """Variables that must stand before torchrun starts.

    OMP_NUM_THREADS: torchrun would set 1. Expandable segments: less fragmentation (torch
    2.9 name). Tokenizers must not fork threads after data-loader workers. A restart needs a
    store of its own: in the shared one restarted ranks find the addresses of the dead ones
    (torch 2.13, dynamic_rendezvous: `Gloo connectFullMesh failed`, or a hang).
    """
    threads = max(1, cpu_count // topology.gpus_per_node)
    environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    if max_restarts:
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if topology.device == "cpu":
        # Spinning threads of one rank starve the other's on a busy machine (10x seen).
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    if topology.device == "cuda":
        environment |= {
            "NCCL_DEBUG": "WARN",
            "PYTORCH_ALLOC_CONF": "expandable_segments:True",
            "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        }
    return environment


def command_script(
    argv: tuple[str, ...], environment: Mapping[str, str], topology: Topology
) -> str:
    """command.sh: the launch on one node, to read and to run by hand."""
    nodes = ""
    if topology.device == "cpu":
        nodes = "# On CPU sftlaunch starts the same ranks by fork: one import for all of them.\n"
    if topology.nodes > 1:
        nodes = (
            f"# Run it on each of the {topology.nodes} nodes, HEAD_NODE replaced by the first.\n"
        )
    return (
        "#!/usr/bin/env bash\n"
        f"# Made by sftlaunch {__version__}. Starts the ranks of one node.\n"
        f"{nodes}"
        "set -euo pipefail\n"
        f"{exports(environment)}"
        f"exec {shell_block(argv)}\n"
    )
