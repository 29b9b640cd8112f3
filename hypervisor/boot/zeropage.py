"""struct boot_params, the "zero page" that tells a Linux kernel about its machine.

Offsets are those of the kernel's Documentation/arch/x86/zero-page.rst and of "Details of Header Fields" in boot.rst
beside it.
"""

from __future__ import annotations

from struct import pack_into
from typing import Final

from hypervisor import layout
from hypervisor.boot.e820 import memory_map

__all__ = ["HEADER", "HEADER_END", "fresh", "set_initrd", "set_load_address"]

SIZE: Final = 0x1000
ACPI_RSDP: Final = 0x070
EXT_RAMDISK_IMAGE: Final = 0x0C0
EXT_RAMDISK_SIZE: Final = 0x0C4
E820_ENTRIES: Final = 0x1E8
HEADER: Final = 0x1F1
"""Where the setup header stands, in the zero page as in a bzImage."""
BOOT_FLAG: Final = 0x1FE
HEADER_MAGIC: Final = 0x202
VERSION: Final = 0x206
TYPE_OF_LOADER: Final = 0x210
LOADFLAGS: Final = 0x211
CODE32_START: Final = 0x214
RAMDISK_IMAGE: Final = 0x218
"""ramdisk_size follows it."""
CMD_LINE_PTR: Final = 0x228
KERNEL_ALIGNMENT: Final = 0x230
CMDLINE_SIZE: Final = 0x238
SETUP_DATA: Final = 0x250
HEADER_END: Final = 0x290
"""The most that a setup header may grow to: edd_mbr_sig_buffer comes next."""
E820_TABLE: Final = 0x2D0

UNREGISTERED_LOADER: Final = 0xFF
LOADED_HIGH: Final = 0x01
PROTOCOL_2_12: Final = 0x020C
ALIGNMENT: Final = 0x20_0000
ELF_COMMAND_LINE_LIMIT: Final = 2047
"""COMMAND_LINE_SIZE of an x86 kernel less the terminator: what bzImages of today say in cmdline_size."""


def fresh(ram_bytes: int, *, rsdp: int | None, header: bytes | None) -> bytearray:
    """Return a zero page: all zero, then the setup header, then what the loader fills in.

    Args:
        ram_bytes: RAM of the machine in all.
        rsdp: address of the ACPI RSDP, or None.
        header: the setup header of a bzImage from offset 0x1F1 on; None makes the one for a bare ELF kernel.
    """
    page = bytearray(SIZE)
    if header is None:
        pack_into("<H", page, BOOT_FLAG, 0xAA55)
        page[HEADER_MAGIC : HEADER_MAGIC + 4] = b"HdrS"
        # A version of zero means "not copied yet" to the kernel, which would then copy the page a second time.
        pack_into("<H", page, VERSION, PROTOCOL_2_12)
        page[LOADFLAGS] = LOADED_HIGH
        pack_into("<I", page, KERNEL_ALIGNMENT, ALIGNMENT)
        pack_into("<I", page, CMDLINE_SIZE, ELF_COMMAND_LINE_LIMIT)
    else:
        page[HEADER : HEADER + len(header)] = header
    page[TYPE_OF_LOADER] = UNREGISTERED_LOADER
    pack_into("<II", page, RAMDISK_IMAGE, 0, 0)
    pack_into("<I", page, CMD_LINE_PTR, layout.COMMAND_LINE)
    pack_into("<Q", page, SETUP_DATA, 0)
    pack_into("<Q", page, ACPI_RSDP, rsdp or 0)
    ranges = memory_map(ram_bytes)
    page[E820_ENTRIES] = len(ranges)
    for index, entry in enumerate(ranges):
        pack_into("<QQI", page, E820_TABLE + 20 * index, *entry)
    return page


def set_load_address(page: bytearray, gpa: int) -> None:
    """Write where a bzImage's protected-mode code is loaded, which a relocating loader must."""
    pack_into("<I", page, CODE32_START, gpa)


def set_initrd(page: bytearray, gpa: int, size: int) -> None:
    """Write where the initial RAM disk is: the low halves into the header, the high halves beside it."""
    pack_into("<II", page, RAMDISK_IMAGE, gpa & 0xFFFF_FFFF, size & 0xFFFF_FFFF)
    pack_into("<I", page, EXT_RAMDISK_IMAGE, gpa >> 32)
    pack_into("<I", page, EXT_RAMDISK_SIZE, size >> 32)
