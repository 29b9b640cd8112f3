"""Guests under pytest: the machines that tests get, and the agent in them for commands and files.

    config = MachineConfig(
        "debian",
        initrd=initramfs("root.cpio", kernel="debian"),
        append=f"console=ttyS0 quiet {RDINIT}",
        ports=[port()],
    )
    with Machine(config) as machine:
        machine.start()
        agent = Agent.of(machine)
        print(agent.run("uname -r").stdout)

The public names are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hypervisor.testing.client import Agent
    from hypervisor.testing.errors import AgentError, CommandError, CommandTimeout, GuestRefusal, OutputLimit
    from hypervisor.testing.failures import GuestEnded, GuestFailed
    from hypervisor.testing.faults import GuestDisk
    from hypervisor.testing.guest import GuestMachine
    from hypervisor.testing.image import RDINIT, initramfs, port, program
    from hypervisor.testing.network import GuestNetwork
    from hypervisor.testing.process import Completed, GuestProcess

_WHERE = {
    "Agent": "client",
    "AgentError": "errors",
    "CommandError": "errors",
    "CommandTimeout": "errors",
    "GuestDisk": "faults",
    "GuestEnded": "failures",
    "GuestFailed": "failures",
    "GuestMachine": "guest",
    "GuestNetwork": "network",
    "Completed": "process",
    "GuestProcess": "process",
    "GuestRefusal": "errors",
    "OutputLimit": "errors",
    "RDINIT": "image",
    "initramfs": "image",
    "port": "image",
    "program": "image",
}

__all__ = [
    "RDINIT",
    "Agent",
    "AgentError",
    "CommandError",
    "CommandTimeout",
    "Completed",
    "GuestDisk",
    "GuestEnded",
    "GuestFailed",
    "GuestMachine",
    "GuestNetwork",
    "GuestProcess",
    "GuestRefusal",
    "OutputLimit",
    "initramfs",
    "port",
    "program",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(import_module(f"hypervisor.testing.{_WHERE[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'hypervisor.testing' has no attribute {name!r}")
