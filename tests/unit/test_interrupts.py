"""Interrupts that are eventfds: where KVM is told to take them."""

import os
import threading

import pytest

from hypervisor.eventloop import EventLoop
from hypervisor.interrupts import Interrupts, NoSignal

LINE = 17


class Vm:
    """What KVM would be told, and what would be delivered."""

    def __init__(self):
        self.connected = {}  # eventfd: GSI
        self.resample = {}
        self.routes = {}
        self.calls = 0
        self.delivered = []

    def connect_irqfd(self, fd, gsi, resample_fd=None):
        assert fd not in self.connected  # EBUSY
        self.calls += 1
        self.connected[fd] = gsi
        self.resample[fd] = resample_fd
        self.look()

    def disconnect_irqfd(self, fd, gsi):
        assert self.connected.pop(fd) == gsi
        self.calls += 1

    def set_routes(self, messages):
        self.calls += 1
        self.routes = dict(messages)

    def look(self):
        """Take what has been written to connected eventfds, as KVM does."""
        for fd, gsi in self.connected.items():
            try:
                os.eventfd_read(fd)
            except BlockingIOError:
                continue
            self.delivered.append(self.routes.get(gsi, gsi))


@pytest.fixture
def vm():
    return Vm()


@pytest.fixture
def loop():
    loop = EventLoop(on_fault=pytest.fail)
    loop.start()
    yield loop
    loop.close()


@pytest.fixture
def interrupts(vm, loop):
    interrupts = Interrupts(vm, loop)
    yield interrupts
    interrupts.close()


def test_an_edge_is_connected_at_once(vm, interrupts):
    signal = interrupts.edge(5)
    signal.fire()
    vm.look()
    assert vm.delivered == [5]
    assert vm.resample[signal.fileno()] is None


def test_a_message_is_routed_and_held_and_routed_elsewhere(vm, interrupts):
    signal = interrupts.routed(LINE, interrupts.pin())
    assert vm.connected == {}
    signal.fire()
    assert signal.is_pending
    signal.to_message(0xFEE00000, 0x31)
    assert vm.delivered == [(0xFEE00000, 0x31)]  # what was held back
    assert not signal.is_pending
    signal.hold()
    signal.fire()
    signal.fire()
    vm.look()
    assert len(vm.delivered) == 1
    assert signal.is_pending
    signal.to_message(0xFEE01000, 0x32)
    assert vm.delivered[1:] == [(0xFEE01000, 0x32)]


def test_the_same_message_again_costs_no_ioctl(vm, interrupts):
    signal = interrupts.routed(LINE, interrupts.pin())
    signal.to_message(0xFEE00000, 0x31)
    calls = vm.calls
    signal.to_message(0xFEE00000, 0x31)
    assert vm.calls == calls


def test_signals_have_messages_of_their_own(vm, interrupts):
    pin = interrupts.pin()
    first, second = interrupts.routed(LINE, pin), interrupts.routed(LINE, pin)
    first.to_message(0xFEE00000, 1)
    second.to_message(0xFEE00000, 2)
    second.fire()
    vm.look()
    assert vm.delivered == [(0xFEE00000, 2)]
    assert min(vm.routes) >= 24  # the IOAPIC's pins are below


def test_from_message_to_line_and_back(vm, interrupts):
    pin = interrupts.pin()
    signal = interrupts.routed(LINE, pin)
    signal.to_message(0xFEE00000, 1)
    signal.to_line()
    assert vm.connected == {signal.fileno(): LINE}
    assert vm.resample[signal.fileno()] == pin.resample_fd
    signal.to_line()
    signal.to_message(0xFEE00000, 1)
    assert vm.connected == {signal.fileno(): 24}


def test_a_level_whose_cause_remains_is_raised_again(vm, interrupts, loop):
    """KVM lowers the line at the guest's end of interrupt and writes to the resample eventfd."""
    pin = interrupts.pin()
    raised, asserted, seen = [], [True], threading.Event()
    pin.is_asserted = lambda: asserted[0]
    pin.raise_again = lambda: (raised.append(1), seen.set())
    os.eventfd_write(pin.resample_fd, 1)
    assert seen.wait(60)
    asserted[0] = False
    os.eventfd_write(pin.resample_fd, 1)
    done = threading.Event()
    loop.call_soon(lambda: loop.call_soon(done.set))
    assert done.wait(60)
    assert raised == [1]


def test_firing_never_blocks(interrupts):
    signal = interrupts.routed(LINE, interrupts.pin())
    os.eventfd_write(signal.fileno(), 2**64 - 2)
    signal.fire()
    assert signal.is_pending


def test_closing_gives_every_descriptor_back(vm, loop):
    before = set(os.listdir("/proc/self/fd"))
    interrupts = Interrupts(vm, loop)
    pin = interrupts.pin()
    interrupts.edge(5)
    interrupts.routed(LINE, pin)
    loop.close()
    interrupts.close()
    assert set(os.listdir("/proc/self/fd")) <= before


def test_no_signal_leads_nowhere():
    signal = NoSignal()
    signal.to_message(1, 2)
    signal.to_line()
    signal.fire()
    signal.hold()
    assert (signal.fileno(), signal.is_pending) == (-1, False)


@pytest.mark.parametrize("address", [0, 0xFED00000, 0x1_FEE00000, 0xFFFFFFFF_FEE00000])
def test_a_message_to_no_lapic_is_held(vm, interrupts, address):
    signal = interrupts.routed(LINE, interrupts.pin())
    signal.to_message(0xFEE00000, 1)
    signal.to_message(address, 2)
    assert vm.connected == {}
    assert vm.routes == {24: (0xFEE00000, 1)}
    signal.fire()
    signal.to_message(0xFEE00000, 3)
    assert vm.delivered == [(0xFEE00000, 3)]


# --- snapshots --------------------------------------------------------------------------------------------------------


class Late(Vm):
    """KVM delivers only when it is told to let go: a worker that is as late as it may be."""

    def __init__(self):
        super().__init__()
        self.let_go = []

    def look(self):
        pass

    def disconnect_irqfd(self, fd, gsi):
        super().look()
        super().disconnect_irqfd(fd, gsi)
        self.let_go.append(gsi)


def test_what_was_fired_is_delivered_when_all_is_settled(loop):
    vm = Late()
    interrupts = Interrupts(vm, loop)
    pin = interrupts.pin()
    message, line, edge, quiet, held = (
        interrupts.routed(LINE, pin), interrupts.routed(LINE, pin), interrupts.edge(5), interrupts.edge(6),
        interrupts.routed(LINE, pin),
    )  # fmt: skip
    message.to_message(0xFEE00000, 1)
    line.to_line()
    for signal in (message, line, edge, held):
        signal.fire()
    connected = dict(vm.connected)
    interrupts.settle()
    assert sorted(vm.delivered, key=str) == [(0xFEE00000, 1), 17, 5]
    assert vm.connected == connected
    assert vm.resample[line.fileno()] == pin.resample_fd
    assert vm.resample[message.fileno()] is None
    assert held.is_pending
    assert not quiet.was_fired
    assert vm.let_go == [24, LINE, 5], "what was not fired costs nothing"
    interrupts.settle()
    assert len(vm.let_go) == 3
    interrupts.close()


def test_a_data_path_has_fired(loop):
    vm = Late()
    interrupts = Interrupts(vm, loop)
    signal = interrupts.edge(5)
    os.eventfd_write(signal.fileno(), 1)
    signal.was_fired = True
    interrupts.settle()
    assert vm.delivered == [5]
    interrupts.close()


def test_an_end_of_interrupt_that_nobody_has_seen_is_seen_to(loop, vm):
    """Settled in the loop's thread, before the loop comes to it."""
    interrupts = Interrupts(vm, loop)
    pin = interrupts.pin()
    signal = interrupts.routed(LINE, pin)
    pin.is_asserted, pin.raise_again = (lambda: True), signal.fire
    signal.to_line()
    done = threading.Event()

    def settle():
        os.eventfd_write(pin.resample_fd, 1)
        interrupts.settle()
        done.set()

    loop.call_soon(settle)
    assert done.wait(60)
    assert vm.delivered == [LINE]
    interrupts.close()


def test_forgetting(vm, interrupts):
    signal = interrupts.routed(LINE, interrupts.pin())
    signal.forget()
    signal.fire()
    signal.fire()
    signal.forget()
    assert not signal.is_pending
    signal.to_message(0xFEE00000, 1)
    assert vm.delivered == []
    signal.fire()
    signal.forget()  # it is on its way already
    vm.look()
    assert vm.delivered == [(0xFEE00000, 1)]


def test_messages_that_change_together_are_told_once(vm, interrupts):
    pin = interrupts.pin()
    signals = [interrupts.routed(LINE, pin) for _ in range(3)]
    with interrupts.collected():
        for number, signal in enumerate(signals):
            signal.to_message(0xFEE00000, number)
    assert vm.calls == 3 + 1
    assert vm.routes == {24 + number: (0xFEE00000, number) for number in range(3)}
    with interrupts.collected():
        for number, signal in enumerate(signals):
            signal.to_message(0xFEE00000, number)
    assert vm.calls == 3 + 1
    signals[1].to_message(0xFEE00000, 9)
    assert vm.routes[25] == (0xFEE00000, 9)


def test_a_signal_knows_whether_it_is_on_the_line(interrupts):
    signal = interrupts.routed(LINE, interrupts.pin())
    assert not signal.is_on_line
    signal.to_line()
    assert signal.is_on_line
    signal.to_message(0xFEE00000, 1)
    assert not signal.is_on_line
