"""Naming files that are no kernel."""

from __future__ import annotations

import struct

import pytest
from images import COMPRESSORS, MIB, bzimage, cpio, elf, patch

from hypervisor import boot
from hypervisor.errors import ImageError


def at(offset: int, magic: bytes, size: int = 0x10100) -> bytes:
    image = bytearray(size)
    image[offset : offset + len(magic)] = magic
    return bytes(image)


def pe(machine: int) -> bytes:
    image = bytearray(at(0, b"MZ", 1024))
    struct.pack_into("<I", image, 0x3C, 0x80)
    struct.pack_into("<4sH", image, 0x80, b"PE\0\0", machine)
    return bytes(image)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (b"", "an empty file"),
        (COMPRESSORS["gzip"](b"x"), "a gzip file"),
        (COMPRESSORS["xz"](b"x"), "an xz file"),
        (COMPRESSORS["zstd"](b"x"), "a zstd file"),
        (COMPRESSORS["bzip2"](b"x"), "a bzip2 file"),
        (COMPRESSORS["lz4"](b"x"), "an lz4 file (legacy format)"),
        (b"\x04\x22\x4d\x18" + bytes(20), "an lz4 file"),
        (b"PK\x03\x04rest", "a zip file"),
        (cpio({"a": b"b"}), "a cpio archive"),
        (at(257, b"ustar\0"), "a tar archive"),
        (b"!<arch>\ndebian-binary   ", "a Debian package"),
        (b"QFI\xfb\0\0\0\x03", "a qcow2 disk image"),
        (at(0x8001, b"CD001"), "an ISO 9660 image"),
        (at(0x438, b"\x53\xef"), "an ext2, ext3 or ext4 file system image"),
        (at(0x10040, b"_BHRfS_M"), "a btrfs file system image"),
        (b"MZ" + at(0x38 - 2, b"ARM\x64"), "an arm64 Linux Image"),
        (at(0x24, b"\x18\x28\x6f\x01"), "a 32-bit ARM Linux zImage"),
        (b"\xcf\xfa\xed\xfe" + bytes(28), "a Mach-O file"),
        (b"#!/bin/sh\necho\n", "a script"),
        (b"just some words\n", "a text file"),
        ("h\u00e4\u00e4\u00e4".encode() * 100, "a text file"),
        (pe(0x8664), "a PE file (Windows or EFI program) for x86-64"),
        (pe(0xAA64), "a PE file (Windows or EFI program) for AArch64"),
        (at(0, b"MZ", 1024), "a DOS or PE program"),
        (bzimage()[:400], "the first 400 bytes of a Linux bzImage, or a DOS or PE program"),
        (at(0x1FE, b"\x55\xaa", 512), "a boot sector or a disk image"),
        (at(64, b"\xd6\x50\x52\xe8"), "a multiboot 2 kernel"),
        (bytes(5000), "5000 zero bytes"),
        (b"\x01\x02\x03\x04" * 100, "an unknown kind of file"),
        (b"\xff", "an unknown kind of file"),
        (b"\x7fELF", "a truncated ELF file"),
        (elf([], machine=183), "a 64-bit ELF executable for AArch64"),
        (elf([], machine=40, bits=32, kind=3), "a 32-bit ELF shared object for ARM"),
        (bzimage(), "a Linux kernel of boot protocol 2.15"),
    ],
)
def test_describe(image, expected):
    assert boot.describe(image) == expected


@pytest.mark.parametrize(
    ("image", "hint"),
    [
        (COMPRESSORS["gzip"](b"x" * 1000), "decompress it first"),
        (b"QFI\xfb\0\0\0\x03", "a kernel is a file inside it; copy that out"),
        (at(0x38, b"ARM\x64"), "use a kernel built for x86-64"),
        (at(0x1FE, b"\x55\xaa", 512), "for a boot sector use --flat 16"),
        (b"random words", "a kernel is a Linux bzImage, an x86-64 vmlinux, a PVH or multiboot 1 kernel"),
        (patch(bzimage(), boot_flag=0), "an EFI program needs firmware"),
    ],
)
def test_as_a_kernel(image, hint):
    """The message names the file and its kind; the hint says what to do."""
    with pytest.raises(ImageError) as caught:
        boot.plan(image, name="dir/file", ram_bytes=64 * MIB)
    assert str(caught.value) == f"dir/file is {boot.describe(image)}, no kernel"
    assert str(caught.value.hint).startswith(hint)
    assert "\n" not in str(caught.value)


def test_an_empty_file():
    with pytest.raises(ImageError, match="dir/file is an empty file"):
        boot.plan(b"", name="dir/file", ram_bytes=64 * MIB)
