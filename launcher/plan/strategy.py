"""Which strategy: the documented simple rule behind `auto`, and what a named one needs.

Rule, first match wins: one GPU -> single. Where the run fits in each GPU with the whole
model on it, or memory is unknown and only an adapter is trained -> ddp (least traffic).
Otherwise -> fsdp. An 8-bit base cannot be sharded, so it is always ddp.
"""

from __future__ import annotations

from collections.abc import Callable

from launcher.errors import PlanRefused
from launcher.plan.types import Topology

ZERO = ("zero1", "zero2", "zero3")


def choose_strategy(
    topology: Topology,
    *,
    trains_adapter: bool,
    quantization: str,
    offload: str,
    fits: Callable[[str], bool | None],
) -> tuple[str, str]:
    """A strategy and the reason, for `strategy: auto`.

    Args:
        topology: ranks and nodes.
        trains_adapter: False for full fine-tuning.
        quantization: none, nf4 or 8bit.
        offload: none, optimizer or all.
        fits: whether a strategy fits in memory; None where that is unknown.
    """
    if offload != "none":
        stage = "zero3" if offload == "all" else "zero2"
        return stage, f"offload {offload} is DeepSpeed's: {stage}"
    if topology.gpus == 1:
        return "single", "one GPU: nothing to distribute"
    if topology.device == "cpu":
        return "ddp", "ranks on CPU share one memory: replicated is simplest"
    if quantization == "8bit":
        return "ddp", "an 8-bit base cannot be sharded"
    verdict = fits("ddp")
    if verdict:
        return "ddp", "the whole run fits on each GPU: least communication"
    if verdict is None and trains_adapter:
        return "ddp", "only an adapter is trained, and memory is unknown"
    reason = "does not fit whole on each GPU" if verdict is False else "memory is unknown"
    return "fsdp", f"sharded: {reason}"


def check_strategy(strategy: str, topology: Topology, offload: str) -> Topology:
    """The topology under a named strategy; for hsdp with its mesh.

    Raises:
        PlanRefused: where the number of GPUs cannot carry the strategy.
    """
    gpus = topology.gpus
    if strategy == "single" and gpus > 1:
        raise PlanRefused(
            "strategy_gpus",
            f"strategy single uses one GPU, {gpus} were asked for",
            fix="use --gpus 1, or --strategy auto",
        )
    if gpus == 1 and strategy != "single" and not (strategy in ZERO and offload != "none"):
        raise PlanRefused(
            "strategy_gpus",
            f"strategy {strategy} needs at least two GPUs",
            why="there is nothing to distribute over one",
            fix="use --strategy single (or auto), or more --gpus",
        )
    if strategy != "hsdp":
        return topology
    return _hybrid_mesh(topology)


def _hybrid_mesh(topology: Topology) -> Topology:
    """Shard inside a node, replicate across nodes; on one node, two replicas."""
    replicas = topology.nodes if topology.nodes > 1 else 2
    if topology.gpus % replicas or topology.gpus // replicas < 2:  # noqa: PLR2004 - a shard group
        raise PlanRefused(
            "strategy_gpus",
            f"strategy hsdp needs groups of at least two GPUs, {topology.gpus} are too few",
            why="it shards inside a group and replicates across groups",
            fix="use --strategy fsdp, or --gpus 4 and more, in even numbers",
        )
    return Topology(
        gpus=topology.gpus,
        nodes=topology.nodes,
        gpus_per_node=topology.gpus_per_node,
        data_parallel_size=topology.data_parallel_size,
        device=topology.device,
        replicate_size=replicas,
    )
