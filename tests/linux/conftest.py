"""Linux guests on a hardware KVM: here where the host has one, else inside the emulated host."""

import pytest
from linux_shell import QUIET, Shell

from hypervisor import Machine, MachineConfig
from hypervisor.host import Kind, quick_kind


@pytest.fixture(autouse=True, scope="session")
def hardware_kvm_is_there():
    assert quick_kind() in {Kind.AMD_V, Kind.VT_X}, "no hardware KVM: run scripts/emulated-host -- pytest tests/linux"


@pytest.fixture
def boot():
    """Return a function that boots a kernel to its shell."""
    machines = []

    def start(kernel="debian", *, prepare=lambda machine: None, **settings):
        settings = {"append": QUIET, "decompress": "host"} | settings
        machine = Machine(MachineConfig(kernel, **settings))
        machines.append(machine)
        prepare(machine)
        machine.start()
        return Shell(machine)

    yield start
    for machine in machines:
        machine.close()
