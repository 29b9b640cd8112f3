"""The ACPI tables, read back as an operating system reads them, and through ACPICA's own compiler (ACPI 6.4)."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from typing import TYPE_CHECKING

import pytest

from hypervisor.boot import aml
from hypervisor.boot.acpi import build_tables

if TYPE_CHECKING:
    from pathlib import Path

BASE = 0xE0000
S5 = 5
PM_REGISTER = struct.Struct("<BBBBQ")  # Generic Address Structure
SYSTEM_IO = 1


class Tables:
    """The blob in memory at its address, followed from the RSDP."""

    def __init__(self, blob: bytes, base: int = BASE) -> None:
        self.blob = blob
        self.base = base
        self.rsdp = blob[:36]
        self.xsdt = self.at(struct.unpack_from("<Q", blob, 24)[0])
        entries = struct.unpack(f"<{(len(self.xsdt) - 36) // 8}Q", self.xsdt[36:])
        self.listed = {self.at(entry)[:4]: self.at(entry) for entry in entries}
        self.fadt = self.listed[b"FACP"]
        self.madt = self.listed[b"APIC"]
        self.mcfg = self.listed[b"MCFG"]
        self.facs_address, self.dsdt_address = struct.unpack_from("<II", self.fadt, 36)
        self.facs = self.at(self.facs_address)
        self.dsdt = self.at(self.dsdt_address)

    def at(self, address: int) -> bytes:
        offset = address - self.base
        length = struct.unpack_from("<I", self.blob, offset + 4)[0]
        assert offset > 0
        assert offset + length <= len(self.blob)
        return self.blob[offset : offset + length]


@pytest.fixture(scope="module")
def tables() -> Tables:
    return Tables(build_tables(cpus=3, s5_sleep_type=S5))


def field(table: bytes, offset: int, code: str) -> int:
    return int(struct.unpack_from("<" + code, table, offset)[0])


# --- structure -----------------------------------------------------------------------------------------------------


def test_rsdp(tables):
    """5.2.5.3: both sums are zero, revision 2, and there is no RSDT."""
    assert tables.rsdp[:8] == b"RSD PTR "
    assert sum(tables.rsdp[:20]) % 256 == 0
    assert sum(tables.rsdp) % 256 == 0
    assert tables.rsdp[15] == 2
    assert field(tables.rsdp, 16, "I") == 0
    assert field(tables.rsdp, 20, "I") == 36
    assert tables.rsdp[33:] == bytes(3)


def test_headers(tables):
    """5.2.6: every table but the FACS sums to zero; the FADT's OEM table ID is the root table's."""
    revisions = {b"XSDT": 1, b"FACP": 6, b"APIC": 5, b"MCFG": 1, b"DSDT": 2}
    for table in (tables.xsdt, tables.fadt, tables.madt, tables.mcfg, tables.dsdt):
        assert sum(table) % 256 == 0
        assert table[8] == revisions.pop(table[:4])
        assert table[10:24] == tables.xsdt[10:24]
    assert not revisions
    assert set(tables.listed) == {b"FACP", b"APIC", b"MCFG"}


def test_facs(tables):
    """5.2.10: 64 bytes on a 64-byte boundary, version 2, nothing set."""
    assert tables.facs_address % 64 == 0
    assert tables.facs == b"FACS" + struct.pack("<I", 64) + bytes(24) + b"\x02" + bytes(31)


def test_tables_do_not_overlap(tables):
    """Sizes of all tables and of the RSDP fit beside each other."""
    used = sum(map(len, (tables.rsdp, tables.xsdt, tables.fadt, tables.madt, tables.dsdt, tables.facs)))
    assert used <= len(tables.blob) < used + 5 * 64


@pytest.mark.parametrize("cpus", [1, 64, 255])
def test_any_number_of_cpus_fits(cpus):
    """Below the 60 KiB up to the next area; the pointers follow."""
    found = Tables(build_tables(cpus=cpus, s5_sleep_type=S5))
    assert len(found.blob) <= 0xF000
    assert len([entry for entry in madt_entries(found.madt) if entry[0] == 0]) == cpus


def test_another_base_moves_every_pointer():
    moved = Tables(build_tables(cpus=3, s5_sleep_type=S5, base=0x7FFE_0000), base=0x7FFE_0000)
    assert moved.dsdt == Tables(build_tables(cpus=3, s5_sleep_type=S5)).dsdt
    assert field(moved.fadt, 140, "Q") == moved.dsdt_address


@pytest.mark.parametrize(
    "wrong",
    [
        {"cpus": 0, "s5_sleep_type": 5},
        {"cpus": 256, "s5_sleep_type": 5},
        {"cpus": 1, "s5_sleep_type": 8},
        {"cpus": 1, "s5_sleep_type": 5, "base": 0xE0010},
    ],
)
def test_what_cannot_be_described_is_refused(wrong):
    with pytest.raises(ValueError, match="no tables"):
        build_tables(**wrong)


# --- FADT (5.2.9) --------------------------------------------------------------------------------------------------


def test_fadt_registers(tables):
    """Ports and their lengths; the 32-bit fields agree with the extended ones."""
    fadt = tables.fadt
    assert len(fadt) == 276
    assert field(fadt, 46, "H") == 9  # SCI_INT
    assert fadt[48:56] == bytes(8)  # SMI_CMD, ACPI_ENABLE, ACPI_DISABLE, S4BIOS_REQ, PSTATE_CNT
    blocks = {  # name: offset of the address, of its length, of the extended address; port, bytes
        "PM1a_EVT": (56, 88, 148, 0x600, 4),
        "PM1a_CNT": (64, 89, 172, 0x604, 2),
        "PM_TMR": (76, 91, 208, 0x608, 4),
    }
    for address, length, extended, port, size in blocks.values():
        assert field(fadt, address, "I") == port
        assert fadt[length] == size
        space, bits, shift, access, where = PM_REGISTER.unpack_from(fadt, extended)
        assert (space, bits, shift, where) == (SYSTEM_IO, size * 8, 0, port)
        assert access == (3 if port == 0x608 else 2)
    absent = {60: 160, 68: 184, 72: 196, 80: 220, 84: 232}  # PM1b_EVT, PM1b_CNT, PM2_CNT, GPE0, GPE1
    for address, extended in absent.items():
        assert field(fadt, address, "I") == 0
        assert fadt[extended : extended + 12] == bytes(12)
    assert (fadt[90], fadt[92], fadt[93]) == (0, 0, 0)
    assert fadt[244:276] == bytes(32)  # sleep registers of reduced hardware, hypervisor identity


def test_fadt_pointers(tables):
    """X_FIRMWARE_CTRL is zero where FIRMWARE_CTRL is used."""
    assert field(tables.fadt, 132, "Q") == 0
    assert field(tables.fadt, 140, "Q") == tables.dsdt_address


def test_fadt_flags(tables):
    """Fixed power button (bit 4 clear), no fixed sleep button, no RTC wake, 32-bit timer, a reset register."""
    assert field(tables.fadt, 112, "I") == 1 << 0 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 10
    assert field(tables.fadt, 96, "H") > 100  # no C2
    assert field(tables.fadt, 98, "H") > 1000  # no C3
    assert tables.fadt[108] == 0x32  # the RTC's century


def test_fadt_reset_register(tables):
    """RESET_REG is port 0xCF9, a byte; RESET_VALUE 6."""
    assert PM_REGISTER.unpack_from(tables.fadt, 116) == (SYSTEM_IO, 8, 0, 1, 0xCF9)
    assert tables.fadt[128] == 6


@pytest.mark.parametrize(("i8042", "flags"), [(True, 0b0111), (False, 0b0101)])
def test_fadt_boot_architecture(i8042, flags):
    """5.2.9.3: legacy devices, 8042, no VGA; the CMOS RTC is not denied."""
    found = Tables(build_tables(cpus=1, s5_sleep_type=S5, i8042=i8042))
    assert field(found.fadt, 109, "H") == flags


# --- MADT (5.2.12) -------------------------------------------------------------------------------------------------


def madt_entries(madt: bytes) -> list[bytes]:
    entries = []
    at = 44
    while at < len(madt):
        assert madt[at + 1] >= 2
        entries.append(madt[at : at + madt[at + 1]])
        at += madt[at + 1]
    assert at == len(madt)
    return entries


def test_madt(tables):
    """LAPICs, one IOAPIC from GSI 0 on, the PIT at GSI 2, the SCI an active-high level, NMI at LINT1 of all."""
    assert struct.unpack_from("<II", tables.madt, 36) == (0xFEE0_0000, 1)
    entries = madt_entries(tables.madt)
    assert [struct.unpack("<BBBBI", entry) for entry in entries[:3]] == [(0, 8, cpu, cpu, 1) for cpu in range(3)]
    assert struct.unpack("<BBBBII", entries[3]) == (1, 12, 0, 0, 0xFEC0_0000, 0)
    assert struct.unpack("<BBBBIH", entries[4]) == (2, 10, 0, 0, 2, 0)
    assert struct.unpack("<BBBBIH", entries[5]) == (2, 10, 0, 9, 9, 0x0D)
    assert struct.unpack("<BBBHB", entries[6]) == (4, 6, 0xFF, 0, 1)
    assert len(entries) == 7


def test_mcfg(tables):
    """PCI Firmware 3.0, 4.1.2: 8 reserved bytes, then base address, segment, first and last bus."""
    assert tables.mcfg[8] == 1
    assert tables.mcfg[36:44] == bytes(8)
    assert struct.unpack("<QHBBI", tables.mcfg[44:]) == (0xF000_0000, 0, 0, 0, 0)


# --- through iasl --------------------------------------------------------------------------------------------------


def iasl(*arguments: str, cwd: Path) -> str:
    program = shutil.which("iasl")
    assert program, "iasl is missing: install the package acpica-tools"
    done = subprocess.run([program, *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    return output


def recompile(table: bytes, directory: Path) -> tuple[str, bytes]:
    """Disassemble and compile again; return the source and the new table."""
    (directory / "table.dat").write_bytes(table)
    iasl("-d", "table.dat", cwd=directory)
    source = (directory / "table.dsl").read_text()
    output = iasl("-oa", "-p", "again", "table.dsl", cwd=directory)  # -oa: no optimization
    assert "0 Errors, 0 Warnings" in output, output
    return source, (directory / "again.aml").read_bytes()


@pytest.mark.parametrize("name", ["xsdt", "fadt", "madt", "mcfg", "facs", "dsdt"])
def test_iasl_understands_every_table(tables, name, tmp_path):
    """Disassembled and compiled again every byte is the same, but for who compiled it and the checksum of that."""
    table = getattr(tables, name)
    _, again = recompile(table, tmp_path)

    def stripped(data: bytes) -> bytes:
        return data if name == "facs" else data[:9] + data[10:28] + data[36:]

    assert stripped(again) == stripped(table)


def test_dsdt_describes_the_machine(tables, tmp_path):
    """What a guest learns from the AML, in ACPICA's words."""
    source, _ = recompile(tables.dsdt, tmp_path)
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", source, flags=re.DOTALL)
    text = re.sub(r"\s+", "", text)
    assert r"Scope(\_SB)" in text
    assert 'Device(PCI0){Name(_HID,EisaId("PNP0A03"))' in text
    assert "WordBusNumber(ResourceProducer,MinFixed,MaxFixed,PosDecode,0x0000,0x0000,0x0000,0x0000,0x0001" in text
    assert "IO(Decode16,0x0CF8,0x0CF8,0x01,0x08,)" in text
    assert "EntireRange,0x0000,0x0000,0x0CF7,0x0000,0x0CF8" in text
    assert "EntireRange,0x0000,0x0D00,0xFFFF,0x0000,0xF300" in text
    assert "NonCacheable,ReadWrite,0x00000000,0xE0000000,0xEFFFFFFF,0x00000000,0x10000000" in text
    assert 'Device(MBRD){Name(_HID,EisaId("PNP0C02"))' in text
    assert "Memory32Fixed(ReadWrite,0xF0000000,0x00100000,)" in text
    assert 'Device(RTC){Name(_HID,EisaId("PNP0B00"))' in text
    assert "IO(Decode16,0x0070,0x0070,0x01,0x02,)IRQNoFlags(){8}" in text
    assert 'Device(COM1){Name(_HID,EisaId("PNP0501"))' in text
    assert "IO(Decode16,0x03F8,0x03F8,0x01,0x08,)IRQNoFlags(){4}" in text
    assert 'Device(FWCF){Name(_HID,"QEMU0002")Name(_STA,0x0B)' in text
    assert "IO(Decode16,0x0510,0x0510,0x01,0x02,)" in text
    assert 'Device(VGEN){Name(_HID,"TRAP0001")Name(_CID,Package(0x02){"VM_Gen_Counter","VMGENCTR"})' in text
    assert 'Name(_DDN,"VM_Gen_Counter")Name(ADDR,Package(0x02){0x000EF028,Zero})' in text
    assert 'Device(GED){Name(_HID,"ACPI0013")' in text
    assert "Interrupt(ResourceConsumer,Edge,ActiveHigh,Exclusive,,,){0x00000003,}" in text
    assert "Method(_EVT,1,Serialized){Notify(VGEN,0x80)}" in text
    assert r"Name(\_S5,Package(0x04){0x05,0x05,Zero,Zero})" in text


def test_dsdt_routes_the_pins_of_pci_devices_and_has_virtio_mmio_devices(tmp_path):
    """_PRT (6.2.13): any function of device N, INTA, no link device, a GSI from 16 on; LNRO0005 is virtio-mmio's."""
    blob = build_tables(cpus=1, s5_sleep_type=5, pci_devices=2, virtio_mmio=[(0xFEB00000, 5), (0xFEB00200, 6)])
    start = blob.index(b"DSDT")
    dsdt = blob[start : start + int.from_bytes(blob[start + 4 : start + 8], "little")]
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", recompile(dsdt, tmp_path)[0], flags=re.DOTALL)
    text = re.sub(r"\s+", "", text)
    assert "Package(0x04){0x0001FFFF,Zero,Zero,0x11},Package(0x04){0x0002FFFF,Zero,Zero,0x12}" in text
    assert 'Device(VR00){Name(_HID,"LNRO0005")Name(_UID,Zero)' in text
    assert "Memory32Fixed(ReadWrite,0xFEB00200,0x00000200,)" in text
    assert "Interrupt(ResourceConsumer,Edge,ActiveHigh,Exclusive,,,){0x00000006,}" in text


def test_dsdt_stays_small(tables):
    """Interpreting AML costs a guest more than any other table; half a KiB is plenty."""
    assert len(tables.dsdt) < 512


# --- AML encodings that the DSDT does not all reach (chapter 20) ------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (0, "00"),
        (1, "01"),
        (2, "0a02"),
        (0xFF, "0aff"),
        (0x100, "0b0001"),
        (0xFFFF, "0bffff"),
        (0x1_0000, "0c00000100"),
        (0x1_0000_0000, "0e0000000001000000"),
    ],
)
def test_integers_take_their_shortest_form(value, code):
    """20.2.3."""
    assert aml.integer(value).hex() == code


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_an_integer_has_64_bits(value):
    with pytest.raises((ValueError, OverflowError)):
        aml.integer(value)


def test_eisa_id():
    """PNP0A03 is 0x030AD041, as every PC's _HID has it."""
    assert aml.eisa_id("PNP0A03").hex() == "0c41d00a03"


@pytest.mark.parametrize(
    ("terms", "lead"),
    [(58, "3f"), (59, "4104"), (4089, "4fff"), (4090, "810001"), (1 << 16, "870010"), (1 << 20, "c8000001")],
)
def test_package_lengths(terms, lead):
    """20.2.4: up to 63 in one byte; else four bits and up to three bytes more; the count includes itself."""
    encoded = aml.scope("ABCD", bytes(terms))
    code = bytes.fromhex(lead)
    assert encoded[:1] == b"\x10"
    assert encoded[1 : 1 + len(code)] == code
    if len(code) == 1:
        length = code[0]
    else:
        assert code[0] >> 6 == len(code) - 1
        length = code[0] & 15 | int.from_bytes(code[1:], "little") << 4
    assert length == len(encoded) - 1
