"""The map of guest-physical memory, in the form of the BIOS call INT 15h, E820h (ACPI 6.4, section 15).

The zero page, PVH and multiboot all hand this same map to the guest.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from hypervisor import layout

__all__ = ["RAM", "RESERVED", "MemoryRange", "memory_map"]

RAM: Final = 1
"""AddressRangeMemory: the guest may use it."""
RESERVED: Final = 2
"""AddressRangeReserved: the guest must leave it alone."""


class MemoryRange(NamedTuple):
    """One range: first address and length in bytes, and its type (RAM or RESERVED)."""

    base: int
    size: int
    kind: int


def memory_map(ram_bytes: int) -> list[MemoryRange]:
    """Return the ranges of a machine with `ram_bytes` of RAM, by rising address, none empty, none overlapping.

    Conventional RAM ends where the MP table begins. Tables that the guest must keep are reserved. RAM above 3 GiB
    continues at 4 GiB. Where PCI's configuration space decodes is reserved, for kernels without ACPI too.
    """
    low = min(ram_bytes, layout.RAM_LOW_END)
    legacy = layout.EBDA + layout.EBDA_SIZE
    ranges = (
        (0, layout.EBDA, RAM),
        (layout.EBDA, legacy, RESERVED),
        (layout.ACPI_TABLES, layout.HIGH_MEMORY, RESERVED),
        (layout.HIGH_MEMORY, layout.RAM_LOW_END, RAM),
    )
    found = [MemoryRange(base, min(end, low) - base, kind) for base, end, kind in ranges if base < low]
    found.append(MemoryRange(layout.PCI_ECAM, layout.PCI_ECAM_SIZE, RESERVED))
    if ram_bytes > layout.RAM_LOW_END:
        found.append(MemoryRange(layout.RAM_HIGH_BASE, ram_bytes - layout.RAM_LOW_END, RAM))
    return found
