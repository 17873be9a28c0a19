"""How many ranks on how many nodes: two of three numbers give the third."""

from __future__ import annotations

from launcher.errors import PlanRefused
from launcher.plan.types import Topology
from launcher.spec.schema import HardwareSpec


def decide_topology(hardware: HardwareSpec, present_gpus: int, device: str) -> Topology:
    """Resolve GPUs, nodes and GPUs per node.

    Args:
        hardware: what the user said.
        present_gpus: GPUs of this machine, the default where nothing was said.
        device: cuda or cpu.

    Raises:
        PlanRefused: where the three numbers contradict each other.
    """
    nodes, per_node, total = hardware.nodes, hardware.gpus_per_node, hardware.gpus
    if total is None:
        total = (nodes or 1) * (per_node or present_gpus or 1)
    if nodes is None:
        nodes = max(1, total // per_node) if per_node else 1
    if per_node is None:
        per_node = max(1, total // nodes)
    if nodes * per_node != total:
        raise _contradiction(total, nodes, per_node)
    return Topology(
        gpus=total,
        nodes=nodes,
        gpus_per_node=per_node,
        data_parallel_size=total,
        device=device,
    )


def _contradiction(total: int, nodes: int, per_node: int) -> PlanRefused:
    below, above = total // nodes * nodes, -(-total // nodes) * nodes
    near = f"{below} or {above}" if below and below != above else str(above)
    if total % nodes:
        fix = f"use --gpus {near}, or a number of nodes that divides {total}"
    else:
        fix = f"use --gpus-per-node {total // nodes}, or --gpus {nodes * per_node}"
    return PlanRefused(
        "nodes_do_not_divide",
        f"{total} GPUs are not {nodes} nodes x {per_node} GPUs per node",
        fix=fix,
    )
