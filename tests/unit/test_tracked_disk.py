"""A disk that is copied while it is used: what changes is noted, and nothing of it is missed."""

import random
import threading

import pytest
from memory_image import MemoryImage

from devices.backends.pending import PendingImage
from devices.backends.tracked import TrackedImage, runs_of

CLUSTER = 65536
SIZE = 40 * CLUSTER + 512


def write(image, offset, data):
    image.writev(offset, [memoryview(data)])


def read(image, offset, size):
    data = bytearray(size)
    image.readv(offset, [memoryview(data)])
    return bytes(data)


@pytest.mark.parametrize(
    ("offsets", "size", "runs"),
    [
        ([], 100, []),
        ([0], 10 * CLUSTER, [(0, CLUSTER)]),
        ([0, CLUSTER], 10 * CLUSTER, [(0, 2 * CLUSTER)]),
        ([CLUSTER, 3 * CLUSTER], 10 * CLUSTER, [(CLUSTER, CLUSTER), (3 * CLUSTER, CLUSTER)]),
        ([0, CLUSTER], CLUSTER + 512, [(0, CLUSTER + 512)]),
        (range(0, 20 * CLUSTER, CLUSTER), 20 * CLUSTER, [(0, 16 * CLUSTER), (16 * CLUSTER, 4 * CLUSTER)]),
    ],
)
def test_stretches_are_joined_up_to_a_mebibyte(offsets, size, runs):
    assert list(runs_of(offsets, CLUSTER, size)) == runs


def test_every_kind_of_change_is_noted_once():
    image = TrackedImage(MemoryImage(bytes(SIZE)))
    assert image.collect() == []
    write(image, CLUSTER - 512, bytes(1024))
    image.discard(5 * CLUSTER, 512)
    image.write_zeroes(SIZE - 512, 512, True)
    assert image.changed == 4 * CLUSTER
    assert image.collect() == [(0, 2 * CLUSTER), (5 * CLUSTER, CLUSTER), (40 * CLUSTER, 512)]
    assert (image.collect(), image.changed) == ([], 0)


def test_a_write_that_failed_may_have_changed_a_part():
    below = MemoryImage(bytes(SIZE))
    image = TrackedImage(below)

    def fail(offset, buffers):
        raise OSError(5, "x")

    below.writev = fail
    with pytest.raises(OSError, match="x"):
        write(image, 0, bytes(512))
    assert image.collect() == [(0, CLUSTER)]


def test_a_copy_made_while_others_write_is_whole():
    image = TrackedImage(MemoryImage(bytes(SIZE)))
    copy = bytearray(SIZE)
    enough = threading.Event()

    def work(seed):
        chance = random.Random(seed)
        for number in range(1_000_000):
            if number >= 3000 and enough.is_set():
                break
            size = 512 * chance.randint(1, 200)
            write(image, 512 * chance.randint(0, (SIZE - size) // 512), chance.randbytes(16) * (size // 16))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    rounds = 0
    while True:
        are_done = not any(thread.is_alive() for thread in threads)
        for offset, size in image.collect():
            copy[offset : offset + size] = read(image, offset, size)
        rounds += 1
        if rounds > 2:
            enough.set()
        if are_done:
            break
    assert rounds > 2
    assert copy == read(image, 0, SIZE)


def test_a_disk_that_is_somebody_elses_fails():
    image = PendingImage(size=SIZE, readonly=False, block_size=512, cluster_size=4096)
    assert image.plain_fd is None
    for request in (
        lambda: read(image, 0, 512),
        lambda: write(image, 0, bytes(512)),
        image.flush,
        lambda: image.discard(0, 512),
        lambda: image.write_zeroes(0, 512, True),
    ):
        with pytest.raises(OSError, match="not here yet"):
            request()
    image.close()
