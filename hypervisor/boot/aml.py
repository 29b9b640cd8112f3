"""As much of an AML encoder as the machine's DSDT needs: terms in, bytes out (ACPI 6.4, chapter 20)."""

from __future__ import annotations

from struct import pack
from typing import Final

__all__ = [
    "buses",
    "device",
    "dword_memory",
    "eisa_id",
    "fixed_memory",
    "integer",
    "interrupt",
    "io_ports",
    "irq",
    "method",
    "name",
    "notify",
    "package",
    "resources",
    "scope",
    "string",
    "word_io",
]

_FIXED: Final = 0x0C
"""General flags of an address space descriptor: both ends fixed, decoded positively."""


def _path(text: str) -> bytes:
    """Encode one name, perhaps below the root (20.2.2); short names are filled with underscores."""
    root = b"\\" if text.startswith("\\") else b""
    return root + text.lstrip("\\").ljust(4, "_").encode("ascii")


def _with_length(body: bytes) -> bytes:
    """Put PkgLength, which counts its own bytes, before `body` (20.2.4)."""
    if len(body) + 1 <= 0x3F:
        return bytes([len(body) + 1]) + body
    more = 1  # bytes beyond the lead byte, at most three; to_bytes refuses what does not fit them
    while more < 3 and len(body) + 1 + more >= 1 << 4 + 8 * more:
        more += 1
    length = len(body) + 1 + more
    return bytes([more << 6 | length & 0x0F]) + (length >> 4).to_bytes(more, "little") + body


def integer(value: int) -> bytes:
    """Encode an unsigned integer of up to 64 bits in its shortest form (20.2.3)."""
    if value in {0, 1}:
        return bytes([value])
    for prefix, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8)):
        if value < 1 << 8 * size:
            return bytes([prefix]) + value.to_bytes(size, "little")
    raise ValueError(f"{value:#x} is no 64-bit integer")


def string(text: str) -> bytes:
    """Encode an ASCII string."""
    return b"\x0d" + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """Encode an EISA identifier, three capitals and four hexadecimal digits, as the integer that _HID holds."""
    first, second, third = (ord(letter) - 0x40 for letter in text[:3])
    big_endian = first << 26 | second << 21 | third << 16 | int(text[3:], 16)
    return integer(int.from_bytes(big_endian.to_bytes(4, "big"), "little"))


def package(*elements: bytes) -> bytes:
    """Encode a Package of `elements`."""
    return b"\x12" + _with_length(bytes([len(elements)]) + b"".join(elements))


def name(path: str, value: bytes) -> bytes:
    """Encode Name(path, value)."""
    return b"\x08" + _path(path) + value


def scope(path: str, *terms: bytes) -> bytes:
    """Encode Scope(path) with its terms."""
    return b"\x10" + _with_length(_path(path) + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    """Encode Device(path) with its terms."""
    return b"\x5b\x82" + _with_length(_path(path) + b"".join(terms))


def method(path: str, arguments: int, *terms: bytes) -> bytes:
    """Encode a serialized Method(path) with so many arguments (20.2.5.2)."""
    return b"\x14" + _with_length(_path(path) + bytes([arguments | 1 << 3]) + b"".join(terms))


def notify(path: str, value: int) -> bytes:
    """Encode Notify(path, value) (20.2.5.3)."""
    return b"\x86" + _path(path) + integer(value)


def resources(*descriptors: bytes) -> bytes:
    """Encode a ResourceTemplate: a buffer of descriptors that ends with an end tag without checksum (6.4.2.9)."""
    content = b"".join(descriptors) + b"\x79\0"
    return b"\x11" + _with_length(integer(len(content)) + content)


def io_ports(base: int, count: int) -> bytes:
    """Describe `count` ports at `base`, of a device that decodes all 16 bits (6.4.2.5)."""
    return pack("<BBHHBB", 0x47, 1, base, base, 1, count)


def irq(number: int) -> bytes:
    """Describe an ISA interrupt: high edge, not shared (6.4.2.1)."""
    return pack("<BH", 0x22, 1 << number)


def buses(first: int, last: int) -> bytes:
    """Describe the PCI bus numbers below a bridge (6.4.3.5)."""
    return _word(2, 0, first, last)


def word_io(first: int, last: int) -> bytes:
    """Describe ports that a bridge passes on, ISA and others (6.4.3.5)."""
    return _word(1, 3, first, last)


def _word(kind: int, flags: int, first: int, last: int) -> bytes:
    return pack("<BHBBBHHHHH", 0x88, 13, kind, _FIXED, flags, 0, first, last, 0, last - first + 1)


def dword_memory(first: int, last: int) -> bytes:
    """Describe memory below 4 GiB that a bridge passes on: writable, not cacheable (6.4.3.5)."""
    return pack("<BHBBBIIIII", 0x87, 23, 0, _FIXED, 1, 0, first, last, 0, last - first + 1)


def fixed_memory(base: int, size: int) -> bytes:
    """Describe `size` writable bytes at `base` (6.4.3.4)."""
    return pack("<BHBII", 0x86, 9, 1, base, size)


def interrupt(gsi: int) -> bytes:
    """Describe a rising edge at `gsi` that nobody shares (6.4.3.6)."""
    return pack("<BHBBI", 0x89, 6, 0x03, 1, gsi)
