"""Machines that go back in place: again and again, running or ended, with their disks."""

import random
import time

import pytest
from test_journal import SIZE, last_of

from hypervisor import Machine, MachineConfig, SnapshotError
from hypervisor.host import is_software_kvm
from hypervisor.outcome import Outcome, Stop

pytestmark = pytest.mark.kvm

TIMEOUT = 120
WORK = "20000" if is_software_kvm() else "30000000"
GUESTS = {
    "checksum": {"kernel": "checksum"},
    "deadline": {"kernel": "checksum", "append": "3000000 1"},
    "four": {"kernel": "late-ap", "cpus": 4, "append": WORK},
    "pit": {"kernel": "timer"},
    "threads": {"kernel": "preempt"},
}
ENDLESS = {"kernel": "dirtier", "ram_mib": 96, "append": "0 5 2000000 24"}
"""It runs until something is typed."""


def config(settings):
    return MachineConfig(**({"ram_mib": 8, "debug_exit": "raw"} | settings))


def stopped(settings, seconds=0.01, *, prepare=lambda: None):
    """Return a machine that stands still after a while, not ended; `prepare` is called before each attempt."""
    while True:
        prepare()
        machine = Machine(config(settings))
        machine.start()
        time.sleep(seconds)
        machine.pause()
        if machine.outcome is None:
            return machine
        machine.close()
        seconds /= 2


@pytest.mark.parametrize("name", GUESTS)
def test_a_guest_ends_in_the_same_way_however_often_it_goes_back(name):
    """At random moments while it runs, and after its end."""
    chance = random.Random(name)
    with Machine(config(GUESTS[name])) as machine:
        status, whole = machine.run(TIMEOUT).status, machine.console.output
    with stopped(GUESTS[name]) as machine:
        first = machine.console.output
        with machine.checkpoint() as checkpoint:
            machine.resume()
            for _ in range(5):
                for _ in range(8):
                    time.sleep(chance.random() * 0.01)
                    checkpoint.reset()
                assert machine.wait(TIMEOUT).status == status
                assert first + machine.console.output == whole
                checkpoint.reset()
            assert checkpoint.resets == 45
        assert machine.wait(TIMEOUT).status == status, "given up, it goes on"
        assert first + machine.console.output == whole


def test_a_paused_machine_stays_paused():
    with stopped(GUESTS["checksum"]) as machine, machine.checkpoint() as checkpoint:
        before = machine.vcpus[0].registers
        machine.resume()
        machine.wait(TIMEOUT)
        machine.pause()
        checkpoint.reset()
        time.sleep(0.02)
        assert machine.outcome is None
        assert machine.vcpus[0].registers == before
        machine.resume()
        assert machine.wait(TIMEOUT).status == 0


@pytest.mark.parametrize("virtio", ["mmio", "pci"])
def test_a_machine_that_was_killed_lives_again(virtio):
    settings = ENDLESS | {"nets": ["none"], "rng": True, "virtio": virtio}
    with stopped(settings) as machine, machine.checkpoint() as checkpoint:
        machine.resume()
        assert machine.kill(Outcome(Stop.KILLED, status=9)).status == 9
        assert checkpoint.reset() >= 0
        assert machine.outcome is None
        machine.console.write("end")
        assert machine.wait(TIMEOUT).status == 0
        assert machine.exits.count


def test_a_dead_guest_lives_again():
    with Machine(config({"kernel": "triple-fault"})) as machine:
        machine.pause()
        machine.start()
        with machine.checkpoint() as checkpoint:
            for _ in range(3):
                machine.resume()
                assert machine.wait(TIMEOUT).reason in {Stop.TRIPLE_FAULT, Stop.INTERNAL_ERROR}
                machine.pause()
                checkpoint.reset()
                assert machine.outcome is None


@pytest.mark.parametrize("kind", ["", ",overlay=memory", ",iops=400"])
def test_disks_go_back_too(tmp_path, kind):
    """What is written after the checkpoint is in memory only, until the checkpoint is given up."""
    transactions = 20
    path = tmp_path / "disk"
    expected = b"REDONE 0 NEXT 1\n" + b"".join(b"DONE %d\n" % n for n in range(1, transactions + 1))
    settings = {"kernel": "virtio-journal", "virtio": "mmio", "disks": [f"{path}{kind}"], "append": str(transactions)}
    with stopped(settings, 0.02, prepare=lambda: path.write_bytes(bytes(SIZE))) as machine:
        first = machine.console.output
        with machine.checkpoint() as checkpoint:
            machine.resume()
            frozen = path.read_bytes()
            for number in range(6):
                time.sleep(0.005 * number)
                checkpoint.reset()
            for _ in range(2):
                assert machine.wait(TIMEOUT).status == 0
                assert first + machine.console.output == expected
                assert path.read_bytes() == frozen
                checkpoint.reset()
            machine.wait(TIMEOUT)
        if "overlay" not in kind:
            assert last_of(path.read_bytes()) == transactions


def test_one_checkpoint_at_a_time():
    with stopped(GUESTS["checksum"]) as machine:
        with machine.checkpoint(), pytest.raises(SnapshotError, match="has a checkpoint"):
            machine.checkpoint()
        machine.checkpoint().close()


def test_a_closed_machine_does_not_go_back():
    machine = stopped(GUESTS["checksum"])
    checkpoint = machine.checkpoint()
    machine.close()
    with pytest.raises(SnapshotError, match="cannot go back"):
        checkpoint.reset()
    checkpoint.close()


def test_a_fault_of_a_device_is_not_hidden_by_the_end_of_a_checkpoint():
    class Broken:
        def read(self, offset, size):
            raise ZeroDivisionError

        def write(self, offset, size, value):
            raise ZeroDivisionError

    with Machine(config({"kernel": "pio-loop"})) as machine:
        machine.bus_pio.claim(0x5658, 4, Broken(), "broken")
        machine.pause()
        machine.start()
        checkpoint = machine.checkpoint()
        machine.resume()
        with pytest.raises(ZeroDivisionError):
            machine.wait(TIMEOUT)
        checkpoint.close()
        with pytest.raises(SnapshotError, match="cannot go back"):
            checkpoint.reset()


def test_a_restored_machine_has_checkpoints(tmp_path):
    with stopped(GUESTS["checksum"]) as machine:
        machine.save(tmp_path / "s")
        machine.resume()
        machine.wait(TIMEOUT)
        whole = machine.console.output
    with Machine.restore(tmp_path / "s", clone=True) as machine:
        machine.pause()
        machine.start()
        with machine.checkpoint() as checkpoint:
            machine.resume()
            for _ in range(3):
                assert machine.wait(TIMEOUT).status == 0
                assert machine.console.output == whole
                checkpoint.reset()
