"""Qcow2 images that are damaged or made to harm, and guests that try to make one grow."""

import errno
import os
import resource
import struct
import subprocess

import pytest

from devices.backends.errors import BackendError
from devices.backends.image import open_image
from devices.backends.qcow2_header import create

MIB = 1 << 20
CLUSTER = 1 << 16
COPIED = 1 << 63


def check(path):
    """No errors, and no leaks either."""
    result = subprocess.run(["qemu-img", "check", path], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def put(image, offset, data):
    image.writev(offset, [memoryview(data)])


def patch(path, offset, data):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def test_more_l2_tables_than_are_kept_in_memory(tmp_path):
    """With clusters of 512 bytes an L2 table is for 32 KiB, so this disk has 512."""
    path = tmp_path / "e.qcow2"
    create(str(path), 16 * MIB, cluster_bits=9)
    image = open_image(str(path))
    for at in range(0, 16 * MIB, 32768):
        put(image, at, at.to_bytes(8, "big") * 64)
    found = bytearray(512)
    for at in range(0, 16 * MIB, 32768):
        image.readv(at, [memoryview(found)])
        assert found == at.to_bytes(8, "big") * 64
    image.close()
    check(path)


def test_a_refcount_table_that_grows_leaves_nothing_behind(tmp_path):
    """With clusters of 512 bytes a cluster of the table is for 64 blocks of 256 clusters: 8 MiB."""
    path = tmp_path / "g.qcow2"
    create(str(path), 24 * MIB, cluster_bits=9)
    table = path.read_bytes()[48:60]
    image = open_image(str(path))
    data = os.urandom(CLUSTER)
    for at in range(0, 20 * MIB, CLUSTER):
        put(image, at, data)
    image.close()
    assert path.read_bytes()[48:60] != table
    check(path)
    raw = tmp_path / "raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", path, raw], check=True)
    assert raw.read_bytes() == (data * 320).ljust(24 * MIB, b"\0")


def test_a_guest_that_writes_and_discards_and_never_flushes(tmp_path):
    path = tmp_path / "n.qcow2"
    create(str(path), 4 * MIB)
    image = open_image(str(path))
    data = os.urandom(MIB)
    for _ in range(200):
        put(image, 0, data)
        image.discard(0, MIB)
    assert path.stat().st_size <= 72 * MIB  # the disk, 64 MiB that wait to be free, metadata
    image.close()
    check(path)


def test_clusters_that_an_earlier_user_freed_are_used_again(tmp_path):
    path = tmp_path / "s.qcow2"
    create(str(path), 4 * MIB)
    for _ in range(6):
        image = open_image(str(path))
        put(image, 0, os.urandom(MIB))
        image.flush()
        image.discard(0, MIB)
        image.close()
    assert path.stat().st_size < 2 * MIB
    check(path)


def test_a_full_host_leaks_nothing(tmp_path, monkeypatch):
    path = tmp_path / "f.qcow2"
    create(str(path), 4 * MIB)
    image = open_image(str(path))

    def full(offset, buffers):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(image._file, "writev", full)
        with pytest.raises(OSError, match="No space"):
            put(image, 0, b"a" * CLUSTER)
    put(image, 0, b"b" * CLUSTER)
    image.close()
    check(path)


@pytest.mark.parametrize("target", [0, 1, 2, 3, 1 << 30])
def test_an_l1_that_leads_to_other_metadata_is_never_written_through(tmp_path, target):
    """Cluster 0 is the header, 1 the refcount table, 2 its block, 3 the L1."""
    path = tmp_path / "l.qcow2"
    create(str(path), 4 * MIB)
    patch(path, 3 * CLUSTER, (target * CLUSTER + 512 * (target == 0) | COPIED).to_bytes(8, "big"))
    before = path.read_bytes()
    with pytest.raises(BackendError, match=r"damaged: (two of its tables|a table at)"):
        open_image(str(path))
    assert path.read_bytes() == before


def test_two_l1_entries_with_one_l2_table(tmp_path):
    path = tmp_path / "d.qcow2"
    create(str(path), 1024 * MIB)
    image = open_image(str(path))
    put(image, 0, b"x" * 512)
    image.close()
    patch(path, 3 * CLUSTER + 8, path.read_bytes()[3 * CLUSTER :][:8])
    with pytest.raises(BackendError, match="two of its tables"):
        open_image(str(path))


def test_a_zstd_bomb_is_unpacked_no_further_than_a_cluster(tmp_path):
    """A frame of RLE blocks, 4 bytes for 128 KiB each (RFC 8878 section 3.1.1.2), makes 900 MiB of 30 KiB."""
    source, path = tmp_path / "s.raw", tmp_path / "z.qcow2"
    source.write_bytes(os.urandom(30000) + bytes(MIB - 30000))
    subprocess.run(
        ["qemu-img", "convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd", source, path], check=True
    )
    image = open_image(str(path), readonly=True)
    place, size = image._compressed_place(image._entry(0))
    image.close()
    block = (128 << 10 << 3 | 1 << 1).to_bytes(3, "little") + b"r"
    patch(path, place, struct.pack("<IBB", 0xFD2FB528, 0, 0x38) + block * ((size - 6) // 4))
    image = open_image(str(path), readonly=True)
    found = bytearray(CLUSTER)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    image.readv(0, [memoryview(found)])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB
    assert found == b"r" * CLUSTER
    image.close()


def test_a_raw_backing_file_of_any_length(tmp_path):
    base, path = tmp_path / "b.raw", tmp_path / "o.qcow2"
    base.write_bytes(b"a" * 1000)
    create(str(path), MIB, backing=str(base), backing_format="raw")
    image = open_image(str(path), form="qcow2")
    found = bytearray(2048)
    image.readv(0, [memoryview(found)])
    image.close()
    assert found == (b"a" * 1000).ljust(2048, b"\0")
