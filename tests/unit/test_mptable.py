"""The MP tables, read back as an operating system reads them (MultiProcessor Specification 1.4)."""

from __future__ import annotations

import struct
from typing import NamedTuple

import pytest

from hypervisor.boot.mptable import build_mptable

CPU, BUS, IOAPIC, IO_INTERRUPT, LOCAL_INTERRUPT = range(5)
SIZES = {CPU: 20, BUS: 8, IOAPIC: 8, IO_INTERRUPT: 8, LOCAL_INTERRUPT: 8}  # table 4-3
INT, NMI, EXTINT = 0, 1, 3  # table 4-11


class Interrupt(NamedTuple):
    """An assignment entry; `target` is an APIC, `pin` its INTIN or LINTIN."""

    kind: int
    flags: int
    bus: int
    irq: int
    target: int
    pin: int


def parse(table: bytes) -> dict[int, list[bytes]]:
    signature, length, revision = struct.unpack_from("<4sHB", table)
    assert signature == b"PCMP"
    assert length == len(table)
    assert revision == 4
    assert sum(table) % 256 == 0
    entries: dict[int, list[bytes]] = {kind: [] for kind in SIZES}
    at = 44
    while at < length:
        kind = table[at]
        entries[kind].append(table[at : at + SIZES[kind]])
        at += SIZES[kind]
    assert at == length
    assert struct.unpack_from("<H", table, 34) == (sum(map(len, entries.values())),)
    return entries


def interrupts(entries: list[bytes]) -> list[Interrupt]:
    return [Interrupt(*struct.unpack("<xBHBBBB", entry)) for entry in entries]


def test_floating_pointer():
    """4.1: 16 bytes whose sum is zero, with the table's address; feature bytes zero: a table, no IMCR."""
    (base, pointer), (table_base, _) = build_mptable(cpus=1, base=0x9FC00, table_base=0xF1230)
    assert (base, table_base) == (0x9FC00, 0xF1230)
    assert len(pointer) == 16
    assert sum(pointer) % 256 == 0
    signature, address, paragraphs, revision = struct.unpack_from("<4sIBB", pointer)
    assert (signature, address, paragraphs, revision) == (b"_MP_", 0xF1230, 1, 4)
    assert pointer[11:] == bytes(5)


def test_default_places():
    """Chapter 4: the pointer in the last KiB of conventional memory; the table in the BIOS area."""
    (base, _), (table_base, _) = build_mptable(cpus=1)
    assert base == 0x9FC00
    assert table_base == 0xF0000


def test_header_has_space_padded_names_and_no_other_tables():
    """4.2."""
    table = build_mptable(cpus=1)[1][1]
    oem, product, oem_table, oem_size, _count, lapic, extended, checksum, reserved = struct.unpack_from(
        "<8s12sIHHIHBB", table, 8
    )
    assert oem.decode("ascii").isprintable()
    assert product.decode("ascii").isprintable()
    assert (oem_table, oem_size, extended, checksum, reserved) == (0, 0, 0, 0, 0)
    assert lapic == 0xFEE0_0000


@pytest.mark.parametrize("cpus", [1, 2, 64, 255])
def test_processors(cpus):
    """4.3.1: all usable, unique identifiers, one bootstrap processor, which is the first."""
    table = build_mptable(cpus=cpus)[1][1]
    processors = parse(table)[CPU]
    assert [entry[1] for entry in processors] == [*range(cpus)]
    assert [entry[3] for entry in processors] == [3] + [1] * (cpus - 1)
    assert {entry[2] for entry in processors} == {0x14}
    assert all(struct.unpack_from("<I", entry, 8)[0] & 0x201 == 0x201 for entry in processors)  # FPU and APIC
    assert len(table) < 6 << 10


def test_one_isa_bus_and_one_ioapic():
    """4.3.2 and 4.3.3."""
    entries = parse(build_mptable(cpus=2)[1][1])
    assert entries[BUS] == [b"\x01\x00ISA   "]
    assert [struct.unpack("<BBBBI", entry) for entry in entries[IOAPIC]] == [(2, 0, 0x11, 1, 0xFEC0_0000)]


def test_isa_interrupts():
    """4.3.4: the timer is at pin 2, so the cascade is nowhere; the SCI is an active-high level, the rest ISA's."""
    table = build_mptable(cpus=2)[1][1]
    found = interrupts(parse(table)[IO_INTERRUPT])
    assert {entry.irq: entry.pin for entry in found} == {0: 2} | {irq: irq for irq in range(1, 16) if irq != 2}
    assert len(found) == 15
    assert {(entry.kind, entry.bus, entry.target) for entry in found} == {(INT, 0, 0)}
    assert {entry.irq: entry.flags for entry in found if entry.flags} == {9: 0x0D}


def test_local_interrupts():
    """4.3.5: the 8259s at LINTIN0, NMI at LINTIN1 of all processors."""
    external, nmi = interrupts(parse(build_mptable(cpus=2)[1][1])[LOCAL_INTERRUPT])
    assert (external.kind, external.target, external.pin) == (EXTINT, 0, 0)
    assert (nmi.kind, nmi.target, nmi.pin) == (NMI, 0xFF, 1)


@pytest.mark.parametrize("wrong", [{"cpus": 0}, {"cpus": 256}, {"cpus": 1, "base": 0x9FC08}])
def test_what_cannot_be_described_is_refused(wrong):
    with pytest.raises(ValueError, match="no MP table"):
        build_mptable(**wrong)
