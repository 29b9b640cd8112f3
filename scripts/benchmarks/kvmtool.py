"""kvmtool, where there is one: it knows no multiboot, so the guest goes behind a stub that starts it as if it did."""

from __future__ import annotations

from struct import pack, unpack_from
from typing import Final

LOAD: Final = 0x10000
"""Where kvmtool puts a flat binary, and enters it in real mode at offset 0 of its segment."""
RAM: Final = 0x100000
MULTIBOOT_LOADER_MAGIC: Final = 0x2BADB002
HAS_COMMAND_LINE: Final = 1 << 2
COMMAND_LINE: Final = 16
"""Offset of its address in the multiboot information."""
CODE: Final = 8
DATA: Final = 16
GDT: Final = pack("<QQQ", 0, 0x00CF9A000000FFFF, 0x00CF92000000FFFF)
"""The selectors above: flat, 32 bits, ring 0."""
PT_LOAD: Final = 1


def _load(opcode: int, value: int) -> bytes:
    """Return `mov r32, value`."""
    return bytes([opcode]) + pack("<I", value)


EAX, ECX, EBX, ESI, EDI = 0xB8, 0xB9, 0xBB, 0xBE, 0xBF


def _stub(*, table: int, info: int, image: int, size: int, target: int, entry: int) -> bytes:  # noqa: PLR0913
    """Return the code: into protected mode, the image to where it belongs, then as a multiboot loader enters it."""
    code = b"\xfa\x2e\x66\x0f\x01\x16" + pack("<H", table)  # cli; lgdt cs:[table]
    code += b"\x0f\x20\xc0\x0c\x01\x0f\x22\xc0"  # mov eax, cr0; or al, 1; mov cr0, eax
    code += b"\x66\xea" + pack("<IH", LOAD + len(code) + 8, CODE)  # jmp to the next instruction
    code += _load(EAX, DATA) + b"\x8e\xd8\x8e\xc0\x8e\xd0"  # mov ds, eax; mov es, eax; mov ss, eax
    code += _load(ESI, LOAD + image) + _load(EDI, target) + _load(ECX, size) + b"\xfc\xf3\xa4"  # cld; rep movsb
    code += _load(EAX, MULTIBOOT_LOADER_MAGIC) + _load(EBX, LOAD + info) + _load(ECX, entry)
    return code + b"\xff\xe1"  # jmp ecx


def flat(elf: bytes, command_line: str) -> bytes:
    """Return a flat binary for kvmtool from a multiboot guest of ours: a 32-bit ELF with one segment to load.

    Its .bss is what RAM is at the start, zero.
    """
    (entry, headers) = unpack_from("<II", elf, 24)
    kind, offset, _, target, size = unpack_from("<IIIII", elf, headers)
    if kind != PT_LOAD or target < RAM:
        raise ValueError("no guest that guest.ld has linked")
    table = (
        -(-len(_stub(table=0, info=0, image=0, size=0, target=0, entry=0)) // 8) * 8
    )  # the GDT's limit and address, then itself
    info = table + 8 + len(GDT)
    text = info + COMMAND_LINE + 4
    image = text + len(command_line) + 1
    parts = _stub(table=table, info=info, image=image, size=size, target=target, entry=entry).ljust(table, b"\0")
    parts += pack("<HIxx", len(GDT) - 1, LOAD + table + 8) + GDT
    parts += pack("<I", HAS_COMMAND_LINE).ljust(COMMAND_LINE, b"\0") + pack("<I", LOAD + text)
    return parts + command_line.encode("ascii") + b"\0" + elf[offset : offset + size]
