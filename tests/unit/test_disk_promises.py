"""What a disk owes beyond the plain cases: errors on every way, limits, direct I/O by several threads."""

import os
import resource
import threading
from struct import pack

import pytest
from memory_image import MemoryImage
from virtio_driver import Driver, FakeRam

from devices.backends.errors import BackendError
from devices.backends.faults import FaultyImage
from devices.backends.image import open_image
from devices.backends.limits import Limits
from devices.events import EventLog
from devices.virtio.block import Block

SECTOR = 512
IN, FLUSH, DISCARD, WRITE_ZEROES = 0, 4, 11, 13
OK, IOERR = 0, 1


def disk(image, *, features=None, **settings):
    ram = FakeRam()
    return Driver(Block("blk0", ram, image, log=EventLog(device="blk0"), **settings), ram, features=features)


def request(kind, *segment):
    return pack("<IIQ", kind, 0, 0) + (pack("<QII", *segment) if segment else b"")


@pytest.mark.parametrize(("fault", "kind", "room"), [("flush-error", FLUSH, 1), ("read-error", IN, 513)])
def test_a_flush_or_read_that_fails_is_never_a_success(fault, kind, room):
    """5.2.6.2: what a completed flush covers is stable."""
    image = FaultyImage(MemoryImage(bytes(8 * SECTOR)))
    image.fault(fault)
    driver = disk(image)
    assert driver.ask(0, request(kind), room)[-1] == IOERR


@pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES])
def test_without_the_flush_feature_zeroes_are_stable_too(kind):
    image = MemoryImage(b"x" * 8 * SECTOR)
    assert disk(image, features=0).ask(0, request(kind, 0, 1, 0), 1)[-1] == OK
    assert image.flushes == 1


@pytest.mark.parametrize("flags", [0, 1])
def test_only_the_unmap_flag_lets_room_go(monkeypatch, flags):
    image = MemoryImage(bytes(8 * SECTOR))
    seen = []
    monkeypatch.setattr(image, "write_zeroes", lambda offset, size, unmap: seen.append(unmap))
    disk(image).ask(0, request(WRITE_ZEROES, 0, 1, flags), 1)
    assert seen == [bool(flags)]


@pytest.mark.parametrize(("kind", "segment"), [(FLUSH, ()), (DISCARD, (0, 1, 0)), (WRITE_ZEROES, (0, 1, 0))])
def test_every_request_counts_for_the_limits(kind, segment):
    waits = []
    driver = disk(MemoryImage(bytes(8 * SECTOR)), limits=Limits(iops=10, bandwidth=None, clock=lambda: 0.0))
    driver.device.wait = lambda seconds: waits.append(seconds) or True
    for _ in range(3):
        driver.ask(0, request(kind, *segment), 1)
    assert waits == pytest.approx([0.1, 0.2])


def test_no_wait_is_longer_than_can_be_waited():
    limits = Limits(iops=None, bandwidth=1, clock=lambda: 0.0)
    for _ in range(4):
        assert limits.take(1 << 32) <= threading.TIMEOUT_MAX


def test_direct_writes_to_one_block_by_two_threads(tmp_path):
    """A queue each: neither may write back what the other has changed."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 16))
    image = open_image(str(path), cache="none")
    lost = []

    def write(sector):
        back = bytearray(SECTOR)
        for number in range(200):
            data = bytes([number % 255 + 1]) * SECTOR
            image.writev(sector * SECTOR, [memoryview(data)])
            image.readv(sector * SECTOR, [memoryview(back)])
            if back != data:
                lost.append((sector, number))

    threads = [threading.Thread(target=write, args=(sector,)) for sector in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    image.close()
    assert lost == []


def test_a_long_unaligned_transfer_takes_little_memory(tmp_path):
    """A guest can name one page a thousand times in a chain."""
    path = tmp_path / "disk.img"
    path.touch()
    os.truncate(path, 256 << 20)
    image = open_image(str(path), cache="none")
    buffer = memoryview(bytearray((1 << 20) + 1))[1:]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    image.readv(SECTOR, [buffer] * 255)
    image.close()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10


@pytest.mark.parametrize("how", [{}, {"form": "raw"}, {"readonly": True}, {"form": "raw", "readonly": True}])
def test_a_fifo_is_refused_and_not_waited_for(tmp_path, how):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with pytest.raises(BackendError, match="no file"):
        open_image(str(path), **how)
