"""Multiboot 1; sections are those of the Multiboot Specification 0.6.96."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
from bootplan import GIB, check_plan, number, read, segment_at, string
from images import MIB, Load, elf, multiboot_header

from hypervisor import boot
from hypervisor.errors import ConfigError, ImageError

if TYPE_CHECKING:
    from hypervisor.boot import BootPlan

RAM = 64 * MIB
INFO = 0x10000


def kernel(flags: int = 0, *, bits: int = 32, entry: int = MIB + 4) -> bytes:
    return elf([Load(MIB, b"\xf4" * 5000, 8192)], bits=bits, entry=entry, front=multiboot_header(flags))


def plan(image: bytes, *, ram: int = RAM, **options: object) -> BootPlan:
    result = boot.plan(image, ram_bytes=ram, name="kernel.elf", **options)
    check_plan(result, ram)
    return result


@pytest.mark.parametrize("bits", [32, 64])
def test_machine_state(bits):
    """3.2: EAX the loader's magic, EBX the information, 32-bit flat segments, paging and interrupts off."""
    result = plan(kernel(bits=bits))
    state = result.entry
    assert (state.mode, state.rip, state.rax, state.rbx) == ("protected32", MIB + 4, 0x2BAD_B002, INFO)
    assert state.cr0 & (1 << 31 | 1) == 1
    assert not state.rflags & (1 << 17 | 1 << 9)
    assert (state.cs.base, state.cs.limit, state.cs.type, state.cs.db, state.cs.g) == (0, 0xFFFF_FFFF, 0xB, 1, 1)
    for register in (state.ds, state.es, state.fs, state.gs, state.ss):
        assert (register.base, register.limit, register.type, register.db) == (0, 0xFFFF_FFFF, 3, 1)
    assert read(result, MIB, 5001) == b"\xf4" * 5000 + b"\0"
    assert result.kind == f"multiboot ELF{bits} kernel"
    assert not result.is_linux


def test_information():
    """3.3: memory sizes, command line exactly as given, no modules, memory map, loader name."""
    result = plan(kernel(flags=2), command_line="a=1 b")
    flags, lower, upper = struct.unpack("<III", read(result, INFO, 12))
    assert flags == 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9
    assert (lower, upper) == (639, 63 * 1024)
    assert string(result, number(result, INFO + 16)) == b"a=1 b"
    assert number(result, INFO + 20) == 0
    assert string(result, number(result, INFO + 64)) == b"hv"
    length, address = struct.unpack("<II", read(result, INFO + 44, 8))
    ranges = []
    while length:
        size, *entry = struct.unpack("<IQQI", read(result, address, 24))
        assert size == 20
        ranges.append(tuple(entry))
        address += size + 4
        length -= size + 4
    assert ranges == [
        (0, 0x9FC00, 1),
        (0x9FC00, 0x400, 2),
        (0xE0000, 0x20000, 2),
        (MIB, 63 * MIB, 1),
        (0xF000_0000, MIB, 2),
    ]


def test_upper_memory_ends_at_the_first_hole():
    assert number(plan(kernel(), ram=5 * GIB), INFO + 8) == (3 * GIB - MIB) // 1024


def test_modules():
    """3.3 and 3.1.2: start, end, string; page-aligned; none overlaps the kernel's bss."""
    modules = [("first.bin", b"one" * 2000, "first with arguments"), ("second.bin", b"two", "")]
    result = plan(kernel(flags=1), modules=modules, command_line="cmd")
    count, address = struct.unpack("<II", read(result, INFO + 20, 8))
    assert count == 2
    records = [struct.unpack("<IIII", read(result, address + 16 * index, 16)) for index in range(count)]
    expected = [b"first with arguments", b"second.bin"]
    for (start, end, text, reserved), (_, data, _), words in zip(records, modules, expected, strict=True):
        assert start % 4096 == 0
        assert start >= MIB + 8192
        assert read(result, start, end - start) == data
        assert string(result, text) == words
        assert reserved == 0
    assert string(result, number(result, INFO + 16)) == b"cmd"


def test_initrd_is_the_first_module():
    result = plan(kernel(), initrd=b"any bytes", initrd_name="disk.img", modules=[("second", b"2", "")])
    count, address = struct.unpack("<II", read(result, INFO + 20, 8))
    start, end, text, _ = struct.unpack("<IIII", read(result, address, 16))
    assert (count, read(result, start, end - start), string(result, text)) == (2, b"any bytes", b"disk.img")


def test_names_that_are_no_text():
    odd = plan(kernel(), initrd=b"x", initrd_name="\udcff.img", modules=[("\udcfe.mod", b"y", "")])
    address = number(odd, INFO + 24)
    assert string(odd, number(odd, address + 8)) == b"\xff.img"
    assert string(odd, number(odd, address + 24)) == b"\xfe.mod"
    with pytest.raises(ConfigError, match="the initrd's name has a character that is no text"):
        plan(kernel(), initrd=b"x", initrd_name="\ud800")


def test_address_fields():
    """3.1.3: load_addr's offset in the file is the header's, less header_addr - load_addr; bss is zeroed."""
    front = b"front matter 4 B"
    header = multiboot_header(addresses=(MIB + 0x10, MIB, MIB + 0x40, MIB + 0x2000, MIB + 0x30))
    image = b"skip" * 4 + front + header + b"\x90" * 100
    result = plan(image)
    assert result.entry.rip == MIB + 0x30
    assert read(result, MIB, 0x10) == front
    assert segment_at(result, MIB) == (0x40, 0x2000)
    assert result.kind == "multiboot kernel"
    assert result.symbols is None


def test_address_fields_of_zero_mean_the_whole_file_and_no_bss():
    image = multiboot_header(addresses=(MIB, MIB, 0, 0, MIB + 32)) + b"\xf4" * 68
    assert segment_at(plan(image), MIB) == (100, 100)


def test_address_fields_count_in_an_elf_file_too():
    """3.1.2: the loader should use them instead of the fields in the executable's own header."""
    header = multiboot_header(addresses=(2 * MIB + 84, 2 * MIB, 0, 0, 2 * MIB + 120))
    result = plan(elf([Load(MIB, b"\xf4" * 64)], bits=32, front=header))
    assert result.entry.rip == 2 * MIB + 120
    assert read(result, 2 * MIB, 4) == b"\x7fELF"


@pytest.mark.parametrize(
    ("addresses", "message"),
    [
        ((MIB, MIB + 4, 0, 0, MIB), "load_addr 0x100004 does not fit header_addr"),
        ((MIB + 4, MIB, 0, 0, MIB), "load_addr 0x100000 does not fit header_addr"),
        ((MIB, MIB, MIB, 0, MIB), "load_end_addr 0x100000 is below load_addr"),
        ((MIB, MIB, MIB + 101, 0, MIB), "truncated multiboot kernel: 101 bytes by its header, 100 in the file"),
        ((MIB, MIB, MIB + 50, MIB + 49, MIB), "bss_end_addr 0x100031 is below the data's end"),
        ((MIB, MIB, 0, 0, MIB + 100), "entry_addr 0x100064 is outside the kernel"),
        ((0x10000, 0x10000, 0, 0, 0x10000), "the kernel .* overlaps the multiboot information"),
        ((0xFFFF_FFFF, 0xFFFF_FFFF, 0, 0, 0xFFFF_FFFF), "must lie below 0xc0000000"),
    ],
)
def test_refuses_address_fields(addresses, message):
    with pytest.raises(ImageError, match=message):
        plan(multiboot_header(addresses=addresses) + b"\xf4" * 68)


@pytest.mark.parametrize(
    ("flags", "message"),
    [(4, "requires a video mode"), (8, "requires multiboot features 0x8"), (0x8004, "multiboot features 0x8004")],
)
def test_requirements_that_are_not_met(flags, message):
    """3.1.2: a loader that cannot fulfil a bit of 0 to 15 must say so and not load the image."""
    with pytest.raises(ImageError, match=message):
        plan(kernel(flags=flags))


def test_optional_features_are_ignored():
    """3.1.2: bits 16 to 31 are optional."""
    assert plan(kernel(flags=1 << 17)).entry.rip == MIB + 4


@pytest.mark.parametrize(("at", "found"), [(8192 - 12, True), (8192 - 8, False), (4094, False)])
def test_header_must_be_aligned_and_within_8192_bytes(at, found):
    """3.1."""
    front = b"\xf4" * (at - 84) + multiboot_header()
    image = elf([Load(MIB, b"\xf4" * 64)], bits=32, front=front)
    if found:
        assert plan(image).entry.rax == 0x2BAD_B002
    else:
        with pytest.raises(ImageError, match="without a multiboot header"):
            plan(image)


def test_wrong_checksum_is_no_header():
    front = bytearray(multiboot_header())
    front[8] ^= 1
    with pytest.raises(ImageError, match="without a multiboot header"):
        plan(elf([Load(MIB, b"\xf4")], bits=32, front=bytes(front)))


def test_header_that_ends_before_its_address_fields_is_none():
    image = multiboot_header(addresses=(MIB, MIB, 0, 0, MIB))
    with pytest.raises(ImageError, match="is an unknown kind of file, no kernel"):
        plan(image[:31])


def test_no_elf_and_no_address_fields():
    with pytest.raises(ImageError, match="multiboot header without address fields and is no ELF file"):
        plan(multiboot_header() + b"\xf4" * 100)


def test_entry_outside_the_segments():
    with pytest.raises(ImageError, match="entry of the ELF file is in none of its segments"):
        plan(kernel(entry=8 * MIB))


def test_empty_module():
    with pytest.raises(ImageError, match=r"empty\.mod is an empty file"):
        plan(kernel(), modules=[("empty.mod", b"", "")])


def test_ram_too_small_counts_the_modules():
    with pytest.raises(ConfigError, match="needs at least 5 MiB of RAM, this machine has 4 MiB"):
        plan(kernel(), ram=4 * MIB, modules=[("a", bytes(2 * MIB), ""), ("b", bytes(MIB + 1), "")])
    plan(kernel(), ram=5 * MIB, modules=[("a", bytes(2 * MIB), ""), ("b", bytes(MIB + 1), "")])


def test_strings_too_long():
    plan(kernel(), command_line="x" * 60000)
    with pytest.raises(ConfigError, match=r"take \d+ bytes, 65536 are allowed"):
        plan(kernel(), command_line="x" * 66000)


@pytest.mark.parametrize("protocol", ["pvh", "linux64"])
def test_no_other_entry_in_a_bare_multiboot_kernel(protocol):
    image = multiboot_header(addresses=(MIB, MIB, 0, 0, MIB + 32)) + b"\xf4" * 68
    with pytest.raises(ConfigError, match=f"is a multiboot kernel; it has no {protocol} entry"):
        plan(image, protocol=protocol)


def test_low_memory_is_the_kernels_but_for_what_multiboot_needs():
    """3.3: the information may be anywhere but in the kernel; a kernel below 1 MiB is loaded where it wants to be."""
    image = elf([Load(0x7000, b"\xf4" * 64, 0x4000)], bits=32, front=multiboot_header())
    assert plan(image).entry.rip == 0x7000
