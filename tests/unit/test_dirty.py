"""Which pages have changed: marks, what is made of them, and the data paths in C, which have to say what they write."""

import mmap
import os
import random
import threading
from struct import pack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dataplane import IN, LARGE, OUT, RX, SECTOR, Disk, Interface, finish, wait_until_idle
from virtio_driver import Driver

from devices.ports import GuestFault
from hypervisor.kvm import host_address
from hypervisor.kvm.dataplane import DiskPath
from hypervisor.kvm.dirty import Changed, Dirty, Marks, copy_back, copy_base
from hypervisor.memory import GuestMemory

PAGE = 4096
HEADER = 12


class NoLog:
    """A VM without memory slots: nothing but marks."""

    def __init__(self):
        self.slots = {}

    def fileno(self):
        return -1

    def log_dirty(self, on, *, by_hand=False):
        return False


def pages_of(changed):
    found = {page for first, count in changed.runs() for page in range(first, first + count)}
    assert len(found) == changed.pages
    words = changed.bitmap
    assert found == {64 * i + bit for i in range(len(words)) for bit in range(64) if words[i] >> bit & 1}
    return found


def pages_in(offset, size):
    return set(range(offset // PAGE, (offset + size - 1) // PAGE + 1)) if size else set()


def differing(before, after):
    return {at // PAGE for at in range(0, len(after), PAGE) if before[at : at + PAGE] != after[at : at + PAGE]}


@pytest.fixture(autouse=True, scope="module")
def rings_across_pages():
    """Rings of 16 whose used flags and idx are in another page than all but the first of their entries.

    Virtio 1.2, 2.7: a table of 256 bytes, an available ring of 38, and the used ring on a multiple of four behind it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Driver, "base", 2 * PAGE - 8 - 256 - 40)
        yield


# --- marks ------------------------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(st.integers(1, 300), st.data())
def test_marks_are_every_page_that_was_touched_and_no_other(count, data):
    marks = Marks(1 << 30, count * PAGE)
    dirty = Dirty(NoLog(), marks)
    for _ in range(3):  # each collection begins anew
        expected = set()
        for _ in range(data.draw(st.integers(0, 8))):
            offset = data.draw(st.integers(0, count * PAGE - 1))
            size = data.draw(st.integers(0, count * PAGE - offset))
            marks.mark(offset, size)
            expected |= pages_in(offset, size)
        assert pages_of(dirty.collect()) == expected
    dirty.close()


def test_marks_outside_of_ram_are_nobodys():
    marks = Marks(1 << 30, 65 * PAGE)
    dirty = Dirty(NoLog(), marks)
    marks.mark(65 * PAGE, 1)
    marks.mark(-1, 1)
    marks.mark(64 * PAGE, 1 << 40)
    assert pages_of(dirty.collect()) == {64}
    dirty.close()


def test_nothing_is_noted_while_it_is_off():
    marks = Marks(1 << 30, PAGE)
    marks.mark(0, 1)
    dirty = Dirty(NoLog(), marks)
    assert dirty.collect().pages == 0
    marks.mark(0, 1)
    dirty.close()
    assert not marks.is_on
    marks.mark(0, 1)
    again = Dirty(NoLog(), marks)
    assert again.collect().pages == 0
    again.close()
    again.close()


def test_only_one_may_follow():
    marks = Marks(1 << 30, PAGE)
    dirty = Dirty(NoLog(), marks)
    marks.mark(0, 1)
    with pytest.raises(ValueError, match="already"):
        Dirty(NoLog(), marks)
    assert pages_of(dirty.collect()) == {0}
    dirty.close()


def test_a_slot_that_is_no_part_of_ram():
    marks = Marks(1 << 30, 256 * PAGE)
    for host, size in (((1 << 30) + PAGE, PAGE), ((1 << 30) + 192 * PAGE, 65 * PAGE), ((1 << 30) - 64 * PAGE, PAGE)):
        vm = NoLog()
        vm.slots = {0: (host, size)}
        with pytest.raises(ValueError, match="slot 0"):
            Dirty(vm, marks)
        assert not marks.is_on


def test_a_vm_that_does_not_log_leaves_no_marks_on():
    class Refuses(NoLog):
        def log_dirty(self, on, *, by_hand=False):
            raise OSError("no")

    marks = Marks(1 << 30, PAGE)
    with pytest.raises(OSError, match="no"):
        Dirty(Refuses(), marks)
    assert not marks.is_on


@settings(max_examples=60)
@given(st.integers(1, 200), st.data())
def test_copying_back_restores_what_changed_and_touches_nothing_else(count, data):
    ram, base = mmap.mmap(-1, count * PAGE), mmap.mmap(-1, count * PAGE)
    chance = random.Random(data.draw(st.integers()))
    for page in range(count):
        if chance.random() < 0.5:
            ram[page * PAGE + chance.randrange(PAGE)] = chance.randrange(1, 256)
    marks = Marks(host_address(ram), count * PAGE)
    filled = copy_base(marks, base)
    assert base[:] == ram[:]
    assert filled == sum(any(ram[at : at + PAGE]) for at in range(0, len(ram), PAGE))
    changed = data.draw(st.sets(st.integers(0, count - 1)))
    for page in range(count):
        ram[page * PAGE] ^= 0x80
    words = [sum(1 << bit for bit in range(64) if 64 * i + bit in changed) for i in range(-(-count // 64))]
    row = Changed(memoryview(bytearray(pack(f"<{len(words)}Q", *words))).cast("Q"), len(changed))
    assert pages_of(row) == changed
    assert copy_back(marks, base, row) == len(changed)
    assert differing(base[:], ram[:]) == set(range(count)) - changed


def test_more_runs_than_are_fetched_at_once():
    words = [0x5555_5555_5555_5555] * 100
    row = Changed(memoryview(bytearray(pack("<100Q", *words))).cast("Q"), 3200)
    assert list(row.runs()) == [(page, 1) for page in range(0, 6400, 2)]


# --- guest memory -----------------------------------------------------------------------------------------------------


def test_what_the_vmm_writes_to_guest_memory_is_noted():
    memory = GuestMemory(8 << 20)
    memory.write(5 * PAGE, b"before")
    assert not memory.is_tracked
    dirty = Dirty(NoLog(), memory.marks)
    assert memory.is_tracked
    memory.write(3 * PAGE - 1, b"ab")
    memory.write(9 * PAGE, b"")
    memory.view(40 * PAGE, 1)[:] = b"x"
    memory.written(40 * PAGE, 1)
    memory.reclaim(64 * PAGE, 2 * PAGE)
    memory.read(100 * PAGE, PAGE)
    assert pages_of(dirty.collect()) == {2, 3, 40, 64, 65}
    with pytest.raises(GuestFault):
        memory.written(8 << 20, 1)
    dirty.close()
    memory.close()


def test_memory_above_4_gib_comes_behind_that_below_it(monkeypatch):
    monkeypatch.setattr("hypervisor.memory.RAM_LOW_END", 1 << 20)
    memory = GuestMemory(2 << 20)
    dirty = Dirty(NoLog(), memory.marks)
    memory.write((1 << 32) + PAGE, b"x")
    assert pages_of(dirty.collect()) == {(1 << 20) // PAGE + 1}
    dirty.close()
    memory.close()


# --- data paths -------------------------------------------------------------------------------------------------------


class Watched:
    """What a device writes to RAM from here on: all that changes is noted, and not much more."""

    def __init__(self, ram):
        self.ram = ram
        self.before = bytes(ram.map)
        self.dirty = Dirty(NoLog(), ram.marks)

    def check(self, *allowed):
        noted = pages_of(self.dirty.collect())
        changed = differing(self.before, bytes(self.ram.map))
        assert changed <= noted
        if allowed:
            assert noted <= set().union(*(pages_in(*part) for part in allowed))
        self.before = bytes(self.ram.map)
        return changed

    def close(self):
        self.dirty.close()


def rings(driver):
    return [(queue.used, 6 + 8 * queue.size) for queue in driver.queues]


@pytest.mark.parametrize("waits", [0, 1], ids=["at once", "must wait"])
@pytest.mark.parametrize("features", [0, 1 << 29], ids=["flags", "event idx"])
def test_a_small_read_is_noted_with_its_status_and_its_ring(tmp_path, features, waits):
    disk = Disk(tmp_path, features=features | 1 << 28 | 1 << 9)
    disk.path._c.waits = waits  # what the path learns from a file system that cannot tell
    try:
        for kind, room in ((IN, 20 * SECTOR), (OUT, 0)):
            data = b"w" * SECTOR if kind == OUT else b""
            _, target = disk.request(kind, 3, data, room, cuts=(16,) if data else (room,))
            disk.ram.write(target + room, b"\xff")
            watched = Watched(disk.ram)
            disk.run()
            changed = watched.check((target, room + 1), *rings(disk.driver))
            assert target // PAGE in changed
            watched.close()
            os.eventfd_read(disk.path._stop_fd)
            disk.driver.queues[0].collect()
    finally:
        disk.close()


def test_what_it_tells_the_driver_before_the_model_takes_over_is_noted(tmp_path):
    """2.7.10: VIRTQ_USED_F_NO_NOTIFY, and nothing else."""
    disk = Disk(tmp_path, features=1 << 9)
    try:
        disk.request(99, 0)
        watched = Watched(disk.ram)
        assert disk.path.run() == 0
        used = disk.driver.queues[0].used
        assert watched.check((used, 2)) == {used // PAGE}
        watched.close()
    finally:
        disk.close()


def test_what_a_model_writes_and_never_gives_back_is_noted(tmp_path):
    """It was noted when the chain was handed out: a model may find fault with a request half-way."""
    disk = Disk(tmp_path)
    try:
        _, target = disk.request(IN, 0, room=3 * PAGE, cuts=(3 * PAGE,))
        watched = Watched(disk.ram)
        disk.driver.device.queues[0].pop().scatter(b"x" * 2 * PAGE)
        assert watched.check((target, 3 * PAGE + 1)) >= {target // PAGE, target // PAGE + 1}
        watched.close()
    finally:
        disk.close()


def test_large_reads_on_their_way_are_noted_when_they_are_done(tmp_path):
    disk = Disk(tmp_path, size=2 * LARGE)
    try:
        content = random.Random(1).randbytes(2 * LARGE)
        disk.file.write_bytes(content)
        targets = [
            (disk.request(IN, sector, room=LARGE, cuts=(5000, LARGE - 5000))[1], LARGE + 1)
            for sector in (0, LARGE // SECTOR)
        ]
        watched = Watched(disk.ram)
        assert len(finish(disk)) == 2
        assert disk.path.sent == 1
        assert len(watched.check(*targets, *rings(disk.driver))) >= 2 * LARGE // PAGE
        watched.close()
    finally:
        disk.close()


def test_a_read_that_fails_half_way_is_noted_as_far_as_it_came(tmp_path):
    disk = Disk(tmp_path, size=2 * LARGE)
    try:
        os.truncate(disk.file, LARGE - SECTOR)
        for _ in range(2):
            disk.request(IN, 0, room=LARGE, cuts=(LARGE,))
        watched = Watched(disk.ram)
        assert len(finish(disk)) == 2
        watched.check()
        watched.close()
    finally:
        disk.close()


@settings(max_examples=30)
@given(data=st.data())
def test_whatever_a_disk_is_asked_all_that_changes_is_noted(tmp_path_factory, data):
    """By the path in C and by the model, which takes what the path leaves."""
    features = data.draw(st.sampled_from([0, 1 << 29, 1 << 28, 3 << 28])) | 1 << 9
    disk = Disk(tmp_path_factory.mktemp("d"), features=features)
    try:
        for _ in range(data.draw(st.integers(1, 4))):
            for _ in range(data.draw(st.integers(1, 3))):
                kind = data.draw(st.sampled_from([IN, IN, OUT, 4, 8, 99]))
                count = data.draw(st.integers(0, 20)) * SECTOR
                payload = bytes([data.draw(st.integers(0, 255))]) * count if kind == OUT else b""
                room = 0 if kind == OUT else count
                cuts = data.draw(st.sampled_from([(16,) if payload else (room,), (7,), (16, 512)]))
                disk.request(kind, data.draw(st.sampled_from([0, 1, 40, 64])), payload, room, cuts=cuts)
            watched = Watched(disk.ram)
            finish(disk)
            watched.check()
            watched.close()
    finally:
        disk.close()


def arrive(interface, size):
    interface.tap.ours.send(bytes(HEADER) + os.urandom(size))


def at_rest(interface):
    """Wait until the path has done what there is to do."""
    wait_until_idle(interface.thread)
    interface.path.stop()
    interface.thread.join(60)


@pytest.mark.parametrize("size", [60, 2500, 7000])
def test_frames_are_noted_where_they_came_to_lie(size):
    """One buffer, several; and those of a frame that found no room, also if nobody is ever told of it."""
    interface = Interface()
    try:
        given_ = [(interface.give(1600)[1], 1600) for _ in range(3)]
        watched = Watched(interface.ram)
        arrive(interface, size)
        interface.thread.start()
        at_rest(interface)
        assert given_[0][0] // PAGE in watched.check(*given_, *rings(interface.driver))
        watched.close()
    finally:
        interface.close()


def test_the_rest_of_a_frame_that_waited_is_noted():
    """A first buffer of one byte less than the frame: what is copied behind it lies in a page of its own."""
    interface = Interface()
    try:
        interface.give(HEADER + 2000)
        interface.thread.start()
        arrive(interface, 2000 + 100)
        wait_until_idle(interface.thread)
        interface.driver.memory = 0x40000
        _, target = interface.driver.send(RX, b"", 1600)
        watched = Watched(interface.ram)
        os.eventfd_write(interface.kicks[RX], 1)
        interface.wait(RX, 2)
        at_rest(interface)
        assert target // PAGE in watched.check()
        watched.close()
    finally:
        interface.close()


def test_sent_frames_are_noted_by_their_ring():
    interface = Interface()
    try:
        interface.driver.send(1, bytes(HEADER) + b"x" * 60, 0, cuts=(12,))
        watched = Watched(interface.ram)
        interface.thread.start()
        at_rest(interface)
        assert watched.check(*rings(interface.driver))
        watched.close()
    finally:
        interface.close()


def follow(ram, dirty, copy, is_over):
    """Collect and copy as fast as can be until it is over, then once more; from the end on, as writers do not."""
    while True:
        last = is_over()
        for first, count in reversed(list(dirty.collect().runs())):
            for page in reversed(range(first, first + count)):
                copy[page * PAGE : (page + 1) * PAGE] = ram.map[page * PAGE : (page + 1) * PAGE]
        if last:
            return


def test_a_copy_that_follows_a_busy_disk_never_misses_a_page(tmp_path):
    """What the guest writes is copied while nothing else runs, as if KVM had logged it."""
    disk = Disk(tmp_path, size=LARGE)
    disk.file.write_bytes(random.Random(2).randbytes(LARGE))
    dirty = Dirty(NoLog(), disk.ram.marks)
    chance = random.Random(3)
    thread = threading.Thread(target=disk.path.run)
    thread.start()
    try:
        for _ in range(60):
            for _ in range(chance.randrange(1, 4)):
                sectors = chance.randrange(1, 400)
                room = sectors * SECTOR
                disk.request(IN, chance.randrange(LARGE // SECTOR - sectors), room=room, cuts=(room,))
            wanted = len(disk.driver.queues[0].chains)
            copy = bytearray(disk.ram.map)
            dirty.collect()
            used = []

            def is_over(used=used, wanted=wanted):
                used += disk.driver.queues[0].collect()
                return len(used) == wanted

            os.eventfd_write(disk.kick_fd, 1)
            follow(disk.ram, dirty, copy, is_over)
            for _ in range(60_000):  # until the path is at rest; what it missed stays missed
                follow(disk.ram, dirty, copy, lambda: True)
                if not differing(copy, bytes(disk.ram.map)):
                    break
                threading.Event().wait(0.001)
            assert differing(copy, bytes(disk.ram.map)) == set()
    finally:
        disk.path.stop()
        thread.join()
        dirty.close()
        disk.close()


def test_what_is_collected_in_the_middle_of_a_read_is_noted_again(tmp_path):
    """Reads that take so long that they are copied meanwhile."""
    size, target = 16 << 20, 8 << 20
    disk = Disk(tmp_path, size=size, ram_bytes=32 << 20)
    content = random.Random(4).randbytes(size)
    disk.file.write_bytes(content)
    dirty = Dirty(NoLog(), disk.ram.marks)
    thread = threading.Thread(target=disk.path.run)
    thread.start()
    ours = disk.driver.queues[0]
    header = disk.driver.buffer(pack("<IIQ", IN, 0, 0))
    try:
        for _ in range(3):
            disk.ram.map[target : target + size] = bytes(size)
            ours.offer(ours.chain([(header, 16, False), (target, size, True), (target + size, 1, True)]))
            ours.publish()
            copy = bytearray(disk.ram.map)
            os.eventfd_write(disk.kick_fd, 1)
            follow(disk.ram, dirty, copy, lambda: ours.collect() != [])
            assert copy[target : target + size] == content
    finally:
        disk.path.stop()
        thread.join()
        dirty.close()
        disk.close()


def test_a_path_without_marks_works_as_well(tmp_path):
    disk = Disk(tmp_path)
    try:
        disk.path.close()
        queue = disk.driver.device.queues[0]
        disk.path = DiskPath(disk.ram.ranges, queue, disk.driver.device.short_cut(), disk.kick_fd)
        disk.request(IN, 3, room=SECTOR, cuts=(SECTOR,))
        disk.run()
        assert len(disk.driver.queues[0].collect()) == 1
    finally:
        disk.close()
