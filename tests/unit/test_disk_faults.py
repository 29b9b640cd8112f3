"""Disks that fail when asked to: every fault as a driver sees it, and what a power cut leaves."""

import errno
import random
import threading
import time
from struct import pack

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from memory_image import MemoryImage
from virtio_driver import Driver, FakeRam

from devices.backends.fault import KINDS, Hit
from devices.backends.faults import FaultyImage, faulty
from devices.backends.image import open_image
from devices.events import EventLog
from devices.virtio.block import Block

SECTOR = 512
SECTORS = 16
IN, OUT, FLUSH, DISCARD, WRITE_ZEROES = 0, 1, 4, 11, 13
OK, IOERR = 0, 1


@pytest.fixture
def medium():
    return MemoryImage(bytes(SECTORS * SECTOR))


@pytest.fixture
def image(medium):
    return FaultyImage(medium)


@pytest.fixture
def driver(image):
    ram = FakeRam()
    return Driver(Block("blk0", ram, image, log=EventLog(device="blk0")), ram)


def ask_read(driver, sector, count=1):
    answer = driver.ask(0, pack("<IIQ", IN, 0, sector), count * SECTOR + 1)
    return answer[:-1], answer[-1]


def ask_write(driver, sector, byte, count=1):
    return driver.ask(0, pack("<IIQ", OUT, 0, sector) + bytes([byte]) * SECTOR * count, 1)[-1]


def ask(driver, kind, *segment):
    return driver.ask(0, pack("<IIQ", kind, 0, 0) + (pack("<QII", *segment) if segment else b""), 1)[-1]


def write(image, sector, byte, count=1):
    image.writev(sector * SECTOR, [memoryview(bytes([byte]) * SECTOR * count)])


def sectors(data):
    """The first byte of each sector, all of whose bytes are the same."""
    assert all(len(set(data[at : at + SECTOR])) == 1 for at in range(0, len(data), SECTOR))
    return [data[at] for at in range(0, len(data), SECTOR)]


def seen(image):
    data = bytearray(image.size)
    image.readv(0, [memoryview(data)])
    return sectors(data)


# --- each fault, as a driver sees it ----------------------------------------------------------------------------------


def test_a_read_that_fails(driver, image):
    ask_write(driver, 3, 7)
    image.fault("read-error", where=(3, 2))
    assert ask_read(driver, 2) == (bytes(SECTOR), OK)
    assert ask_read(driver, 3)[1] == IOERR
    assert ask_read(driver, 4)[1] == IOERR
    assert ask_read(driver, 0, 8)[1] == IOERR
    assert ask_read(driver, 5)[1] == OK
    assert ask_write(driver, 3, 8) == OK
    image.clear()
    assert ask_read(driver, 3) == (bytes([8]) * SECTOR, OK)


@pytest.mark.parametrize("kind", ["write", "discard", "zeroes"])
def test_a_write_that_fails_writes_nothing(driver, image, kind):
    ask_write(driver, 3, 7)
    image.fault("write-error", count=1)
    requests = {
        "write": lambda: ask_write(driver, 3, 9),
        "discard": lambda: ask(driver, DISCARD, 3, 1, 0),
        "zeroes": lambda: ask(driver, WRITE_ZEROES, 3, 1, 0),
    }
    assert requests[kind]() == IOERR
    assert ask_read(driver, 3) == (bytes([7]) * SECTOR, OK)
    assert requests[kind]() == OK
    assert ask_read(driver, 3)[0] != bytes([7]) * SECTOR


def test_a_flush_that_fails_covers_nothing(driver, image, medium):
    image.hold_writes()
    ask_write(driver, 3, 7)
    image.fault("flush-error", count=1)
    assert ask(driver, FLUSH) == IOERR
    assert (medium.flushes, sectors(medium.content)[3]) == (0, 0)
    assert ask(driver, FLUSH) == OK
    assert (medium.flushes, sectors(medium.content)[3]) == (1, 7)


@pytest.mark.parametrize(("error", "status"), [(errno.EIO, IOERR), (None, OK)])
def test_a_torn_write(driver, image, error, status):
    image.fault("torn-write", sectors=2, error=error, count=1)
    assert ask_write(driver, 4, 7, count=4) == status
    assert seen(image)[3:9] == [0, 7, 7, 0, 0, 0]
    assert ask_write(driver, 4, 8, count=4) == OK
    assert seen(image)[3:9] == [0, 8, 8, 8, 8, 0]


def test_a_torn_write_is_never_whole(image):
    image.fault("torn-write", error=None, seed=3)
    kept = set()
    for number in range(1, 60):
        write(image, 0, number, count=4)
        kept.add(seen(image)[:4].count(number))
    assert kept == {0, 1, 2, 3}
    image.clear()
    image.fault("torn-write", error=None, sectors=99)
    write(image, 8, 1, count=4)
    assert seen(image)[8:12] == [1, 1, 1, 0]


def test_a_dropped_write(driver, image):
    image.fault("dropped-write", where=(4, 1))
    assert ask_write(driver, 4, 7) == OK
    assert ask_write(driver, 5, 7) == OK
    assert seen(image)[4:6] == [0, 7]


def test_a_flush_that_lies(driver, image, medium):
    image.fault("lying-flush", count=1)
    ask_write(driver, 4, 7)
    assert ask(driver, FLUSH) == OK
    assert medium.flushes == 0
    assert ask_read(driver, 4)[0] == bytes([7]) * SECTOR
    assert sectors(image.after_cut(keep="flushed"))[4] == 0
    assert ask(driver, FLUSH) == OK
    assert sectors(image.after_cut(keep="flushed"))[4] == 7


def test_a_slow_disk_until_it_is_cleared(driver, image):
    image.fault("slow", seconds=0.05, requests=["read"], count=1)
    before = time.monotonic()
    assert ask_read(driver, 0)[1] == OK
    assert time.monotonic() - before >= 0.05
    image.fault("slow", seconds=3600, requests=("flush",))
    assert ask_write(driver, 0, 1) == OK
    slow = threading.Thread(target=ask, args=(driver, FLUSH))
    slow.start()
    slow.join(0.05)
    assert slow.is_alive()
    image.clear()
    slow.join(60)
    assert not slow.is_alive()


def test_a_slow_disk_can_fail_too(image):
    image.fault("slow", seconds=0.001)
    image.fault("read-error")
    with pytest.raises(OSError, match="Input/output"):
        seen(image)
    assert [hit.kind for hit in image.hits] == ["slow", "read-error"]


def test_after_so_many_so_often_and_by_chance(image):
    image.fault("write-error", after=2, count=3, where=(4, 4))

    def outcome(sector):
        try:
            write(image, sector, 1)
        except OSError:
            return "x"
        return "."

    assert "".join(outcome(sector) for sector in (0, 4, 0, 5, 6, 0, 7, 4, 4)) == "....x.xx."
    image.clear()
    image.hits.clear()
    image.fault("write-error", chance=0.5, seed=1)
    first = "".join(outcome(0) for _ in range(200))
    assert 60 < first.count("x") < 140
    image.clear()
    image.fault("write-error", chance=0.5, seed=1)
    assert "".join(outcome(0) for _ in range(200)) == first


def test_of_two_faults_the_first_counts(image):
    image.fault("dropped-write", count=1)
    image.fault("write-error")
    write(image, 0, 1)
    with pytest.raises(OSError, match="Input/output"):
        write(image, 0, 1)


def test_what_was_hit_is_told(image):
    image.fault("write-error", where=(2, 4), count=1)
    image.fault("lying-flush")
    write(image, 0, 1)
    with pytest.raises(OSError, match="Input/output"):
        write(image, 1, 1, count=2)
    image.flush()
    assert list(image.hits) == [Hit("write-error", "write", 1, 2), Hit("lying-flush", "flush", 0, 0)]


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("fire", {}),
        ("slow", {}),
        ("slow", {"seconds": -1}),
        ("slow", {"seconds": float("nan")}),
        ("slow", {"seconds": 1, "requests": ("erase",)}),
        ("slow", {"seconds": 1, "requests": ()}),
        ("read-error", {"requests": ("write",)}),
        ("read-error", {"error": None}),
    ],
)
def test_what_is_no_fault(image, kind, how):
    with pytest.raises(ValueError, match=r"fault|slow"):
        image.fault(kind, **how)
    assert image.is_transparent


# --- nothing armed ----------------------------------------------------------------------------------------------------


def test_without_a_fault_the_short_cut_stays(tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(bytes(8 * SECTOR))
    image = faulty(open_image(str(path)))
    assert faulty(image) is image
    assert image.plain_fd is not None
    device = Block("blk0", FakeRam(), image, log=EventLog(device="blk0"))
    device.features = device.offered
    assert device.short_cut().fd == image.plain_fd
    for kind in KINDS:
        image.fault(kind, seconds=1)
        assert image.plain_fd is None
        assert device.short_cut() is None
        image.clear()
        assert image.plain_fd is not None
    image.hold_writes()
    assert image.plain_fd is None
    image.close()


def test_every_request_reaches_the_image_below(medium):
    image = FaultyImage(medium)
    write(image, 1, 7, count=3)
    image.write_zeroes(2 * SECTOR, SECTOR, unmap=True)
    image.discard(3 * SECTOR, SECTOR)
    image.flush()
    assert seen(image)[:5] == [0, 7, 0, 0, 0] == sectors(medium.content)[:5]
    assert (medium.writes, medium.flushes) == (3, 1)


# --- power ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def volatile(medium):
    return FaultyImage(medium, volatile=True)


def outcomes(image, count, tries=300):
    return {tuple(sectors(image.after_cut(seed=seed))[:count]) for seed in range(tries)}


def test_what_is_flushed_is_there_after_every_cut(volatile):
    write(volatile, 1, 7)
    volatile.flush()
    assert outcomes(volatile, 4) == {(0, 7, 0, 0)}


def test_what_is_not_may_be_gone_torn_or_reordered(volatile):
    write(volatile, 0, 1, count=2)
    write(volatile, 2, 2)
    seen = outcomes(volatile, 4)
    assert {(0, 0, 0, 0), (1, 1, 2, 0), (0, 0, 2, 0), (1, 0, 0, 0), (0, 1, 2, 0)} <= seen


def test_a_sector_never_goes_back_behind_its_last_flush(volatile):
    write(volatile, 0, 1)
    volatile.flush()
    write(volatile, 0, 2)
    write(volatile, 0, 3)
    assert outcomes(volatile, 1) == {(1,), (2,), (3,)}


def test_a_cut_in_place(volatile, medium):
    write(volatile, 0, 1)
    volatile.flush()
    write(volatile, 1, 2)
    volatile.power_cut()
    for request in (lambda: seen(volatile), lambda: write(volatile, 0, 9), volatile.flush):
        with pytest.raises(OSError, match="no power"):
            request()
    volatile.close()
    assert sectors(medium.content)[:2] == [1, 0]
    volatile.power_on()
    assert seen(volatile)[:2] == [1, 0]


def test_a_cut_leaves_what_was_foretold(medium):
    for seed in range(20):
        image = FaultyImage(MemoryImage(medium.content), volatile=True)
        rng = random.Random(seed)
        for _ in range(20):
            write(image, rng.randrange(SECTORS - 2), rng.randrange(256), count=rng.randint(1, 3))
        foretold = image.after_cut(keep="random", seed=seed)
        image.power_cut(keep="random", seed=seed)
        image.power_on()
        assert seen(image) == sectors(foretold)


def test_a_cut_needs_something_to_lose(image, volatile):
    assert volatile.holds_writes
    for _ in range(2):
        assert not image.holds_writes
        with pytest.raises(ValueError, match="hold_writes"):
            image.power_cut()
        with pytest.raises(ValueError, match="hold_writes"):
            image.after_cut()
        assert seen(image)[0] == 0  # the power is still on
        image.fault("write-error")
    with pytest.raises(ValueError, match="neither"):
        volatile.power_cut(keep="all")


def test_the_cache_of_a_disk_has_a_bound(volatile, medium, monkeypatch):
    """What does not fit goes to the medium, the oldest first, as in any disk."""
    monkeypatch.setattr("devices.backends.faults.CACHE_BYTES", 4 * SECTOR)
    for number in range(1, 6):
        write(volatile, number, number)
    assert volatile._cache.size <= 4 * SECTOR
    assert seen(volatile)[:7] == [0, 1, 2, 3, 4, 5, 0]
    assert sectors(medium.content)[:7] == [0, 1, 2, 3, 0, 0, 0]


def test_zeroes_without_end_are_not_held(volatile, monkeypatch):
    monkeypatch.setattr("devices.backends.faults.ZEROES", SECTOR)
    write(volatile, 0, 1, count=4)
    volatile.write_zeroes(SECTOR, 2 * SECTOR, unmap=False)
    assert len(volatile._cache) == 0
    assert seen(volatile)[:4] == [1, 0, 0, 1]


# --- everything at once, against a plain model ------------------------------------------------------------------------

PLACE = st.integers(0, SECTORS - 1)
STEP = st.one_of(
    st.tuples(st.just("write"), PLACE, st.integers(1, 255), st.integers(1, 4)),
    st.tuples(st.just("zero"), PLACE, st.booleans(), st.integers(1, 4)),
    st.tuples(st.sampled_from(["flush", "checkpoint", "rewind", "commit", "lose", "random", "read"])),
)


class Model:
    """What the guest sees, what must be there after a cut, and what each sector may hold then."""

    def __init__(self):
        self.now = [0] * SECTORS
        self.may = [{0} for _ in range(SECTORS)]
        self.saved = None

    def write(self, first, byte, count):
        for sector in range(first, min(first + count, SECTORS)):
            self.now[sector] = byte
            self.may[sector].add(byte)

    def flush(self):
        self.may = [{byte} for byte in self.now]

    def settle(self, found):
        self.now = found
        self.flush()

    def checkpoint(self):
        self.saved = list(self.now), [set(one) for one in self.may]

    def rewind(self):
        self.now, self.may = list(self.saved[0]), [set(one) for one in self.saved[1]]


@settings(max_examples=150)
@given(st.lists(STEP, max_size=40))
@example([("checkpoint",), ("write", 0, 1, 1), ("rewind",)])
@example([("write", 0, 1, 1), ("checkpoint",), ("write", 0, 2, 1), ("rewind",), ("lose",)])
def test_any_sequence(steps):
    image, model = FaultyImage(MemoryImage(bytes(SECTORS * SECTOR)), volatile=True), Model()
    durable = list(model.now)  # what the last flush, or cut, has left
    saved = None
    for number, (what, *rest) in enumerate(steps):
        if what == "write":
            first, byte, count = rest
            write(image, first, byte, count=min(count, SECTORS - first))
            model.write(first, byte, count)
        elif what == "zero":
            first, unmap, count = rest
            image.write_zeroes(first * SECTOR, min(count, SECTORS - first) * SECTOR, unmap)
            model.write(first, 0, count)
        elif what == "flush":
            image.flush()
            model.flush()
            durable = list(model.now)
        elif what == "checkpoint":
            image.checkpoint()
            model.checkpoint()
            saved = durable
        elif what == "rewind" and saved is not None:
            image.rewind()
            model.rewind()
            durable = list(saved)
        elif what == "commit":
            image.commit()
            saved = None
        elif what in {"lose", "random"}:
            image.power_cut(keep="flushed" if what == "lose" else "random", seed=number)
            image.power_on()
            found = seen(image)
            assert all(byte in may for byte, may in zip(found, model.may, strict=True))
            assert what != "lose" or found == durable
            model.settle(list(found))
            durable = found
        assert seen(image) == model.now
        assert sectors(image.after_cut(keep="flushed")) == durable
