"""Machines that move with their disks: at every moment exactly one end has them, and what was done is on them."""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing, nullcontext

import pytest
from test_journal import FOREVER, SIZE, content, done_in, journal, new_disk, what_is_wrong
from test_migration import DOWNTIME, impatient, migrate, stands_still, vanish

from devices.backends.errors import BackendError
from devices.backends.image import open_image
from hypervisor import Machine, MachineConfig
from hypervisor.errors import ConfigError, HostError
from hypervisor.host import is_software_kvm
from hypervisor.migration.disks import TargetDisks
from hypervisor.migration.target import receive
from hypervisor.migration.wire import Kind, Listener, MigrationError, connect
from hypervisor.outcome import Stop

pytestmark = pytest.mark.kvm

TIMEOUT = 120


class Receiver:
    """Takes one machine in a thread; `machine` starts it."""

    def __init__(self, address, **how):
        self._listener = Listener(address)
        self._how = how
        self._result = []
        self._thread = threading.Thread(target=self._main)
        self._thread.start()

    def _main(self):
        machine = None
        try:
            machine = receive(self._listener.accept(TIMEOUT), **self._how)
            machine.start()
            self._result.append(machine)
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            if machine is not None:
                machine.close()
            self._result.append(error)

    def result(self):
        self._thread.join(TIMEOUT)
        self._listener.close()
        return self._result[0]


def wait_for(machine, number):
    deadline = time.monotonic() + TIMEOUT
    while done_in(machine.console.output) < number:
        machine.console.read(timeout=0.1)
        assert time.monotonic() < deadline


def is_locked(path):
    try:
        open_image(str(path)).close()
    except BackendError:
        return True
    return False


def moves(disk, folder, how, where, count=6):
    """Run the journal guest, moving it again and again; return what it said, and the disk that it ended on."""
    chance = random.Random(5)
    said = b""
    machine = journal(str(disk), FOREVER)
    machine.start()
    wait_for(machine, 3)
    for number in range(count):
        time.sleep(chance.random() * 0.05)
        place = where(number)
        receiver = Receiver(f"unix:{folder}/socket{number}", **({} if place is None else {"disks": [str(place)]}))
        migrate(machine, f"unix:{folder}/socket{number}", **how)
        assert machine.wait(TIMEOUT).reason is Stop.MIGRATED
        arrived = receiver.result()
        assert isinstance(arrived, Machine), arrived
        said += machine.console.output
        machine.close()
        machine = arrived
        disk = disk if place is None else place
        assert is_locked(disk)
        wait_for(machine, done_in(said) + 2)
    machine.close()
    return said + machine.console.output, disk


def numbers_in(said):
    """Return the numbers of the lines that were printed whole: the machine may be closed in the middle of one."""
    return [int(line.split()[1]) for line in said.splitlines(keepends=True) if re.fullmatch(rb"DONE \d+\n", line)]


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_a_shared_disk_goes_along(tmp_path, kind):
    disk = new_disk(tmp_path, kind)
    said, _ = moves(disk, tmp_path, {}, lambda _: None)
    assert numbers_in(said) == list(range(1, done_in(said) + 1))
    assert what_is_wrong(content(tmp_path / "copy", disk.read_bytes()), done_in(said)) is None
    assert not is_locked(disk)


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_a_copied_disk_is_whole_at_the_other_end(tmp_path, kind):
    disk = new_disk(tmp_path, kind)
    said, last = moves(disk, tmp_path, {"copy_disks": True}, lambda number: tmp_path / f"copy{number}")
    assert last.name == "copy5"
    assert numbers_in(said) == list(range(1, done_in(said) + 1))
    assert what_is_wrong(last.read_bytes(), done_in(said)) is None
    assert what_is_wrong(content(tmp_path / "copy", disk.read_bytes()), 3) is None  # the source's, as it was left


def test_what_is_written_to_memory_goes_along(tmp_path):
    disk = new_disk(tmp_path, "raw")
    said, _ = moves(f"{disk},overlay=memory", tmp_path, {}, lambda _: None, count=0)
    assert disk.read_bytes() == bytes(SIZE)
    receiver = Receiver(f"unix:{tmp_path}/socket")
    with journal(f"{disk},overlay=memory", FOREVER) as machine:
        machine.start()
        wait_for(machine, 12)
        migrate(machine, f"unix:{tmp_path}/socket")
        said = machine.console.output
    with receiver.result() as machine:
        wait_for(machine, done_in(said) + 3)
        said += machine.console.output
        image = bytearray(SIZE)
        machine.stand_still(lambda: machine.images["blk0"].readv(0, [memoryview(image)]))
        said += machine.console.output[len(said) :]
    assert what_is_wrong(bytes(image), done_in(said)) is None
    assert disk.read_bytes() == bytes(SIZE)


# --- what goes wrong --------------------------------------------------------------------------------------------------


def goes_on(machine, disk, folder):
    """The guest and the disk are still here; both are whole."""
    assert is_locked(disk)
    assert machine.images["blk0"].plain_fd is not None or disk.read_bytes().startswith(b"QFI")
    wait_for(machine, done_in(machine.console.output) + 3)
    machine.close()
    assert what_is_wrong(content(folder / "look", disk.read_bytes()), done_in(machine.console.output)) is None


@pytest.mark.parametrize("copied", [False, True])
def test_a_disk_that_the_target_cannot_have_stays(tmp_path, copied):
    """Another file at the other end; a place that is taken."""
    disk, other = new_disk(tmp_path, "raw"), tmp_path / "other"
    other.write_bytes(b"mine" * (SIZE // 4))
    how = {"disks": [str(other)]} if copied else {"changes": {"disks": [str(other)]}}
    receiver = Receiver(f"unix:{tmp_path}/socket", **how)
    machine = journal(str(disk), FOREVER)
    machine.start()
    wait_for(machine, 2)
    with pytest.raises(MigrationError, match="cannot make" if copied else "is not the source's") as caught:
        migrate(machine, f"unix:{tmp_path}/socket", copy_disks=copied)
    assert caught.value.is_certain
    assert isinstance(receiver.result(), ConfigError if copied else HostError)
    assert other.read_bytes() == b"mine" * (SIZE // 4)
    goes_on(machine, disk, tmp_path)


def test_a_target_that_fails_when_it_has_opened_the_disk(tmp_path, monkeypatch):
    """Between GO and MINE: it closes the disk first, and says so then."""
    disk = new_disk(tmp_path, "raw")
    take_over = TargetDisks.take_over

    def fail(self, *arguments):
        take_over(self, *arguments)
        assert is_locked(disk)
        raise HostError("no more")

    monkeypatch.setattr(TargetDisks, "take_over", fail)
    receiver = Receiver(f"unix:{tmp_path}/socket")
    machine = journal(str(disk), FOREVER)
    machine.start()
    wait_for(machine, 2)
    with pytest.raises(MigrationError, match="no more"):
        migrate(machine, f"unix:{tmp_path}/socket")
    assert isinstance(receiver.result(), HostError)
    goes_on(machine, disk, tmp_path)


@pytest.mark.parametrize("has_it", [False, True])
def test_a_target_that_falls_silent_has_the_guest_if_it_has_the_disk(tmp_path, monkeypatch, has_it):
    """Otherwise nobody knows: the disk is here again, and the guest stands still."""
    disk = new_disk(tmp_path, "raw")
    listener, hold = Listener("tcp:127.0.0.1:0"), threading.Event()
    impatient(monkeypatch, 1)

    def take():
        with closing(open_image(str(disk))) if has_it else nullcontext():
            hold.wait()

    thread = threading.Thread(target=vanish, args=(listener, take))
    thread.start()
    machine = journal(str(disk), FOREVER)
    machine.start()
    wait_for(machine, 2)
    with pytest.raises(MigrationError, match="word is missing") as caught:
        migrate(machine, listener.address, downtime=DOWNTIME)
    if has_it:
        assert "cannot be opened again" in str(caught.value)
        assert not caught.value.is_certain
        assert machine.wait(TIMEOUT).status == 3
        machine.close()
    else:
        assert not caught.value.is_certain
        stands_still(machine)
        machine.resume()
        goes_on(machine, disk, tmp_path)
    hold.set()
    thread.join()
    listener.close()


def test_a_disk_with_a_fault_does_not_move(tmp_path):
    with journal(str(new_disk(tmp_path, "raw")), FOREVER) as machine:
        machine.images["blk0"].fault("slow", seconds=0.001)
        machine.start()
        listener = Listener(f"unix:{tmp_path}/socket")
        with pytest.raises(ConfigError, match="fault armed"):
            migrate(machine, f"unix:{tmp_path}/socket")
        listener.close()
        wait_for(machine, done_in(machine.console.output) + 1)


def test_a_disk_that_is_gone_at_the_target(tmp_path):
    disk = new_disk(tmp_path, "raw")
    receiver = Receiver(f"unix:{tmp_path}/socket", changes={"disks": [str(tmp_path / "nothing")]})
    machine = journal(str(disk), FOREVER)
    machine.start()
    with pytest.raises(MigrationError, match="is not here"):
        migrate(machine, f"unix:{tmp_path}/socket")
    assert isinstance(receiver.result(), ConfigError)
    goes_on(machine, disk, tmp_path)


PROGRAM = """
import sys
from hypervisor.migration.target import receive
from hypervisor.migration.wire import Listener
listener = Listener(sys.argv[1])
print("ready", flush=True)
with receive(listener.accept(120), disks=sys.argv[2:]) as machine:
    machine.start()
    print("mine", flush=True)
    while True:
        sys.stdout.buffer.write(machine.console.read(timeout=1))
        sys.stdout.flush()
"""


def attempt(machine, address, **how):
    """Move a machine; return whether it moved, which must be certain."""
    try:
        migrate(machine, address, **how)
    except MigrationError as error:
        if not error.is_certain:
            raise
        return False
    return True


@pytest.mark.parametrize("copied", [False, True])
def test_a_target_killed_at_a_random_moment_leaves_one_owner_and_a_whole_disk(tmp_path, copied):
    chance = random.Random(7)
    here = there = 0
    whole = TIMEOUT  # the first one is killed when it has arrived, and says how long that takes here
    least = 14 if is_software_kvm() else 5
    for number in range(4 * least):
        if number >= least and here:
            break
        disk = new_disk(tmp_path, ("raw", "qcow2")[number % 2])
        other = tmp_path / f"other{number}"
        address = f"unix:{tmp_path}/socket{number}"
        command = [sys.executable, "-c", PROGRAM, address, *([str(other)] * copied)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            killer = threading.Timer(chance.random() * 1.3 * whole, process.send_signal, [signal.SIGKILL])
            machine = journal(str(disk), FOREVER)
            machine.start()
            wait_for(machine, 2)
            if number:
                killer.start()
            began = time.monotonic()
            moved = attempt(machine, address, copy_disks=copied)
            if moved:
                whole = min(whole, time.monotonic() - began)  # on a busy host the first may take long
            if number:
                killer.join()
            else:
                process.kill()
            if not moved:
                assert b"mine" not in process.stdout.read()
                goes_on(machine, disk, tmp_path)
                here += 1
            else:
                machine.close()
                said = machine.console.output + process.stdout.read()
                file = other if copied else disk
                assert what_is_wrong(content(tmp_path / "look", file.read_bytes()), done_in(said)) is None
                there += 1
        os.unlink(disk)
    assert here, "it never died early enough"
    assert there
    print(f"{here} stayed, {there} moved")


# --- an enemy at the other end ----------------------------------------------------------------------------------------


def hello(disk, **changes):
    with Machine(MachineConfig("virtio-journal", ram_mib=4, virtio="mmio", disks=[str(disk)])) as machine:
        form = {"version": 1, "program": "x", **machine.describe()}
    facts = {"size": SIZE, "readonly": False, "block_size": 512, "cluster_size": 4096} | changes
    return form | {"disks": {"copied": True, "images": {"blk0": facts}, "paths": form["config"]["disks"]}}


@pytest.mark.parametrize(
    "changes",
    [{"size": -512}, {"size": 100}, {"size": 1 << 60}, {"size": "x"}, {"block_size": 0}, {"cluster_size": 1 << 40}],
)
def test_a_disk_that_is_none_is_refused(tmp_path, monkeypatch, changes):
    disk = new_disk(tmp_path, "raw")
    monkeypatch.chdir(tmp_path)
    receiver = Receiver(f"unix:{tmp_path}/socket")
    wire = connect(f"unix:{tmp_path}/socket")
    wire.send(Kind.HELLO, hello(disk, **changes))
    assert wire.receive().kind is Kind.REFUSED
    wire.close()
    assert isinstance(receiver.result(), MigrationError)
    assert os.listdir(tmp_path) == ["disk"]


@pytest.mark.parametrize(
    "form",
    [
        {"disk": "blk1", "offset": 0},
        {"disk": "blk0", "offset": -512},
        {"disk": "blk0", "offset": SIZE},
        {"disk": "blk0", "offset": 7},
        {"disk": "blk0", "offset": "x"},
        {"disk": ["blk0"], "offset": 0},
        {},
    ],
)
def test_a_part_that_belongs_nowhere_is_refused_and_leaves_nothing(tmp_path, monkeypatch, form):
    disk = new_disk(tmp_path, "raw")
    monkeypatch.chdir(tmp_path)
    receiver = Receiver(f"unix:{tmp_path}/socket")
    wire = connect(f"unix:{tmp_path}/socket")
    wire.send(Kind.HELLO, hello(disk))
    assert wire.receive().kind is Kind.READY
    assert (tmp_path / "disk-blk0.raw").exists()
    wire.send(Kind.DISK, form, [memoryview(bytes(512))])
    assert wire.receive().kind is Kind.REFUSED
    wire.close()
    assert isinstance(receiver.result(), MigrationError)
    assert os.listdir(tmp_path) == ["disk"]
