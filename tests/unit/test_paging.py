"""Page tables of every mode, walked; good ones, broken ones, and ones that point to themselves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.ports import GuestFault
from hypervisor.paging import is_canonical, reader, walk

# SDM volume 3, "Paging" and "Control Registers"; written out again on purpose.
PG, PSE, PAE, LA57, LMA = 1 << 31, 1 << 4, 1 << 5, 1 << 12, 1 << 10
P, PS = 1, 1 << 7
RAM = 0x40000


class Ram:
    """64 pages of guest-physical memory; all else faults."""

    def __init__(self) -> None:
        self.data = bytearray(RAM)

    def read(self, gpa: int, size: int) -> bytes:
        if gpa < 0 or gpa + size > RAM:
            raise GuestFault(gpa, size)
        return bytes(self.data[gpa : gpa + size])

    def put(self, gpa: int, value: int, size: int = 8) -> None:
        self.data[gpa : gpa + size] = value.to_bytes(size, "little")


@pytest.fixture
def ram() -> Ram:
    return Ram()


def long_walk(ram: Ram, virtual: int, cr3: int = 0x1000, cr4: int = PAE) -> int | None:
    return walk(ram.read, cr3, cr4, LMA, PG, virtual)


HIGH = 0xFFFF_FFFF_8100_0123
"""PML4 511, PDPT 510, PD 8, PT 0, offset 0x123."""


def map_high(ram: Ram) -> None:
    ram.put(0x1000 + 8 * 511, 0x2000 | P)
    ram.put(0x2000 + 8 * 510, 0x3000 | P)
    ram.put(0x3000 + 8 * 8, 0x4000 | P)
    ram.put(0x4000 + 8 * 0, 0x5000 | P | 1 << 63)


def test_four_levels(ram: Ram) -> None:
    map_high(ram)
    assert long_walk(ram, HIGH) == 0x5123
    assert long_walk(ram, HIGH, cr3=0x1000 | 0xFFF | 1 << 63) == 0x5123, "PCID and the no-flush bit are no address"


@pytest.mark.parametrize("entry", [0x1FF8, 0x2FF0, 0x3040, 0x4000])
def test_an_entry_that_is_not_present_ends_the_walk(ram: Ram, entry: int) -> None:
    map_high(ram)
    ram.data[entry] &= ~P
    assert long_walk(ram, HIGH) is None


@pytest.mark.parametrize("entry", [0x1FF8, 0x2FF0, 0x3040])
def test_a_table_outside_memory_ends_the_walk(ram: Ram, entry: int) -> None:
    map_high(ram)
    ram.put(entry, 0x000F_FFFF_FFFF_F000 | P)
    assert long_walk(ram, HIGH) is None


def test_large_pages(ram: Ram) -> None:
    map_high(ram)
    ram.put(0x3040, 0x4_0040_0000 | P | PS | 1 << 12)
    assert long_walk(ram, HIGH) == 0x4_0040_0123, "2 MiB: bit 12 is PAT there"
    ram.put(0x2FF0, 0x8_4000_0000 | P | PS)
    assert long_walk(ram, HIGH) == 0x8_4100_0123, "1 GiB"
    ram.put(0x1FF8, 0x2000 | P | PS)
    assert long_walk(ram, HIGH) == 0x8_4100_0123, "PML4 entries have no page size bit"


def test_the_last_level_has_no_page_size_bit(ram: Ram) -> None:
    map_high(ram)
    ram.put(0x4000, 0x5000 | P | PS)
    assert long_walk(ram, HIGH) == 0x5123, "bit 7 is PAT there"


def test_five_levels(ram: Ram) -> None:
    map_high(ram)
    ram.put(0x6000 + 8 * 511, 0x1000 | P)
    assert long_walk(ram, HIGH, cr3=0x6000, cr4=PAE | LA57) == 0x5123
    ram.put(0x6000 + 8 * 1, 0x1000 | P)
    low = 1 << 48 | HIGH & (1 << 48) - 1
    assert long_walk(ram, low, cr3=0x6000, cr4=PAE | LA57) == 0x5123
    assert long_walk(ram, low) is None, "with four levels that address is not canonical"


@pytest.mark.parametrize(
    ("address", "four", "five"),
    [
        (0, True, True),
        (0x0000_7FFF_FFFF_FFFF, True, True),
        (0x0000_8000_0000_0000, False, True),
        (0x00FF_FFFF_FFFF_FFFF, False, True),
        (0x0100_0000_0000_0000, False, False),
        (0xFEFF_FFFF_FFFF_FFFF, False, False),
        (0xFF00_0000_0000_0000, False, True),
        (0xFFFF_7FFF_FFFF_FFFF, False, True),
        (0xFFFF_8000_0000_0000, True, True),
        (0xFFFF_FFFF_FFFF_FFFF, True, True),
    ],
)
def test_canonical_addresses(address: int, *, four: bool, five: bool) -> None:
    assert is_canonical(address, PAE) is four
    assert is_canonical(address, PAE | LA57) is five


def test_pae(ram: Ram) -> None:
    """Four pointers of 8 bytes at CR3[31:5], then two levels."""
    ram.put(0x1020 + 8 * 3, 0x2000 | P)
    ram.put(0x2000 + 8 * 2, 0x3000 | P)
    ram.put(0x3000 + 8 * 5, 0x7000 | P)
    assert walk(ram.read, 0x1020, PAE, 0, PG, 0xC040_5FFF) == 0x7FFF
    assert walk(ram.read, 0x1020 | 0x1F, PAE, 0, PG, 0xC040_5FFF) == 0x7FFF
    assert walk(ram.read, 0x1020, PAE, 0, PG, 1 << 32 | 0xC040_5FFF) == 0x7FFF, "addresses have 32 bits"
    ram.put(0x2010, 0x1_2340_0000 | P | PS)
    assert walk(ram.read, 0x1020, PAE, 0, PG, 0xC040_5FFF) == 0x1_2340_5FFF
    assert walk(ram.read, 0x1020, PAE, 0, PG, 0x0040_5FFF) is None


def test_32_bit(ram: Ram) -> None:
    ram.put(0x1000 + 4 * 0x300, 0x2000 | P, 4)
    ram.put(0x2000 + 4 * 0x005, 0x7000 | P, 4)
    assert walk(ram.read, 0x1000, 0, 0, PG, 0xC000_5ABC) == 0x7ABC
    ram.put(0x1000 + 4 * 0x300, 0x0080_0000 | 0x12 << 13 | P | PS, 4)
    assert walk(ram.read, 0x1000, PSE, 0, PG, 0xC000_5ABC) == 0x12_0080_5ABC, "PSE-36"
    assert walk(ram.read, 0x1000, 0, 0, PG, 0xC000_5ABC) is None, "without PSE it points to a table outside memory"


def test_paging_off(ram: Ram) -> None:
    assert walk(ram.read, 0xDEAD_F000, PAE, 0, 0x11, 0x1_2345_6789) == 0x2345_6789


def test_tables_that_point_to_themselves_end(ram: Ram) -> None:
    for index in range(512):
        ram.put(0x1000 + 8 * index, 0x1000 | P)
    assert long_walk(ram, HIGH) == 0x1123
    assert long_walk(ram, HIGH, cr4=PAE | LA57) == 0x1123
    for index in range(1024):
        ram.put(0x1000 + 4 * index, 0x1000 | P, 4)
    assert walk(ram.read, 0x1000, 0, 0, PG, 0x1234_5678) == 0x1678


def test_reading_joins_pages_and_refuses_holes(ram: Ram) -> None:
    map_high(ram)
    ram.put(0x4008, 0x9000 | P)
    ram.data[0x5FFE:0x6000] = b"ab"
    ram.data[0x9000:0x9002] = b"cd"
    read = reader(ram.read, cr0=PG, cr3=0x1000, cr4=PAE, efer=LMA)
    edge = HIGH - 0x123 + 0xFFE
    assert read(edge, 4) == b"abcd"
    assert read(edge, 2) == b"ab"
    assert read(edge + 2, 0x1001) is None, "the page after is not mapped"
    assert read(edge, 0) == b""
    ram.put(0x4008, 0x100_0000 | P)
    assert read(edge, 4) is None, "mapped, but outside memory"


def test_reading_wraps_nowhere(ram: Ram) -> None:
    read = reader(ram.read, cr0=0, cr3=0, cr4=0, efer=0)
    assert read(RAM - 4, 4) == bytes(4)
    assert read(RAM - 4, 5) is None
    assert read(0xFFFF_FFFF, 1) is None


def test_memory_may_answer_none_or_too_little() -> None:
    for answer in (None, b"", b"\1"):

        def read(_gpa: int, _size: int, answer: bytes | None = answer) -> bytes | None:
            return answer

        assert walk(read, 0, PAE, LMA, PG, 0) is None
        assert reader(read, cr0=0, cr3=0, cr4=0, efer=0)(0, 8) is None


WORD = st.integers(0, (1 << 64) - 1)


@given(st.tuples(WORD, WORD, WORD, WORD), WORD, st.binary(min_size=8, max_size=64))
def test_any_registers_and_tables_give_an_address_or_none(
    registers: tuple[int, int, int, int], virtual: int, pattern: bytes
) -> None:
    def read(gpa: int, size: int) -> bytes:
        assert gpa >= 0
        return bytes(pattern[(gpa + index) % len(pattern)] for index in range(size))

    physical = walk(read, *registers, virtual)
    assert physical is None or 0 <= physical < 1 << 52
    assert physical is None or physical & 0xFFF == virtual & 0xFFF
