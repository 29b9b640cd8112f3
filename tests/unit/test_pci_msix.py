"""MSI-X as system software programs it (PCI Local Bus 3.0, 6.8.2)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.pci import PciFunction
from devices.pci_msix import Msix

COMMAND, INTX_DISABLE = 0x04, 1 << 10
MASK, ENABLE = 1 << 14, 1 << 15
NO_VECTOR = 0xFFFF
TABLE, PENDING = 0x4000, 0x5000
ALL = {4: 0xFFFF_FFFF, 8: 0xFFFF_FFFF_FFFF_FFFF}


class FakeSignal:
    """A RoutedSignal: where it goes, every change of that, and what got through."""

    def __init__(self) -> None:
        self.calls: list[object] = ["hold"]
        self.sent: list[object] = []
        self.is_pending = False

    @property
    def target(self) -> object:
        return self.calls[-1]

    def fire(self) -> None:
        if self.target == "hold":
            self.is_pending = True
        else:
            self.sent.append(self.target)

    def fileno(self) -> int:
        return -1

    def _go(self, target: object) -> None:
        self.calls.append(target)
        if self.is_pending and target != "hold":
            self.is_pending = False
            self.sent.append(target)

    def to_message(self, address: int, data: int) -> None:
        self._go((address, data))

    def to_line(self) -> None:
        self._go("line")

    def hold(self) -> None:
        self._go("hold")


class Setup:
    """A function with MSI-X, and the driver's words."""

    def __init__(self, signals: int = 3, vectors: int = 4) -> None:
        self.function = PciFunction(vendor=1, device=2, class_code=0, has_pin=True)
        self.signals = [FakeSignal() for _ in range(signals)]
        self.msix = Msix(self.function, self.signals, vectors=vectors, bar=0, table=TABLE, pending=PENDING)
        self.capability = self.function.config_read(0x34, 1)

    def control(self, value: int) -> None:
        self.function.config_write(self.capability + 2, 2, value)
        self.msix.update()

    def command(self, value: int) -> None:
        self.function.config_write(COMMAND, 2, value)
        self.msix.update()

    def entry(self, vector: int, address: int, data: int, control: int = 0) -> None:
        for at, value in ((12, 1), (0, address & ALL[4]), (4, address >> 32), (8, data), (12, control)):
            self.msix.write_table(16 * vector + at, 4, value)


@pytest.fixture
def setup() -> Setup:
    return Setup()


def test_capability(setup):
    """6.8.2.3 to 6.8.2.5: id 0x11, the table's size less one, BIR and offsets; only enable and mask can be written."""
    function, at = setup.function, setup.capability
    assert function.config_read(at, 1) == 0x11
    assert function.config_read(at + 2, 2) == 3
    assert function.config_read(at + 4, 4) == TABLE
    assert function.config_read(at + 8, 4) == PENDING
    for where in range(0, 12, 4):
        function.config_write(at + where, 4, 0xFFFF_FFFF)
    assert function.config_read(at + 2, 2) == 3 | MASK | ENABLE
    assert function.config_read(at + 4, 4) == TABLE
    assert function.config_read(at + 8, 4) == PENDING


@pytest.mark.parametrize(("vectors", "table", "pending"), [(0, 0, 0), (0x801, 0, 0), (1, 4, 0), (1, 0, 4)])
def test_impossible_shapes(vectors, table, pending):
    function = PciFunction(vendor=1, device=2, class_code=0)
    with pytest.raises(ValueError, match="MSI-X"):
        Msix(function, [], vectors=vectors, bar=0, table=table, pending=pending)


def test_entries_are_masked_after_reset(setup):
    """6.8.2.9: the mask bit is 1 after reset, and the only bit there."""
    for vector in range(4):
        assert [setup.msix.read_table(16 * vector + at, 4) for at in (0, 4, 8, 12)] == [0, 0, 0, 1]
    setup.msix.write_table(12, 4, 0xFFFF_FFFE)
    assert setup.msix.read_table(12, 4) == 0


def test_a_mapped_vector_sends_its_message(setup):
    setup.control(ENABLE)
    setup.entry(2, 0xFEE0_1000, 0x4041)
    setup.msix.map(1, 2)
    signal = setup.signals[1]
    signal.fire()
    assert signal.sent == [(0xFEE0_1000, 0x4041)]
    assert [other.calls for other in (setup.signals[0], setup.signals[2])] == [["hold"]] * 2


def test_upper_address(setup):
    setup.control(ENABLE)
    setup.msix.map(0, 0)
    setup.msix.write_table(0, 8, 0x1_FEE0_2003)
    setup.msix.write_table(8, 8, 0x31)
    assert setup.signals[0].target == (0x1_FEE0_2000, 0x31), "bits 1 and 0 of the address are 0"
    assert setup.msix.read_table(0, 8) == 0x1_FEE0_2000


def test_several_signals_share_a_vector(setup):
    setup.control(ENABLE)
    setup.entry(0, 0xFEE0_0000, 7)
    for signal in range(3):
        setup.msix.map(signal, 0)
    assert [signal.target for signal in setup.signals] == [(0xFEE0_0000, 7)] * 3


def test_masks_hold_and_show_what_is_pending(setup):
    """6.8.2.8, 6.8.2.10: masked, a message is pending; unmasked, it is sent and the bit clears."""
    setup.control(ENABLE)
    setup.entry(3, 0xFEE0_0000, 9)
    setup.msix.map(0, 3)
    setup.msix.write_table(16 * 3 + 12, 4, 1)
    setup.signals[0].fire()
    assert setup.signals[0].sent == []
    assert setup.msix.read_pending(0, 4) == 1 << 3
    setup.msix.write_table(16 * 3 + 12, 4, 0)
    assert setup.signals[0].sent == [(0xFEE0_0000, 9)]
    assert setup.msix.read_pending(0, 8) == 0
    setup.control(ENABLE | MASK)
    setup.signals[0].fire()
    assert setup.msix.read_pending(0, 8) == 1 << 3
    setup.control(ENABLE)
    assert setup.signals[0].sent == [(0xFEE0_0000, 9)] * 2


def test_pending_bits_of_a_long_table():
    """6.8.2.10: bit n of the array is vector n, whichever width and place reads it."""
    setup = Setup(signals=1, vectors=100)
    setup.control(ENABLE)
    setup.msix.map(0, 70)
    setup.signals[0].fire()
    assert [setup.msix.read_pending(offset, 4) for offset in (0, 4, 8, 12)] == [0, 0, 1 << 6, 0]
    assert [setup.msix.read_pending(offset, 8) for offset in (0, 8, 16)] == [0, 1 << 6, 0]


def test_unmapped_is_silent_and_not_pending(setup):
    setup.control(ENABLE)
    setup.entry(0, 0xFEE0_0000, 1)
    setup.msix.map(0, 0)
    setup.msix.map(0, NO_VECTOR)
    setup.signals[0].fire()
    assert setup.signals[0].sent == []
    assert setup.msix.read_pending(0, 8) == 0
    assert setup.msix.vector(0) == NO_VECTOR


@pytest.mark.parametrize("vector", [4, 0x7FF, 0xFFFE])
def test_vectors_beyond_the_table_are_none(setup, vector):
    setup.msix.map(0, 1)
    setup.msix.map(0, vector)
    assert setup.msix.vector(0) == NO_VECTOR


def test_the_pin_when_msix_is_off(setup):
    assert [signal.calls for signal in setup.signals] == [["hold"]] * 3
    setup.msix.start()
    assert [signal.target for signal in setup.signals] == ["line"] * 3
    setup.command(INTX_DISABLE)
    assert [signal.target for signal in setup.signals] == ["hold"] * 3
    setup.signals[0].fire()
    setup.command(0)
    assert setup.signals[0].sent == ["line"]
    setup.control(ENABLE)
    assert [signal.target for signal in setup.signals] == ["hold"] * 3
    setup.control(0)
    assert [signal.target for signal in setup.signals] == ["line"] * 3


def test_reset_unmaps(setup):
    setup.control(ENABLE)
    setup.entry(0, 0xFEE0_0000, 1)
    setup.msix.map(0, 0)
    setup.msix.start()
    setup.msix.reset()
    assert [setup.msix.vector(signal) for signal in range(3)] == [NO_VECTOR] * 3
    assert setup.signals[0].target == "hold"
    assert setup.msix.read_table(12, 4) == 0, "the table is the bus's, not the driver's"


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (0, 2), (2, 2), (2, 4), (4, 8), (12, 8), (1, 4)])
def test_other_accesses_do_nothing(setup, offset, size):
    """6.8.2: aligned dwords and qwords only."""
    before = [setup.msix.read_table(at, 4) for at in range(0, 64, 4)]
    setup.msix.write_table(offset, size, 0)
    assert [setup.msix.read_table(at, 4) for at in range(0, 64, 4)] == before
    ones = (1 << 8 * size) - 1
    assert setup.msix.read_table(offset, size) & ones == ones
    assert setup.msix.read_pending(offset, size) & ones == ones


def test_behind_the_table_there_is_nothing(setup):
    setup.msix.write_table(64, 8, 1)
    assert setup.msix.read_table(64, 8) == setup.msix.read_table(0xFFC, 4) == 0


STEP = st.one_of(
    st.tuples(st.just("control"), st.sampled_from([0, MASK, ENABLE, ENABLE | MASK])),
    st.tuples(st.just("command"), st.sampled_from([0, INTX_DISABLE])),
    st.tuples(st.just("map"), st.integers(0, 2), st.sampled_from([0, 1, 2, 3, 4, NO_VECTOR])),
    st.tuples(st.just("table"), st.integers(0, 19), st.sampled_from([4, 8]), st.sampled_from([0, 1, 0xFEE0_0000])),
    st.tuples(st.just("start")),
    st.tuples(st.just("reset")),
    st.tuples(st.just("fire"), st.integers(0, 2)),
)


@given(steps=st.lists(STEP, max_size=40))
def test_signals_go_where_the_registers_say(steps):
    """Any sequence: each signal's way follows from the registers as they read, and never is one set twice alike."""
    setup, live = Setup(), False
    for kind, *what in steps:
        if kind == "table":
            setup.msix.write_table(4 * what[0], what[1], what[2])
        elif kind == "fire":
            setup.signals[what[0]].fire()
        elif kind in ("control", "command"):
            getattr(setup, kind)(*what)
        else:
            live = {"start": True, "reset": False}.get(kind, live)
            getattr(setup.msix, kind)(*what)
        control = setup.function.config_read(setup.capability + 2, 2)
        pin_off = setup.function.config_read(COMMAND, 2) & INTX_DISABLE
        for number, signal in enumerate(setup.signals):
            vector = setup.msix.vector(number)
            if not control & ENABLE:
                expected = "line" if live and not pin_off else "hold"
            elif vector == NO_VECTOR or control & MASK or setup.msix.read_table(16 * vector + 12, 4):
                expected = "hold"
            else:
                expected = setup.msix.read_table(16 * vector, 8), setup.msix.read_table(16 * vector + 8, 4)
            assert signal.target == expected
            assert all(one != other for one, other in zip(signal.calls, signal.calls[1:], strict=False))
