"""The disk of the crash tests: what it promises is what they stand on."""

import random

from faulty_image import FaultyImage

SECTOR = 512


def write(image, sector, byte, count=1):
    image.writev(sector * SECTOR, [memoryview(bytes([byte]) * SECTOR * count)])


def sectors(data):
    """The first byte of each sector, all of whose bytes are the same."""
    assert all(len(set(data[at : at + SECTOR])) == 1 for at in range(0, len(data), SECTOR))
    return [data[at] for at in range(0, len(data), SECTOR)]


def outcomes(image, tries=300):
    rng = random.Random(1)
    return {tuple(sectors(image.power_cut(rng))) for _ in range(tries)}


def test_reads_see_every_write():
    image = FaultyImage(bytes(4 * SECTOR))
    write(image, 1, 7)
    data = bytearray(4 * SECTOR)
    image.readv(0, [memoryview(data)])
    assert sectors(data) == [0, 7, 0, 0]


def test_what_is_flushed_is_there_after_every_cut():
    image = FaultyImage(bytes(4 * SECTOR))
    write(image, 1, 7)
    image.flush()
    assert outcomes(image) == {(0, 7, 0, 0)}


def test_what_is_not_may_be_gone_torn_or_reordered():
    image = FaultyImage(bytes(4 * SECTOR))
    write(image, 0, 1, count=2)
    write(image, 2, 2)
    seen = outcomes(image)
    assert {(0, 0, 0, 0), (1, 1, 2, 0), (0, 0, 2, 0), (1, 0, 0, 0), (0, 1, 2, 0)} <= seen


def test_a_sector_never_goes_back_behind_its_last_flush():
    image = FaultyImage(bytes(SECTOR))
    write(image, 0, 1)
    image.flush()
    write(image, 0, 2)
    write(image, 0, 3)
    assert outcomes(image) == {(1,), (2,), (3,)}


def test_a_lying_disk_loses_what_it_said_was_safe():
    image = FaultyImage(bytes(SECTOR), lies=True)
    write(image, 0, 1)
    image.flush()
    assert image.flushes == 1
    assert (0,) in outcomes(image)
