"""A guest that pokes a virtio PCI function at random: nothing raises, and the device can always be reset and used."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from test_virtio_pci import DRIVER_OK, NUM_QUEUES, QUEUE_ENABLE, QUEUE_SELECT, QUEUE_SIZE, STATUS, Guest

from devices.pci import PciBus, PciConfigPorts, PciMemoryWindow

BASE, SIZE, BAR_SIZE = 0xC000_0000, 0x10_0000, 0x8000
VALUES = st.one_of(
    st.sampled_from([0, 1, 2, 3, 4, 8, 0xF, 0xFF, 0x1000, 0x8000, 0xFFFF, 0xFFFF_FFFF, (1 << 64) - 1]),
    st.integers(0, (1 << 64) - 1),
)
OFFSETS = st.one_of(
    st.sampled_from([0x10, 0x14, 0x16, 0x18, 0x1A, 0x1C, 0x20, 0x24, 0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000]),
    st.integers(0, 0x3F),
    st.integers(0, BAR_SIZE),
)
ACCESS = st.tuples(
    st.sampled_from(["config", "config", "memory", "memory", "memory"]),
    st.booleans(),
    OFFSETS,
    st.sampled_from([1, 2, 4, 8]),
    VALUES,
)


@given(accesses=st.lists(ACCESS, max_size=60), configured=st.booleans())
def test_random_pokes(accesses, configured):
    guest = Guest()
    bus = PciBus(range(BASE, BASE + SIZE))
    bus.add(1, 0, guest.function)
    bells: dict[int, int] = {}
    guest.function.on_decode = lambda bar, base: bells.pop(bar) if base is None else bells.update({bar: base})
    guest.function.place_bars(lambda size: BASE + size)
    guest.config(0x04, 2, 2)
    ports, window = PciConfigPorts(bus, on_reset=lambda: None), PciMemoryWindow(bus)
    if configured:
        guest.start()
    identity = [guest.config(register, 4) for register in (0x00, 0x08, 0x2C, 0x34)]
    for where, writes, offset, width, value in accesses:
        if where == "config":
            size = min(width, 4)
            ports.write(0, 4, 1 << 31 | 1 << 11 | offset & 0xFC)
            device, place = ports, 4 + (offset & 4 - size)
        else:
            device, place, size = window, BAR_SIZE + offset, width
        if writes:
            device.write(place, size, value & (1 << 8 * size) - 1)
        else:
            assert device.read(place, size) >= 0
        shown = guest.common(QUEUE_SIZE, 2)
        assert shown & (shown - 1) == 0
    assert [guest.config(register, 4) for register in (0x00, 0x08, 0x2C, 0x34)] == identity
    assert bells in ({}, {0: guest.config(0x10, 4)})
    assert len(guest.device.log._once) <= 64
    guest.start()
    assert guest.common(STATUS, 1) & 0x7F == 0xF
    assert guest.common(STATUS, 1) & DRIVER_OK
    assert guest.common(NUM_QUEUES, 2) == 3
    for index in range(3):
        guest.common(QUEUE_SELECT, 2, index)
        assert guest.common(QUEUE_ENABLE, 2) == 1


@given(
    register=st.integers(0, 0xFF),
    size=st.sampled_from([1, 2, 4]),
    window=st.tuples(VALUES, VALUES, st.sampled_from([1, 2, 4])),
    value=VALUES,
)
def test_window_of_any_address(register, size, window, value):
    """4.1.4.9: whatever bar, offset and length say, an access is made or nothing happens."""
    guest = Guest()
    at = guest.structures[5][0]
    guest.config(at + 4, 1, window[0] & 0xFF)
    guest.config(at + 8, 4, window[1] & 0xFFFF_FFFF)
    guest.config(at + 12, 4, window[2])
    for where in (at + 16, register):
        guest.config(where, size, value & (1 << 8 * size) - 1)
        assert 0 <= guest.config(where, size) < 1 << 8 * size
