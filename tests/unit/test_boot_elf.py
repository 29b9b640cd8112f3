"""ELF kernels by the 64-bit entry and by PVH."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
from bootplan import GIB, check_plan, number, read, segment_at, string
from images import EM_X86_64, MIB, Load, cpio, elf, multiboot_header, note, pvh_note

from hypervisor import boot
from hypervisor.errors import ConfigError, ImageError

if TYPE_CHECKING:
    from hypervisor.boot import BootPlan

RAM = 64 * MIB
VIRTUAL = 0xFFFF_FFFF_8000_0000
INITRD = cpio({"init": b"x" * 5000})
CODE = Load(16 * MIB, b"\x90" * 100, vaddr=VIRTUAL + 16 * MIB)
LINUX = note(b"Linux", 0x100, b"salt")


def plan(image: bytes, *, ram: int = RAM, **options: object) -> BootPlan:
    result = boot.plan(image, ram_bytes=ram, name="vmlinux", **options)
    check_plan(result, ram)
    return result


# --- the 64-bit entry ----------------------------------------------------------------------------------------------


def test_segments_go_to_their_physical_addresses():
    image = elf([CODE, Load(20 * MIB, b"data", 4096, vaddr=0)], notes=LINUX)
    result = plan(image)
    assert result.entry.mode == "long64"
    assert (result.entry.rip, result.entry.rsi) == (16 * MIB, 0x7000)
    assert read(result, 16 * MIB, 100) == b"\x90" * 100
    assert segment_at(result, 20 * MIB) == (4, 4096)
    assert result.kind == "ELF64 kernel, 64-bit entry"
    assert result.is_linux
    assert bytes(result.symbols) == image


def test_zero_page_without_a_setup_header():
    """The kernel takes a hdr.version of zero for a page it has not copied yet, and type_of_loader 0 for no initrd."""
    result = plan(elf([CODE]), initrd=INITRD, command_line="ro", rsdp=0xE0000)
    page = read(result, 0x7000, 4096)
    assert page[0x1FE:0x200] == b"\x55\xaa"
    assert page[0x202:0x206] == b"HdrS"
    assert struct.unpack_from("<H", page, 0x206)[0] >= 0x020C
    assert page[0x210] == 0xFF
    assert page[0x1EF] == 0
    assert struct.unpack_from("<Q", page, 0x070) == (0xE0000,)
    assert struct.unpack_from("<II", page, 0x218) == ((RAM - len(INITRD)) & ~0xFFF, len(INITRD))
    assert struct.unpack_from("<I", page, 0x228) == (0x20000,)
    assert page[0x1E8] == 5
    assert string(result, 0x20000) == b"ro"


def test_not_linux_by_its_notes():
    assert not plan(elf([CODE])).is_linux
    assert not plan(elf([CODE], notes=note(b"GNU", 3, b"id"))).is_linux
    assert plan(elf([CODE], notes=note(b"Xen", 6, b"linux\0"))).is_linux
    assert not plan(elf([CODE], notes=note(b"Xen", 6, b"netbsd\0"))).is_linux


def test_entry_by_its_virtual_address():
    result = plan(elf([CODE], entry=VIRTUAL + 16 * MIB + 8))
    assert result.entry.rip == 16 * MIB + 8


def test_a_percpu_segment_at_virtual_zero_does_not_mislead():
    """A vmlinux has .data..percpu at virtual address 0; the physical entry must not be translated through it."""
    image = elf([Load(32 * MIB, b"percpu", 24 * MIB, vaddr=0), CODE], entry=16 * MIB)
    assert plan(image).entry.rip == 16 * MIB


def test_command_line_limit():
    plan(elf([CODE]), command_line="x" * 2047)
    with pytest.raises(ConfigError, match="has 2048 bytes; vmlinux takes at most 2047"):
        plan(elf([CODE]), command_line="x" * 2048)


def test_headers_in_the_page_below_1_mib():
    """Linking with `ld -Ttext 0x100000` loads the ELF headers in front of the text, at 0xFF000."""
    result = plan(elf([Load(0xFF000, b"headers"), Load(MIB, b"\xf4")], entry=MIB))
    assert read(result, 0xFF000, 7) == b"headers"


def test_ram_is_used_up_to_the_hole():
    image = elf([CODE, Load(3 * GIB - 1, b"x")])
    assert read(plan(image, ram=4 * GIB), 3 * GIB - 1, 1) == b"x"
    for initrd in (None, INITRD):
        with pytest.raises(ConfigError, match="needs at least 3072 MiB of RAM"):
            plan(image, initrd=initrd)
    plan(image, initrd=INITRD, ram=3 * GIB)


def test_bss_only_segment_may_point_past_the_file():
    """A segment with p_filesz 0 has no bytes in the file, whatever its p_offset."""
    image = bytearray(elf([CODE, Load(20 * MIB, b"", 4096)]))
    struct.pack_into("<Q", image, 64 + 56 + 8, 1 << 40)
    assert segment_at(plan(bytes(image)), 20 * MIB) == (0, 4096)


# --- PVH -----------------------------------------------------------------------------------------------------------


def test_pvh_entry():
    """x86/HVM direct boot ABI: EBX holds the start info, paging off, flat segments, CR4 zero, TR a TSS of 0x67."""
    result = plan(elf([CODE], notes=LINUX + pvh_note(16 * MIB + 0x10)), protocol="pvh")
    state = result.entry
    assert (state.mode, state.rip, state.rbx) == ("protected32", 16 * MIB + 0x10, 0x6000)
    assert state.cr0 & ~0x10 == 1, "all writable bits but PE are clear; ET is fixed at one"
    assert (state.cr3, state.cr4, state.efer, state.rflags) == (0, 0, 0, 2)
    assert (state.cs.base, state.cs.limit, state.cs.db, state.cs.l, state.cs.type) == (0, 0xFFFF_FFFF, 1, 0, 0xB)
    for register in (state.ds, state.es, state.ss):
        assert (register.base, register.limit, register.type, register.db) == (0, 0xFFFF_FFFF, 3, 1)
    assert (state.tr.base, state.tr.limit, state.tr.type, state.tr.s) == (0, 0x67, 0xB, 0)
    assert number(result, 0x500 + 0x10, "<Q") == 0x00CF_9B00_0000_FFFF
    assert result.kind == "ELF64 kernel, PVH entry"


def test_pvh_start_info():
    """start_info.h, version 1: magic, modules (the first is the ramdisk), command line, RSDP, memory map."""
    result = plan(
        elf([CODE], notes=pvh_note(16 * MIB)),
        protocol="pvh",
        initrd=INITRD,
        command_line="ro quiet",
        rsdp=0xE0000,
        ram=4 * GIB,
    )
    info = struct.unpack("<IIIIQQQQII", read(result, 0x6000, 56))
    magic, version, flags, modules, modlist, cmdline, rsdp, memmap, entries, reserved = info
    assert (magic, version, flags, modules, rsdp, reserved) == (0x336E_C578, 1, 0, 1, 0xE0000, 0)
    assert string(result, cmdline) == b"ro quiet"
    address, size, _, _ = struct.unpack("<QQQQ", read(result, modlist, 32))
    assert read(result, address, size) == INITRD
    assert address + size <= 0x8000_0000
    table = [struct.unpack("<QQII", read(result, memmap + 24 * index, 24)) for index in range(entries)]
    assert table == [
        (0, 0x9FC00, 1, 0),
        (0x9FC00, 0x400, 2, 0),
        (0xE0000, 0x20000, 2, 0),
        (0x100000, 3 * GIB - 0x100000, 1, 0),
        (0xF000_0000, 0x100000, 2, 0),
        (4 * GIB, GIB, 1, 0),
    ]


def test_pvh_without_initrd_has_no_modules():
    result = plan(elf([CODE], notes=pvh_note(16 * MIB)), protocol="pvh")
    assert struct.unpack("<IQ", read(result, 0x600C, 12)) == (0, 0)
    assert number(result, 0x6020, "<Q") == 0


def test_pvh_note_of_four_bytes_and_behind_others():
    notes = note(b"GNU", 3, b"0123456789") + note(b"Xen", 6, b"linux\0") + pvh_note(16 * MIB + 4, bits=32)
    assert plan(elf([CODE], notes=notes), protocol="pvh").entry.rip == 16 * MIB + 4


def test_other_owners_may_use_the_same_number():
    with pytest.raises(ImageError, match="vmlinux has no PVH entry"):
        plan(elf([CODE], notes=note(b"NetBSD", 18, struct.pack("<Q", 16 * MIB))), protocol="pvh")


def test_32_bit_kernel_with_pvh_note():
    result = plan(elf([CODE._replace(vaddr=None)], bits=32, notes=pvh_note(16 * MIB + 4, bits=32)))
    assert (result.entry.mode, result.entry.rip) == ("protected32", 16 * MIB + 4)
    assert result.kind == "ELF32 kernel, PVH entry"


# --- which entry ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "pvh", "protocol", "mode"),
    [
        (16 * MIB, 16 * MIB + 8, "auto", "long64"),
        (16 * MIB, 16 * MIB + 8, "linux64", "long64"),
        (16 * MIB, 16 * MIB + 8, "pvh", "protected32"),
        (16 * MIB, None, "auto", "long64"),
        (16 * MIB + 8, 16 * MIB + 8, "auto", "protected32"),
        (VIRTUAL + 16 * MIB, 16 * MIB + 8, "auto", "protected32"),
        (VIRTUAL + 16 * MIB, 16 * MIB + 8, "linux64", "long64"),
    ],
)
def test_choice_of_entry(entry, pvh, protocol, mode):
    notes = b"" if pvh is None else pvh_note(pvh)
    assert plan(elf([CODE], entry=entry, notes=notes), protocol=protocol).entry.mode == mode


def test_protocol_that_the_file_does_not_have():
    with pytest.raises(ImageError, match="vmlinux has no PVH entry"):
        plan(elf([CODE]), protocol="pvh")
    with pytest.raises(ImageError, match="32-bit ELF file: it has no 64-bit entry"):
        plan(elf([Load(16 * MIB, b"x")], bits=32, notes=pvh_note(16 * MIB, 32)), protocol="linux64")
    with pytest.raises(ConfigError, match="--protocol xen is unknown"):
        plan(elf([CODE]), protocol="xen")


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (elf([CODE], machine=183), "vmlinux is a 64-bit ELF executable for AArch64, not for x86"),
        (elf([CODE], machine=243), "for RISC-V"),
        (elf([CODE], machine=4711), "for machine 4711"),
        (elf([CODE], kind=1), "vmlinux is a 64-bit ELF relocatable object for x86-64, not an executable"),
        (elf([CODE], kind=4), "core dump"),
        (elf([Load(16 * MIB, b"x")], bits=32), "vmlinux is a 32-bit ELF file without a multiboot header or PVH note"),
        (elf([]), "has nothing to load"),
        (elf([Load(16 * MIB, b"")]), "has nothing to load"),
        (elf([CODE], entry=1), "the entry of the ELF file is in none of its segments"),
        (elf([CODE], extra=[(3, b"/lib64/ld-linux-x86-64.so.2\0")]), "is a program for Linux user space"),
        (elf([CODE], notes=note(b"GNU", 1, bytes(16))), "is a program for Linux user space"),
        (elf([Load(16 * MIB, b"12345", 4)]), "ELF segment 0 is larger in the file than in memory"),
        (elf([CODE, Load(16 * MIB + 50, b"data")]), r"ELF segment 1 \(0x1000032-0x1000036\) overlaps ELF segment 0"),
        (elf([Load(16 * MIB, b"x", MIB), Load(15 * MIB, b"x", 2 * MIB)]), "ELF segment 1 .* overlaps ELF segment 0"),
        (elf([CODE, Load((1 << 64) - 4096, b"x", 8192)]), "segment 1 at 0xfffffffffffff000 wraps around"),
        (elf([CODE, Load(3 * GIB - 1, b"xx")]), "the kernel reaches 0xc0000001; a kernel must lie below 0xc0000000"),
        (elf([CODE, Load(4 * GIB, b"x")]), "must lie below 0xc0000000"),
        (elf([Load(0x7800, b"x" * 16)]), r"ELF segment 0 \(0x7800-0x7810\) overlaps the zero page \(0x7000-0x8000\)"),
        (elf([Load(0, b"x" * 0x501)]), "overlaps the boot GDT"),
        (elf([Load(0x8FF0, b"x")]), "overlaps the boot stack"),
        (elf([Load(0xA000, b"x")]), "overlaps the boot page tables"),
        (elf([Load(0x20000, b"x")]), "overlaps the command line"),
        (elf([Load(0x9FC10, b"x")]), "overlaps the MP floating pointer"),
        (elf([Load(0xB8000, b"x")]), "overlaps the legacy video and ROM area"),
        (elf([Load(0xFEFFF, b"x" * 8192)]), "overlaps the ACPI and MP tables"),
    ],
)
def test_refuses(image, message):
    with pytest.raises(ImageError, match=message):
        plan(image)


def test_refuses_a_pvh_entry_outside_the_file():
    with pytest.raises(ImageError, match="entry of the ELF file is in none of its segments"):
        plan(elf([CODE], notes=pvh_note(8 * MIB)), protocol="pvh")


def test_big_endian():
    image = bytearray(elf([CODE]))
    image[5] = 2
    struct.pack_into(">HH", image, 16, 2, 22)
    with pytest.raises(ImageError, match="vmlinux is a 64-bit big-endian ELF executable for S/390, not for x86"):
        plan(bytes(image))


def test_low_segments_get_a_hint():
    with pytest.raises(ImageError) as caught:
        plan(elf([Load(0x7800, b"x")]))
    assert caught.value.hint == "link the image above 1 MiB"


def test_pvh_kernel_may_use_what_only_the_64_bit_entry_needs():
    image = elf([Load(0xA000, b"x" * 64)], notes=pvh_note(0xA000))
    assert plan(image, protocol="pvh").entry.rip == 0xA000
    with pytest.raises(ImageError, match="overlaps the PVH start info"):
        plan(elf([Load(0x6800, b"x" * 64)], notes=pvh_note(0x6800)), protocol="pvh")


def test_ram_too_small():
    """The figure counts every segment and the initrd."""
    image = elf([CODE, Load(40 * MIB, b"x", MIB)])
    with pytest.raises(ConfigError, match="needs at least 42 MiB of RAM, this machine has 32 MiB"):
        plan(image, ram=32 * MIB, initrd=INITRD)
    plan(image, ram=42 * MIB, initrd=INITRD)


@pytest.mark.parametrize("bits", [32, 64])
def test_every_truncation_is_found(bits):
    image = elf([CODE._replace(vaddr=None), Load(17 * MIB, b"data" * 20)], bits=bits, notes=pvh_note(16 * MIB))
    plan(image, protocol="pvh")
    for size in range(4, len(image)):
        with pytest.raises(ImageError, match="truncated ELF file"):
            plan(image[:size], protocol="pvh")


def test_broken_notes_are_no_notes():
    """A note whose lengths lead out of its segment ends the list."""
    notes = struct.pack("<III", 4, 0xFFFF_FFFF, 18) + b"Xen\0"
    assert plan(elf([CODE], notes=notes)).entry.mode == "long64"
    notes = struct.pack("<III", 0xFFFF_FFFF, 4, 18)
    assert plan(elf([CODE], notes=notes)).entry.mode == "long64"


def test_program_headers_that_are_too_small():
    image = bytearray(elf([CODE], machine=EM_X86_64))
    struct.pack_into("<H", image, 54, 16)
    with pytest.raises(ImageError, match="headers are cut short"):
        plan(bytes(image))


def test_modules_need_multiboot():
    with pytest.raises(ConfigError, match="vmlinux has no multiboot header"):
        plan(elf([CODE]), modules=[("m", b"x", "")])


def test_multiboot_wins_only_when_nothing_else_is_asked_for():
    image = elf([CODE], front=multiboot_header(), notes=pvh_note(16 * MIB + 8))
    assert plan(image).entry.rax == 0x2BAD_B002
    assert plan(image, protocol="linux64").entry.mode == "long64"
    assert plan(image, protocol="pvh").entry.rip == 16 * MIB + 8
