"""Small guests on whatever KVM there is. Without one these tests fail: then they belong into the emulated host."""

import os

import pytest

from hypervisor import Machine, MachineConfig


@pytest.fixture(autouse=True, scope="session")
def kvm_is_there():
    assert os.access("/dev/kvm", os.R_OK | os.W_OK), (
        "no usable /dev/kvm: run scripts/emulated-host -- pytest tests/guest"
    )


@pytest.fixture
def machine_of():
    """Return a maker of machines from real-mode code or a kernel's name, closed when the test ends."""
    machines = []

    def make(code, **settings):
        settings = {"flat": 16, "ram_mib": 2, "debug_exit": "raw"} | settings
        machine = Machine(MachineConfig(code if isinstance(code, str) else bytes(code), **settings))
        machines.append(machine)
        return machine

    yield make
    for machine in machines:
        machine.close()
