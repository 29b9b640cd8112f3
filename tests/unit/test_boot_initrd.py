"""Initial RAM disks: what is accepted, and that a truncated one is found."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
import struct

import pytest
from images import COMPRESSORS, MIB, bzimage, cpio, zstd

from hypervisor import boot
from hypervisor.boot import initrd
from hypervisor.errors import ImageError

FILES = {"init": b"#!/bin/sh\nexec /bin/sh\n", "bin": b"", "bin/busybox": bytes(range(256)) * 40, "etc/x": b"y"}
ARCHIVE = cpio(FILES)
NOISE = random.Random(1).randbytes(3 * MIB)


def check(data: bytes, limit: int = 1 << 40) -> None:
    initrd.check(memoryview(data), "rd.img", limit=limit)


def refused(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        check(data)
    assert str(caught.value).startswith("the initrd rd.img is ")
    return str(caught.value).removeprefix("the initrd rd.img is ")


@pytest.mark.parametrize("form", [None, *COMPRESSORS])
def test_whole_archives_are_accepted(form):
    packed = ARCHIVE if form is None else COMPRESSORS[form](ARCHIVE)
    check(packed)
    check(packed + bytes(1000))


@pytest.mark.parametrize("form", [*COMPRESSORS])
def test_chains_are_accepted(form):
    """buffer-format.rst: any number of archives, each plain or compressed, with zero bytes between them."""
    packed = COMPRESSORS[form](ARCHIVE)
    padding = bytes(-len(packed) % 4)
    check(ARCHIVE + packed)
    check(packed + packed)
    check(bytes(512) + ARCHIVE + ARCHIVE + packed)
    if form not in ("lz4", "lzma"):
        check(packed + padding + ARCHIVE)
        check(packed + padding + bytes(4) + COMPRESSORS["gzip"](ARCHIVE))


@pytest.mark.parametrize("options", [{"magic": b"070702"}, {"trailer": False}, {"block": 4}])
def test_other_sound_cpio_archives(options):
    """buffer-format.rst: the "crc" format is read too, and the end mark TRAILER!!! is optional."""
    check(cpio(FILES, **options))


def test_a_file_may_be_named_like_a_trailer():
    check(cpio({"TRAILER!!!x": b"data", "z": b"more"}))


@pytest.mark.parametrize(
    ("offset", "magic"),
    [(0x438, b"\x53\xef"), (0, b"hsqs"), (0, b"-rom1fs-"), (0, b"\x45\x3d\xcd\x28"), (0x410, b"\x8f\x13")],
)
def test_file_system_images_are_accepted(offset, magic):
    image = bytearray(8192)
    image[offset : offset + len(magic)] = magic
    check(bytes(image))


def test_every_truncation_of_a_plain_archive_is_found():
    """But for one between two entries, or in the zero bytes behind one, where nothing is missing to the eye."""
    ends = []
    position = 0
    for name, data in [*FILES.items(), ("TRAILER!!!", b"")]:
        header = position + 110 + len(name) + 1
        end = -(-header // 4) * 4 + len(data) if data else header
        position = -(-end // 4) * 4
        ends += range(end, position + 1)
    for size in range(1, position):
        if size not in ends:
            assert refused(ARCHIVE[:size]).startswith("truncated: "), size


@pytest.mark.parametrize("form", sorted(set(COMPRESSORS) - {"lzma"}))
def test_every_truncation_of_a_packed_archive_is_found(form):
    packed = COMPRESSORS[form](ARCHIVE)
    for size in range(8, len(packed)):
        if form == "lz4" and size == 8:
            continue
        assert refused(packed[:size]).startswith("truncated: "), size


@pytest.mark.parametrize("form", sorted(set(COMPRESSORS) - {"lzma"}))
def test_truncated_large_archives_are_found(form):
    """Larger than what is always decompressed: the cheap signs must show it."""
    packed = COMPRESSORS[form](cpio({"noise": NOISE}))
    assert len(packed) > 2 * MIB
    check(packed)
    for missing in (1, 4, 1000, MIB, 2 * MIB):
        assert refused(packed[:-missing]).startswith("truncated: "), missing


def test_a_truncated_xz_file_that_ends_like_a_whole_one():
    """xz-file-format.txt, 2.1.2: the footer's magic number alone proves nothing, its CRC32 does."""
    packed = lzma.compress(cpio({"noise": NOISE}), preset=0)
    check(packed)
    assert refused(packed[:MIB] + b"YZ").startswith("truncated: ")


def test_large_archives_that_lack_the_cheap_sign_are_still_accepted():
    """A gzip file whose content is no multiple of 512, an xz and a bzip2 file with something behind."""
    odd = cpio({"noise": NOISE}, block=4)
    assert len(odd) % 512
    check(gzip.compress(odd))
    check(gzip.compress(odd) + b"signature")
    check(lzma.compress(odd, preset=0) + b"signature")
    check(bz2.compress(odd) + b"signature")


def test_whole_streams_are_not_decompressed(monkeypatch):
    """The mark at the end of a bzip2 stream stands at any bit."""
    monkeypatch.setattr(initrd, "_stream_end", lambda *_: pytest.fail("decompressed"))
    check(COMPRESSORS["xz"](ARCHIVE))
    for size in range(1000, 1064):
        check(bz2.compress(NOISE[:size]))


def test_decompressing_stops_at_the_limit():
    """A bomb costs no more than the limit; that it is also truncated is then the guest's to find out."""
    bomb = gzip.compress(bytes(200 * MIB))[:-8]
    check(bomb, limit=2 * MIB)
    check(lzma.compress(bytes(20 * MIB), preset=0)[:-1], limit=2 * MIB)
    assert refused(bomb).startswith("truncated: ")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "an empty file"),
        (bytes(1000), "1000 zero bytes"),
        (b"070707" + b"0" * 100, "a cpio archive of an old format"),
        (b"\x04\x22\x4d\x18" + bytes(10), "an lz4 file of the format that Linux does not read"),
        (b"#!/bin/sh\n", "a script"),
        (b"plain text\n", "a text file"),
        (b"\x7fELF\x02\x01" + bytes(10) + struct.pack("<HH", 2, 62), "a 64-bit ELF executable for x86-64"),
        (NOISE[:1000], "an unknown kind of file"),
        (b"07", "truncated: "),
        (b"070701" + b"z" * 104, "damaged: the cpio entry at byte 0 has no header"),
        (b"070701" + b" " * 104, "damaged: the cpio entry at byte 0 has no header"),
        (b"070701" + b"\xff" * 104, "damaged: the cpio entry at byte 0 has no header"),
        (b"070701" + b"f" * 104, "truncated: "),
        (b"\x28\xb5\x2f\xfd\x00\x00" + b"\x06\0\0", "damaged: the zstd block at byte 6 has no known type"),
        (b"\x28\xb5\x2f\xfd", "truncated: "),
        (b"\x1f\x8b\x08\0" + NOISE[:1000], "damaged: its gzip stream does not unpack"),
        (b"\xfd7zXZ\0" + NOISE[:1000], "damaged: its compressed stream does not unpack"),
        (b"BZh9" + NOISE[:1000], "damaged: its compressed stream does not unpack"),
        (b"\x02\x21\x4c\x18\xff\xff\xff\xff", "truncated: "),
    ],
)
def test_refuses(data, message):
    assert refused(data).startswith(message)


def test_what_follows_a_whole_archive_is_the_kernels_business():
    check(ARCHIVE + b"junk that is no archive")


def test_zstd_frames_of_every_shape():
    """Single-segment, checksum, RLE and raw blocks, several frames."""
    import zstandard  # noqa: PLC0415 - only this test needs it

    for data in (b"", b"a", bytes(MIB), NOISE[:300_000]):
        for checksum in (False, True):
            for size in (False, True):
                engine = zstandard.ZstdCompressor(write_checksum=checksum, write_content_size=size)
                packed = engine.compress(data)
                check(packed + packed)
                assert refused((packed + packed)[:-1]).startswith("truncated: ")
    assert refused(zstd(NOISE) + zstd(NOISE)[:-1]).startswith("truncated: ")


def test_the_machine_is_told_through_the_plan():
    with pytest.raises(ImageError, match=r"the initrd rd\.img is an empty file") as caught:
        boot.plan(bzimage(), name="k", ram_bytes=64 * MIB, initrd=b"", initrd_name="rd.img")
    assert "cpio archive (newc)" in str(caught.value.hint)
