"""The state of a PC: every device by name, those that nobody has touched, and what they have done to the machine."""

from __future__ import annotations

from copy import deepcopy

import pytest
from uart_port import DLAB, DR, ERBFI, IDLE, IER, LCR, MCR, OUT2, RBR

from hypervisor.bus import Bus
from hypervisor.console import Console
from hypervisor.eventloop import EventLoop
from hypervisor.kvm import ByteRing
from hypervisor.memory import GuestMemory
from hypervisor.pc import LazyDevice, NoIrq, Pc

COM1, I8042_DATA, I8042_COMMAND, RTC, PM1, FW_CFG, PCI = 0x3F8, 0x60, 0x64, 0x70, 0x600, 0x510, 0xCF8
ECAM = 0xF000_0000
NAMES = {"uart0", "i8042", "rtc", "acpi-pm", "fw_cfg", "pci", "console", "debug-console"}


class Line:
    """An interrupt input, and KVM behind it."""

    def __init__(self) -> None:
        self.cached: bool | None = False
        self.driven = False

    def forget(self):
        self.cached = None

    def set(self, level):
        if level is not self.cached:
            self.cached = self.driven = level


class Board:
    """A PC, with the tables of a VM that has no KVM."""

    def __init__(self) -> None:
        self.published: dict[int, int] = {}
        self.diverted: dict[int, int] = {}
        self.lines: dict[int, Line] = {}
        self.ended = []
        self.ports, self.memory_bus = Bus("port", 1 << 16), Bus("memory", 1 << 52)
        self.loop = EventLoop(self.ended.append)
        self.rings = [ByteRing(), ByteRing()]
        self.memory = GuestMemory(4 << 20)
        self.console, self.debug_console = (Console(ring, self.loop) for ring in self.rings)
        self.pc = Pc(
            vm=self,
            ports=self.ports,
            memory_bus=self.memory_bus,
            loop=self.loop,
            irq=lambda gsi: self.lines.setdefault(gsi, Line()),
            console=self.console,
            console_ring=self.rings[0],
            debug_console=self.debug_console,
            debug_ring=self.rings[1],
            cpus=1,
            memory=self.memory,
            on_exit=self.ended.append,
            on_reset=lambda: self.ended.append("reset"),
            on_power_off=lambda: self.ended.append("power off"),
            is_polled=lambda _port: False,
        )
        self.ports.freeze()
        self.memory_bus.freeze()

    def connect_ring(self, ring):
        return self.rings.index(ring)

    def publish_port(self, port, value):
        self.published.pop(port, None)
        if value is not None:
            self.published[port] = value

    def divert_port(self, port, ring):
        self.diverted.pop(port, None)
        if ring is not None:
            self.diverted[port] = ring

    def outb(self, port, value):
        self.ports.write(port, 1, value)

    def inb(self, port):
        return self.ports.read(port, 1)

    def touch_all(self):
        """Leave no device as it was made, and every line high that can be."""
        self.outb(COM1 + LCR, 0x03)
        self.outb(COM1 + MCR, OUT2)
        self.outb(COM1 + IER, ERBFI)
        self.console.write("ab")
        self.console.deliver()
        for port, value in ((I8042_COMMAND, 0x60), (I8042_DATA, 0x65), (I8042_COMMAND, 0xAA)):
            self.outb(port, value)
        self.outb(RTC, 0x0A)
        self.outb(RTC + 1, 0x60)  # a divider chain in reset: nothing changes while the test looks
        self.ports.write(PM1 + 2, 2, 0x101)  # the timer's event, so that an alarm is armed, and the button's
        self.pc.press_power_button()
        self.ports.write(FW_CFG, 2, 0x05)
        self.ports.write(PCI, 4, 0x8000_0000)
        assert self.memory_bus.read(ECAM, 4) == 0x0D57_8086

    def close(self):
        self.loop.close()
        for ring in self.rings:
            ring.close()
        self.memory.close()


@pytest.fixture
def boards():
    made = []

    def make():
        made.append(Board())
        return made[-1]

    yield make
    for board in made:
        board.close()


UNTOUCHED = dict.fromkeys(NAMES) | {
    "console": {"input": b"", "settled": False},
    "debug-console": {"input": b"", "settled": False},
}


def test_what_nobody_has_touched_has_no_state(boards):
    assert boards().pc.state() == UNTOUCHED


def test_every_device_goes_into_another_pc(boards):
    saved, loaded = boards(), boards()
    saved.touch_all()
    states = saved.pc.state()
    assert set(states) == NAMES
    assert None not in states.values()
    kept = deepcopy(states)
    loaded.pc.load(states)
    again = loaded.pc.state()
    for moving in (states["acpi-pm"], again["acpi-pm"]):
        del moving["PM_TMR_ns"]
    assert again == states
    assert kept["uart0"] == states["uart0"]
    assert (loaded.published, loaded.diverted) == (saved.published, saved.diverted)
    assert {gsi: line.driven for gsi, line in loaded.lines.items()} == {4: True, 1: True, 8: False, 9: True}
    assert [loaded.inb(COM1 + RBR) for _ in range(3)] == [ord("a"), ord("b"), 0]
    assert loaded.inb(I8042_DATA) == 0x55
    assert loaded.ports.read(PCI + 4, 4) == 0x0D57_8086
    assert not any(loaded.lines[gsi].driven for gsi in (1, 4))


def test_a_device_that_was_not_touched_then_is_not_touched_now(boards):
    """In place: the next access makes it anew, and until then nothing of it is left."""
    board = boards()
    before = board.pc.state()
    shortcuts = dict(board.published), dict(board.diverted)
    board.touch_all()
    board.outb(COM1 + 7, 0x5A)
    assert any(alarm.deadline_ns is not None for alarm in board.loop._alarms)
    assert (board.published, board.diverted) != shortcuts
    board.pc.load(before)
    assert (board.published, board.diverted) == shortcuts
    assert not any(line.driven for line in board.lines.values())
    assert all(alarm.deadline_ns is None for alarm in board.loop._alarms)
    assert board.pc.state() == UNTOUCHED
    assert board.inb(COM1 + 7) == 0
    assert board.inb(COM1 + 5) == IDLE
    assert board.inb(I8042_COMMAND) == 0x14  # through the second port: not the controller of before
    assert board.ports.read(PCI, 4) == 0
    board.touch_all()
    assert None not in board.pc.state().values()
    assert len(board.loop._alarms) == len(boards().loop._alarms), "a device made again has the alarm of before"


def test_a_made_device_is_called_by_its_claim_again(boards):
    """The claim calls the device itself; after a reset in place, whoever makes one; then that one."""
    board = boards()
    claim = board.ports.find(COM1)
    lazy = claim.read.__self__
    board.inb(COM1)
    first = claim.read.__self__
    assert first is not lazy
    board.pc.load(UNTOUCHED)
    assert claim.read.__self__ is lazy
    assert claim.write.__self__ is lazy
    board.inb(COM1)
    assert claim.read.__self__ not in {lazy, first}


def test_a_load_makes_what_was_made_then(boards):
    saved, loaded = boards(), boards()
    saved.outb(COM1 + LCR, DLAB)
    loaded.pc.load(saved.pc.state())
    assert saved.published == loaded.published
    assert COM1 + 5 in loaded.published
    assert COM1 not in loaded.diverted
    assert isinstance(loaded.ports.find(COM1).read.__self__, type(saved.ports.find(COM1).read.__self__))


def test_a_line_is_driven_though_it_is_said_to_be_there_already(boards):
    """What KVM was told and what it holds may differ by then."""
    board = boards()
    board.touch_all()
    states = board.pc.state()
    for line in board.lines.values():
        line.driven = not line.driven
    board.pc.load(states)
    assert {gsi: line.driven for gsi, line in board.lines.items()} == {4: True, 1: True, 8: False, 9: True}
    board.pc.load(UNTOUCHED)
    for line in board.lines.values():
        line.driven = True
    board.pc.load(UNTOUCHED)
    assert not any(line.driven for line in board.lines.values())


def test_an_alarm_that_was_on_its_way_makes_no_device(boards):
    board = boards()
    board.outb(RTC, 0)
    alarms = [alarm.callback for alarm in board.loop._alarms]
    board.pc.load(UNTOUCHED)
    for callback in alarms:
        callback()
    assert board.pc.state() == UNTOUCHED


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_name_that_is_missing_or_unknown(boards, name):
    board = boards()
    states = board.pc.state()
    with pytest.raises(ValueError, match=name):
        board.pc.load({key: value for key, value in states.items() if key != name})
    with pytest.raises(ValueError, match="floppy"):
        board.pc.load(states | {"floppy": None})


@pytest.mark.parametrize("name", ["uart0", "i8042", "rtc", "acpi-pm", "fw_cfg", "pci"])
def test_what_is_refused_makes_nothing(boards, name):
    board = boards()
    with pytest.raises((KeyError, TypeError, ValueError)):
        board.pc.load(UNTOUCHED | {name: {"no": "state"}})
    assert board.pc.state() == UNTOUCHED


@pytest.mark.parametrize("name", ["console", "debug-console"])
def test_a_console_that_is_none(boards, name):
    with pytest.raises((KeyError, TypeError, ValueError)):
        boards().pc.load(UNTOUCHED | {name: None})


def test_claims_are_locked_while_their_devices_are_read_and_set(boards):
    board = boards()
    board.touch_all()
    seen = set()
    for name, part in board.pc._parts.items():

        def watch(name=name, part=part, device=part.lazy.device):
            state, load = device.state, device.load

            def locked(function, *arguments):
                seen.add((name, function.__name__, part.claim.lock.locked()))
                return function(*arguments)

            device.state = lambda: locked(state)
            device.load = lambda loaded: locked(load, loaded)

        watch()
    board.pc.load(board.pc.state())
    devices = NAMES - {"console", "debug-console"}
    assert seen == {(name, what, True) for name in devices for what in ("state", "load")}


def test_input_on_both_sides_of_the_fifo(boards):
    """What the UART has taken is its state, what it has not is the console's."""
    saved, loaded = boards(), boards()
    saved.outb(COM1 + IER, ERBFI)
    saved.console.write("abc")
    saved.console.deliver()
    loaded.console.write("of another guest")
    loaded.pc.load(saved.pc.state())
    got = b""
    while loaded.inb(COM1 + 5) & DR:
        got += bytes([loaded.inb(COM1 + RBR)])
    assert got == b"abc"


def test_a_view_without_a_line(boards):
    NoIrq().forget()
    lazy = LazyDevice(boards, boards)
    lazy.unmake()
    assert not lazy.is_made
    assert lazy.state() is None


def test_registers_have_their_names_whether_their_devices_are_made_or_not(boards):
    """An exit is counted before its device is made, and what was counted stays when a reset takes the device away."""
    board = boards()
    ports = [*range(COM1, COM1 + 8)]
    ports += [I8042_DATA, I8042_COMMAND, RTC, RTC + 1, *range(PM1, PM1 + 12), FW_CFG, PCI, PCI + 4]
    places = [(board.ports, port) for port in ports] + [(board.memory_bus, ECAM), (board.memory_bus, ECAM + (1 << 15))]

    def named():
        return [bus.name_of(address, write=write) for bus, address in places for write in (False, True)]

    untouched = board.pc.state()
    first = named()
    assert board.pc.state() == untouched
    assert board.published == {0xE9: 0xE9}, "the debug console alone"
    for bus, address in places:
        bus.read(address, 1)
    assert None not in board.pc.state().values()
    assert named() == first
    board.pc.load(untouched)
    assert named() == first
    assert ("uart0", "THR") in first
    assert ("host-bridge", "config.VENDOR_ID") in first
    assert {name for name in first if name[1].startswith("+")} == {("acpi-pm", "+0x6"), ("acpi-pm", "+0x7")}
