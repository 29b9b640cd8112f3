"""The states of the small devices at ports: the keyboard controller, fw_cfg, and PCI's configuration ports."""

from __future__ import annotations

import pytest
from fakes import FakeIrq
from state_walks import check_mutations, check_refusals, check_walk

from devices.fw_cfg import FwCfg
from devices.i8042 import I8042
from devices.pci import PciBus, PciConfigPorts, PciFunction
from devices.ports import Stateful


class Bench:
    """A device and its interrupt line, if it has one."""

    def __init__(self, _now_ns: int = 0) -> None:
        self.irq = FakeIrq()
        self.events = []
        self.device = self.make()
        assert isinstance(self.device, Stateful)

    def make(self):
        raise NotImplementedError

    def do(self, operation):
        name, *arguments = operation
        return getattr(self.device, name)(*arguments)

    def seen(self):
        return self.irq.level, self.irq.history, self.events

    def forget(self):
        self.irq.history.clear()
        self.events.clear()

    def meet(self, other):
        """There is no time in it."""

    def spoil(self, chance):
        """Nothing outside follows from the state."""


# --- the keyboard controller ---------------------------------------------------------------------------------------

DATA, STATUS, COMMAND = 0, 4, 4
COMMANDS = (0x20, 0x60, 0xA7, 0xA8, 0xA9, 0xAA, 0xAB, 0xAD, 0xAE, 0xC0, 0xD0, 0xD1, 0xD2, 0xD3, 0xD4, 0xFE, 0xFF, 0x99)


class Keyboard(Bench):
    def make(self):
        return I8042(lambda: self.events.append("reset"), irq=self.irq)

    def spoil(self, chance):
        self.irq.level = chance.random() < 0.5


def keyboard_operation(chance):
    kind = chance.random()
    if kind < 0.4:
        return "read", chance.choice((DATA, STATUS, STATUS, 1)), chance.choice((1, 2))
    if kind < 0.75:
        return "write", COMMAND, 1, chance.choice(COMMANDS)
    return "write", DATA, 1, chance.choice((0x00, 0x01, 0x45, 0xED, 0xFE, 0xFF))


@pytest.mark.parametrize("seed", range(100))
def test_a_saved_keyboard_controller_goes_on_alike(seed):
    check_walk(Keyboard, keyboard_operation, seed)


def test_a_command_s_parameter_comes_after_the_load():
    saved, loaded = Keyboard(), Keyboard()
    saved.device.write(COMMAND, 1, 0x60)
    state = saved.device.state()
    assert state == {"status": 0x18, "data": 0, "command_byte": 0x74, "output_port": 0xCF, "pending": 0x60}
    loaded.device.load(state)
    loaded.device.write(DATA, 1, 0x65)
    loaded.device.write(COMMAND, 1, 0x20)
    assert loaded.device.read(DATA, 1) & 0xFF == 0x65


def test_a_waiting_byte_interrupts_after_the_load():
    saved, loaded = Keyboard(), Keyboard()
    for port, value in ((COMMAND, 0x60), (DATA, 0x65), (COMMAND, 0xAA)):
        saved.device.write(port, 1, value)
    loaded.device.load(saved.device.state())
    assert loaded.irq.level
    assert loaded.device.read(DATA, 1) & 0xFF == 0x55
    assert not loaded.irq.level


def test_what_is_no_state_of_a_keyboard_controller_is_refused():
    bench = Keyboard()
    bench.device.write(COMMAND, 1, 0xD4)
    byte = (-1, 256)
    wrong = {
        "status": (0x08, 0x12, 0x14, 0x30, 0x90, *byte),
        "data": byte,
        "command_byte": (0x54, *byte),
        "output_port": byte,
        "pending": (0x20, 0xAA, 0xFE, *byte),
    }
    assert bench.device.state()["pending"] == 0xD4
    check_refusals(bench, wrong, nothing=("pending",))


# --- fw_cfg --------------------------------------------------------------------------------------------------------


class Items(Bench):
    def make(self):
        return FwCfg(cpus=3, ram_bytes=1 << 28, files={"opt/a": b"abc", "opt/b": bytes(range(200))})


def items_operation(chance):
    if chance.random() < 0.8:
        return "read", chance.choice((0, 1, 1, 1, 1)), chance.choice((1, 1, 1, 2))
    return "write", 0, 2, chance.choice((0, 1, 3, 5, 0x19, 0x20, 0x21, 0x22, 0x4019, 0xFFFF))


@pytest.mark.parametrize("seed", range(50))
def test_saved_items_go_on_alike(seed):
    check_walk(Items, items_operation, seed)


def test_an_item_is_read_on_from_where_it_was():
    saved, loaded = Items(), Items()
    saved.device.write(0, 2, 0x4020)
    assert saved.device.read(1, 1) == ord("a")
    state = saved.device.state()
    assert state == {"selector": 0x20, "position": 1}
    loaded.device.load(state)
    assert [loaded.device.read(1, 1) for _ in range(3)] == [ord("b"), ord("c"), 0]


def test_what_is_no_state_of_items_is_refused():
    bench = Items()
    bench.device.write(0, 2, 0x20)
    check_refusals(bench, {"selector": (-1, 0x4020, 1 << 16), "position": (4, -1)})


# --- PCI's ports ---------------------------------------------------------------------------------------------------

ADDRESS, RESET, CONFIG_DATA = 0, 1, 4


class Ports(Bench):
    def make(self):
        bus = PciBus()
        bus.add(1, 0, PciFunction(vendor=0x1AF4, device=0x1041, class_code=0x020000))
        return PciConfigPorts(bus, on_reset=lambda: self.events.append("reset"))


def ports_operation(chance):
    kind = chance.random()
    if kind < 0.4:
        return "read", chance.choice((ADDRESS, RESET, CONFIG_DATA, CONFIG_DATA + 2)), chance.choice((1, 2, 4))
    if kind < 0.8:
        return "write", ADDRESS, 4, chance.choice((0, 1 << 31)) | chance.choice((0, 0x800, 0x83C, 0x1000, 0xFF_FFFF))
    return "write", RESET, 1, chance.choice((0, 2, 4, 6, 0xFF))


@pytest.mark.parametrize("seed", range(50))
def test_saved_configuration_ports_go_on_alike(seed):
    check_walk(Ports, ports_operation, seed)


def test_a_register_that_was_chosen_before_is_read_after_the_load():
    saved, loaded = Ports(), Ports()
    saved.device.write(ADDRESS, 4, 0x8000_0800)
    saved.device.write(RESET, 1, 0x02)
    state = saved.device.state()
    assert state == {"CONFIG_ADDRESS": 0x8000_0800, "RST_CNT": 0x02}
    loaded.device.load(state)
    assert loaded.device.read(CONFIG_DATA, 4) == 0x1041_1AF4
    loaded.device.write(RESET, 1, 0x06)
    assert loaded.events == ["reset"]


def test_what_is_no_state_of_configuration_ports_is_refused():
    bench = Ports()
    bench.device.write(ADDRESS, 4, 0x8000_0800)
    check_refusals(bench, {"CONFIG_ADDRESS": (1, 0x4000_0000, -1, 1 << 32), "RST_CNT": (1, 0x10, -1)})


# --- all of them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "operation"), [(Keyboard, keyboard_operation), (Items, items_operation), (Ports, ports_operation)]
)
def test_a_changed_state_is_refused_or_does_no_harm(make, operation):
    assert sum(check_mutations(make, operation, seed) for seed in range(40)) > 50
