"""Who is at an address, and what the register there is called: for reports, after the fact."""

from __future__ import annotations

from fakes import FakeIrq, FakeSink
from test_register_names import make_mmio, nothing
from test_virtio_pci import Guest as PciGuest

from devices.i8042 import I8042
from devices.pci import PciBus, PciFunction, PciMemoryWindow
from devices.ports import Nested
from devices.uart16550 import Uart16550
from hypervisor.bus import Bus
from hypervisor.pc import LazyDevice

WINDOW = 0xE000_0000
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


# --- devices that are made when they are touched ------------------------------------------------------------------


def test_asking_makes_no_device():
    """It is its offset until the guest touches it, and then its name; a second view has offsets of its own."""
    made = []

    def make():
        made.append(I8042(nothing))
        return made[-1]

    bus = Bus("port", 1 << 16)
    data = LazyDevice(make)
    bus.claim(0x60, 1, data, "i8042")
    bus.claim(0x64, 1, LazyDevice(lambda: data.device, offset=4), "i8042")
    bus.freeze()
    assert names(bus, 0x64) == (("i8042", "+0x4"),) * 2
    assert not made
    bus.read(0x64, 1)
    assert names(bus, 0x64) == (("i8042", "STATUS"), ("i8042", "COMMAND"))
    assert names(bus, 0x60) == (("i8042", "DATA"),) * 2
    assert len(made) == 1


def test_a_window_that_is_made_late():
    pci = Pci()
    pci.place(pci.virtio.function, 0x10, WINDOW)
    lazy = LazyDevice(lambda: PciMemoryWindow(pci.pci))
    bus = Bus("memory", 1 << 52)
    bus.claim(WINDOW, 0x10_0000, lazy, "pci-memory")
    assert names(bus, WINDOW) == (("pci-memory", "+0x0"),) * 2
    bus.read(WINDOW, 4)
    assert names(bus, WINDOW) == (("virtio-fake0", "device_feature_select"),) * 2


def test_a_device_without_names_that_is_made_late():
    bus = Bus("port", 1 << 16)
    bus.claim(0x5658, 2, LazyDevice(Plain), "dice")
    bus.read(0x5659, 1)
    assert names(bus, 0x5659) == (("dice", "+0x1"),) * 2
