"""The engine's configuration: shipped policy + run facts -> accelerate.yaml, deepspeed.json, env.

Policy (stage, wrap policy, precision) comes from the files under accelerate_configs and
deepspeed_configs; counts, mesh sizes and offload come from the plan. The environment that
`accelerate launch` would derive from the YAML is derived here from the same mapping, so
that plain torchrun builds equal plugins (tests/engine/test_accelerate_parity.py).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import yaml

from launcher.assets import asset
from launcher.plan.types import Topology

# `fsdp_config` key -> environment variable, as accelerate 1.15 utils/launch.py sets them.
FSDP_VARIABLES = {
    "fsdp_version": "FSDP_VERSION",
    "fsdp_sharding_strategy": "FSDP_SHARDING_STRATEGY",
    "fsdp_reshard_after_forward": "FSDP_RESHARD_AFTER_FORWARD",
    "fsdp_offload_params": "FSDP_OFFLOAD_PARAMS",
    "fsdp_auto_wrap_policy": "FSDP_AUTO_WRAP_POLICY",
    "fsdp_transformer_layer_cls_to_wrap": "FSDP_TRANSFORMER_CLS_TO_WRAP",
    "fsdp_backward_prefetch": "FSDP_BACKWARD_PREFETCH",
    "fsdp_forward_prefetch": "FSDP_FORWARD_PREFETCH",
    "fsdp_state_dict_type": "FSDP_STATE_DICT_TYPE",
    "fsdp_use_orig_params": "FSDP_USE_ORIG_PARAMS",
    "fsdp_sync_module_states": "FSDP_SYNC_MODULE_STATES",
    "fsdp_cpu_ram_efficient_loading": "FSDP_CPU_RAM_EFFICIENT_LOADING",
    "fsdp_activation_checkpointing": "FSDP_ACTIVATION_CHECKPOINTING",
}
# The last collectives of a rank that hangs, written beside its log (torch 2.13 names).
FLIGHT_RECORDER = {
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_FR_DUMP_TEMP_FILE": "{run_directory}/logs/flight-recorder-rank-",
}
# Placeholder in rendered files for the run directory, which only the launcher knows.
RUN_DIRECTORY = "{run_directory}"


@dataclass(frozen=True)
class Engine:
    """What the ranks' engine is configured with."""

    accelerate: Mapping[str, Any]
    """Contents of accelerate.yaml."""
    deepspeed: Mapping[str, Any] | None
    """Contents of deepspeed.json; None without ZeRO."""
    environment: Mapping[str, str]
    """Variables that make plain torchrun build the same engine."""


def decide_engine(
    *,
    strategy: str,
    topology: Topology,
    offload: str,
    mixed_precision: str,
    state_dict_type: str | None,
    layer_class: str | None,
) -> Engine:
    """Lay the run's facts over the strategy's shipped policy.

    Args:
        strategy: a concrete strategy, not auto.
        topology: ranks and nodes.
        offload: none, optimizer or all.
        mixed_precision: no, bf16 or fp16.
        state_dict_type: from the adapter rules; None without FSDP.
        layer_class: decoder layer that FSDP wraps; None leaves it to the model's own list.
    """
    config = copy.deepcopy(_policy(strategy))
    config["num_machines"] = topology.nodes
    config["num_processes"] = topology.gpus
    deepspeed = None
    if config["distributed_type"] == "DEEPSPEED":
        deepspeed = _deepspeed(strategy, offload, topology.device)
        config["deepspeed_config"]["deepspeed_config_file"] = f"{RUN_DIRECTORY}/deepspeed.json"
    else:
        config["mixed_precision"] = mixed_precision
    if "fsdp_config" in config:
        fsdp = config["fsdp_config"]
        fsdp["fsdp_state_dict_type"] = state_dict_type
        fsdp["fsdp_offload_params"] = offload == "all"
        if layer_class:
            fsdp["fsdp_transformer_layer_cls_to_wrap"] = layer_class
    if "parallelism_config" in config:
        mesh = config["parallelism_config"]
        mesh["parallelism_config_dp_replicate_size"] = topology.replicate_size
        mesh["parallelism_config_dp_shard_size"] = topology.gpus // topology.replicate_size
    environment = {**_device_environment(topology.device), **engine_environment(config)}
    return Engine(accelerate=config, deepspeed=deepspeed, environment=environment)


@lru_cache
def _policy(strategy: str) -> dict[str, Any]:
    """The shipped file, read once however many runs a sweep has; never to be changed."""
    text = asset("accelerate_configs", f"{strategy}.yaml").read_text(encoding="utf-8")
    config: dict[str, Any] = yaml.safe_load(text)
    return config


def engine_environment(config: Mapping[str, Any]) -> dict[str, str]:
    """The variables that `accelerate launch` derives from a configuration file."""
    environment: dict[str, str] = {}
    if "mixed_precision" in config:
        environment["ACCELERATE_MIXED_PRECISION"] = str(config["mixed_precision"])
    if "fsdp_config" in config:
        environment["ACCELERATE_USE_FSDP"] = "true"
        for key, value in config["fsdp_config"].items():
            environment[FSDP_VARIABLES[key]] = _text(value)
    if "parallelism_config" in config:
        environment["ACCELERATE_USE_PARALLELISM_CONFIG"] = "true"
        for key, value in config["parallelism_config"].items():
            environment[key.upper()] = str(value)
    if "deepspeed_config" in config:
        section = config["deepspeed_config"]
        environment["ACCELERATE_USE_DEEPSPEED"] = "true"
        environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = section["deepspeed_config_file"]
        environment["ACCELERATE_DEEPSPEED_ZERO3_INIT"] = _text(section["zero3_init_flag"])
    return environment


def _device_environment(device: str) -> dict[str, str]:
    """On GPUs the flight recorder; on CPU what makes accelerate and deepspeed see a CPU.

    Without the latter they fall back to plain DDP, or to one process, without a word
    (accelerate 1.15 state.py; deepspeed 0.19 accelerator/real_accelerator.py).
    """
    if device != "cpu":
        return dict(FLIGHT_RECORDER)
    return {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}


def _deepspeed(strategy: str, offload: str, device: str) -> dict[str, Any]:
    name = "zero3_offload" if (strategy, offload) == ("zero3", "all") else strategy
    text = asset("deepspeed_configs", f"{name}.json").read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(text)
    zero = config["zero_optimization"]
    if offload == "optimizer":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if device == "cpu":
        for section in ("offload_optimizer", "offload_param"):
            if section in zero:
                zero[section]["pin_memory"] = False  # pinning needs a CUDA driver
    return config


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
