"""Writers of the images that the boot loaders read, so that tests hold no opaque files.

Numbers are restated from the formats' descriptions, not taken from the loaders.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
from typing import NamedTuple

MIB = 1 << 20

PT_LOAD = 1
PT_NOTE = 4
ET_EXEC = 2
EM_386 = 3
EM_X86_64 = 62


class Load(NamedTuple):
    """A PT_LOAD segment to write: physical address, bytes, size in memory, and a virtual address of its own."""

    paddr: int
    data: bytes
    memsz: int | None = None
    vaddr: int | None = None


def note(owner: bytes, kind: int, value: bytes) -> bytes:
    """Return one ELF note, padded to four bytes."""
    name = owner + b"\0"
    return (
        struct.pack("<III", len(name), len(value), kind)
        + name.ljust(-(-len(name) // 4) * 4, b"\0")
        + value.ljust(-(-len(value) // 4) * 4, b"\0")
    )


def pvh_note(entry: int, bits: int = 64) -> bytes:
    """Return XEN_ELFNOTE_PHYS32_ENTRY (18) with a value as wide as the file's class, as Linux writes it."""
    return note(b"Xen", 18, struct.pack("<Q" if bits == 64 else "<I", entry))


def elf(
    loads: list[Load],
    *,
    entry: int | None = None,
    bits: int = 64,
    notes: bytes = b"",
    machine: int | None = None,
    kind: int = ET_EXEC,
    extra: list[tuple[int, bytes]] | None = None,
    front: bytes = b"",
) -> bytes:
    """Return an ELF file.

    Args:
        loads: its PT_LOAD segments.
        entry: e_entry, by default the first segment's physical address.
        bits: 32 or 64.
        notes: content of a PT_NOTE segment, none when empty.
        machine: e_machine, by default that of the class.
        kind: e_type.
        extra: further program headers: p_type and content.
        front: bytes right behind the program headers, such as a multiboot header.
    """
    parts = [(PT_LOAD, load) for load in loads]
    if notes:
        parts.append((PT_NOTE, Load(0, notes)))
    parts += [(kind_, Load(0, data)) for kind_, data in extra or []]
    wide = bits == 64
    header_size, entry_size = (64, 56) if wide else (52, 32)
    position = header_size + entry_size * len(parts)
    body = front.ljust(-(-len(front) // 8) * 8, b"\0")
    table = b""
    for part, load in parts:
        offset = position + len(body)
        body += load.data.ljust(-(-len(load.data) // 8) * 8, b"\0")
        vaddr = load.paddr if load.vaddr is None else load.vaddr
        memsz = len(load.data) if load.memsz is None else load.memsz
        if wide:
            table += struct.pack("<IIQQQQQQ", part, 7, offset, vaddr, load.paddr, len(load.data), memsz, 4)
        else:
            table += struct.pack("<IIIIIIII", part, offset, vaddr, load.paddr, len(load.data), memsz, 7, 4)
    if machine is None:
        machine = EM_X86_64 if wide else EM_386
    if entry is None:
        entry = loads[0].paddr if loads else 0
    head = b"\x7fELF" + bytes([2 if wide else 1, 1, 1]) + bytes(9)
    head += struct.pack(
        "<HHIQQQIHHHHHH" if wide else "<HHIIIIIHHHHHH",
        *(kind, machine, 1, entry, header_size, 0, 0, header_size, entry_size, len(parts), 0, 0, 0),
    )
    return head + table + body


def multiboot_header(flags: int = 0, addresses: tuple[int, int, int, int, int] | None = None) -> bytes:
    """Return a multiboot 1 header (0.6.96, 3.1.1).

    Args:
        flags: its flags; bit 16 is added with `addresses`.
        addresses: header_addr, load_addr, load_end_addr, bss_end_addr, entry_addr.
    """
    if addresses is not None:
        flags |= 1 << 16
    head = struct.pack("<III", 0x1BADB002, flags, -(0x1BADB002 + flags) & 0xFFFF_FFFF)
    return head if addresses is None else head + struct.pack("<5I", *addresses)


BZIMAGE_FIELDS = {
    "setup_sects": (0x1F1, "<B"),
    "syssize": (0x1F4, "<I"),
    "boot_flag": (0x1FE, "<H"),
    "jump": (0x201, "<B"),
    "magic": (0x202, "<4s"),
    "version": (0x206, "<H"),
    "kernel_version": (0x20E, "<H"),
    "loadflags": (0x211, "<B"),
    "initrd_addr_max": (0x22C, "<I"),
    "kernel_alignment": (0x230, "<I"),
    "relocatable_kernel": (0x234, "<B"),
    "xloadflags": (0x236, "<H"),
    "cmdline_size": (0x238, "<I"),
    "payload_offset": (0x248, "<I"),
    "payload_length": (0x24C, "<I"),
    "setup_data": (0x250, "<Q"),
    "pref_address": (0x258, "<Q"),
    "init_size": (0x260, "<I"),
}
"""Offset in the file and form of the setup header's fields (the kernel's boot.rst)."""

STUB = b"\xf4" * 0x2C0
"""What stands in for the kernel's own decompressor, with the 64-bit entry at 0x200 in it."""


def patch(image: bytes, **fields: object) -> bytes:
    """Return a bzImage with some fields of its setup header changed."""
    out = bytearray(image)
    for name, value in fields.items():
        offset, form = BZIMAGE_FIELDS[name]
        struct.pack_into(form, out, offset, value)
    return bytes(out)


def bzimage(payload: bytes = b"", *, sectors: int = 3, release: bytes = b"6.1.0-test", **fields: object) -> bytes:
    """Return a bzImage of protocol 2.15 with `payload` behind a stub, 1 MiB of init_size at 16 MiB.

    Args:
        payload: the compressed kernel.
        sectors: setup_sects.
        release: first word of the version string.
        fields: values for BZIMAGE_FIELDS.
    """
    code = STUB + payload
    code = code.ljust(-(-len(code) // 16) * 16, b"\0")
    setup = bytearray((sectors + 1) * 512)
    setup[0:2] = b"MZ"
    text = release + b" (builder@example.org) #1 SMP\0"
    setup[0x300 : 0x300 + len(text)] = text
    values: dict[str, object] = {
        "setup_sects": sectors,
        "syssize": len(code) // 16,
        "boot_flag": 0xAA55,
        "jump": 0x6A,
        "magic": b"HdrS",
        "version": 0x020F,
        "kernel_version": 0x100,
        "loadflags": 1,
        "initrd_addr_max": 0x7FFF_FFFF,
        "kernel_alignment": 2 * MIB,
        "relocatable_kernel": 1,
        "xloadflags": 0x3F,
        "cmdline_size": 2047,
        "payload_offset": len(STUB),
        "payload_length": len(payload),
        "pref_address": 16 * MIB,
        "init_size": MIB,
    }
    return patch(bytes(setup) + code, **(values | fields))


def lz4_legacy(data: bytes) -> bytes:
    """Compress into lz4's legacy frame, the only one that Linux reads: 8 MiB blocks, each after its length."""
    from lz4.block import compress  # noqa: PLC0415 - only the tests of lz4 need the library

    out = b"\x02\x21\x4c\x18"
    for start in range(0, len(data), 8 * MIB):
        block = compress(data[start : start + 8 * MIB], mode="high_compression", store_size=False)
        out += struct.pack("<I", len(block)) + block
    return out


def zstd(data: bytes) -> bytes:
    """Compress into a zstd frame without the content's size, as `cat | zstd` does."""
    from zstandard import ZstdCompressor  # noqa: PLC0415 - only the tests of zstd need the library

    engine = ZstdCompressor(write_checksum=True).compressobj()
    return engine.compress(data) + engine.flush()


def xz_kernel(data: bytes) -> bytes:
    """Compress as the kernel's scripts/xz_wrap.sh does: CRC32, the x86 filter, LZMA2 with a 32 MiB dictionary."""
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "dict_size": 32 * MIB}]
    return lzma.compress(data, lzma.FORMAT_XZ, lzma.CHECK_CRC32, filters=filters)


COMPRESSORS = {
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "bzip2": bz2.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "xz": xz_kernel,
    "lz4": lz4_legacy,
    "zstd": zstd,
}
"""A compressor for each format that a kernel or an initrd may be packed with, but LZO."""


def kernel_payload(form: str, kernel: bytes, size: int | None = None) -> bytes:
    """Return the payload of a bzImage: packed, and (but for gzip, which has it already) the unpacked length behind."""
    packed = COMPRESSORS[form](kernel)
    if form == "gzip":
        return packed if size is None else packed[:-4] + struct.pack("<I", size)
    return packed + struct.pack("<I", len(kernel) if size is None else size)


def cpio(files: dict[str, bytes], *, magic: bytes = b"070701", trailer: bool = True, block: int = 512) -> bytes:
    """Return a cpio archive in the "newc" format (the kernel's buffer-format.rst), padded to `block` bytes."""
    out = b""
    entries = [*files.items(), ("TRAILER!!!", b"")] if trailer else [*files.items()]
    for number, (name, data) in enumerate(entries):
        raw = name.encode() + b"\0"
        fields = (number, 0o100644, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(raw), 0)
        out += magic + "".join(f"{field:08x}" for field in fields).encode() + raw
        out = out.ljust(-(-len(out) // 4) * 4, b"\0") + data
        out = out.ljust(-(-len(out) // 4) * 4, b"\0")
    return out.ljust(-(-len(out) // block) * block, b"\0")
