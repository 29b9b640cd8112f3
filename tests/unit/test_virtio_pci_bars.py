"""What virtio-pci's base class does: header, BARs and capabilities of a PCI function (PCI Local Bus 3.0, chapter 6)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.pci import PciBus, PciConfigPorts, PciFunction, PciMemoryWindow

BASE, SIZE = 0xC000_0000, 0x10_0000
ADDRESS, DATA = 0, 4
COMMAND, STATUS, BAR0, LINE = 0x04, 0x06, 0x10, 0x3C
MEMORY, MASTER, INTX_DISABLE = 1 << 1, 1 << 2, 1 << 10
ONES = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFF_FFFF, 8: 0xFFFF_FFFF_FFFF_FFFF}


class Function(PciFunction):
    """Answers each BAR access with who was asked for what."""

    def __init__(self, mark: int = 0, bars: dict[int, tuple[int, bool]] | None = None) -> None:
        super().__init__(
            vendor=0x1234,
            device=0x5678,
            class_code=0x0102_03,
            revision=9,
            subsystem_vendor=0xABCD,
            subsystem=0xEF01,
            has_pin=True,
        )
        self.mark = mark
        self.pending = False
        self.writes: list[tuple[int, ...]] = []
        self.told: list[tuple[int, int | None]] = []
        self.on_decode = lambda bar, base: self.told.append((bar, base))
        for bar, (size, wide) in (bars or {0: (0x1000, False)}).items():
            self.add_bar(bar, size, wide=wide)

    @property
    def interrupt_is_pending(self) -> bool:
        return self.pending

    def bar_read(self, bar, offset, size):
        return self.mark << 28 | bar << 24 | offset

    def bar_write(self, bar, offset, size, value):
        self.writes.append((bar, offset, size, value))


class Guest:
    """System software: ports and memory."""

    def __init__(self, *functions: Function) -> None:
        self.bus = PciBus(range(BASE, BASE + SIZE))
        for number, function in enumerate(functions, 1):
            self.bus.add(number, 0, function)
        self.ports = PciConfigPorts(self.bus, on_reset=lambda: None)
        self.window = PciMemoryWindow(self.bus)

    def config(self, device: int, register: int, size: int, value: int | None = None) -> int:
        self.ports.write(ADDRESS, 4, 1 << 31 | device << 11 | register & 0xFC)
        if value is not None:
            self.ports.write(DATA + (register & 3), size, value)
            return 0
        return self.ports.read(DATA + (register & 3), size) & ONES[size]

    def read(self, address: int, size: int = 4) -> int:
        return self.window.read(address - BASE, size) & ONES[size]


def test_header():
    """6.1 and 6.2: identifiers, class, type 0, INTA, and a note of the line that can be changed."""
    guest = Guest(Function())
    assert guest.config(1, 0x00, 4) == 0x5678_1234
    assert guest.config(1, 0x08, 4) == 0x0102_0309
    assert guest.config(1, 0x0E, 1) == 0
    assert guest.config(1, 0x2C, 4) == 0xEF01_ABCD
    assert guest.config(1, 0x3D, 1) == 1
    guest.config(1, LINE, 1, 11)
    assert guest.config(1, LINE, 1) == 11
    guest.config(1, COMMAND, 2, 0xFFFF)
    assert guest.config(1, COMMAND, 2) == MEMORY | MASTER | INTX_DISABLE


def test_machine_notes_line_and_multifunction():
    function = Function()
    function.set_interrupt_line(17)
    function.set_multifunction()
    guest = Guest(function)
    assert guest.config(1, LINE, 1) == 17
    assert guest.config(1, 0x0E, 1) == 0x80


@pytest.mark.parametrize("disabled", [0, INTX_DISABLE])
def test_interrupt_status(disabled):
    """6.2.3: bit 3 shows the pin's state whether INTx is disabled or not; it cannot be written."""
    function = Function()
    guest = Guest(function)
    guest.config(1, COMMAND, 2, disabled)
    for pending in (True, False):
        function.pending = pending
        guest.config(1, STATUS, 2, 0xFFFF)
        assert guest.config(1, STATUS, 2) == pending << 3
        assert guest.config(1, COMMAND, 4) == disabled | pending << 19
        assert guest.config(1, STATUS + 1, 1) == 0


# --- BARs ----------------------------------------------------------------------------------------------------------


@given(power=st.integers(4, 31), wide=st.booleans(), bar=st.integers(0, 4))
def test_sizing(power, wide, bar):
    """6.2.5.1: all ones written, the size reads back in what stays zero; bits 2..1 are 00 for 32 and 10 for 64 bits."""
    guest = Guest(Function(bars={bar: (1 << power, wide)}))
    where = BAR0 + 4 * bar
    guest.config(1, where, 4, 0xFFFF_FFFF)
    assert guest.config(1, where, 4) == 0x1_0000_0000 - (1 << power) | (4 if wide else 0)
    guest.config(1, where + 4, 4, 0xFFFF_FFFF)
    assert guest.config(1, where + 4, 4) == (0xFFFF_FFFF if wide else 0)


@pytest.mark.parametrize(
    ("bar", "size", "wide"),
    [(0, 8, False), (0, 48, False), (0, 1 << 32, True), (6, 16, False), (5, 16, True), (-1, 16, False), (1, 16, False)],
)
def test_impossible_bars(bar, size, wide):
    with pytest.raises(ValueError, match="BAR"):
        Function(bars={1: (16, False)}).add_bar(bar, size, wide=wide)


def test_a_wide_bar_takes_two():
    with pytest.raises(ValueError, match="BAR 1"):
        Function(bars={0: (16, True)}).add_bar(1, 16)


def test_placed_bars_decode_when_the_guest_turns_memory_on():
    function = Function(bars={0: (0x1000, False), 2: (0x2000, True)})
    sizes: list[int] = []
    bases = iter([BASE + 0x4000, BASE + 0x8000])

    def allocate(size: int) -> int:
        sizes.append(size)
        return next(bases)

    function.place_bars(allocate)
    guest = Guest(function)
    assert sizes == [0x1000, 0x2000]
    assert guest.config(1, BAR0 + 8, 4) == BASE + 0x8000 | 4
    assert guest.read(BASE + 0x4000) == ONES[4]
    assert function.told == []
    guest.config(1, COMMAND, 2, MEMORY)
    assert function.told == [(0, BASE + 0x4000), (2, BASE + 0x8000)]
    assert guest.read(BASE + 0x4010) == 0x10
    assert guest.read(BASE + 0x9FFC) == 0x0200_1FFC
    guest.window.write(0x8008, 2, 7)
    assert function.writes == [(2, 8, 2, 7)]
    guest.config(1, COMMAND, 1, 0)
    assert function.told[2:] == [(0, None), (2, None)]
    assert guest.read(BASE + 0x4010) == ONES[4]


def test_a_bar_moves():
    function = Function()
    guest = Guest(function)
    guest.config(1, COMMAND, 2, MEMORY)
    assert function.told == [], "base 0 is not in the bus's memory"
    guest.config(1, BAR0, 4, BASE + 0x1000)
    guest.config(1, BAR0, 4, BASE + 0x1000)
    guest.config(1, BAR0, 4, BASE + 0x3000)
    guest.config(1, BAR0, 4, 0xFFFF_FFFF)
    assert function.told == [(0, BASE + 0x1000), (0, None), (0, BASE + 0x3000), (0, None)]


@pytest.mark.parametrize("base", [BASE - 0x1000, BASE + SIZE, BASE + 1 << 32])
def test_a_bar_outside_the_window_does_not_decode(base):
    function = Function(bars={0: (0x1000, True)})
    guest = Guest(function)
    guest.config(1, BAR0, 4, base & 0xFFFF_FFFF)
    guest.config(1, BAR0 + 4, 4, base >> 32)
    guest.config(1, COMMAND, 2, MEMORY)
    assert function.told == []
    assert guest.read(BASE) == ONES[4]


def test_accesses_across_the_end_are_open_bus():
    function = Function(bars={0: (16, False)})
    guest = Guest(function)
    guest.config(1, BAR0, 4, BASE)
    guest.config(1, COMMAND, 2, MEMORY)
    assert guest.read(BASE + 12) == 12
    assert guest.read(BASE + 14) == ONES[4]
    assert guest.read(BASE + 16) == ONES[4]
    guest.window.write(14, 4, 0)
    guest.window.write(16, 4, 0)
    assert function.writes == []


def test_the_lowest_function_wins():
    """One BAR in the middle of another: the lower function's answers, and a shared BAR gets no short cuts."""
    big, small = Function(1, bars={0: (0x4000, False)}), Function(2)
    guest = Guest(small, big)  # small is device 1, big device 2
    for device, base in ((2, BASE), (1, BASE + 0x1000)):
        guest.config(device, BAR0, 4, base)
        guest.config(device, COMMAND, 2, MEMORY)
    assert [guest.read(BASE + offset) >> 28 for offset in (0xFFC, 0x1000, 0x1FFC, 0x2000)] == [1, 2, 2, 1]
    assert big.told == [(0, BASE), (0, None)]
    assert small.told == [(0, BASE + 0x1000)]
    guest.config(1, COMMAND, 2, 0)
    assert guest.read(BASE + 0x1000) == 1 << 28 | 0x1000
    assert big.told[2:] == [(0, BASE)]


def test_in_one_function_the_lowest_bar_wins():
    function = Function(bars={1: (0x1000, False), 3: (0x1000, False)})
    guest = Guest(function)
    for bar in (3, 1):
        guest.config(1, BAR0 + 4 * bar, 4, BASE)
    guest.config(1, COMMAND, 2, MEMORY)
    assert guest.read(BASE) == 1 << 24
    assert function.told == [(1, BASE)]


@given(
    steps=st.lists(
        st.tuples(
            st.integers(1, 3),
            st.sampled_from([COMMAND, BAR0, BAR0 + 4]),
            st.sampled_from([0, MEMORY, BASE, BASE + 0x1000, BASE + 0x2000, BASE + SIZE, 0xFFFF_FFFF]),
        ),
        max_size=30,
    )
)
def test_what_is_told_is_what_decodes(steps):
    """Any order of writes: on_decode's last word for each BAR is where it answers, at its first and last byte."""
    functions = [Function(mark, {0: (0x2000, False), 1: (0x1000, False)}) for mark in (1, 2, 3)]
    guest = Guest(*functions)
    for device, register, value in steps:
        guest.config(device, register, 4, value)
    for mark, function in enumerate(functions, 1):
        assert all(one != other for one, other in zip(function.told, function.told[1:], strict=False))
        for bar, base in dict(function.told).items():
            if base is not None:
                size = 0x2000 if bar == 0 else 0x1000
                assert guest.read(base) == mark << 28 | bar << 24
                assert guest.read(base + size - 4) == mark << 28 | bar << 24 | size - 4


# --- capabilities --------------------------------------------------------------------------------------------------


def test_capability_list():
    """6.7: status bit 4, a pointer at 0x34, dword-aligned links, 0 ends the list."""
    function = Function()
    guest = Guest(function)
    assert guest.config(1, STATUS, 2) == 0
    first = function.add_capability(0x09, b"\x05\x11\x22", writable=b"\0\xf0")
    second = function.add_capability(0x11, bytes(4))
    assert guest.config(1, STATUS, 2) == 1 << 4
    assert guest.config(1, 0x34, 1) == first == 0x40
    assert guest.config(1, first, 2) == second << 8 | 0x09
    assert second % 4 == 0
    assert guest.config(1, second, 2) == 0x11
    guest.config(1, first, 4, 0xFFFF_FFFF)
    assert guest.config(1, first, 4) == 0xF105_0009 | second << 8


def test_capabilities_end_with_the_space():
    function = Function()
    function.add_capability(0x09, bytes(0xBE))
    with pytest.raises(ValueError, match="room"):
        function.add_capability(0x09, b"")


@given(
    writes=st.lists(
        st.tuples(st.integers(0, 0xFF), st.sampled_from([1, 2, 4]), st.integers(0, 0xFFFF_FFFF)), max_size=20
    )
)
def test_only_writable_bits_change(writes):
    """Whatever is written, wherever, in whatever width: nothing raises, and read-only bits stay."""
    function = Function(bars={0: (0x100, False), 1: (0x1000, True)})
    function.add_capability(0x09, bytes(6), writable=b"\0\0\xff")
    bus = PciBus(range(BASE, BASE + SIZE))
    bus.add(4, 2, function)
    writable = bytearray(256)
    writable[0x04:0x06] = b"\x06\x04"
    writable[0x10:0x1C] = b"\0\xff\xff\xff" + b"\0\xf0\xff\xff" + b"\xff" * 4
    writable[0x3C] = 0xFF
    writable[0x44] = 0xFF
    before = [function.config_read(register, 1) for register in range(256)]
    for register, size, value in writes:
        function.config_write(register, size, value & ONES[size])
        function.config_read(register, size)
    after = [function.config_read(register, 1) for register in range(256)]
    assert [was & ~mask for was, mask in zip(before, writable, strict=True)] == [
        now & ~mask for now, mask in zip(after, writable, strict=True)
    ]
