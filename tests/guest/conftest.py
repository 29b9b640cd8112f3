"""Small guests on whatever KVM there is. Without one these tests fail: then they belong into the emulated host."""

import os
import threading
import time

import pytest

from hypervisor import Machine, MachineConfig

GRACE = 120
"""Seconds that threads may take to end on a busy host: those of a request's answer are nobody's to wait for."""


@pytest.fixture(autouse=True, scope="session")
def kvm_is_there():
    assert os.access("/dev/kvm", os.R_OK | os.W_OK), (
        "no usable /dev/kvm: run scripts/emulated-host -- pytest tests/guest"
    )


@pytest.fixture(autouse=True)
def no_thread_stays():
    """A test closes its machines, and a machine that is closed has no threads."""
    before = set(threading.enumerate())  # of another test: that one has been told
    yield
    deadline = time.monotonic() + GRACE
    while left := [one.name for one in set(threading.enumerate()) - before if one.name.startswith("hv-")]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


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
