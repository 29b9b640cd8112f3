"""The disk, in the driver's words (Virtio 1.2, 5.2)."""

import errno
from struct import pack, unpack_from

import pytest
from memory_image import MemoryImage
from virtio_driver import NEEDS_RESET, Driver, FakeRam

from devices.backends.faults import FaultyImage
from devices.backends.limits import Limits
from devices.events import EventLog
from devices.virtio.block import Block

SECTOR = 512
SECTORS = 64
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
F_RO, F_FLUSH, F_MQ, F_DISCARD, F_ZEROES = 1 << 5, 1 << 9, 1 << 12, 1 << 13, 1 << 14


def content():
    return b"".join(bytes([number]) * SECTOR for number in range(SECTORS))


@pytest.fixture
def image():
    return MemoryImage(content())


@pytest.fixture
def ram():
    return FakeRam()


def disk(ram, image, *, features=None, **settings):
    device = Block("blk0", ram, image, log=EventLog(device="blk0"), **settings)
    return Driver(device, ram, features=features)


@pytest.fixture
def driver(ram, image):
    return disk(ram, image, serial="S123")


def header(kind, sector=0):
    return pack("<IIQ", kind, 0, sector)


def read(driver, sector, count=1, **how):
    answer = driver.ask(0, header(IN, sector), count * SECTOR + 1, **how)
    return answer[:-1], answer[-1]


def write(driver, sector, data, **how):
    return driver.ask(0, header(OUT, sector) + data, 1, **how)[-1]


def segments(*rows):
    return b"".join(pack("<QII", *row) for row in rows)


@pytest.mark.parametrize("cuts", [(), (16,), (8,), (16, 512), (1, 2, 3), (600,)])
def test_reads_and_writes_however_they_are_cut(driver, cuts):
    assert read(driver, 3, 2, cuts=cuts) == (bytes([3]) * SECTOR + bytes([4]) * SECTOR, OK)
    assert write(driver, 5, b"w" * SECTOR, cuts=cuts) == OK
    assert read(driver, 5)[0] == b"w" * SECTOR


@pytest.mark.parametrize(
    ("sector", "count"), [(SECTORS, 1), (SECTORS - 1, 2), ((1 << 64) - 1, 1), ((1 << 64) - 1, 2), (1 << 55, 1)]
)
def test_beyond_the_end(driver, image, sector, count):
    assert read(driver, sector, count)[1] == IOERR
    assert write(driver, sector, bytes(count * SECTOR)) == IOERR
    assert image.writes == 0


def test_what_is_no_whole_sector(driver):
    assert driver.ask(0, header(IN), 100 + 1)[-1] == IOERR
    assert driver.ask(0, header(IN), 1)[-1] == IOERR
    assert write(driver, 0, b"x" * 100) == IOERR
    assert write(driver, 0, b"") == IOERR


def test_flush_covers_what_was_written(driver, image):
    write(driver, 1, b"w" * SECTOR)
    assert image.flushes == 0
    assert driver.ask(0, header(FLUSH), 1) == bytes([OK])
    assert image.flushes == 1
    assert image.writes == 1


def test_5_2_6_2_without_the_flush_feature_a_write_is_stable_when_it_completes(ram, image):
    driver = disk(ram, image, features=0)
    assert driver.device.short_cut() is None
    write(driver, 1, b"w" * SECTOR)
    assert image.flushes == 1


def test_get_id(driver):
    assert driver.ask(0, header(GET_ID), 21) == b"S123".ljust(20, b"\0") + bytes([OK])
    assert driver.ask(0, header(GET_ID), 5)[-1] == IOERR


def test_an_unknown_request(driver):
    for kind in (2, 3, 10, 14, 99, 0xFFFFFFFF):
        assert driver.ask(0, header(kind), 1) == bytes([UNSUPP])


def test_discard_and_write_zeroes(driver):
    assert driver.ask(0, header(DISCARD) + segments((2, 1, 0), (4, 2, 0)), 1)[-1] == OK
    assert driver.ask(0, header(WRITE_ZEROES) + segments((8, 1, 0), (9, 1, 1)), 1)[-1] == OK
    for sector in (8, 9):
        assert read(driver, sector)[0] == bytes(SECTOR)
    assert read(driver, 3)[0] == bytes([3]) * SECTOR
    assert read(driver, 10)[0] == bytes([10]) * SECTOR


@pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES])
@pytest.mark.parametrize(
    ("data", "status"),
    [
        (segments((0, 1, 2)), UNSUPP),
        (segments((0, 1, 1 << 31)), UNSUPP),
        (segments((SECTORS, 1, 0)), IOERR),
        (segments((SECTORS - 1, 2, 0)), IOERR),
        (segments(((1 << 64) - 1, 1, 0)), IOERR),
        (segments((0, 0xFFFFFFFF, 0)), IOERR),
        (segments((0, 1, 0))[:15], IOERR),
        (b"", IOERR),
        (segments(*[(0, 1, 0)] * 33), IOERR),
    ],
)
def test_5_2_6_2_bad_segments(driver, image, kind, data, status):
    assert driver.ask(0, header(kind) + data, 1) == bytes([status])
    assert image.writes == 0


def test_5_2_6_2_discard_with_unmap(driver):
    assert driver.ask(0, header(DISCARD) + segments((0, 1, 1)), 1) == bytes([UNSUPP])


def test_a_disk_that_is_read_only(ram, image):
    image.readonly = True
    driver = disk(ram, image)
    assert driver.device.offered & F_RO
    assert not driver.device.offered & (F_DISCARD | F_ZEROES)
    assert write(driver, 0, bytes(SECTOR)) == IOERR
    assert driver.ask(0, header(WRITE_ZEROES) + segments((0, 1, 0)), 1) == bytes([IOERR])
    assert driver.ask(0, header(FLUSH), 1) == bytes([OK])
    assert read(driver, 7)[0] == bytes([7]) * SECTOR
    assert image.writes == 0


def test_an_error_of_the_host_is_the_guests_eio_and_one_line(ram, image):
    broken = FaultyImage(image)
    broken.fault("write-error", error=errno.ENOSPC)
    driver = disk(ram, broken)
    for _ in range(50):
        assert write(driver, 1, bytes(SECTOR)) == IOERR
    assert len(driver.device.log._once) == 1
    broken.clear()
    assert write(driver, 1, bytes(SECTOR)) == OK


@pytest.mark.parametrize(("readable", "writable"), [(b"", 1), (header(IN)[:15], 513), (header(FLUSH), 0)])
def test_a_request_without_header_or_status(driver, readable, writable):
    driver.send(0, readable, writable)
    assert driver.transport.status & NEEDS_RESET
    driver.start()
    assert read(driver, 1)[1] == OK


def test_the_configuration_space(ram, image):
    """5.2.4, by offset."""
    config = disk(ram, image, queues=3, queue_size=128).device.config()
    assert len(config) == 60
    capacity, _, seg_max = unpack_from("<QII", config)
    assert (capacity, seg_max) == (SECTORS, 126)
    assert unpack_from("<I", config, 20)[0] == 512  # blk_size
    assert unpack_from("<BBHI", config, 24) == (3, 0, 1, 8)  # 4 KiB physical blocks
    assert unpack_from("<H", config, 34)[0] == 3  # num_queues
    most, most_segments, _, most_zeroed, _ = unpack_from("<IIIII", config, 36)
    assert most == most_zeroed > 0
    assert most_segments == 32
    assert config[56] == 1


def test_many_queues(ram, image):
    driver = disk(ram, image, queues=2)
    assert driver.device.offered & F_MQ
    for queue in (0, 1):
        assert driver.ask(queue, header(IN, 1), 513) == bytes([1]) * SECTOR + bytes([OK])


def test_limits(ram, image):
    now = [0.0]
    waits = []
    driver = disk(ram, image, limits=Limits(iops=10, bandwidth=None, clock=lambda: now[0]))
    driver.device.wait = lambda seconds: waits.append(seconds) or True
    assert driver.device.short_cut() is None
    for _ in range(4):
        assert read(driver, 0)[1] == OK
    assert waits == pytest.approx([0.1, 0.2, 0.3])
    now[0] = 100.0
    assert read(driver, 0)[1] == OK
    assert len(waits) == 3  # a pause gives no more than a short burst
    read(driver, 0)
    assert len(waits) == 4


@pytest.mark.parametrize("limit", [{"iops": 10, "bandwidth": None}, {"iops": None, "bandwidth": 5120}])
def test_a_request_that_waits_when_the_device_is_stopped_stays_in_the_queue(ram, image, limit):
    """A pause is no error of the disk's, and the request is not counted twice."""
    now, waits = [0.0], []
    driver = disk(ram, image, limits=Limits(**limit, clock=lambda: now[0]))
    driver.device.wait = lambda seconds: waits.append(seconds) or False
    assert read(driver, 0)[1] == OK
    _, target = driver.send(0, header(IN, 1), 513)
    assert driver.queues[0].collect() == []
    driver.device.wait = lambda seconds: waits.append(seconds) or True
    driver.runner.kick(0)
    assert len(driver.queues[0].collect()) == 1
    assert driver.ram.read(target, 513) == bytes([1]) * SECTOR + bytes([OK])
    assert waits == pytest.approx([0.1, 0.1])


def test_bandwidth_counts_bytes():
    now = [0.0]
    limits = Limits(iops=None, bandwidth=1000, clock=lambda: now[0])
    assert limits.take(100) == 0
    assert limits.take(500) == pytest.approx(0.5)
    now[0] = 0.5
    assert limits.take(100) == pytest.approx(0.1)


def test_the_short_cut_is_for_plain_files(ram, image):
    assert disk(ram, image).device.short_cut() is None
    image.plain_fd = 33
    assert tuple(disk(ram, image).device.short_cut()) == (33, SECTORS, False)
