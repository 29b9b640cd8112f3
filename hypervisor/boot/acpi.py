"""The ACPI tables of the machine, as one blob for one address (ACPI 6.4, chapter 5).

What they describe is fixed by `hypervisor.layout`. The DSDT is small on purpose: a guest interprets it at boot, and
that can cost more than the rest of its boot.
"""

from __future__ import annotations

from struct import pack
from typing import TYPE_CHECKING, Final

from hypervisor import layout
from hypervisor.boot import aml

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["MAX_CPUS", "build_tables"]

MAX_CPUS: Final = 255
"""APIC identifiers 0..254: an 8-bit one of 255 addresses all of them."""

_OEM: Final = b"TRAPVM"
_OEM_TABLE: Final = b"TRAPVISR"
_CREATOR: Final = b"TRAP"
_RSDP_SIZE: Final = 36
_SYSTEM_IO: Final = 1
_NO_REGISTER: Final = bytes(12)
_RTC_CENTURY: Final = 0x32
"""Where the RTC's RAM has the century."""
_RESET_VALUE: Final = 0x06
"""A reset of the whole system: RST_CPU and SYS_RST of the ICH's RST_CNT."""
_IOAPIC_ID: Final = 0
"""What the ID register of KVM's IOAPIC holds after reset."""
_PIT_GSI: Final = 2
"""KVM wires the PIT, ISA IRQ 0, to the IOAPIC's pin 2, as PCs do."""
_STATUS_CHANGE: Final = 0x80
"""The notification of a new generation identifier."""
_ACTIVE_HIGH_LEVEL: Final = 0x0D
"""Polarity and trigger mode of an interrupt (5.2.12.5, MPS INTI flags)."""

# FADT: IAPC_BOOT_ARCH (5.2.9.3)
_LEGACY_DEVICES: Final = 1 << 0
_HAS_8042: Final = 1 << 1
_NO_VGA: Final = 1 << 2

# FADT: Flags (5.2.9). PWR_BUTTON stays 0: the power button is a fixed feature. So does HW_REDUCED_ACPI.
_WBINVD: Final = 1 << 0
_PROC_C1: Final = 1 << 2
_NO_FIXED_SLEEP_BUTTON: Final = 1 << 5
_NO_FIXED_RTC_WAKE: Final = 1 << 6
_TIMER_32_BITS: Final = 1 << 8
_RESET_REG_SUP: Final = 1 << 10
_FLAGS: Final = _WBINVD | _PROC_C1 | _NO_FIXED_SLEEP_BUTTON | _NO_FIXED_RTC_WAKE | _TIMER_32_BITS | _RESET_REG_SUP


def build_tables(  # noqa: PLR0913 - what a platform has, all of it by name
    *,
    cpus: int,
    s5_sleep_type: int,
    base: int = layout.ACPI_TABLES,
    i8042: bool = True,
    pci_devices: int = 0,
    virtio_mmio: Sequence[tuple[int, int]] = (),
) -> bytes:
    """Build RSDP, XSDT, FADT, MADT, MCFG, DSDT and FACS.

    Args:
        cpus: how many, 1..MAX_CPUS; their APIC identifiers count from zero.
        s5_sleep_type: SLP_TYP that the platform's PM1 control register takes for soft-off (0..7).
        base: guest-physical address the blob is for, a multiple of 64 below 4 GiB; the RSDP is at its start.
        i8042: whether there is a keyboard controller that an operating system should probe.
        pci_devices: how many PCI devices there are, from device number 1 on; their pins are routed.
        virtio_mmio: register address and GSI of every virtio-mmio device.

    Returns:
        The blob: at most layout.ACPI_TABLES_SIZE bytes, whatever `cpus` is.

    Raises:
        ValueError: an argument is out of its range.
    """
    if not 1 <= cpus <= MAX_CPUS or base % 64 or not 0 <= s5_sleep_type <= 7:
        raise ValueError(f"no tables for {cpus} CPUs at {base:#x} with SLP_TYP {s5_sleep_type}")
    blob = bytearray(_RSDP_SIZE)

    def place(table: bytes, alignment: int = 16) -> int:
        blob.extend(bytes(-len(blob) % alignment))
        blob.extend(table)
        return base + len(blob) - len(table)

    dsdt = place(_dsdt(s5_sleep_type, pci_devices, virtio_mmio))
    facs = place(_facs(), 64)
    fadt = place(_fadt(facs, dsdt, i8042=i8042))
    madt = place(_madt(cpus))
    mcfg = place(_mcfg())
    xsdt = place(_table(b"XSDT", 1, pack("<QQQ", fadt, madt, mcfg)))
    blob[:_RSDP_SIZE] = _rsdp(xsdt)
    return bytes(blob)


def _checksum(data: bytes) -> int:
    """Return the byte that makes the sum of `data` and itself zero."""
    return -sum(data) & 0xFF


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    """Put the system description table header before `body` (5.2.6)."""
    length = 36 + len(body)
    head = pack("<4sIB", signature, length, revision)
    tail = pack("<6s8sI4sI", _OEM, _OEM_TABLE, 1, _CREATOR, 1) + body
    return head + bytes([_checksum(head + tail)]) + tail


def _rsdp(xsdt: int) -> bytes:
    """Build the root pointer, revision 2, without an RSDT (5.2.5.3)."""
    first = pack("<8s", b"RSD PTR ")
    rest = pack("<6sBI", _OEM, 2, 0)
    first += bytes([_checksum(first + rest)]) + rest
    extension = pack("<IQ", _RSDP_SIZE, xsdt)
    return first + extension + bytes([_checksum(first + extension)]) + bytes(3)


def _facs() -> bytes:
    """Build the control structure (5.2.10), version 2: a global lock that only the guest takes."""
    return pack("<4sI24xB31x", b"FACS", 64, 2)


def _register(address: int, bits: int, access: int) -> bytes:
    """Build a Generic Address Structure of a port; `access`: 1 by bytes, 2 by words, 3 by dwords."""
    return pack("<BBBBQ", _SYSTEM_IO, bits, 0, access, address)


def _fadt(facs: int, dsdt: int, *, i8042: bool) -> bytes:
    """Build the fixed description table, revision 6 (5.2.9)."""
    boot_arch = _LEGACY_DEVICES | _NO_VGA | (_HAS_8042 if i8042 else 0)
    no_c2, no_c3 = 101, 1001  # latencies, in us, that say there is no such state
    body = pack("<IIBBH", facs, dsdt, 0, 0, layout.IRQ_SCI)
    body += pack("<IBBBB", 0, 0, 0, 0, 0)  # SMI_CMD and what to write there: no SMM, always ACPI mode
    body += pack("<II", layout.PM1_EVENT, 0)  # PM1a, PM1b
    body += pack("<II", layout.PM1_CONTROL, 0)
    body += pack("<IIII", 0, layout.PM_TIMER, 0, 0)  # PM2 control, timer, GPE0, GPE1
    body += pack("<BBBBBBBB", 4, 2, 0, 4, 0, 0, 0, 0)  # their lengths, GPE1_BASE, CST_CNT
    body += pack("<HHHHBB", no_c2, no_c3, 0, 0, 0, 0)  # no flush stride, no throttling duty
    body += pack("<BBB", 0, 0, _RTC_CENTURY)  # no day or month in the RTC's alarm
    body += pack("<HBI", boot_arch, 0, _FLAGS)
    body += _register(layout.RESET_CONTROL, 8, 1) + pack("<B", _RESET_VALUE)
    body += pack("<HB", 0, 4)  # ARM_BOOT_ARCH, minor version
    body += pack("<QQ", 0, dsdt)  # X_FIRMWARE_CTRL is 0 where the 32-bit field serves
    body += _register(layout.PM1_EVENT, 32, 2) + _NO_REGISTER
    body += _register(layout.PM1_CONTROL, 16, 2) + _NO_REGISTER
    body += _NO_REGISTER + _register(layout.PM_TIMER, 32, 3) + 2 * _NO_REGISTER
    body += 2 * _NO_REGISTER + bytes(8)  # SLEEP_CONTROL_REG, SLEEP_STATUS_REG, hypervisor vendor identity
    return _table(b"FACP", 6, body)


def _madt(cpus: int) -> bytes:
    """Build the interrupt controllers' table, revision 5 (5.2.12)."""
    body = pack("<II", layout.LAPIC, 1)  # PCAT_COMPAT: there are two 8259s as well
    body += b"".join(pack("<BBBBI", 0, 8, cpu, cpu, 1) for cpu in range(cpus))
    body += pack("<BBBBII", 1, 12, _IOAPIC_ID, 0, layout.IOAPIC, 0)
    for source, gsi, flags in ((0, _PIT_GSI, 0), (layout.IRQ_SCI, layout.IRQ_SCI, _ACTIVE_HIGH_LEVEL)):
        body += pack("<BBBBIH", 2, 10, 0, source, gsi, flags)
    body += pack("<BBBHB", 4, 6, 0xFF, 0, 1)  # NMI at LINT1 of every processor
    return _table(b"APIC", 5, body)


def _mcfg() -> bytes:
    """Build the table of PCI's memory-mapped configuration space (PCI Firmware 3.0, 4.1.2): bus 0 of segment 0."""
    return _table(b"MCFG", 1, bytes(8) + pack("<QHBB4x", layout.PCI_ECAM, 0, 0, 0))


def _interrupt_routes(pci_devices: int) -> bytes:
    """Build the _PRT: which GSI the INTA pin of each PCI device leads to (6.2.13)."""
    routes = []
    for device in range(1, pci_devices + 1):
        gsi = layout.PCI_GSIS[device % len(layout.PCI_GSIS)]
        every_function = aml.integer(device << 16 | 0xFFFF)
        routes.append(aml.package(every_function, aml.integer(0), aml.integer(0), aml.integer(gsi)))
    return aml.name("_PRT", aml.package(*routes)) if routes else b""


def _virtio_mmio(number: int, base: int, gsi: int) -> bytes:
    """Build the device object of virtio-mmio device `number`."""
    return aml.device(
        f"VR{number:02X}",
        aml.name("_HID", aml.string("LNRO0005")),
        aml.name("_UID", aml.integer(number)),
        aml.name("_CRS", aml.resources(aml.fixed_memory(base, layout.VIRTIO_MMIO_STRIDE), aml.interrupt(gsi))),
    )


def _generation() -> bytes:
    """Build the generation identifier's device (Virtual Machine Generation ID) and what tells of a new one.

    A generic event device (ACPI 6.4, 5.6.9) and not a general-purpose event, which would have registers: a guest that
    boots leaves for none, and an event costs it no exit either.
    """
    compatible = aml.package(aml.string("VM_Gen_Counter"), aml.string("VMGENCTR"))
    identifier = aml.device(
        "VGEN",
        aml.name("_HID", aml.string("TRAP0001")),
        aml.name("_CID", compatible),
        aml.name("_DDN", aml.string("VM_Gen_Counter")),
        aml.name("ADDR", aml.package(aml.integer(layout.VMGENID), aml.integer(0))),
    )
    event = aml.device(
        "GED",
        aml.name("_HID", aml.string("ACPI0013")),
        aml.name("_CRS", aml.resources(aml.interrupt(layout.IRQ_EVENT))),
        aml.method("_EVT", 1, aml.notify("VGEN", _STATUS_CHANGE)),
    )
    return identifier + event


def _dsdt(s5_sleep_type: int, pci_devices: int, virtio_mmio: Sequence[tuple[int, int]]) -> bytes:
    """Build the AML: PCI root and its ECAM, the other devices, and how to power off."""
    hid, crs = "_HID", "_CRS"
    pci = aml.device(
        "PCI0",
        aml.name(hid, aml.eisa_id("PNP0A03")),
        aml.name(
            crs,
            aml.resources(
                aml.buses(0, 0),
                aml.io_ports(layout.PCI_CONFIG, 8),
                aml.word_io(0, layout.PCI_CONFIG - 1),
                aml.word_io(layout.PCI_CONFIG + 8, 0xFFFF),
                aml.dword_memory(layout.PCI_WINDOW, layout.PCI_WINDOW + layout.PCI_WINDOW_SIZE - 1),
            ),
        ),
        _interrupt_routes(pci_devices),
    )
    ecam = aml.fixed_memory(layout.PCI_ECAM, layout.PCI_ECAM_SIZE)  # or nobody believes the MCFG (PCI Firmware, 4.1.2)
    board = aml.device("MBRD", aml.name(hid, aml.eisa_id("PNP0C02")), aml.name(crs, aml.resources(ecam)))
    rtc = aml.device(
        "RTC",
        aml.name(hid, aml.eisa_id("PNP0B00")),
        aml.name(crs, aml.resources(aml.io_ports(layout.RTC, 2), aml.irq(layout.IRQ_RTC))),
    )
    com1 = aml.device(
        "COM1",
        aml.name(hid, aml.eisa_id("PNP0501")),
        aml.name("_UID", aml.integer(1)),
        aml.name(crs, aml.resources(aml.io_ports(layout.COM1, 8), aml.irq(layout.IRQ_COM1))),
    )
    fw_cfg = aml.device(
        "FWCF",
        aml.name(hid, aml.string("QEMU0002")),
        aml.name("_STA", aml.integer(0x0B)),  # present, decoding, working; nothing to show to a user
        aml.name(crs, aml.resources(aml.io_ports(layout.FW_CFG, 2))),
    )
    sleep_type = aml.integer(s5_sleep_type)
    s5 = aml.name("\\_S5", aml.package(sleep_type, sleep_type, aml.integer(0), aml.integer(0)))
    virtio = [_virtio_mmio(number, base, gsi) for number, (base, gsi) in enumerate(virtio_mmio)]
    return _table(b"DSDT", 2, aml.scope("\\_SB", pci, board, rtc, com1, fw_cfg, _generation(), *virtio) + s5)
