"""PCI functions and their interrupts carried into others: every register reads as before, every signal goes there."""

from __future__ import annotations

from copy import deepcopy
from random import Random

import pytest
from test_virtio_pci import FakeSignal, Guest

from devices.pci import PciBus, PciFunction

MSIX_ENABLE, FUNCTION_MASK, INTX_DISABLE, MEMORY = 0x8000, 0x4000, 1 << 10, 1 << 1
COMMAND, BAR0, INTERRUPT_LINE = 0x04, 0x10, 0x3C
NO_VECTOR = 0xFFFF


class Signal(FakeSignal):
    """Counts what it is told, and can forget."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[object] = []

    def forget(self) -> None:
        if self.target == "hold":
            self.is_pending = False

    def _go(self, target: object) -> None:
        if target != self.target:
            self.told.append(target)
        super()._go(target)


def new_guest() -> Guest:
    guest = Guest()
    signals = [Signal() for _ in guest.signals]
    guest.signals[:] = signals
    guest.function._msix._signals = tuple(signals)
    guest.function._config_signal = guest.function.transport._config_signal = signals[-1]
    for queue, signal in zip(guest.device.queues, signals[:-1], strict=True):
        queue.signal = signal
    return guest


def act(guest: Guest, chance: Random) -> None:
    """Do one of the things that a guest does to the function."""
    table = guest.config(guest.msix + 4, 4)
    kind = chance.randrange(11)
    if kind == 0:
        guest.start()
    elif kind == 1:
        guest.map_vectors()
    elif kind == 2:
        guest.config(guest.msix + 2, 2, chance.choice([0, MSIX_ENABLE, MSIX_ENABLE | FUNCTION_MASK]))
    elif kind == 3:
        guest.config(COMMAND, 2, chance.choice([0, MEMORY, MEMORY | INTX_DISABLE, 4]))
    elif kind == 4:
        guest.bar(table + 16 * chance.randrange(len(guest.signals)) + 12, 4, chance.randrange(2))
    elif kind == 5:
        guest.bar(table + 4 * chance.randrange(4 * len(guest.signals)), 4, chance.getrandbits(32))
    elif kind == 6:
        guest.config(BAR0, 4, chance.choice([0xFFFF_FFFF, 0xE000_0000, 0xE010_0000]))
        guest.config(INTERRUPT_LINE, 1, chance.getrandbits(8))
    elif kind == 7:
        guest.through_window(chance.choice([0, 20, 24]), 4, 0)
    elif kind == 8:
        guest.function.transport.config_changed()
    else:
        guest.interrupt(chance.randrange(len(guest.device.queues)))


def registers(guest: Guest) -> object:
    """Read everything that a guest can read without changing it; pci_cfg_data reads the BAR."""
    function = guest.function
    table, pending = guest.config(guest.msix + 4, 4), guest.config(guest.msix + 8, 4)
    return (
        [function.peek(register, 4) for register in range(0, 256, 4)],
        function.config_read(COMMAND, 4),
        [guest.bar(table + 4 * index, 4) for index in range(4 * len(guest.signals))],
        guest.bar(pending, 8),
        [guest.function._msix.vector(index) for index in range(len(guest.signals))],
        [signal.target for signal in guest.signals],
        [signal.is_pending for signal in guest.signals],
        function.transport.peek_isr(),
        function.line_is_asserted,
    )


@pytest.mark.parametrize("seed", range(60))
def test_a_function_reads_and_interrupts_as_before(seed):
    chance = Random(seed)
    guest = new_guest()
    for _ in range(chance.randrange(1, 25)):
        act(guest, chance)
    state = guest.function.state()
    expected = registers(guest)
    busy = new_guest()
    for _ in range(seed % 20):
        act(busy, chance)
    for other in (new_guest(), busy):
        heard = [list(signal.sent) for signal in other.signals]
        other.function.load(deepcopy(state))
        assert registers(other) == expected
        assert other.function.state() == state
        assert [signal.sent for signal in other.signals] == heard, "nothing is sent by loading"
    for one in (guest, other):
        for signal in one.signals:
            signal.sent.clear()
        again = Random(seed)
        for _ in range(20):
            act(one, again)
    assert registers(other) == registers(guest)
    assert [signal.sent for signal in other.signals] == [signal.sent for signal in guest.signals]


def test_what_is_as_it_was_is_told_to_nobody():
    guest = new_guest()
    guest.start()
    guest.map_vectors()
    state = guest.function.state()
    for signal in guest.signals:
        signal.told.clear()
    guest.function.load(state)
    assert [signal.told for signal in guest.signals] == [[], [], [], []]


def test_what_was_held_since_is_forgotten_and_what_is_held_in_the_state_comes_later():
    guest = new_guest()
    guest.start()
    guest.map_vectors()
    before = guest.function.state()
    table = guest.config(guest.msix + 4, 4)
    guest.bar(table + 12, 4, 1)
    guest.interrupt(0)
    masked = guest.function.state()
    guest.function.load(before)
    assert guest.signals[0].sent == [], "what was fired after the snapshot never happened"
    guest.function.load(masked)
    assert guest.signals[0].is_pending
    guest.bar(table + 12, 4, 0)
    assert guest.signals[0].sent == [(0xFEE0_0000, 0x40)]


# --- the bus ----------------------------------------------------------------------------------------------------------


class Memory(PciFunction):
    def __init__(self) -> None:
        super().__init__(vendor=1, device=2, class_code=3)
        self.add_bar(0, 4096)
        self.told: list[tuple[int, int | None]] = []
        self.on_decode = lambda bar, base: self.told.append((bar, base))


def test_bars_decode_when_all_are_in_place():
    """Two functions change places: each is told once that it has ended and once where it begins."""
    window = range(0xE000_0000, 0xE001_0000)
    states = []
    for places in ((0xE000_0000, 0xE000_1000), (0xE000_1000, 0xE000_0000)):
        bus, functions = PciBus(window), [Memory(), Memory()]
        for number, (function, place) in enumerate(zip(functions, places, strict=True), 1):
            bus.add(number, 0, function)
            function.config_write(BAR0, 4, place)
            function.config_write(COMMAND, 2, MEMORY)
        states.append([function.state() for function in functions])
    for wanted, told in ((states[1], []), (states[0], [[(0, None), (0, 0xE000_0000)], [(0, None), (0, 0xE000_1000)]])):
        for function, state in zip(functions, wanted, strict=True):
            function.told.clear()
            function.load(state)
        bus.update()
        assert [function.told for function in functions if function.told] == told


# --- what is no state -------------------------------------------------------------------------------------------------


def started() -> Guest:
    guest = new_guest()
    guest.start()
    guest.map_vectors()
    return guest


@pytest.mark.parametrize("key", ["config_space", "msix", "transport"])
@pytest.mark.parametrize("value", [KeyError, None, b"", 1, {}, bytes(256), bytes(255)], ids=str)
def test_no_function_can_be_like_that(key, value):
    state = started().function.state()
    if value is KeyError:
        del state[key]
    else:
        state[key] = value
    with pytest.raises((KeyError, TypeError, ValueError)):
        new_guest().function.load(state)


@pytest.mark.parametrize(
    "change",
    [
        {"table": bytes(63)},
        {"table": bytes(65)},
        {"table": (bytes(12) + b"\2\0\0\0") * 4},
        {"table": (b"\1" + bytes(15)) * 4},
        {"table": bytes(63) + b"\1"},
        {"table": [0] * 16},
        {"table": bytearray(64)},
        {"vectors": [0, 1, 2]},
        {"vectors": [0, 1, 2, 4]},
        {"vectors": [0, 1, 2, -1]},
        {"pending": [0, 0, 0, 0]},
        {"pending": []},
        {"is_live": 1},
    ],
    ids=str,
)
def test_no_vector_table_can_be_like_that(change):
    guest = started()
    state = guest.function.state()
    before = deepcopy(state)
    state["msix"] |= change
    with pytest.raises((TypeError, ValueError)):
        guest.function.load(state)
    assert guest.function.state() == before


def test_each_part_of_the_table_is_needed():
    for key in ("table", "vectors", "is_live", "pending"):
        state = started().function.state()
        del state["msix"][key]
        with pytest.raises(KeyError):
            new_guest().function.load(state)


@pytest.mark.parametrize("path", [(), ("msix",), ("transport",), ("transport", "device")])
def test_what_nobody_knows_is_refused(path):
    state = started().function.state()
    holder = state
    for key in path:
        holder = holder[key]
    holder["surprise"] = 1
    with pytest.raises(ValueError, match=r"surprise"):
        new_guest().function.load(state)


def test_another_device_is_refused():
    state = started().function.state()
    other = Guest(kind=1)
    with pytest.raises(ValueError, match="another function"):
        other.function.load(state)
