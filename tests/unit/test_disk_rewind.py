"""Disks that go back to a checkpoint, over every kind of image."""

import errno
import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_image import MemoryImage

from devices.backends.faults import FaultyImage
from devices.backends.image import open_image
from devices.backends.memory_overlay import MemoryOverlay
from devices.backends.qcow2_header import create
from devices.backends.rewind import CheckpointImage, rewindable

KIB = 1 << 10
CLUSTER = 64 * KIB
SIZE = 5 * CLUSTER + 3 * 512


def contents(image):
    data = bytearray(image.size)
    image.readv(0, [memoryview(data)])
    return bytes(data)


def write(image, offset, data, cut=4096):
    view = memoryview(data)
    image.writev(offset, [view[at : at + cut] for at in range(0, len(data), cut)])


def make(folder, kind):
    """A disk of random bytes, of each kind that can be opened."""
    data = random.Random(4).randbytes(SIZE)
    base = folder / "base.raw"
    base.write_bytes(data)
    if kind == "qcow2":
        create(str(folder / "disk.qcow2"), SIZE)
        image = open_image(str(folder / "disk.qcow2"))
        write(image, 0, data)
        return image
    how = {
        "raw": {},
        "direct": {"cache": "none"},
        "memory": {"overlay": "memory"},
        "overlay": {"overlay": str(folder / "over.qcow2")},
    }
    return open_image(str(base), **how[kind])


@pytest.mark.parametrize("kind", ["raw", "direct", "qcow2", "overlay", "memory"])
def test_what_was_written_since_is_gone(tmp_path, kind):
    image = rewindable(make(tmp_path, kind))
    write(image, 512, b"a" * 1024)
    image.checkpoint()
    before = contents(image)
    for byte in (b"b", b"c"):
        write(image, CLUSTER - 512, byte * CLUSTER)
        write(image, SIZE - 512, byte * 512)
        image.write_zeroes(2 * CLUSTER, 2 * CLUSTER, unmap=True)
        image.discard(0, 512)
        image.flush()
        after = contents(image)
        assert after[CLUSTER - 512 : 2 * CLUSTER - 512] == byte * CLUSTER
        assert after[SIZE - 512 :] == byte * 512
        assert after[2 * CLUSTER : 4 * CLUSTER] == bytes(2 * CLUSTER)
        image.rewind()
        assert contents(image) == before
    image.close()


def test_the_file_below_is_only_read_until_a_commit(tmp_path):
    image = rewindable(make(tmp_path, "raw"))
    path = tmp_path / "base.raw"
    image.checkpoint()
    before = path.read_bytes()
    write(image, 512, b"a" * CLUSTER)
    image.flush()
    assert path.read_bytes() == before
    image.commit()
    assert path.read_bytes() == contents(image) == before[:512] + b"a" * CLUSTER + before[512 + CLUSTER :]
    write(image, 0, b"b" * 512)
    assert path.read_bytes()[:512] == b"b" * 512
    with pytest.raises(ValueError, match="no checkpoint"):
        image.rewind()
    image.checkpoint()
    write(image, 0, b"c" * 512)
    image.close()
    assert path.read_bytes()[:512] == b"b" * 512


def test_a_second_checkpoint_takes_the_first_ones_place(tmp_path):
    image = rewindable(make(tmp_path, "raw"))
    image.checkpoint()
    write(image, 0, b"a" * 512)
    image.checkpoint()
    write(image, 0, b"b" * 512)
    image.rewind()
    assert contents(image)[:512] == b"a" * 512
    image.close()


def test_the_short_cut_is_there_without_a_checkpoint_only(tmp_path):
    image = rewindable(make(tmp_path, "raw"))
    fd = image.plain_fd
    assert fd is not None
    image.checkpoint()
    assert image.plain_fd is None
    image.commit()
    assert image.plain_fd == fd
    image.close()


def test_more_than_the_limit_is_an_error_and_a_rewind_makes_room():
    image = CheckpointImage(MemoryImage(bytes(SIZE)))
    image.checkpoint(limit=2 * CLUSTER)
    for _ in range(3):
        write(image, 0, b"a" * 512)
        write(image, CLUSTER, b"b" * CLUSTER)
        write(image, 512, b"a" * 512)
        for attempt in (
            lambda: write(image, 3 * CLUSTER, b"c" * 512),
            lambda: write(image, 3 * CLUSTER, b"c" * CLUSTER),
            lambda: image.write_zeroes(3 * CLUSTER, CLUSTER, unmap=True),
        ):
            with pytest.raises(OSError, match="No space") as caught:
                attempt()
            assert caught.value.errno == errno.ENOSPC
        after = contents(image)
        assert after[:2048] == b"a" * 1024 + bytes(1024)
        assert after[CLUSTER:] == b"b" * CLUSTER + bytes(SIZE - 2 * CLUSTER)
        image.rewind()
        assert contents(image) == bytes(SIZE)


def test_a_disk_that_is_read_only_has_nothing_to_go_back_from(tmp_path):
    make(tmp_path, "raw").close()
    image = rewindable(open_image(str(tmp_path / "base.raw"), readonly=True))
    before = contents(image)
    image.checkpoint()
    image.rewind()
    assert contents(image) == before
    assert image.plain_fd is not None
    image.close()


def test_an_image_that_can_go_back_is_left_alone():
    image = rewindable(MemoryImage(bytes(SIZE)))
    assert rewindable(image) is image
    broken = FaultyImage(MemoryImage(bytes(SIZE)))
    assert rewindable(broken) is broken


def test_the_memory_that_a_rewind_keeps_is_bounded(monkeypatch):
    monkeypatch.setattr("devices.backends.memory_overlay.MAX_SPARE", 2)
    overlay = MemoryOverlay(MemoryImage(bytes(b"x" * SIZE)))
    for cluster in range(5):
        write(overlay, cluster * CLUSTER, b"a" * 512)
        overlay.forget()
        assert len(overlay._filled) <= 2
        assert contents(overlay) == b"x" * SIZE


def test_a_read_of_the_base_is_one_read():
    """A guest's buffers are pages; below an overlay they are still one request where they can be."""
    base = MemoryImage(bytes(SIZE))
    overlay, reads = MemoryOverlay(base), []
    original = base.readv
    base.readv = lambda offset, buffers: (reads.append((offset, len(buffers))), original(offset, buffers))
    write(overlay, CLUSTER, b"a" * CLUSTER)
    data = memoryview(bytearray(3 * CLUSTER))
    overlay.readv(0, [data[at : at + 4096] for at in range(0, 3 * CLUSTER, 4096)])
    assert bytes(data) == bytes(CLUSTER) + b"a" * CLUSTER + bytes(CLUSTER)
    assert reads == [(0, 16), (2 * CLUSTER, 16)]


STEPS = ["write", "zero", "discard", "flush", "checkpoint", "rewind", "commit"]
PLACE = st.integers(0, SIZE // 512 - 1)
LENGTH = st.integers(1, 2 * CLUSTER // 512 + 3)


@settings(max_examples=60)
@given(
    kind=st.sampled_from(["raw", "qcow2", "memory"]),
    steps=st.lists(
        st.tuples(st.sampled_from(STEPS), PLACE, LENGTH),
        max_size=25,
    ),
)
def test_any_sequence_equals_a_plain_array(tmp_path, kind, steps):
    folder = tmp_path / os.urandom(4).hex()
    folder.mkdir()
    image = rewindable(make(folder, kind))
    model = bytearray(contents(image))
    saved = None
    for number, (what, place, length) in enumerate(steps):
        start = place * 512
        size = min(length * 512, SIZE - start)
        if what == "write":
            data = random.Random(number).randbytes(size)
            write(image, start, data)
            model[start : start + size] = data
        elif what == "zero":
            image.write_zeroes(start, size, unmap=number % 2 == 0)
            model[start : start + size] = bytes(size)
        elif what == "discard":
            image.discard(start, size)
            found = contents(image)[start : start + size]
            old = model[start : start + size]
            for at in range(0, size, 512):
                assert found[at : at + 512] in {bytes(512), bytes(old[at : at + 512])}
            model[start : start + size] = found
        elif what == "flush":
            image.flush()
        elif what == "checkpoint":
            image.checkpoint()
            saved = bytes(model)
        elif what == "rewind" and saved is not None:
            image.rewind()
            model[:] = saved
        elif what == "commit":
            image.commit()
            saved = None
        assert contents(image) == model
    image.close()
