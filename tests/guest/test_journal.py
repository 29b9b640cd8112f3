"""A guest with a write-ahead log on its disk, and power that goes: what was done stays, nothing is there in part.

The format is that of the first lines of guest-kernels/virtio-journal.S, read here without any of the guest's code.
"""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from functools import lru_cache
from struct import iter_unpack, unpack_from

import pytest
from memory_image import MemoryImage

from devices.backends.faults import FaultyImage
from devices.backends.image import open_image
from devices.backends.qcow2_header import create
from hypervisor import Machine, MachineConfig, Stop

pytestmark = pytest.mark.kvm

SECTOR = 512
SIZE = 144 * SECTOR
LOG, LOG_SLOTS, SLOT_SECTORS = 8, 8, 8
PLACES, PLACE_COUNT = 80, 61
TAIL_MAGIC, BEGIN_MAGIC, END_MAGIC = (int.from_bytes(word, "little") for word in (b"TAIL", b"BEGN", b"ENDS"))
FOREVER = 60000
PATIENCE = 200
"""Seconds until a guest that does nothing is given up; a slow host needs some of them."""


# --- what must be on the disk -----------------------------------------------------------------------------------------


def sectors(image, first, count=1):
    return image[first * SECTOR : (first + count) * SECTOR]


@lru_cache(maxsize=4096)
def checksum(data):
    total = 0
    for (bits,) in iter_unpack("<I", data):
        total = (total ^ bits) * 16777619 & 0xFFFFFFFF
    return total


def blocks_of(number):
    """(place, content) of each block of a transaction."""
    for index in range(3 + number % 4):
        place = (5 * number + 3 * index) % PLACE_COUNT
        yield place, (number << 16 | place).to_bytes(4, "little") * (SECTOR // 4)


STATES = [bytes(PLACE_COUNT * SECTOR)]


def state_after(number):
    """Return what all places hold when transactions 1 to `number` have been made, and no others."""
    while len(STATES) <= number:
        state = bytearray(STATES[-1])
        for place, content in blocks_of(len(STATES)):
            state[place * SECTOR : (place + 1) * SECTOR] = content
        STATES.append(bytes(state))
    return STATES[number]


def logged(image, number):
    """Return (place, content) of the blocks of a transaction that is whole in the log, else None."""
    slot = sectors(image, LOG + number % LOG_SLOTS * SLOT_SECTORS, SLOT_SECTORS)
    magic, found, count = unpack_from("<III", slot)
    if (magic, found) != (BEGIN_MAGIC, number) or not 1 <= count <= SLOT_SECTORS - 2:
        return None
    end = (1 + count) * SECTOR
    if unpack_from("<III", slot, end) != (END_MAGIC, number, checksum(slot[:end])):
        return None
    return [(place, sectors(slot, 1 + index)) for index, place in enumerate(unpack_from(f"<{count}I", slot, 12))]


def tail_of(image):
    """Return the oldest transaction that the log may have to redo; 1 on a new disk."""
    magic, tail = unpack_from("<II", image)
    return tail if magic == TAIL_MAGIC else 1


def last_of(image):
    """Return the last transaction that is whole, in the log or in its places."""
    number = tail_of(image)
    while logged(image, number) is not None:
        number += 1
    return number - 1


def what_is_wrong(image, done):
    """Redo a disk's log; return what is wrong then, where `done` transactions were said to be done, or None."""
    places = bytearray(sectors(image, PLACES, PLACE_COUNT))
    last = last_of(image)
    for number in range(tail_of(image), last + 1):
        for place, content in logged(image, number):
            places[place * SECTOR : (place + 1) * SECTOR] = content
    if last < done:
        return f"{done} transactions were done and {last} are there"
    if places != state_after(last):
        return f"after transaction {last} of {done} the places hold something else"
    return None


def has_unfinished(image):
    """Whether a transaction has begun in the log, with some of its blocks, and has no end."""
    number = last_of(image) + 1
    slot = sectors(image, LOG + number % LOG_SLOTS * SLOT_SECTORS, SLOT_SECTORS)
    return unpack_from("<II", slot) == (BEGIN_MAGIC, number)


def needs_redo(image):
    return sectors(image, PLACES, PLACE_COUNT) != state_after(last_of(image))


# --- running the guest ------------------------------------------------------------------------------------------------


def journal(disk, count):
    return Machine(
        MachineConfig("virtio-journal", ram_mib=4, debug_exit="raw", virtio="mmio", disks=[disk], append=str(count))
    )


def done_in(said):
    """Return how many transactions the guest has said are done."""
    return max((int(number) for number in re.findall(rb"DONE (\d+)\n", said)), default=0)


def run(disk, count):
    """Run the guest to its end on a disk image and return what it said."""
    with journal(disk, count) as machine:
        outcome = machine.run(timeout=PATIENCE)
        assert (outcome.reason, outcome.status) == (Stop.GUEST_EXIT, 0), outcome
        return machine.console.output


class Watched(FaultyImage):
    """A disk that is looked at whenever it has changed: these are all the moments at which a power cut differs."""

    def __init__(self, content):
        super().__init__(MemoryImage(content), volatile=True)

    def watch(self, look):
        self.look = look
        return self

    def writev(self, offset, buffers):
        super().writev(offset, buffers)
        self.look()

    def flush(self):
        super().flush()
        self.look()


def cuts_while(disk, count, monkeypatch, rng, known=0):
    """Run the guest on a Watched disk; return (what a power cut leaves, transactions done) for each moment."""
    monkeypatch.setattr("devices.backends.image.open_image", lambda path, **_: disk)
    taken = []
    with journal("faulty", count) as machine:

        def look():
            taken.append((disk.after_cut(seed=rng.getrandbits(64)), max(done_in(machine.console.output), known)))

        disk.watch(look)
        outcome = machine.run(timeout=PATIENCE)
        assert (outcome.reason, outcome.status) == (Stop.GUEST_EXIT, 0), outcome
    monkeypatch.undo()
    return taken


def test_every_transaction_survives_every_power_cut(tmp_path, monkeypatch):
    """Hundreds of cuts judged from outside; dozens of them by the guest itself, whose redo has power cuts as well."""
    rng = random.Random(11)
    taken = cuts_while(Watched(bytes(SIZE)), 60, monkeypatch, rng)
    assert len(taken) > 400
    assert taken[-1][1] == 60
    assert [wrong for cut in taken if (wrong := what_is_wrong(*cut))] == []
    redos = [cut for cut in taken if needs_redo(cut[0])]
    unfinished = [cut for cut in taken if has_unfinished(cut[0])]
    assert len(redos) > 20
    assert len(unfinished) > 20
    for image, _ in [*rng.sample(redos, 18), *rng.sample(unfinished, 12), *rng.sample(taken, 6)]:
        check_redo(image, tmp_path / "disk", more=rng.randint(0, 1))
    for image, _ in rng.sample(redos, 4):
        last = last_of(image)
        again = cuts_while(Watched(image), 1, monkeypatch, rng, known=last)
        assert len(again) > 10
        assert [wrong for cut in again if (wrong := what_is_wrong(*cut))] == []


def check_redo(image, path, more):
    """Start the guest on what a power cut has left: it redoes what is whole, erases what is not, and goes on."""
    path.write_bytes(image)
    tail, last = tail_of(image), last_of(image)
    done = "".join(f"DONE {number}\n" for number in range(last + 1, last + 1 + more))
    assert run(str(path), more).decode() == f"REDONE {last - tail + 1} NEXT {last + 1}\n{done}"
    after = path.read_bytes()
    assert sectors(after, PLACES, PLACE_COUNT) == state_after(last + more)
    assert last_of(after) == last + more
    assert not has_unfinished(after)


DAMAGED = {"number": 4, "place": 12, "block": SECTOR + 99, "last block": 6 * SECTOR - 1, "checksum": 6 * SECTOR + 8}


@pytest.mark.parametrize("at", DAMAGED)
def test_a_transaction_that_was_damaged_is_not_redone(tmp_path, at):
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    run(str(path), 6)  # the tail is at 4: three may have to be redone, the last of them has five blocks
    assert (tail_of(path.read_bytes()), last_of(path.read_bytes())) == (4, 6)
    damaged = bytearray(path.read_bytes())
    damaged[(LOG + 6 * SLOT_SECTORS) * SECTOR + DAMAGED[at]] ^= 1
    path.write_bytes(damaged)
    assert run(str(path), 1).decode() == "REDONE 2 NEXT 6\nDONE 6\n"
    assert sectors(path.read_bytes(), PLACES, PLACE_COUNT) == state_after(6)


def test_a_flush_that_lies_is_caught(monkeypatch):
    """The same cuts can fail."""
    disk = Watched(bytes(SIZE))
    disk.fault("lying-flush")
    taken = cuts_while(disk, 20, monkeypatch, random.Random(5))
    assert any(what_is_wrong(*cut) for cut in taken)


# --- a host that loses its page cache ---------------------------------------------------------------------------------


class FailingHost:
    """A file, and what is left of it when the host's power goes.

    What was in the file when fdatasync was called, and is called done, is on the medium. Of all that was written since,
    by whatever way, each sector may be.

    Attributes:
        cuts: (what is left, what `said` told before), from before and after every fdatasync and wherever else one asks.
    """

    def __init__(self, path, rng, monkeypatch):
        self.path = path
        self.rng = rng
        self.said = lambda: 0
        self.cuts = []
        self.syncs = 0
        self._durable = path.read_bytes()
        self._lock = threading.Lock()
        self._fdatasync = os.fdatasync
        monkeypatch.setattr("os.fdatasync", self.fdatasync)

    def fdatasync(self, fd):
        with self._lock:
            self._cut()
            written = self.path.read_bytes()
            self._fdatasync(fd)
            self._durable = written
            self.syncs += 1
            self._cut()

    def power_cut(self):
        with self._lock:
            self._cut()

    def _cut(self):
        said = self.said()
        written = self.path.read_bytes()
        durable = self._durable.ljust(len(written), b"\0")
        kept = [self.rng.choice((durable, written)) for _ in range(0, len(written), SECTOR)]
        self.cuts.append((b"".join(sectors(image, at) for at, image in enumerate(kept)), said))


def host_cuts(tmp_path, monkeypatch, cache, kind="raw"):
    """Run the guest on a disk in a file; return (the disk after a power cut, transactions done), and the host."""
    path = new_disk(tmp_path, kind)
    host = FailingHost(path, random.Random(2), monkeypatch)
    with journal(f"{path},cache={cache}", FOREVER) as machine:
        host.said = lambda: done_in(machine.console.output)
        machine.start()
        deadline = time.monotonic() + PATIENCE
        while host.said() < 25:
            machine.console.read(timeout=1)
            host.power_cut()
            assert time.monotonic() < deadline
    monkeypatch.undo()
    return [(content(tmp_path / "cut", file), said) for file, said in host.cuts], host


def new_disk(folder, kind):
    """Make an empty disk and return its path."""
    path = folder / "disk"
    if kind == "qcow2":
        create(str(path), SIZE, cluster_bits=9)  # small clusters: there is always one to be allocated
    else:
        path.write_bytes(bytes(SIZE))
    return path


def content(path, file):
    """Return the disk that a raw or qcow2 file holds."""
    path.write_bytes(file)
    image = open_image(str(path), readonly=True)
    data = bytearray(SIZE)
    image.readv(0, [memoryview(data)])
    image.close()
    return bytes(data)


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_what_was_flushed_survives_the_host(tmp_path, monkeypatch, kind):
    taken, host = host_cuts(tmp_path, monkeypatch, "writeback", kind)
    assert host.syncs >= 3 * 25
    assert [wrong for cut in taken if (wrong := what_is_wrong(*cut))] == []


def test_a_cache_that_is_unsafe_is_caught(tmp_path, monkeypatch):
    """cache=unsafe calls no fdatasync: it says so, and here is what it costs."""
    taken, host = host_cuts(tmp_path, monkeypatch, "unsafe")
    assert host.syncs == 0
    assert any(what_is_wrong(*cut) for cut in taken)


# --- a VMM that is killed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_a_killed_vmm_loses_nothing(tmp_path, kind):
    """SIGKILL at random moments, the disk goes on from where it was. The VMM itself holds tables of a qcow2 image.

    Twelve times; on a host so slow that these take long, as often as there is time for, but four times at least.
    """
    disk = new_disk(tmp_path, kind)
    rng = random.Random(3)
    command = [sys.executable, "-m", "hypervisor", "run", "virtio-journal", "--ram", "4", "--virtio", "mmio"]
    command += ["--disk", disk, "--append", str(FOREVER)]
    last = 0
    enough = time.monotonic() + 30
    for number in range(12):
        if number >= 4 and time.monotonic() > enough:
            break
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0) as process:
            said = b""
            wanted = last + rng.randint(1, 12)
            while done_in(said) < wanted:
                chunk = os.read(process.stdout.fileno(), 4096)
                assert chunk, said
                said += chunk
            time.sleep(rng.random() * 0.02)  # anywhere in a transaction, and not only after what was said
            process.send_signal(signal.SIGKILL)
            said += process.stdout.read()
        image = content(tmp_path / "copy", disk.read_bytes())
        assert what_is_wrong(image, done_in(said)) is None
        assert f"NEXT {last + 1}\n" in said.decode()
        last = last_of(image)
