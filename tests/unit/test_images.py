"""Raw images, overlays in memory, locks: what a disk stands on."""

import errno
import os
import random
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.backends import raw
from devices.backends.errors import BackendError
from devices.backends.image import open_image

SECTOR = 512
SIZE = 300 * 1024 + SECTOR


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


def contents(image):
    data = bytearray(image.size)
    image.readv(0, [memoryview(data)])
    return bytes(data)


@settings(max_examples=40)
@given(data=st.data())
@pytest.mark.parametrize("kind", ["writeback", "none", "unsafe", "memory"])
def test_any_sequence_equals_a_plain_array(tmp_path, kind, data):
    path = tmp_path / os.urandom(4).hex()
    path.write_bytes(random.Random(1).randbytes(SIZE))
    before = path.read_bytes()
    model = bytearray(before)
    how = {"overlay": "memory"} if kind == "memory" else {"cache": kind}
    image = open_image(str(path), **how)
    assert image.size == SIZE
    for _ in range(data.draw(st.integers(1, 10))):
        offset = data.draw(st.integers(0, SIZE // SECTOR - 1)) * SECTOR
        length = min(data.draw(st.integers(1, 300)) * SECTOR, SIZE - offset)
        what = data.draw(st.sampled_from(["write", "zero", "unmap", "discard", "flush"]))
        if what == "write":
            fresh = random.Random(offset).randbytes(length)
            cut = data.draw(st.sampled_from([SECTOR, 4096, 1 << 20]))
            image.writev(offset, [memoryview(fresh)[at : at + cut] for at in range(0, length, cut)])
            model[offset : offset + length] = fresh
        elif what in {"zero", "unmap"}:
            image.write_zeroes(offset, length, what == "unmap")
            model[offset : offset + length] = bytes(length)
        elif what == "discard":
            image.discard(offset, length)
            model[offset : offset + length] = contents(image)[offset : offset + length]
        else:
            image.flush()
        assert contents(image) == model
    image.close()
    image.close()
    assert path.read_bytes() == (before if kind == "memory" else model)


def test_thousands_of_small_buffers(path):
    """More than one call takes."""
    image = open_image(str(path))
    buffers = [memoryview(bytearray(SECTOR)) for _ in range(SIZE // SECTOR)]
    whole = path.read_bytes()
    buffers += [memoryview(bytearray(0))]
    image.readv(0, buffers[:-1] * 1)
    assert b"".join(buffers) == whole
    image.writev(0, [memoryview(bytes([1]))] * 2048)
    assert path.read_bytes()[:2049] == b"\1" * 2048 + whole[2048:2049]
    image.close()


def test_discard_punches_holes(path):
    image = open_image(str(path))
    before = os.stat(path).st_blocks
    image.discard(0, 256 * 1024)
    assert os.stat(path).st_blocks <= before - 500
    assert contents(image)[: 256 * 1024] == bytes(256 * 1024)
    image.close()


def test_where_the_host_cannot_punch_zeroes_are_written(path, monkeypatch):
    def cannot(*_):
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(raw, "_fallocate", cannot)
    image = open_image(str(path))
    image.discard(0, 4096)
    assert contents(image) == path.read_bytes() != bytes(SIZE)
    image.write_zeroes(512, 200 * 1024, True)
    assert contents(image)[512 : 512 + 200 * 1024] == bytes(200 * 1024)
    image.close()


def test_flush_is_true_and_fails_for_good(path, monkeypatch):
    """The kernel may drop what it could not write, and say so only once."""
    calls = []
    real = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda fd: calls.append(fd) or real(fd))
    image = open_image(str(path))
    image.flush()
    assert len(calls) == 1

    def broken(fd):
        raise OSError(errno.EIO, "lost")

    monkeypatch.setattr(os, "fdatasync", broken)
    with pytest.raises(OSError, match="lost"):
        image.flush()
    monkeypatch.setattr(os, "fdatasync", real)
    with pytest.raises(OSError, match="lost"):
        image.flush()
    image.close()


def test_an_unsafe_cache_flushes_nothing(path, monkeypatch):
    monkeypatch.setattr(os, "fdatasync", pytest.fail)
    image = open_image(str(path), cache="unsafe")
    image.flush()
    image.close()


def test_an_image_that_shrinks(path):
    image = open_image(str(path))
    os.truncate(path, SECTOR)
    with pytest.raises(OSError, match="smaller"):
        contents(image)
    image.close()


def make(path, kind):
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "odd":
        path.write_bytes(bytes(1000))
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        return "/dev/null"
    return str(path)


@pytest.mark.parametrize(
    ("kind", "words", "hint"),
    [
        ("missing", "No such file", "truncate"),
        ("empty", "is empty", "truncate"),
        ("odd", "no multiple of 512", "truncate"),
        ("folder", "Is a directory", "image file"),
        ("device", "no file and no block device", ""),
    ],
)
def test_what_is_no_disk(tmp_path, kind, words, hint):
    with pytest.raises(BackendError, match=words) as caught:
        open_image(make(tmp_path / "x", kind))
    assert hint in caught.value.hint


def test_a_file_that_may_only_be_read(path):
    image = open_image(str(path), readonly=True)
    with pytest.raises(OSError, match="Bad file descriptor"):
        image.writev(0, [memoryview(bytes(512))])
    image.close()
    assert image.readonly


def test_locks(path):
    writer = open_image(str(path))
    for readonly in (True, False):
        with pytest.raises(BackendError, match="in use"):
            open_image(str(path), readonly=readonly)
    with pytest.raises(BackendError, match="in use"):
        open_image(str(path), overlay="memory")
    assert subprocess.run(
        ["qemu-img", "bench", "-w", "-c", "1", "-f", "raw", path], capture_output=True, check=False
    ).returncode
    writer.close()
    readers = [open_image(str(path), overlay="memory"), open_image(str(path), readonly=True)]
    with pytest.raises(BackendError, match="in use"):
        open_image(str(path))
    for reader in readers:
        reader.close()
    open_image(str(path)).close()


def test_a_raw_image_that_a_guest_made_look_like_another_one(path):
    """Told by content it is qcow2; named raw it stays what it is."""
    with open(path, "r+b") as file:
        file.write(b"QFI\xfb\0\0\0\3")
    with pytest.raises(BackendError):
        open_image(str(path))
    image = open_image(str(path), form="raw")
    assert contents(image) == path.read_bytes()
    image.close()


def test_memory_is_given_back_by_an_overlay(path):
    image = open_image(str(path), overlay="memory")
    image.writev(0, [memoryview(b"x" * 200 * 1024)])
    image.discard(0, 128 * 1024)
    assert contents(image)[: 128 * 1024] == bytes(128 * 1024)
    assert contents(image)[128 * 1024 : 200 * 1024] == b"x" * 72 * 1024
    image.close()
