"""Disks that begin to fail, or take a checkpoint, under a guest that runs on their file by the short cut."""

import contextlib
import re
import time

import pytest

from devices.backends.faults import faulty
from devices.backends.rewind import rewindable
from hypervisor import Machine, MachineConfig, Stop

pytestmark = pytest.mark.kvm

SIZE = 144 * 512
PATIENCE = 200
REQUEST_FAILED = 3
"""The status of the guest virtio-journal when a request was not answered with success."""


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    return path


@pytest.fixture
def machine(disk):
    config = MachineConfig(
        "virtio-journal", ram_mib=4, debug_exit="raw", virtio="mmio", disks=[str(disk)], append="60000"
    )
    with Machine(config) as machine:
        machine.start()
        yield machine


def done(machine):
    """How many transactions the guest says that it has made."""
    return max((int(number) for number in re.findall(rb"DONE (\d+)\n", machine.console.output)), default=0)


def go_on(machine, count=5):
    """Wait until the guest has made some more."""
    wanted = done(machine) + count
    deadline = time.monotonic() + PATIENCE
    while done(machine) < wanted:
        assert machine.outcome is None, machine.outcome
        assert time.monotonic() < deadline
        machine.console.read(timeout=1)


@contextlib.contextmanager
def at_rest(machine):
    """Stop the disk's queues, if the guest has come as far; they ask for a short cut anew when they go on."""
    ((device, runner, lock),) = machine._virtio._made
    with lock:
        runner.stop()
        yield device
        if device.is_active:
            runner.start()


@pytest.mark.parametrize("kind", ["write-error", "flush-error"])
def test_a_guest_meets_a_fault_that_was_armed_while_it_ran(machine, kind):
    go_on(machine)
    with at_rest(machine) as device:
        device.image = faulty(device.image)
        assert device.short_cut() is not None
    go_on(machine)
    with at_rest(machine) as device:
        device.image.fault(kind, after=2)
        assert device.short_cut() is None
    outcome = machine.wait(timeout=PATIENCE)
    assert (outcome.reason, outcome.status) == (Stop.GUEST_EXIT, REQUEST_FAILED)
    assert {hit.kind for hit in device.image.hits} == {kind}


def test_a_guest_goes_on_after_a_fault_is_cleared(machine):
    with at_rest(machine) as device:
        device.image = faulty(device.image)
        device.image.fault("slow", seconds=0.001, count=5)
    go_on(machine)
    assert len(device.image.hits) == 5
    device.image.clear()
    with at_rest(machine):
        assert device.short_cut() is not None
    go_on(machine)


def test_a_checkpoint_under_a_guest_that_runs(machine, disk):
    """What it writes after the checkpoint is not in the file, and gone after the rewind."""
    go_on(machine)
    with at_rest(machine) as device:
        device.image = image = rewindable(device.image)
        image.checkpoint()
        before = disk.read_bytes()
    go_on(machine, 9)  # each place of the log is written again
    with at_rest(machine) as device:
        now = bytearray(SIZE)
        image.readv(0, [memoryview(now)])
        assert now != before == disk.read_bytes()
        image.rewind()
        image.readv(0, [memoryview(now)])
        assert now == before
        image.commit()
        assert device.short_cut() is not None
    go_on(machine)
    assert disk.read_bytes() != before
