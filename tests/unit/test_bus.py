"""Claims, overlaps, open bus."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.bus import Bus
from hypervisor.errors import ConfigError


class Echo:
    """Answers with its offset, remembers writes."""

    def __init__(self):
        self.writes = []

    def read(self, offset, size):
        return 0x1_0000_0000_0000_0000 | offset << 4 | size

    def write(self, offset, size, value):
        self.writes.append((offset, size, value))


def test_a_device_sees_offsets_of_its_own():
    bus, device = Bus("port", 0x10000), Echo()
    bus.claim(0x3F8, 8, device, "uart0")
    bus.freeze()
    assert bus.read(0x3FD, 1) == 0x51
    bus.write(0x3F9, 2, 0xBEEF)
    assert device.writes == [(1, 2, 0xBEEF)]


def test_unclaimed_addresses_read_as_all_ones_and_drop_writes():
    bus = Bus("port", 0x10000)
    bus.freeze()
    assert [bus.read(0x80, size) for size in (1, 2, 4, 8)] == [0xFF, 0xFFFF, 0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF]
    bus.write(0x80, 4, 1)


def test_an_access_that_leaves_the_claim_is_open_bus():
    bus, device = Bus("port", 0x10000), Echo()
    bus.claim(0x70, 2, device, "rtc")
    bus.freeze()
    assert bus.read(0x71, 2) == 0xFFFF
    bus.write(0x71, 4, 0)
    assert device.writes == []


def test_overlap_is_refused_and_names_both():
    bus = Bus("port", 0x10000)
    bus.claim(0x3F8, 8, Echo(), "uart0")
    with pytest.raises(ConfigError, match=r"extra at 0x3ff\.\.0x402 overlaps uart0 at 0x3f8\.\.0x3ff on the port bus"):
        bus.claim(0x3FF, 4, Echo(), "extra")
    with pytest.raises(ConfigError, match="overlaps uart0"):
        bus.claim(0x3F0, 0x100, Echo(), "around")


@pytest.mark.parametrize(("base", "size"), [(0xFFFF, 2), (-1, 1), (0, 0)])
def test_a_claim_stays_on_the_bus(base, size):
    with pytest.raises(ConfigError, match="is not a range of the port bus"):
        Bus("port", 0x10000).claim(base, size, Echo(), "odd")


def test_a_frozen_bus_takes_no_claim():
    bus = Bus("port", 0x10000)
    bus.freeze()
    with pytest.raises(ConfigError, match="has started"):
        bus.claim(0, 1, Echo(), "late")


ranges = st.lists(st.tuples(st.integers(0, 20000), st.integers(1, 9000)), max_size=12)


@given(wanted=ranges, probes=st.lists(st.tuples(st.integers(0, 30000), st.sampled_from([1, 2, 4, 8])), max_size=30))
def test_look_up_agrees_with_a_search_of_all_claims(wanted, probes):
    bus = Bus("memory", 1 << 52)
    held = []
    for base, size in wanted:
        try:
            bus.claim(base, size, Echo(), "x")
        except ConfigError:
            assert any(base < b + s and b < base + size for b, s in held)
        else:
            assert not any(base < b + s and b < base + size for b, s in held)
            held.append((base, size))
    bus.freeze()
    for address, size in probes:
        owner = [b for b, s in held if b <= address and address + size <= b + s]
        expected = (owner and (address - owner[0]) << 4 | size) if owner else (1 << 8 * size) - 1
        assert bus.read(address, size) == expected & ((1 << 8 * size) - 1)
