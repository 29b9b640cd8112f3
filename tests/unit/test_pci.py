"""PCI configuration mechanism #1 and the reset register, as system software uses them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.pci import PciConfigPorts, PciEcam

ADDRESS, RESET, DATA = 0, 1, 4  # offsets from 0xCF8
ENABLE = 1 << 31
SYS_RST, RST_CPU, FULL_RST = 2, 4, 8


class Resets:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


class FakeFunction:
    """256 bytes that can be written; remembers what it was asked."""

    def __init__(self) -> None:
        self.space = bytearray(range(256))
        self.calls: list[tuple[int, ...]] = []

    def config_read(self, register: int, size: int) -> int:
        self.calls.append((register, size))
        return int.from_bytes(self.space[register : register + size], "little")

    def config_write(self, register: int, size: int, value: int) -> None:
        self.calls.append((register, size, value))
        self.space[register : register + size] = value.to_bytes(size, "little")


@pytest.fixture
def resets() -> Resets:
    return Resets()


@pytest.fixture
def ports(resets) -> PciConfigPorts:
    return PciConfigPorts(on_reset=resets)


def address(bus: int, device: int, function: int, register: int) -> int:
    return ENABLE | bus << 16 | device << 11 | function << 8 | register & 0xFC


def config_read(ports: PciConfigPorts, where: tuple[int, int, int], register: int, size: int) -> int:
    ports.write(ADDRESS, 4, address(*where, register))
    return ports.read(DATA + (register & 3), size) & (1 << 8 * size) - 1


def config_write(ports: PciConfigPorts, where: tuple[int, int, int], register: int, size: int, value: int) -> None:
    ports.write(ADDRESS, 4, address(*where, register))
    ports.write(DATA + (register & 3), size, value)


# --- what is on the bus --------------------------------------------------------------------------------------------


def test_host_bridge(ports):
    """00:00.0: class 06 00 00, header type 0, no BARs, no capabilities, no interrupt pin."""
    host = (0, 0, 0)
    assert config_read(ports, host, 0x00, 2) == 0x8086
    assert config_read(ports, host, 0x02, 2) == 0x0D57
    assert config_read(ports, host, 0x08, 4) >> 8 == 0x06_00_00
    assert config_read(ports, host, 0x0E, 1) == 0x00
    assert config_read(ports, host, 0x06, 2) & 1 << 4 == 0
    assert {config_read(ports, host, register, 4) for register in range(0x10, 0x100, 4)} == {0}


def test_host_bridge_cannot_be_written(ports):
    before = [config_read(ports, (0, 0, 0), register, 4) for register in range(0, 256, 4)]
    for register in range(0, 256, 4):
        config_write(ports, (0, 0, 0), register, 4, 0xFFFF_FFFF)
    assert [config_read(ports, (0, 0, 0), register, 4) for register in range(0, 256, 4)] == before


def test_only_the_host_bridge_is_there(ports):
    """An absent function reads as all ones, which is no vendor."""
    found = [
        (bus, device, function)
        for bus in (0, 1, 255)
        for device in range(32)
        for function in range(8)
        if config_read(ports, (bus, device, function), 0, 4) != 0xFFFF_FFFF
    ]
    assert found == [(0, 0, 0)]
    config_write(ports, (0, 5, 0), 4, 2, 7)  # goes nowhere


def test_mechanism_probe(ports):
    """What Linux does before it believes in mechanism #1."""
    ports.write(3, 1, 0x01)
    saved = ports.read(ADDRESS, 4)
    ports.write(ADDRESS, 4, ENABLE)
    assert ports.read(ADDRESS, 4) & 0xFFFF_FFFF == ENABLE
    ports.write(ADDRESS, 4, saved)
    assert ports.read(ADDRESS, 4) & 0xFFFF_FFFF == saved == 0


# --- decoding ------------------------------------------------------------------------------------------------------


@given(value=st.integers(0, 0xFFFF_FFFF))
def test_config_address_keeps_its_defined_bits(value):
    """Bits 30..24 and 1..0 are reserved and read as zero."""
    ports = PciConfigPorts(on_reset=Resets())
    ports.write(ADDRESS, 4, value)
    assert ports.read(ADDRESS, 4) == value & ~(0x7F << 24 | 3)


@given(
    value=st.integers(0, 0xFFFF_FFFF),
    lane=st.sampled_from([(0, 1), (1, 1), (2, 1), (3, 1), (0, 2), (1, 2), (2, 2), (0, 4)]),
    data=st.integers(0, 0xFFFF_FFFF),
)
def test_config_data_reaches_the_bytes_addressed(value, lane, data):
    """Enable, bus 0, device, function and dword from CONFIG_ADDRESS; byte and size from the access to CONFIG_DATA."""
    first, size = lane
    data &= (1 << 8 * size) - 1
    device, function, register = value >> 11 & 31, value >> 8 & 7, value & 0xFC | first
    ports = PciConfigPorts(on_reset=Resets())
    target = FakeFunction()
    if (device, function) != (0, 0):
        ports.bus.add(device, function, target)
    ports.write(ADDRESS, 4, value)
    ports.write(DATA + first, size, data)
    read = ports.read(DATA + first, size) & (1 << 8 * size) - 1
    if (device, function) == (0, 0):
        return
    if value >> 31 and value >> 16 & 0xFF == 0:
        assert target.calls == [(register, size, data), (register, size)]
        assert read == data
    else:
        assert target.calls == []
        assert read == (1 << 8 * size) - 1


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (0, 2), (1, 2), (2, 1), (2, 2), (3, 1)])
def test_smaller_accesses_do_not_touch_config_address(ports, resets, offset, size):
    ports.write(ADDRESS, 4, ENABLE | 0x1234)
    ports.write(offset, size, (1 << 8 * size) - 1)
    assert ports.read(ADDRESS, 4) == ENABLE | 0x1234
    assert ports.read(offset, size) & (1 << 8 * size) - 1 == (1 << 8 * size) - 1
    assert resets.count == 0


def test_added_functions_answer(ports):
    first, second = FakeFunction(), FakeFunction()
    ports.bus.add(3, 0, first)
    ports.bus.add(3, 7, second)
    second.space[0:2] = b"\xf4\x1a"
    assert config_read(ports, (0, 3, 0), 0x10, 4) == 0x1312_1110
    assert config_read(ports, (0, 3, 7), 0, 2) == 0x1AF4


@pytest.mark.parametrize("place", [(0, 0), (32, 0), (-1, 0), (1, 8), (1, -1)])
def test_a_place_is_given_once_and_must_exist(ports, place):
    with pytest.raises(ValueError, match="no place"):
        ports.bus.add(*place, FakeFunction())


# --- in memory (PCI Express 4.0, 7.2.2) -------------------------------------------------------------------------------


def place_in_memory(device: int, function: int, register: int) -> int:
    """Address bits 27..20 are the bus, 19..15 the device, 14..12 the function, 11..0 the register."""
    return device << 15 | function << 12 | register


@given(
    device=st.integers(1, 31),
    function=st.integers(0, 7),
    register=st.integers(0, 255),
    size=st.sampled_from([1, 2, 4]),
    value=st.integers(0, 0xFFFF_FFFF),
)
def test_memory_and_ports_reach_the_same_registers(device, function, register, size, value):
    register -= register % size
    value &= (1 << 8 * size) - 1
    ports = PciConfigPorts(on_reset=Resets())
    ecam, target = PciEcam(ports.bus), FakeFunction()
    ports.bus.add(device, function, target)
    where = place_in_memory(device, function, register)
    assert ecam.read(where, size) == config_read(ports, (0, device, function), register, size)
    ecam.write(where, size, value)
    assert target.calls[-1] == (register, size, value)
    assert config_read(ports, (0, device, function), register, size) == value


def test_every_place_is_found_where_the_address_says(ports):
    ecam = PciEcam(ports.bus)
    ports.bus.add(31, 7, FakeFunction())
    ones = (1 << 32) - 1
    found = [at for at in range(0, 1 << 20, 1 << 12) if ecam.read(at, 4) & ones != ones]
    assert found == [0, 0xFF000]
    assert ecam.read(0, 4) == 0x0D57_8086
    ecam.write(place_in_memory(5, 0, 4), 2, 7)  # nobody is there


def test_there_are_no_extended_capabilities(ports):
    """7.6.1: a header with identifier, version and next offset of zero says so. An absent function reads as ones."""
    target = FakeFunction()
    ports.bus.add(3, 0, target)
    ecam = PciEcam(ports.bus)
    for device in (0, 3):
        assert {ecam.read(place_in_memory(device, 0, register), 4) for register in range(0x100, 0x1000, 4)} == {0}
    ecam.write(place_in_memory(3, 0, 0x100), 4, 0xFFFF_FFFF)
    ecam.write(place_in_memory(3, 0, 0xFFC), 4, 0xFFFF_FFFF)
    assert target.calls == []
    assert ecam.read(place_in_memory(4, 0, 0x100), 4) & 0xFFFF_FFFF == 0xFFFF_FFFF


@pytest.mark.parametrize(("register", "size"), [(0, 8), (3, 2), (1, 4), (0xFE, 4), (0xFF, 2), (0xFFF, 2), (0x104, 8)])
def test_an_access_across_a_dword_reaches_nobody(ports, register, size):
    target = FakeFunction()
    ports.bus.add(3, 0, target)
    ecam = PciEcam(ports.bus)
    where = place_in_memory(3, 0, register)
    assert ecam.read(where, size) & (1 << 8 * size) - 1 == (1 << 8 * size) - 1
    ecam.write(where, size, 0)
    assert target.calls == []


# --- reset control (ICH10 13.7.5) ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [0, SYS_RST, SYS_RST | FULL_RST])
def test_rst_cpu_going_high_resets(ports, resets, kind):
    """Bits 1 and 3 choose the kind first; then bit 2 goes from 0 to 1."""
    ports.write(RESET, 1, kind)
    assert resets.count == 0
    assert ports.read(RESET, 1) == kind
    ports.write(RESET, 1, kind | RST_CPU)
    assert resets.count == 1


def test_rst_cpu_must_rise_again(ports, resets):
    ports.write(RESET, 1, SYS_RST | RST_CPU)
    ports.write(RESET, 1, SYS_RST | RST_CPU)
    assert resets.count == 1
    ports.write(RESET, 1, SYS_RST)
    ports.write(RESET, 1, SYS_RST | RST_CPU)
    assert resets.count == 2


def test_acpi_reset_value(ports, resets):
    """The FADT's RESET_VALUE, 6, resets by itself."""
    ports.write(RESET, 1, 0x06)
    assert resets.count == 1


def test_reserved_bits_read_as_zero(ports, resets):
    ports.write(RESET, 1, 0xFB)
    assert ports.read(RESET, 1) == SYS_RST | FULL_RST
    assert resets.count == 0
    assert ports.read(ADDRESS, 4) == 0
