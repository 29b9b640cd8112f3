"""The guest's page tables, walked from outside: which physical address is behind a virtual one.

Intel SDM volume 3, chapter "Paging". Access rights are not looked at: this is for reading memory on the guest's behalf,
not for deciding what the guest may do. Each walk has a fixed number of steps, so tables that point to themselves are
as harmless as they are to the CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from devices.ports import GuestFault

if TYPE_CHECKING:
    from collections.abc import Callable

    Reader = Callable[[int, int], bytes | None]

__all__ = ["is_canonical", "reader", "walk"]

PAGE: Final = 4096
CR0_PG: Final = 1 << 31
CR4_PSE: Final = 1 << 4
CR4_PAE: Final = 1 << 5
CR4_LA57: Final = 1 << 12
EFER_LMA: Final = 1 << 10

PRESENT: Final = 1 << 0
LARGE: Final = 1 << 7
FRAME: Final = 0x000F_FFFF_FFFF_F000
"""Bits 51 to 12 of an 8-byte entry: the physical address of what it points to."""


def is_canonical(address: int, cr4: int) -> bool:
    """Return whether a 64-bit address repeats its top used bit (47, or 56 with 5-level paging) up to bit 63."""
    top = address >> (56 if cr4 & CR4_LA57 else 47)
    return top in (0, (1 << (8 if cr4 & CR4_LA57 else 17)) - 1)


def walk(  # noqa: PLR0913, PLR0917 - four registers decide how a virtual address is read
    read_physical: Reader, cr3: int, cr4: int, efer: int, cr0: int, virtual: int
) -> int | None:
    """Translate one virtual address.

    Args:
        read_physical: copies (address, size) out of guest-physical memory; None or GuestFault where there is none.
        cr3: control register 3 as the guest set it.
        cr4: control register 4; PSE, PAE and LA57 count.
        efer: the EFER MSR; LMA counts.
        cr0: control register 0; PG counts.
        virtual: a linear address; its low 32 bits count outside long mode.

    Returns:
        The guest-physical address, or None where nothing is mapped or a table lies outside memory.
    """
    if not cr0 & CR0_PG:
        return virtual & 0xFFFF_FFFF
    if efer & EFER_LMA:
        virtual &= (1 << 64) - 1
        if not is_canonical(virtual, cr4):
            return None
        return _walk_wide(read_physical, cr3 & FRAME, virtual, 5 if cr4 & CR4_LA57 else 4)
    virtual &= 0xFFFF_FFFF
    if not cr4 & CR4_PAE:
        return _walk_narrow(read_physical, cr3, virtual, large=bool(cr4 & CR4_PSE))
    pointer = _entry(read_physical, (cr3 & 0xFFFF_FFE0) + 8 * (virtual >> 30), 8)
    return None if pointer is None else _walk_wide(read_physical, pointer & FRAME, virtual, 2)


def reader(read_physical: Reader, *, cr0: int, cr3: int, cr4: int, efer: int) -> Reader:
    """Return a function that copies (address, size) out of virtual memory, None unless all of it is mapped RAM."""

    def read_virtual(address: int, size: int) -> bytes | None:
        parts = []
        while size > 0:
            physical = walk(read_physical, cr3, cr4, efer, cr0, address)
            length = min(size, PAGE - address % PAGE)
            part = None if physical is None else _read(read_physical, physical, length)
            if part is None:
                return None
            parts.append(part)
            address += length
            size -= length
        return b"".join(parts)

    return read_virtual


def _walk_wide(read_physical: Reader, table: int, virtual: int, levels: int) -> int | None:
    """Walk tables of 512 entries of 8 bytes; the two levels above the last may hold pages of 2 MiB and 1 GiB."""
    for level in range(levels - 1, -1, -1):
        shift = 12 + 9 * level
        entry = _entry(read_physical, table + 8 * (virtual >> shift & 0x1FF), 8)
        if entry is None:
            return None
        if not level or (entry & LARGE and level <= 2):
            within = (1 << shift) - 1
            return entry & FRAME & ~within | virtual & within
        table = entry & FRAME
    return None


def _walk_narrow(read_physical: Reader, cr3: int, virtual: int, *, large: bool) -> int | None:
    """Walk tables of 1024 entries of 4 bytes; bits 20 to 13 of a 4 MiB page are bits 39 to 32 of its address."""
    entry = _entry(read_physical, (cr3 & 0xFFFF_F000) + 4 * (virtual >> 22), 4)
    if entry is None:
        return None
    if large and entry & LARGE:
        return (entry >> 13 & 0xFF) << 32 | entry & 0xFFC0_0000 | virtual & 0x3F_FFFF
    entry = _entry(read_physical, (entry & 0xFFFF_F000) + 4 * (virtual >> 12 & 0x3FF), 4)
    return None if entry is None else entry & 0xFFFF_F000 | virtual & 0xFFF


def _entry(read_physical: Reader, address: int, size: int) -> int | None:
    """Return a present entry, None for any other."""
    data = _read(read_physical, address, size)
    if data is None:
        return None
    entry = int.from_bytes(data, "little")
    return entry if entry & PRESENT else None


def _read(read_physical: Reader, address: int, size: int) -> bytes | None:
    try:
        data = read_physical(address, size)
    except GuestFault:
        return None
    return data if data is not None and len(data) == size else None
