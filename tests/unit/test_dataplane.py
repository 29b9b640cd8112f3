"""The data paths in C, beside the queue and the models in Python: the same rings, the same answers."""

import contextlib
import ctypes
import mmap
import os
import random
import socket
import threading
import time
from struct import pack, unpack_from

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_virtqueue import BAD
from virtio_driver import F_EVENT_IDX, F_IN_ORDER, F_INDIRECT, INDIRECT, LOW, WRITE, Driver, FakeRam, FakeSignal
from waiting import until

from devices.backends.raw import RawImage
from devices.events import EventLog
from devices.ports import DiskShortCut, GuestFault, TapShortCut
from devices.virtio.block import Block
from devices.virtio.net import Net
from hypervisor.kvm.dataplane import STOPPED, DiskPath, TapPath
from hypervisor.kvm.dirty import Marks
from hypervisor.runner import ThreadRunner

SECTOR, SECTORS = 512, 64
SECONDS = 60
IN, OUT, FLUSH = 0, 1, 4


class Ram(FakeRam):
    """The low range only, in one mapping that C can use."""

    def __init__(self, size=LOW):
        self.map = mmap.mmap(-1, size)
        self.low = self.map
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.ranges = [(0, size, self.address)]
        self.marks = Marks(self.address, size)

    @property
    def is_tracked(self):
        return self.marks.is_on

    def write(self, gpa, data):
        self.view(gpa, len(data))[:] = data  # the guest does

    def written(self, gpa, size):
        self.marks.mark(gpa, size)

    def view(self, gpa, size):
        if size >= 0 and gpa >= 0 and gpa + size <= len(self.map):
            return memoryview(self.map)[gpa : gpa + size]
        raise GuestFault(gpa, size)


class Signal(FakeSignal):
    """Counts through an eventfd, as C fires it."""

    def __init__(self):
        self.fd = os.eventfd(0, os.EFD_NONBLOCK)

    def fileno(self):
        return self.fd

    def fire(self):
        os.eventfd_write(self.fd, 1)

    @property
    def count(self):
        try:
            return os.eventfd_read(self.fd)
        except BlockingIOError:
            return 0


class ByHand:
    """A runner that serves nothing by itself."""

    def start(self):
        pass

    def stop(self):
        pass

    def kick(self, index):
        pass


def driver_of(device, ram, features):
    """A driver whose kicks nobody answers but the test."""
    driver = Driver(device, ram, features=features, start=False)
    driver.runner = ByHand()
    driver.transport._runner = driver.runner
    device.runner = driver.runner
    driver.start()
    driver.signals = [Signal() for _ in device.queues]
    for queue, signal in zip(device.queues, driver.signals, strict=True):
        queue.signal = signal
    return driver


POLL = "7"


def wait_until_idle(thread):
    """Wait until a path's thread sleeps, in a poll(2) that nothing limits; or has ended."""
    end = time.monotonic() + SECONDS
    while thread.is_alive():
        with contextlib.suppress(OSError), open(f"/proc/self/task/{thread.native_id}/syscall") as file:
            words = file.read().split()
            if words[0] == POLL and int(words[3], 16) & 0xFFFF_FFFF == 0xFFFF_FFFF:
                return
        assert time.monotonic() < end
        time.sleep(0.0005)


class Disk:
    """A disk over a file, its driver, and its path."""

    def __init__(self, folder, *, features=F_EVENT_IDX | F_INDIRECT | 1 << 9, size=SECTORS * SECTOR, ram_bytes=LOW):
        self.file = folder / "disk"
        self.file.write_bytes(b"".join(bytes([number & 255]) * SECTOR for number in range(size // SECTOR)))
        self.ram = Ram(ram_bytes)
        self.image = RawImage(str(self.file))
        device = Block("blk0", self.ram, self.image, log=EventLog())
        self.driver = driver_of(device, self.ram, features)
        self.kick_fd = os.eventfd(0)
        self.path = DiskPath(self.ram.ranges, device.queues[0], device.short_cut(), self.kick_fd, marks=self.ram.marks)

    def run(self):
        """Let the path do all that is there now; return what it wants done in Python."""
        wanted = []
        thread = threading.Thread(target=lambda: wanted.append(self.path.run()))
        thread.start()
        wait_until_idle(thread)
        self.path.stop()
        thread.join()
        return wanted[0]

    def request(self, kind, sector, data=b"", room=0, **how):
        return self.driver.send(0, pack("<IIQ", kind, 0, sector) + data, room + 1, **how)

    def close_path(self):
        """Go on with a new path: one that was stopped stays so."""
        self.path.close()
        device = self.driver.device
        self.path = DiskPath(self.ram.ranges, device.queues[0], device.short_cut(), self.kick_fd)

    def close(self):
        self.path.close()
        self.image.close()
        os.close(self.kick_fd)
        os.close(self.driver.signals[0].fd)


@pytest.fixture
def disk(tmp_path):
    disk = Disk(tmp_path)
    yield disk
    disk.close()


def test_a_path_says_that_it_has_fired(disk):
    """Whoever has to know whether an interrupt may be on its way asks for it: C fires behind Python's back."""
    queue = disk.driver.device.queues[0]
    disk.request(IN, 0, room=SECTOR, cuts=(SECTOR,))
    assert queue.cursor[3] == 0
    disk.driver.queues[0].want_interrupt(wanted=False)
    disk.run()
    assert queue.cursor[3] == 0
    disk.close_path()
    disk.request(IN, 0, room=SECTOR, cuts=(SECTOR,))
    disk.driver.queues[0].collect()
    disk.driver.queues[0].want_interrupt(at=1)
    disk.run()
    assert disk.driver.signals[0].count == 1
    assert queue.cursor[3] == 1
    queue.reset()
    assert list(queue.cursor) == [0, 0, 0, 1], "what was fired is on its way, whatever becomes of the queue"


def in_shape(kind, data, room):
    """Descriptors in the common shape: header, data, status."""
    return (16,) if kind == OUT else (room,)


def test_reads_and_writes_of_the_common_shape(disk):
    ours = disk.driver.queues[0]
    head, target = disk.request(IN, 3, room=1024, cuts=(1024,))
    assert disk.run() == STOPPED
    assert ours.collect() == [(head, 1025)]
    assert disk.ram.read(target, 1025) == bytes([3]) * SECTOR + bytes([4]) * SECTOR + b"\0"
    assert disk.path.requests == 1
    assert disk.path.bytes == 1024
    assert disk.driver.signals[0].count == 1


def test_a_write_reaches_the_file(disk):
    head, target = disk.request(OUT, 5, b"w" * SECTOR, cuts=(16,))
    disk.ram.write(target, b"\xff")
    disk.run()
    assert disk.driver.queues[0].collect() == [(head, 1)]
    assert disk.ram.read(target, 1) == b"\0"
    assert disk.file.read_bytes()[5 * SECTOR : 6 * SECTOR] == b"w" * SECTOR


@pytest.mark.parametrize(
    ("kind", "sector", "data", "room"),
    [
        (FLUSH, 0, b"", 0),
        (99, 0, b"", 0),
        (IN, SECTORS, b"", SECTOR),
        (IN, SECTORS - 1, b"", 2 * SECTOR),
        (IN, (1 << 64) - 1, b"", SECTOR),
        (IN, 0, b"", 100),
        (IN, 0, b"", 0),
        (OUT, 0, b"", 0),
        (OUT, 0, b"x" * 100, 0),
        (OUT, SECTORS, b"x" * SECTOR, 0),
        (OUT, 0, b"x" * SECTOR, 7),
    ],
)
def test_everything_else_is_left_untouched_for_the_model(disk, kind, sector, data, room):
    before = disk.file.read_bytes()
    disk.request(kind, sector, data, room, cuts=in_shape(kind, data, room) if room or data else ())
    assert disk.path.run() == 0
    assert disk.driver.queues[0].collect() == []
    assert disk.file.read_bytes() == before
    disk.driver.device.serve(0, most=1)
    assert len(disk.driver.queues[0].collect()) == 1
    assert disk.run() == STOPPED  # and the path goes on behind it


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_chain_is_left_for_the_model_to_judge(disk, name):
    disk.driver.queues[0].offer(BAD[name](disk.driver))
    disk.driver.queues[0].publish()
    assert disk.path.run() == 0
    disk.driver.device.serve(0, most=1)
    assert disk.driver.device.is_broken


def test_an_index_too_far_ahead(disk):
    disk.driver.queues[0].publish(idx=100)
    assert disk.path.run() == 0


@pytest.mark.parametrize("flags", [0, WRITE])
def test_2_7_5_3_2_descriptors_before_an_indirect_table_whose_write_flag_is_ignored(disk, flags):
    ours, target = disk.driver.queues[0], 0x9000
    header = disk.driver.buffer(pack("<IIQ", IN, 0, 3))
    head = ours.chain(
        [(header, 16, False), (target, 512, True), (target + 512, 1, True)], indirect_at=0x80000, direct=1
    )
    ours.write_descriptor(ours.chains[head][1], 0x80000, 32, INDIRECT | flags)
    ours.offer(head)
    ours.publish()
    before = bytes(disk.ram.map)
    assert disk.run() == STOPPED
    assert ours.collect() == [(head, 513)]
    assert disk.ram.read(target, 513) == bytes([3]) * SECTOR + b"\0"
    allowed = {*range(target, target + 513), *range(ours.used, ours.end)}
    after = bytes(disk.ram.map)
    assert {gpa for gpa, (old, new) in enumerate(zip(before, after, strict=True)) if old != new} <= allowed


def test_a_disk_that_broke_in_one_queue_answers_nothing_in_another(tmp_path):
    """2.1.2: until the driver resets the device, which gives it new paths."""
    file = tmp_path / "disk"
    file.write_bytes(bytes(SECTOR))
    ram, image = Ram(), RawImage(str(file))
    device = Block("blk0", ram, image, queues=2, log=EventLog())
    driver = driver_of(device, ram, F_EVENT_IDX | 1 << 9)
    at_rest = threading.Event()

    def make_path(_, group, fds):
        path = DiskPath(ram.ranges, device.queues[group[0]], device.short_cut(), fds[0])
        run = path.run

        def run_and_tell():
            wanted = run()
            if wanted == STOPPED:
                at_rest.set()
            return wanted

        path.run = run_and_tell
        return path

    runner = ThreadRunner(device, make_path, [[0], [1]], pytest.fail)
    runner.start()
    request = pack("<IIQ", IN, 0, 0)

    def ask(seconds):
        driver.send(1, request, SECTOR + 1, cuts=(SECTOR,))
        runner.kick(1)
        for _ in range(seconds * 200):
            if done := driver.queues[1].collect():
                return done
            threading.Event().wait(0.005)
        return []

    assert len(ask(SECONDS)) == 1
    driver.queues[0].publish(idx=1000)
    runner.kick(0)
    until(lambda: driver.transport.status & 64)  # DEVICE_NEEDS_RESET
    assert at_rest.wait(SECONDS)
    assert ask(2) == []
    runner.stop()
    runner.close()
    image.close()
    for signal in driver.signals:
        os.close(signal.fd)


def test_a_file_that_was_cut_short_is_the_models_problem(disk):
    disk.file.write_bytes(bytes(SECTOR))
    _, target = disk.request(IN, 3, room=SECTOR, cuts=(SECTOR,))
    assert disk.path.run() == 0
    disk.driver.device.serve(0, most=1)
    assert disk.ram.read(target + SECTOR, 1) == b"\1"


def test_stop_ends_a_wait_and_stays(disk):
    results = []
    thread = threading.Thread(target=lambda: results.append(disk.path.run()))
    thread.start()
    disk.path.stop()
    thread.join(SECONDS)
    assert results == [STOPPED]
    assert disk.path.run() == STOPPED


def test_a_kick_ends_a_sleep(disk):
    thread = threading.Thread(target=disk.path.run)
    thread.start()
    head, _ = disk.request(IN, 0, room=SECTOR, cuts=(SECTOR,))
    os.eventfd_write(disk.kick_fd, 1)
    until(lambda: disk.driver.signals[0].count)
    disk.path.stop()
    thread.join(SECONDS)
    assert disk.driver.queues[0].collect() == [(head, SECTOR + 1)]


@settings(max_examples=40)
@given(data=st.data())
def test_the_path_and_the_model_answer_alike(tmp_path_factory, data):
    """Requests of any kind, cut anywhere, direct or indirect: the used ring, the answers and the file are the same."""
    features = data.draw(st.sampled_from([0, F_EVENT_IDX, F_INDIRECT, F_EVENT_IDX | F_INDIRECT])) | 1 << 9
    disks = [Disk(tmp_path_factory.mktemp("d"), features=features) for _ in range(2)]
    try:
        for _ in range(data.draw(st.integers(1, 12))):
            kind = data.draw(st.sampled_from([IN, IN, OUT, OUT, FLUSH, 99]))
            sector = data.draw(st.sampled_from([0, 1, 30, SECTORS - 1, SECTORS]))
            count = data.draw(st.integers(0, 3)) * SECTOR
            payload = bytes([data.draw(st.integers(0, 255))]) * count if kind == OUT else b""
            room = count if kind == IN else 0
            cuts = data.draw(st.sampled_from([(), in_shape(kind, payload, room), (7,), (16, 512), (512, 512)]))
            indirect = bool(features & F_INDIRECT) and data.draw(st.booleans())
            answers = []
            for number, disk in enumerate(disks):
                ours = disk.driver.queues[0]
                if data.draw(st.just(False)) or len(ours.free) < 8:
                    ours.free = ours.free or list(range(ours.size))
                ours.want_interrupt()
                _, target = disk.request(kind, sector, payload, room, cuts=cuts, indirect=indirect)
                if number:
                    disk.driver.device.serve(0)
                else:
                    disk.path.stop()
                    os.eventfd_read(disk.path._stop_fd)
                    while run_once(disk) == 0:
                        disk.driver.device.serve(0, most=1)
                answers.append((ours.collect(), disk.ram.read(target, room + 1), bool(disk.driver.signals[0].count)))
            assert answers[0] == answers[1]
        assert disks[0].file.read_bytes() == disks[1].file.read_bytes()
    finally:
        for disk in disks:
            disk.close()


LARGE = 256 << 10
"""From this size on reads are left to the kernel's threads when others wait behind them."""


def large_disk(folder, size):
    """A disk of random bytes, and those."""
    disk = Disk(folder, size=size)
    content = random.Random(size).randbytes(size)
    disk.file.write_bytes(content)
    return disk, content


def finish(disk):
    """Run the path until it has nothing to do, with the model's help; return all it gave back."""
    used = []
    while run_once(disk) == 0:
        disk.driver.device.serve(0, most=1, head=disk.path.head)
    used += disk.driver.queues[0].collect()
    return used


def test_large_reads_go_side_by_side(tmp_path):
    """They may come back in any order, each with its own bytes; small ones and writes between them too."""
    disk, content = large_disk(tmp_path, 2 * LARGE)
    try:
        heads = {}
        for sector, size in ((0, LARGE), (7, SECTOR), (LARGE // SECTOR, LARGE)):
            head, target = disk.request(IN, sector, room=size, cuts=(5000, size - 5000) if size > 5000 else (size,))
            heads[head] = sector * SECTOR, size, target
        written, _ = disk.request(OUT, 9, b"w" * SECTOR, cuts=(16,))
        used = finish(disk)
        assert sorted(used) == sorted([(written, 1), *((head, size + 1) for head, (_, size, _) in heads.items())])
        for offset, size, target in heads.values():
            got = disk.ram.read(target, size + 1)
            expected = bytearray(content[offset : offset + size] + b"\0")
            if offset == 0:  # it was in flight beside the write: either is right
                expected[9 * SECTOR : 10 * SECTOR] = got[9 * SECTOR : 10 * SECTOR]
            assert got == expected
        assert disk.path.sent == 2  # the last one had none behind it; the small one and the write were done at once
        assert disk.path.requests == 4
    finally:
        disk.close()


def test_large_writes_are_left_to_the_kernel_too(tmp_path):
    """All but the last: each reaches its place, and says so once it has."""
    disk, content = large_disk(tmp_path, 4 * LARGE)
    try:
        data = [bytes([number]) * LARGE for number in (1, 2)]
        heads = [disk.request(OUT, 3 * number * LARGE // SECTOR, data[number], cuts=(16, 4000))[0] for number in (0, 1)]
        assert sorted(finish(disk)) == sorted((head, 1) for head in heads)
        assert disk.file.read_bytes() == data[0] + content[LARGE : 3 * LARGE] + data[1]
        assert disk.path.sent == 1
    finally:
        disk.close()


def test_what_fails_on_its_way_is_done_anew_by_the_model(tmp_path):
    """The file ends in the middle of one large read and before another: both fail, and the rest goes on."""
    disk, content = large_disk(tmp_path, 2 * LARGE)
    try:
        os.truncate(disk.file, LARGE - SECTOR)
        _, first = disk.request(IN, 0, room=LARGE, cuts=(LARGE,))
        _, second = disk.request(IN, LARGE // SECTOR, room=LARGE, cuts=(LARGE,))
        _, third = disk.request(IN, 1, room=SECTOR, cuts=(SECTOR,))
        used = finish(disk)
        assert len(used) == 3
        assert disk.ram.read(first + LARGE, 1) == disk.ram.read(second + LARGE, 1) == b"\1"
        assert disk.ram.read(third, SECTOR + 1) == content[SECTOR : 2 * SECTOR] + b"\0"
    finally:
        disk.close()


def test_stop_waits_for_what_is_on_its_way(tmp_path):
    disk, content = large_disk(tmp_path, 2 * LARGE)
    try:
        _, first = disk.request(IN, 0, room=LARGE, cuts=(LARGE,))
        _, second = disk.request(IN, LARGE // SECTOR, room=LARGE, cuts=(LARGE,))
        results = []
        thread = threading.Thread(target=lambda: results.append(disk.path.run()))
        thread.start()
        while not disk.path.sent:
            pass
        disk.path.stop()
        thread.join()
        assert results == [STOPPED]
        used = disk.driver.queues[0].collect()
        targets = (first, second)[: len(used)]  # the second may not have been begun
        assert used
        for number, target in enumerate(targets):
            assert disk.ram.read(target, LARGE + 1) == content[number * LARGE : (number + 1) * LARGE] + b"\0"
    finally:
        disk.close()


def test_reads_that_wait_for_the_disk_do_so_together(tmp_path):
    """What the host's cache does not hold is left to the kernel; where its file system tells, we see that it was."""
    size, reads = 4 << 20, 12
    disk, content = large_disk(tmp_path, size)
    fd = os.open(disk.file, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, size, os.POSIX_FADV_DONTNEED)
        expected = {}
        for number in range(reads):
            sector = number * 600
            head, target = disk.request(IN, sector, room=2 * SECTOR, cuts=(SECTOR, SECTOR), indirect=True)
            expected[head] = target, content[sector * SECTOR : (sector + 2) * SECTOR] + b"\0"
        os.posix_fadvise(fd, 0, size, os.POSIX_FADV_DONTNEED)
        try:
            os.preadv(fd, [bytearray(SECTOR)], size - SECTOR, os.RWF_NOWAIT)
            tells = False
        except BlockingIOError:
            tells = True
        except OSError:
            tells = False
        assert sorted(finish(disk)) == [(head, 2 * SECTOR + 1) for head in sorted(expected)]
        for target, data in expected.values():
            assert disk.ram.read(target, len(data)) == data
        assert disk.path.sent > 0 or not tells
    finally:
        os.close(fd)
        disk.close()


def run_once(disk):
    """Run the path until it would sleep."""
    wanted = []
    thread = threading.Thread(target=lambda: wanted.append(disk.path.run()))
    thread.start()
    wait_until_idle(thread)
    if thread.is_alive():
        disk.path.stop()
        thread.join()
        os.eventfd_read(disk.path._stop_fd)
    return wanted[0]


# --- frames -----------------------------------------------------------------------------------------------------------

RX, TX = 0, 1
HEADER = 12


class Tap:
    """One end of a socket pair in the place of a TAP."""

    header_size, offered = HEADER, 0

    def __init__(self):
        self.theirs, self.ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.theirs.setblocking(False)
        self.plain_fd = self.theirs.fileno()

    def set_offloads(self, features):
        pass

    def receive(self, buffer):
        return self.theirs.recv_into(buffer)


class Interface:
    def __init__(self, features=1 << 15 | F_EVENT_IDX | F_IN_ORDER | F_INDIRECT, ram_bytes=LOW):
        self.ram = Ram(ram_bytes)
        self.tap = Tap()
        device = Net("net0", self.ram, self.tap, mac=bytes(6), log=EventLog())
        self.driver = driver_of(device, self.ram, features)
        self.kicks = [os.eventfd(0), os.eventfd(0)]
        self.path = TapPath(self.ram.ranges, *device.queues, device.short_cut(), *self.kicks, marks=self.ram.marks)
        self.results = []
        self.thread = threading.Thread(target=lambda: self.results.append(self.path.run()))

    def give(self, size):
        head, target = self.driver.send(RX, b"", size)
        os.eventfd_write(self.kicks[RX], 1)
        return head, target

    def wait(self, queue, count):
        done = []
        for _ in range(SECONDS * 200):
            done += self.driver.queues[queue].collect()
            if len(done) >= count:
                return done
            threading.Event().wait(0.005)
        raise AssertionError(f"{len(done)} of {count} came")

    def close(self):
        self.path.stop()
        if self.thread.ident:
            self.thread.join(SECONDS)
        self.path.close()
        self.tap.ours.close()
        self.tap.theirs.close()
        for fd in (*self.kicks, *(signal.fd for signal in self.driver.signals)):
            os.close(fd)


@pytest.fixture
def interface():
    interface = Interface()
    yield interface
    interface.close()


def test_frames_go_out_with_their_header(interface):
    interface.thread.start()
    for number in range(40):
        interface.driver.send(TX, bytes(HEADER) + bytes([number]) * 60, 0, cuts=(12,))
        os.eventfd_write(interface.kicks[TX], 1)
        assert interface.tap.ours.recv(2000) == bytes(HEADER) + bytes([number]) * 60
        interface.wait(TX, 1)
    assert interface.path.requests == 40


def test_frames_come_in_whole_and_in_order(interface):
    """More frames than there are buffers at a time: the others stay in the TAP."""
    interface.thread.start()
    for number in range(6):
        interface.tap.ours.send(bytes(HEADER) + bytes([number]) * 100)
    for number in range(6):
        _, target = interface.give(2000)
        assert interface.wait(RX, 1)[0][1] == HEADER + 100
        assert interface.ram.read(target + 10, 2 + 100) == b"\1\0" + bytes([number]) * 100


def test_a_frame_over_several_buffers(interface):
    given = [interface.give(1000) for _ in range(5)]
    interface.thread.start()
    frame = os.urandom(2500)
    interface.tap.ours.send(bytes(HEADER) + frame)
    done = interface.wait(RX, 3)
    assert [written for _, written in done] == [1000, 1000, 512]
    data = b"".join(interface.ram.read(target, written) for (_, target), (_, written) in zip(given, done, strict=False))
    assert unpack_from("<H", data, 10)[0] == 3
    assert data[HEADER:] == frame
    interface.give(1000)
    interface.tap.ours.send(bytes(HEADER) + b"x" * 60)  # the rest was not touched
    assert interface.wait(RX, 1)[0] == (given[3][0], HEADER + 60)


@pytest.mark.parametrize("size", [1601, 3200, 5000])
def test_a_frame_that_finds_too_few_buffers_waits_for_more(interface, size):
    """Nothing of it is shown before it is whole, and what comes behind it keeps its place."""
    frame = os.urandom(size - HEADER)
    given = [interface.give(1600)]
    interface.thread.start()
    interface.tap.ours.send(bytes(HEADER) + frame)
    interface.tap.ours.send(bytes(HEADER) + b"y" * 60)
    needed = -(-size // 1600)
    for _ in range(needed - 1):
        threading.Event().wait(0.05)
        assert interface.driver.queues[RX].collect() == []
        given.append(interface.give(1600))
    done = interface.wait(RX, needed)
    assert [head for head, _ in done] == [head for head, _ in given]
    data = b"".join(interface.ram.read(target, written) for (_, target), (_, written) in zip(given, done, strict=True))
    assert data == bytes(10) + pack("<H", needed) + frame
    _, target = interface.give(1600)
    assert interface.wait(RX, 1)[0][1] == HEADER + 60
    assert interface.ram.read(target + HEADER, 60) == b"y" * 60
    until(lambda: interface.path.requests == 2)  # it is counted once it is there
    assert interface.path.drops == 0


def test_a_frame_that_waits_leaves_the_thread_idle(interface):
    interface.give(1600)
    interface.thread.start()
    interface.tap.ours.send(bytes(HEADER) + bytes(5000))
    threading.Event().wait(0.1)
    before = os.times()
    threading.Event().wait(0.2)
    after = os.times()
    assert after.user + after.system - before.user - before.system < 0.15


@pytest.mark.parametrize("features", [F_EVENT_IDX, 1 << 15 | F_EVENT_IDX], ids=["single", "mergeable"])
def test_a_frame_that_will_never_fit_is_dropped_whole(features):
    """One buffer is all that there is for it; or the most that there may be are too short."""
    interface = Interface(features)
    try:
        mergeable = features & 1 << 15
        for _ in range(interface.driver.device.queues[RX].size if mergeable else 2):
            interface.give(100 if mergeable else 1600)
        interface.thread.start()
        interface.tap.ours.send(bytes(HEADER) + bytes(7000))
        interface.tap.ours.send(bytes(HEADER) + b"y" * 60)
        assert interface.wait(RX, 1)[0][1] == HEADER + 60
        assert interface.path.drops == 1
    finally:
        interface.close()


def test_an_odd_buffer_behind_too_few_is_the_models(interface):
    """It is not looked at again and again."""
    interface.give(100)
    interface.driver.send(RX, b"for the device to read", 0)
    assert interface.path.run() == RX


def test_what_is_odd_is_left_for_the_model(interface):
    interface.driver.send(TX, b"short", 0)
    assert interface.path.run() == TX
    interface.driver.device.serve(TX, most=1)
    assert interface.driver.device.is_broken


@pytest.mark.parametrize(("pieces", "is_refused"), [(63, False), (64, True)])
def test_a_chain_of_4_gib_is_left_for_the_model_which_refuses_it(pieces, is_refused):
    """2.7.5.2, and 2.7.8: the used ring has no room for such a length. Each piece is the same 64 MiB."""
    piece = 64 << 20
    with contextlib.closing(Interface(ram_bytes=2 * piece)) as interface:
        ours = interface.driver.queues[RX]
        ours.offer(ours.chain([(piece, piece, True)] * pieces, indirect_at=0x80000))
        ours.publish()
        interface.tap.ours.send(bytes(HEADER) + b"z" * 60)
        interface.thread.start()
        if is_refused:
            interface.thread.join(SECONDS)
            assert interface.results == [RX]
            interface.driver.device.serve(RX, most=1)
            assert ours.collect() == []
        else:
            assert interface.wait(RX, 1) == [(0, HEADER + 60)]
        assert interface.driver.device.is_broken == is_refused


def test_a_tap_that_vanishes_is_told_once_and_leaves_the_path_idle(interface):
    interface.give(2000)
    interface.tap.ours.close()
    assert interface.path.run() == RX
    interface.thread.start()
    threading.Event().wait(0.1)
    before = os.times()
    threading.Event().wait(0.2)
    after = os.times()
    assert after.user + after.system - before.user - before.system < 0.15
    interface.driver.send(TX, bytes(HEADER) + b"x", 0)
    os.eventfd_write(interface.kicks[TX], 1)
    interface.wait(TX, 1)
    assert interface.path.drops >= 1


def test_short_cuts_say_what_a_path_needs(interface):
    assert interface.driver.device.short_cut() == TapShortCut(interface.tap.plain_fd, HEADER, mergeable=True)
    assert DiskShortCut._fields == ("fd", "sectors", "readonly")
