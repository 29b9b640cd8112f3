"""Every guest address, port and interrupt number of the machine, in one table, each with its source.

Addresses are guest-physical, in bytes.
"""

from __future__ import annotations

from typing import Final

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30

# --- RAM -----------------------------------------------------------------------------------------------------------
RAM_LOW_END: Final = 3 * GIB
"""RAM above this size continues at RAM_HIGH_BASE; the gap holds the LAPIC, the IOAPIC and MMIO."""
RAM_HIGH_BASE: Final = 4 * GIB

# --- conventional memory, as the boot code uses it (all of it is RAM that the kernel may reclaim) ---------------------
BOOT_GDT: Final = 0x500
BOOT_IDT: Final = 0x520
PVH_START_INFO: Final = 0x6000
"""struct hvm_start_info, then its module list at +0x100 and its memory map at +0x200 (page-sized in all)."""
ZERO_PAGE: Final = 0x7000
"""struct boot_params of the Linux boot protocol, one page."""
BOOT_STACK: Final = 0x8FF0
"""Initial stack pointer of protected- and long-mode entries; grows down from here."""
PAGE_TABLES: Final = 0x9000
"""PML4, PDPT and four page directories: the first 4 GiB mapped one to one by 2 MiB pages; ends at 0xF000."""
MULTIBOOT_INFO: Final = 0x10000
"""Multiboot information, its module list, memory map and strings; at most 64 KiB."""
COMMAND_LINE: Final = 0x20000
COMMAND_LINE_MAX: Final = 0x10000
EBDA: Final = 0x9FC00
"""Where conventional RAM ends. The MP floating pointer is in the KiB above (MP 1.4, section 4)."""
EBDA_SIZE: Final = 0x400
ACPI_TABLES: Final = 0xE0000
"""RSDP, then every other table; the RSDP must be on a 16-byte boundary in 0xE0000..0xFFFFF (ACPI 6.4, 5.2.5.1)."""
ACPI_TABLES_SIZE: Final = 0xF000
VMGENID: Final = 0xEF028
"""The machine's generation identifier, 16 random bytes in a page of their own, which the memory map reserves. Not on a
16-byte boundary, where kernels look for signatures (Microsoft, Virtual Machine Generation ID, August 2012)."""
MP_TABLE: Final = 0xF0000
"""The MP configuration table, behind the ACPI tables; its floating pointer is in the EBDA."""
HIGH_MEMORY: Final = 0x100000
"""First byte above 1 MiB: where kernels load."""

# --- addresses in the hole below 4 GiB ------------------------------------------------------------------------------
PCI_WINDOW: Final = 0xE000_0000
"""Where the BARs of PCI functions are, and may be moved to."""
PCI_WINDOW_SIZE: Final = 0x1000_0000
PCI_ECAM: Final = 0xF000_0000
"""Configuration space of bus 0, 4 KiB a function (PCI Express 4.0, 7.2.2)."""
PCI_ECAM_SIZE: Final = MIB
VIRTIO_MMIO: Final = 0xFEB0_0000
"""Registers of virtio-mmio devices, one behind the other, where QEMU's microvm has them."""
VIRTIO_MMIO_STRIDE: Final = 0x200
IOAPIC: Final = 0xFEC0_0000
"""The address of KVM's in-kernel IOAPIC."""
LAPIC: Final = 0xFEE0_0000
IDENTITY_MAP: Final = 0xFFFB_C000
"""One page that KVM on VT-x without unrestricted guest needs (KVM API, KVM_SET_IDENTITY_MAP_ADDR)."""
TSS: Final = 0xFFFB_D000
"""Three pages that KVM on VT-x needs (KVM API, KVM_SET_TSS_ADDR)."""

# --- I/O ports ------------------------------------------------------------------------------------------------------
I8042_DATA: Final = 0x60
I8042_COMMAND: Final = 0x64
RTC: Final = 0x70
"""Index and data, two ports."""
DEBUG_CONSOLE: Final = 0xE9
DEBUG_EXIT: Final = 0xF4
"""Four ports, as kvm-unit-tests configures QEMU's isa-debug-exit."""
COM1: Final = 0x3F8
"""Eight ports."""
FW_CFG: Final = 0x510
"""16-bit selector, then the data port at 0x511."""
PM1_EVENT: Final = 0x600
"""PM1 status and enable, 16 bits each (ACPI 6.4, 4.8.3.1)."""
PM1_CONTROL: Final = 0x604
PM_TIMER: Final = 0x608
"""32-bit read-only counter at 3.579545 MHz (ACPI 6.4, 4.8.3.3)."""
PCI_CONFIG: Final = 0xCF8
"""CONFIG_ADDRESS and CONFIG_DATA, eight ports; a one-byte access to RESET_CONTROL is the reset register."""
RESET_CONTROL: Final = 0xCF9

S5_SLEEP_TYPE: Final = 5
"""SLP_TYP that PM1_CONTROL takes for soft-off; the DSDT tells it to the guest."""

# --- interrupts: GSI numbers; the first 16 are the ISA IRQs ----------------------------------------------------------
IRQ_KEYBOARD: Final = 1
IRQ_EVENT: Final = 3
"""Of the generic event device (ACPI 6.4, 5.6.9): an edge for each event. COM2 has it on a PC; there is none here."""
IRQ_COM1: Final = 4
IRQ_RTC: Final = 8
IRQ_SCI: Final = 9
VIRTIO_MMIO_GSIS: Final = (5, 6, 7, 10, 11, 12, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23)
"""One for each virtio-mmio device: edges. ISA interrupts first, which kernels know without ACPI as well."""
PCI_GSIS: Final = (16, 17, 18, 19, 20, 21, 22, 23)
"""Where the INTA pins of PCI devices lead, by device number modulo 8: levels, active low."""


def virtio_mmio_places(count: int) -> list[tuple[int, int]]:
    """Return register address and GSI of the first `count` virtio-mmio devices."""
    places = enumerate(VIRTIO_MMIO_GSIS[:count])
    return [(VIRTIO_MMIO + index * VIRTIO_MMIO_STRIDE, gsi) for index, gsi in places]
