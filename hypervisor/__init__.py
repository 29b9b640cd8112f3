"""A trap-and-emulate virtual machine monitor on KVM.

    from hypervisor import Machine, MachineConfig

    with Machine(MachineConfig(kernel="debian", cpus=2)) as machine:
        machine.start()
        machine.console.expect("# ")

The public names are imported when they are first used, so that a command pays only for what it needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hypervisor.config import MachineConfig
    from hypervisor.console import Console, ConsoleTimeout
    from hypervisor.errors import ConfigError, HostError, ImageError, KvmError, SnapshotError, VmmError
    from hypervisor.machine import Machine
    from hypervisor.network import Network
    from hypervisor.outcome import Outcome, Stop

__version__ = "0.1.0"

_WHERE = {
    "ConfigError": "errors",
    "Console": "console",
    "ConsoleTimeout": "console",
    "HostError": "errors",
    "ImageError": "errors",
    "KvmError": "errors",
    "Machine": "machine",
    "MachineConfig": "config",
    "Network": "network",
    "Outcome": "outcome",
    "SnapshotError": "errors",
    "Stop": "outcome",
    "VmmError": "errors",
}

__all__ = [
    "ConfigError",
    "Console",
    "ConsoleTimeout",
    "HostError",
    "ImageError",
    "KvmError",
    "Machine",
    "MachineConfig",
    "Network",
    "Outcome",
    "SnapshotError",
    "Stop",
    "VmmError",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(import_module(f"hypervisor.{_WHERE[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'hypervisor' has no attribute {name!r}")
