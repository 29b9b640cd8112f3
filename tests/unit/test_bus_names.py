"""Who is at an address, and what the register there is called: for reports, after the fact."""

from __future__ import annotations

import pytest
from fakes import FakeIrq, FakeSink
from test_register_names import make_mmio, nothing
from test_virtio_pci import Guest as PciGuest

from devices.i8042 import I8042
from devices.pci import PciBus, PciEcam, PciFunction, PciMemoryWindow
from devices.ports import Nested
from devices.uart16550 import Uart16550
from hypervisor.bus import Bus
from hypervisor.pc import LazyDevice

WINDOW = 0xE000_0000
ECAM = 0xF000_0000
MEMORY = 1 << 1  # PCI command register


class Plain:
    """A user's device, without names."""

    inner = "an attribute of its own"

    def read(self, offset, size):
        return 0

    def write(self, offset, size, value):
        pass


class TwoBars(PciFunction):
    """A user's PCI function, without names."""

    def __init__(self):
        super().__init__(vendor=1, device=2, class_code=0xFF0000)
        self.add_bar(0, 0x1000)
        self.add_bar(2, 0x1000)


def names(bus, address):
    return bus.name_of(address, write=False), bus.name_of(address, write=True)


def test_claims_by_address_and_direction():
    bus = Bus("port", 1 << 16)
    bus.claim(0x3F8, 8, Uart16550(irq=FakeIrq(), sink=FakeSink()), "uart0")
    assert names(bus, 0x3F8) == (("uart0", "RBR"), ("uart0", "THR"))
    bus.freeze()
    assert names(bus, 0x3FA) == (("uart0", "IIR"), ("uart0", "FCR"))
    assert names(bus, 0x3F7) == names(bus, 0x400) == (None, None)


def test_a_device_without_names():
    bus = Bus("port", 1 << 16)
    bus.claim(0x5658, 0x20, Plain(), "dice")
    assert names(bus, 0x5677) == (("dice", "+0x1f"),) * 2


def test_a_virtio_device_on_mmio():
    bus, transport = Bus("memory", 1 << 52), make_mmio()
    assert transport.name == "virtio-d0"
    bus.claim(0xFEB0_0000, 0x200, transport, transport.name)
    assert names(bus, 0xFEB0_0052) == (("virtio-d0", "QueueNotify"),) * 2


class Config:
    """A user's function that is configuration space alone, without a name."""

    def config_read(self, register, size):
        return 0

    def config_write(self, register, size, value):
        pass


class Pci:
    """A bus with virtio and a function of the user's, at first without decoding."""

    def __init__(self):
        self.virtio = PciGuest()
        self.user = TwoBars()
        self.pci = PciBus(range(WINDOW, WINDOW + 0x10_0000))
        self.pci.add(1, 0, self.virtio.function)
        self.pci.add(2, 3, self.user)
        self.bus = Bus("memory", 1 << 52)
        window = PciMemoryWindow(self.pci)
        assert isinstance(window, Nested)
        self.bus.claim(WINDOW, 0x10_0000, window, "pci-memory")

    def place(self, function, register, base):
        function.config_write(register, 4, base)
        function.config_write(0x04, 2, MEMORY)


def test_what_a_bar_decodes_is_followed():
    pci = Pci()
    notify = pci.virtio.structures[2][1]
    at = WINDOW + 0x8000 + notify
    assert names(pci.bus, at) == (("pci-memory", f"+{0x8000 + notify:#x}"),) * 2
    pci.place(pci.virtio.function, 0x10, WINDOW + 0x8000)
    assert names(pci.bus, at) == (("virtio-fake0", "QueueNotify"),) * 2
    pci.place(pci.virtio.function, 0x10, WINDOW + 0x1_0000)
    assert names(pci.bus, at) == (("pci-memory", f"+{0x8000 + notify:#x}"),) * 2
    assert names(pci.bus, at + 0x8000) == (("virtio-fake0", "QueueNotify"),) * 2
    assert pci.bus.name_of(WINDOW + 0x1_0000 + 22, write=True) == ("virtio-fake0", "queue_select")
    pci.virtio.function.config_write(0x04, 2, 0)
    assert names(pci.bus, at + 0x8000) == (("pci-memory", f"+{0x1_0000 + notify:#x}"),) * 2


def test_a_function_without_names():
    """It is called by its place, and its registers by BAR and offset."""
    pci = Pci()
    pci.place(pci.user, 0x10, WINDOW + 0x2_0000)
    pci.place(pci.user, 0x18, WINDOW + 0x3_0000)
    assert names(pci.bus, WINDOW + 0x2_0010) == (("00:02.3", "BAR0+0x10"),) * 2
    assert names(pci.bus, WINDOW + 0x3_0010) == (("00:02.3", "BAR2+0x10"),) * 2


def test_a_function_keeps_the_name_that_it_has():
    function = TwoBars()
    function.name = "gpu"
    PciBus().add(1, 0, function)
    assert function.name == "gpu"


HEADER = {  # PCI 3.0, 6.1: offset and width
    "VENDOR_ID": (0x00, 2),
    "DEVICE_ID": (0x02, 2),
    "COMMAND": (0x04, 2),
    "STATUS": (0x06, 2),
    "REVISION_ID": (0x08, 1),
    "CLASS_CODE": (0x09, 3),
    "CACHE_LINE_SIZE": (0x0C, 1),
    "LATENCY_TIMER": (0x0D, 1),
    "HEADER_TYPE": (0x0E, 1),
    "BIST": (0x0F, 1),
    "BAR0": (0x10, 4),
    "BAR1": (0x14, 4),
    "BAR2": (0x18, 4),
    "BAR3": (0x1C, 4),
    "BAR4": (0x20, 4),
    "BAR5": (0x24, 4),
    "CARDBUS_CIS_POINTER": (0x28, 4),
    "SUBSYSTEM_VENDOR_ID": (0x2C, 2),
    "SUBSYSTEM_ID": (0x2E, 2),
    "EXPANSION_ROM": (0x30, 4),
    "CAPABILITIES_POINTER": (0x34, 1),
    "INTERRUPT_LINE": (0x3C, 1),
    "INTERRUPT_PIN": (0x3D, 1),
    "MIN_GNT": (0x3E, 1),
    "MAX_LAT": (0x3F, 1),
}


@pytest.mark.parametrize(
    ("device", "number", "name"), [(0, 0, "host-bridge"), (1, 0, "virtio-fake0"), (2, 3, "00:02.3"), (3, 0, "00:03.0")]
)
def test_configuration_space_in_memory(device, number, name):
    """PCI Express 4.0, 7.2.2: each function is 4 KiB, and what is there is the function's."""
    pci = Pci()
    pci.pci.add(3, 0, Config())
    pci.bus.claim(ECAM, 0x10_0000, PciEcam(pci.pci), "pci-ecam")
    base = ECAM + (device << 15) + (number << 12)
    for register, (start, width) in HEADER.items():
        for offset in range(start, start + width):
            assert names(pci.bus, base + offset) == ((name, f"config.{register}"),) * 2
    assert names(pci.bus, base + 0x38) == ((name, "config+0x38"),) * 2
    assert names(pci.bus, base + 0x40) == ((name, "config+0x40"),) * 2
    assert names(pci.bus, base + 0xFFF) == ((name, "config+0xfff"),) * 2


def test_configuration_space_of_nobody():
    """A scan of the bus looks alike at every place that is empty."""
    bus = Bus("memory", 1 << 52)
    bus.claim(ECAM, 0x10_0000, PciEcam(PciBus()), "pci-ecam")
    assert names(bus, ECAM + (31 << 15)) == (("pci-ecam", "config.VENDOR_ID"),) * 2


# --- devices that are made when they are touched ------------------------------------------------------------------


def test_asking_makes_no_device():
    """Its registers have their names before the guest touches it; a second view has offsets of its own."""
    made = []

    def make():
        made.append(I8042(nothing))
        return made[-1]

    bus = Bus("port", 1 << 16)
    data = LazyDevice(make, lambda: I8042)
    bus.claim(0x60, 1, data, "i8042")
    bus.claim(0x64, 1, LazyDevice(lambda: data.device, lambda: I8042, offset=4), "i8042")
    bus.freeze()
    for _ in range(2):
        assert names(bus, 0x64) == (("i8042", "STATUS"), ("i8042", "COMMAND"))
        assert names(bus, 0x60) == (("i8042", "DATA"),) * 2
        assert len(made) == data.is_made
        bus.read(0x64, 1)
    assert made


def test_a_window_that_is_made_late():
    pci = Pci()
    pci.place(pci.virtio.function, 0x10, WINDOW)
    window = PciMemoryWindow(pci.pci)
    bus = Bus("memory", 1 << 52)
    bus.claim(WINDOW, 0x10_0000, LazyDevice(lambda: window, lambda: window), "pci-memory")
    assert names(bus, WINDOW) == (("virtio-fake0", "device_feature_select"),) * 2


def test_a_device_without_names_that_is_made_late():
    bus = Bus("port", 1 << 16)
    bus.claim(0x5658, 2, LazyDevice(Plain, lambda: Plain), "dice")
    assert names(bus, 0x5659) == (("dice", "+0x1"),) * 2
