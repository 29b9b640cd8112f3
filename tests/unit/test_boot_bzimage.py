"""bzImage by the 64-bit entry; expectations are those of the kernel's boot.rst and zero-page.rst."""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from bootplan import check_plan, number, read, segment_at, string
from images import BZIMAGE_FIELDS, MIB, STUB, Load, bzimage, cpio, elf, kernel_payload, note, patch, pvh_note

from hypervisor import boot
from hypervisor.errors import ConfigError, ImageError

if TYPE_CHECKING:
    from hypervisor.boot import BootPlan

ZERO_PAGE = 0x7000
RAM = 128 * MIB
INITRD = cpio({"init": b"#!/bin/sh\n" * 1000})


def plan(image: bytes, *, ram: int = RAM, **options: object) -> BootPlan:
    options.setdefault("name", "vmlinuz")
    result = boot.plan(image, ram_bytes=ram, **options)
    check_plan(result, ram)
    return result


def test_loads_at_the_preferred_address_and_enters_at_0x200():
    """64-bit Boot Protocol: the entry is the start of the loaded kernel plus 0x200, RSI holds the zero page."""
    result = plan(bzimage(b"payload"))
    assert result.entry.mode == "long64"
    assert result.entry.rip == 16 * MIB + 0x200
    assert result.entry.rsi == ZERO_PAGE
    assert read(result, 16 * MIB, len(STUB) + 7) == STUB + b"payload"
    assert segment_at(result, 16 * MIB)[1] == MIB, "init_size is kept free"
    assert result.kind == "bzImage 6.1.0-test, 64-bit entry"
    assert result.is_linux
    assert result.release == "6.1.0-test"


def test_segments_and_tables_for_the_64_bit_entry():
    """64-bit Boot Protocol: CS 0x10 and DS, ES, SS 0x18 flat, in the GDT too; identity map; interrupts off."""
    result = plan(bzimage())
    state = result.entry
    assert (state.cs.selector, state.cs.l, state.cs.type, state.cs.base) == (0x10, 1, 0xB, 0)
    for register in (state.ds, state.es, state.ss):
        assert (register.selector, register.type, register.base, register.limit) == (0x18, 3, 0, 0xFFFF_FFFF)
    assert state.gdt.limit == 31
    code, data = struct.unpack("<QQ", read(result, state.gdt.base + 0x10, 16))
    assert code == 0x00AF_9B00_0000_FFFF
    assert data == 0x00CF_9300_0000_FFFF
    assert state.cr4 == 1 << 5
    assert state.rflags == 2
    pml4 = number(result, state.cr3, "<Q")
    assert pml4 & 0xFFF == 3
    for gigabyte in range(4):
        directory = number(result, (pml4 & ~0xFFF) + 8 * gigabyte, "<Q")
        assert directory & 0xFFF == 3
        for entry in (0, 1, 511):
            expected = (gigabyte << 30) + (entry << 21) | 0x83
            assert number(result, (directory & ~0xFFF) + 8 * entry, "<Q") == expected
    assert number(result, (pml4 & ~0xFFF) + 32, "<Q") == 0


def test_zero_page():
    """zero-page.rst: the setup header is copied, all else is zero but for what the loader fills in."""
    image = bzimage(b"payload", setup_data=0x1234)
    result = plan(image, command_line="console=ttyS0 quiet", initrd=INITRD, rsdp=0xE0000)
    page = read(result, ZERO_PAGE, 4096)
    assert page[0x202:0x208] == b"HdrS\x0f\x02"
    assert page[0x1EF] == 0, "the sentinel"
    assert page[0x000:0x040] == bytes(64), "screen_info"
    assert page[0x210] == 0xFF, "type_of_loader"
    assert struct.unpack_from("<Q", page, 0x070) == (0xE0000,)
    assert struct.unpack_from("<I", page, 0x214) == (16 * MIB,), "code32_start"
    assert struct.unpack_from("<I", page, 0x228) == (0x20000,), "cmd_line_ptr"
    assert struct.unpack_from("<I", page, 0x0C8) == (0,), "ext_cmd_line_ptr"
    assert struct.unpack_from("<Q", page, 0x250) == (0,), "setup_data"
    assert struct.unpack_from("<I", page, 0x260) == (MIB,), "init_size stays"
    assert page[0x26C:0x290] == bytes(0x24), "the header ends where its jump says"
    assert string(result, 0x20000) == b"console=ttyS0 quiet"
    address, size = struct.unpack_from("<II", page, 0x218)
    assert size == len(INITRD)
    assert struct.unpack_from("<II", page, 0x0C0) == (0, 0)
    assert read(result, address, size) == INITRD


ECAM = (0xF000_0000, MIB, 2)


@pytest.mark.parametrize(
    ("ram", "expected"),
    [
        (128 * MIB, [(0x100000, 127 * MIB, 1), ECAM]),
        (3072 * MIB, [(0x100000, 3071 * MIB, 1), ECAM]),
        (4096 * MIB, [(0x100000, 3071 * MIB, 1), ECAM, (4096 * MIB, 1024 * MIB, 1)]),
    ],
)
def test_e820(ram, expected):
    result = plan(bzimage(), ram=ram)
    count = read(result, ZERO_PAGE + 0x1E8, 1)[0]
    table = read(result, ZERO_PAGE + 0x2D0, 20 * count)
    entries = [struct.unpack_from("<QQI", table, 20 * index) for index in range(count)]
    low = [(0, 0x9FC00, 1), (0x9FC00, 0x400, 2), (0xE0000, 0x20000, 2)]
    assert entries == low + expected
    assert not any(read(result, ZERO_PAGE + 0x2D0 + 20 * count, 20))


def test_relocatable_kernel_is_aligned():
    """pref_address and kernel_alignment: runtime_start is the load address, aligned up."""
    result = plan(bzimage(pref_address=16 * MIB + 4096, kernel_alignment=MIB))
    assert result.entry.rip == 17 * MIB + 0x200


def test_a_kernel_that_moves_itself_is_loaded_at_1_mib():
    """relocatable_kernel 0: it runs at pref_address wherever it is loaded, and needs init_size there."""
    result = plan(bzimage(relocatable_kernel=0), initrd=INITRD, ram=18 * MIB)
    assert result.entry.rip == MIB + 0x200
    assert segment_at(result, MIB)[1] == 16 * MIB


def test_signature_behind_the_kernel_is_not_loaded():
    image = bzimage(b"payload")
    result = plan(image + b"signature" * 1000)
    assert segment_at(result, 16 * MIB) == segment_at(plan(image), 16 * MIB)


def test_setup_sects_of_zero_means_four():
    """setup_sects: for backwards compatibility, if it is 0 the real value is 4."""
    image = bzimage(b"payload", sectors=4)
    assert read(plan(patch(image, setup_sects=0)), 16 * MIB, 16) == STUB[:16]


def test_initrd_as_high_as_possible():
    """initrd_addr_max is the last byte that may be occupied; RAM ends first here."""
    result = plan(bzimage(), initrd=INITRD)
    assert number(result, ZERO_PAGE + 0x218) == (RAM - len(INITRD)) & ~0xFFF
    limited = plan(bzimage(initrd_addr_max=64 * MIB - 1), initrd=INITRD)
    assert number(limited, ZERO_PAGE + 0x218) == (64 * MIB - len(INITRD)) & ~0xFFF
    much = plan(bzimage(initrd_addr_max=0xFFFF_FFFF), initrd=INITRD, ram=8192 * MIB)
    assert number(much, ZERO_PAGE + 0x218) == (3072 * MIB - len(INITRD)) & ~0xFFF


def test_initrd_goes_below_the_kernel_when_nothing_is_left_above():
    result = plan(bzimage(), initrd=INITRD, ram=17 * MIB)
    assert number(result, ZERO_PAGE + 0x218) == (16 * MIB - len(INITRD)) & ~0xFFF


def test_initrd_max_that_leaves_no_room():
    with pytest.raises(ImageError, match=r"the initrd rd\.img .* does not fit beside the kernel below 0x100800"):
        plan(bzimage(initrd_addr_max=0x100800 - 1), initrd=INITRD, initrd_name="rd.img")


@pytest.mark.parametrize("initrd", [None, INITRD, cpio({"big": bytes(20 * MIB)})])
def test_ram_too_small_names_what_is_needed(initrd):
    """The figure is enough, and nothing below it is."""
    with pytest.raises(ConfigError, match=r"vmlinuz: needs at least \d+ MiB of RAM, this machine has 2 MiB") as caught:
        plan(bzimage(), initrd=initrd, ram=2 * MIB)
    need = int(str(caught.value).split(" at least ")[1].split()[0])
    assert caught.value.hint == f"--ram {need} or more"
    assert need == {None: 17, INITRD: 18}.get(initrd, 38)
    plan(bzimage(), initrd=initrd, ram=need * MIB)


def test_ram_too_small_for_the_initrd_alone():
    big = cpio({"big": bytes(20 * MIB)})
    with pytest.raises(ConfigError, match="needs at least 38 MiB of RAM, this machine has 37 MiB"):
        plan(bzimage(), initrd=big, ram=37 * MIB)
    plan(bzimage(), initrd=big, ram=38 * MIB)


def test_command_line_limit_of_the_header():
    """cmdline_size does not count the terminator."""
    plan(bzimage(cmdline_size=20), command_line="x" * 20)
    with pytest.raises(ConfigError, match="the kernel command line has 21 bytes; vmlinuz takes at most 20") as caught:
        plan(bzimage(cmdline_size=20), command_line="x" * 21)
    assert not isinstance(caught.value, ImageError)


def test_command_line_never_outgrows_its_room():
    image = bzimage(cmdline_size=0xFFFF_FFFF)
    plan(image, command_line="x" * 0xFFFF)
    with pytest.raises(ConfigError, match="has 65536 bytes; vmlinuz takes at most 65535"):
        plan(image, command_line="x" * 0x10000)


def test_command_line_keeps_the_bytes_of_argv():
    result = plan(bzimage(), command_line="init=/\u00e4 \udcff")
    assert string(result, 0x20000) == b"init=/\xc3\xa4 \xff"
    with pytest.raises(ConfigError, match="zero byte"):
        plan(bzimage(), command_line="a\0b")
    with pytest.raises(ConfigError, match="no text"):
        plan(bzimage(), command_line="\ud800")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 0x020B}, r"vmlinuz is a Linux kernel of boot protocol 2\.11; the 64-bit entry came with 2\.12"),
        ({"version": 0x0200}, r"boot protocol 2\.00"),
        ({"xloadflags": 0}, "vmlinuz is a 32-bit Linux kernel"),
        ({"loadflags": 0}, "vmlinuz is a zImage"),
        ({"jump": 0x5F}, "the setup header ends at 0x261"),
        ({"kernel_alignment": 0}, "kernel_alignment 0x0 is no power of two"),
        ({"kernel_alignment": 0x30_0000}, "kernel_alignment 0x300000"),
        ({"pref_address": 0}, "pref_address 0x0 is below 1 MiB"),
        ({"pref_address": 1 << 63}, "must lie below 0xc0000000"),
        ({"init_size": 0xFFFF_FFFF}, "must lie below 0xc0000000"),
        ({"payload_length": 0xFFFF_FFFF}, "the payload of the bzImage lies outside it"),
        ({"payload_offset": 0xFFFF_FFFF}, "the payload of the bzImage lies outside it"),
        ({"syssize": 0x20}, "the bzImage ends before its 64-bit entry"),
        ({"syssize": 0xFFFF_FFFF}, "truncated bzImage: 68719478768 bytes by its header"),
    ],
)
def test_refuses(fields, message):
    payload = {"payload_offset": 0, "payload_length": 0} if "syssize" in fields else {}
    with pytest.raises(ImageError, match=message):
        plan(bzimage(b"payload", **(payload | fields)))


def test_every_truncation_is_found():
    image = bzimage(b"payload" * 100)
    for size in range(len(image)):
        with pytest.raises(ImageError) as caught:
            plan(image[:size])
        text = str(caught.value)
        assert "truncated" in text or "empty" in text or "bytes of a Linux bzImage" in text or size < 2, (size, text)


def test_bad_version_strings_do_no_harm():
    """kernel_version: zero, or a pointer less 0x200 that must be below setup_sects * 0x200."""
    assert plan(bzimage(kernel_version=0)).release is None
    assert plan(bzimage(kernel_version=0xFFFF)).kind == "bzImage, 64-bit entry"
    assert plan(bzimage(release=b"6.1\x1b[2J")).release is None
    assert plan(bzimage(release=b"x" * 1000)).release == "x" * 256
    at_the_end = bytearray(bzimage(kernel_version=0x7FC - 0x200))
    at_the_end[0x7FC:0x806] = b"6.1-behind"
    assert plan(bytes(at_the_end)).release == "6.1-"


def test_modules_need_multiboot():
    with pytest.raises(ConfigError, match="only a multiboot kernel takes modules"):
        plan(bzimage(), modules=[("m", b"x", "")])


def test_pvh_of_a_bzimage_needs_the_host_to_unpack_it():
    with pytest.raises(ConfigError, match="its PVH entry is in the compressed kernel") as caught:
        plan(bzimage(), protocol="pvh")
    assert caught.value.hint == "add --decompress host"


# --- unpacked on the host ------------------------------------------------------------------------------------------

KERNEL = elf(
    [Load(16 * MIB, b"\x90" * 5000, 8192, vaddr=0xFFFF_FFFF_8100_0000), Load(17 * MIB, b"data", 100)],
    notes=pvh_note(16 * MIB + 0x50) + note(b"Linux", 0x100, b"salt\0\0\0\0"),
)


def host(form: str = "lz4", kernel: bytes = KERNEL, **options: object) -> BootPlan:
    return plan(bzimage(kernel_payload(form, kernel), init_size=2 * MIB), decompress="host", **options)


@pytest.mark.parametrize("form", ["gzip", "bzip2", "lzma", "xz", "lz4", "zstd"])
def test_host_unpacks(form):
    result = host(form)
    assert result.entry.mode == "long64"
    assert result.entry.rip == 16 * MIB
    assert read(result, 16 * MIB, 5001) == b"\x90" * 5000 + b"\0"
    assert read(result, 17 * MIB, 5) == b"data\0"
    assert segment_at(result, 17 * MIB) == (4, 100)
    assert result.kind == "bzImage 6.1.0-test unpacked on the host, 64-bit entry"
    assert result.is_linux
    assert result.release == "6.1.0-test"
    assert bytes(result.symbols) == KERNEL


def test_host_unpacked_zero_page_has_the_setup_header():
    """What the bzImage's header says is handed on, as its own decompressor would hand it on."""
    result = host(initrd=INITRD, command_line="quiet")
    page = read(result, ZERO_PAGE, 4096)
    assert page[0x202:0x208] == b"HdrS\x0f\x02"
    assert struct.unpack_from("<Q", page, 0x258) == (16 * MIB,)
    assert page[0x210] == 0xFF
    assert struct.unpack_from("<II", page, 0x218) == ((RAM - len(INITRD)) & ~0xFFF, len(INITRD))
    assert string(result, 0x20000) == b"quiet"


def test_host_unpacked_kernel_by_pvh():
    result = host(protocol="pvh")
    assert result.entry.mode == "protected32"
    assert result.entry.rip == 16 * MIB + 0x50
    assert result.kind == "bzImage 6.1.0-test unpacked on the host, PVH entry"


def test_host_keeps_the_headers_limits():
    image = bzimage(kernel_payload("gzip", KERNEL), init_size=2 * MIB, cmdline_size=10, initrd_addr_max=32 * MIB - 1)
    with pytest.raises(ConfigError, match="takes at most 10"):
        plan(image, decompress="host", command_line="x" * 11)
    result = plan(image, decompress="host", initrd=INITRD)
    assert number(result, ZERO_PAGE + 0x218) == (32 * MIB - len(INITRD)) & ~0xFFF


def test_host_with_too_little_ram_does_not_unpack():
    image = bzimage(b"not even compressed", init_size=64 * MIB)
    with pytest.raises(ConfigError, match="needs at least 80 MiB of RAM"):
        plan(image, decompress="host", ram=64 * MIB)


def test_host_without_payload():
    with pytest.raises(ImageError, match="does not say where its payload is") as caught:
        plan(bzimage(payload_offset=0), decompress="host")
    assert caught.value.hint == "--decompress guest"


def test_host_unpacks_something_else():
    with pytest.raises(ImageError, match="what the bzImage unpacks to is no ELF file"):
        host(kernel=b"no kernel at all")


def test_fields_of_the_writer_do_not_overlap():
    """The tests' own table of the header is sound."""
    spans = sorted((offset, offset + struct.calcsize(form)) for offset, form in BZIMAGE_FIELDS.values())
    assert all(first[1] <= second[0] for first, second in pairwise(spans))
