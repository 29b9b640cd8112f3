"""The MP floating pointer and configuration table, for guests without ACPI (MultiProcessor Specification 1.4).

The pointer goes where an operating system looks first, to the KiB above conventional memory. The table may be anywhere:
with more than 40 processors it would not fit there.
"""

from __future__ import annotations

from struct import pack
from typing import Final

from hypervisor import layout

__all__ = ["MAX_CPUS", "build_mptable"]

MAX_CPUS: Final = 255
"""APIC identifiers 0..254; 255 addresses all of them."""

_HEADER_SIZE: Final = 44
_SPEC_REV: Final = 4  # 1.4
_LAPIC_VERSION: Final = 0x14
_IOAPIC_VERSION: Final = 0x11
_IOAPIC_ID: Final = 0
"""What the ID register of KVM's IOAPIC holds after reset."""
_CPU_SIGNATURE: Final = 0x600  # family 6; what the processors really are CPUID says
_CPU_FEATURES: Final = 0x201  # FPU and APIC
_ISA_BUS: Final = 0
_INT, _NMI, _EXTINT = 0, 1, 3
_ACTIVE_HIGH_LEVEL: Final = 0x0D


def build_mptable(
    *, cpus: int, base: int = layout.EBDA, table_base: int = layout.MP_TABLE
) -> tuple[tuple[int, bytes], tuple[int, bytes]]:
    """Build the floating pointer and the table.

    Args:
        cpus: how many, 1..MAX_CPUS; their APIC identifiers count from zero, the first starts the system.
        base: guest-physical address of the pointer, a multiple of 16 where an operating system searches.
        table_base: guest-physical address of the table, below 4 GiB.

    Returns:
        Addresses and what goes there: (base, 16 bytes) and (table_base, less than 6 KiB).

    Raises:
        ValueError: `cpus` or `base` is out of its range.
    """
    if not 1 <= cpus <= MAX_CPUS or base % 16:
        raise ValueError(f"no MP table for {cpus} CPUs with its pointer at {base:#x}")
    return (base, _pointer(table_base)), (table_base, _table(cpus))


def _checksum(data: bytes) -> int:
    return -sum(data) & 0xFF


def _pointer(table: int) -> bytes:
    """Build the floating pointer (4.1). No feature bits: a table is there, and no IMCR, so virtual wire mode."""
    head = pack("<4sIBB", b"_MP_", table, 1, _SPEC_REV)
    return head + bytes([_checksum(head)]) + bytes(5)


def _table(cpus: int) -> bytes:
    """Build header (4.2) and entries (4.3)."""
    entries = [
        pack("<BBBBII8x", 0, cpu, _LAPIC_VERSION, 3 if cpu == 0 else 1, _CPU_SIGNATURE, _CPU_FEATURES)
        for cpu in range(cpus)
    ]
    entries.append(pack("<BB6s", 1, _ISA_BUS, b"ISA   "))
    entries.append(pack("<BBBBI", 2, _IOAPIC_ID, _IOAPIC_VERSION, 1, layout.IOAPIC))
    for irq in range(16):
        if irq != 2:  # the cascade of the 8259s; its pin serves the PIT
            flags = _ACTIVE_HIGH_LEVEL if irq == layout.IRQ_SCI else 0
            entries.append(pack("<BBHBBBB", 3, _INT, flags, _ISA_BUS, irq, _IOAPIC_ID, irq or 2))
    entries.append(pack("<BBHBBBB", 4, _EXTINT, 0, _ISA_BUS, 0, 0, 0))  # the 8259s at LINT0 of the first processor
    entries.append(pack("<BBHBBBB", 4, _NMI, 0, _ISA_BUS, 0, 0xFF, 1))  # NMI at LINT1 of all
    body = b"".join(entries)
    head = pack("<4sHB", b"PCMP", _HEADER_SIZE + len(body), _SPEC_REV)
    tail = pack("<8s12sIHHIHBB", b"TRAPVISR", b"TRAPVISOR   ", 0, 0, len(entries), layout.LAPIC, 0, 0, 0) + body
    return head + bytes([_checksum(head + tail)]) + tail
