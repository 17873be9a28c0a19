"""Versions of the training stack: those installed, and those that the rules were read from.

Decides nothing. It must not import the packages: their metadata is enough.
"""

from __future__ import annotations

TESTED_VERSIONS: dict[str, str] = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "trl": "1.16.0",
    "peft": "0.21.2",
    "accelerate": "1.15.0",
    "deepspeed": "0.19.8",
    "bitsandbytes": "0.50.2",
    "datasets": "5.2.0",
}
"""The versions that the launcher's rules and tests hold for."""


def installed_versions() -> dict[str, str]:
    """Version of each package of the training stack that is installed; the others are absent."""
    from importlib import metadata  # noqa: PLC0415 - costs 20 ms that a plan does not need

    present = {
        package.metadata["Name"].lower(): package.version
        for name in TESTED_VERSIONS
        for package in metadata.distributions(name=name)
    }
    return {name: present[name] for name in TESTED_VERSIONS if name in present}
