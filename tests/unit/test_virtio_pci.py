"""Virtio over PCI as a driver sees it (Virtio 1.2, 4.1): discovery, capabilities, common configuration.

Interrupts are in test_virtio_pci_interrupts.py, and what a driver may never do in test_virtio_pci_hostile.py.
"""

from __future__ import annotations

import itertools

import pytest

from devices.events import EventLog
from devices.ports import GuestFault
from devices.virtio.device import VirtioDevice
from devices.virtio.pci import VirtioPci

COMMON_CFG, NOTIFY_CFG, ISR_CFG, DEVICE_CFG, PCI_CFG = 1, 2, 3, 4, 5
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET = 1, 2, 4, 8, 64
VERSION_1 = 1 << 32
OPEN_BUS = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFF_FFFF, 8: 0xFFFF_FFFF_FFFF_FFFF}
DEVICE_FEATURE_SELECT, DEVICE_FEATURE, DRIVER_FEATURE_SELECT, DRIVER_FEATURE = 0, 4, 8, 12
CONFIG_VECTOR, NUM_QUEUES, STATUS, GENERATION = 16, 18, 20, 21
QUEUE_SELECT, QUEUE_SIZE, QUEUE_VECTOR, QUEUE_ENABLE, QUEUE_NOTIFY_OFF = 22, 24, 26, 28, 30
QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE = 32, 40, 48


class FakeRam:
    """64 KiB from address 0 on."""

    def __init__(self) -> None:
        self.data = memoryview(bytearray(0x1_0000))

    def view(self, gpa: int, size: int) -> memoryview:
        if gpa + size > len(self.data):
            raise GuestFault(gpa, size)
        return self.data[gpa : gpa + size]

    is_tracked = False

    def read(self, gpa: int, size: int) -> bytes:
        return bytes(self.view(gpa, size))

    def write(self, gpa: int, data: bytes) -> None:
        self.view(gpa, len(data))[:] = data


class FakeRunner:
    """Remembers what it was asked: "start", "stop", or the index of a queue kicked."""

    def __init__(self) -> None:
        self.calls: list[str | int] = []

    def start(self) -> None:
        self.calls.append("start")

    def stop(self) -> None:
        self.calls.append("stop")

    def kick(self, index: int) -> None:
        self.calls.append(index)


class FakeSignal:
    """A RoutedSignal: where it goes, and what got through."""

    def __init__(self) -> None:
        self.target: object = "hold"
        self.sent: list[object] = []
        self.is_pending = False

    def fire(self) -> None:
        self.is_pending = True
        self._go(self.target)

    def fileno(self) -> int:
        return -1

    def _go(self, target: object) -> None:
        self.target = target
        if self.is_pending and target != "hold":
            self.is_pending = False
            self.sent.append(target)

    def to_message(self, address: int, data: int) -> None:
        self._go((address, data))

    def to_line(self) -> None:
        self._go("line")

    def hold(self) -> None:
        self._go("hold")


class FakeDevice(VirtioDevice):
    """A device of any type, with a configuration space that remembers what is written to it."""

    def __init__(self, kind: int, queues: int, config: bytes) -> None:
        super().__init__("fake0", FakeRam(), queue_sizes=[16] * queues, log=EventLog(device="fake0"))
        self.device_id = kind
        self.space = config
        self.config_writes: list[tuple[int, bytes]] = []

    def config(self) -> bytes:
        return self.space

    def write_config(self, offset: int, data: bytes) -> None:
        self.config_writes.append((offset, data))


class Guest:
    """A function and its driver.

    Attributes:
        structures: by cfg_type, the first one's place in configuration space, offset in the BAR, and length.
        msix: where that capability is.
        signals: one a queue, then that of the configuration.
    """

    def __init__(self, kind: int = 2, queues: int = 3, config: bytes = bytes(range(1, 13))) -> None:
        self.device = FakeDevice(kind, queues, config)
        self.runner = FakeRunner()
        self.signals = [FakeSignal() for _ in range(queues + 1)]
        self.function = VirtioPci(self.device, self.runner, self.signals[:-1], self.signals[-1])
        self.structures: dict[int, tuple[int, int, int]] = {}
        at = self.config(0x34, 1)
        while at:
            if self.config(at, 1) == 0x09:
                place = at, self.config(at + 8, 4), self.config(at + 12, 4)
                self.structures.setdefault(self.config(at + 3, 1), place)
            elif self.config(at, 1) == 0x11:
                self.msix = at
            at = self.config(at + 1, 1)
        self.config(0x10, 4, 0xFFFF_FFFF)
        self.bar_size = 0x1_0000_0000 - (self.config(0x10, 4) & ~0xF)

    def config(self, register: int, size: int, value: int | None = None) -> int:
        """Read configuration space, or write it."""
        if value is None:
            return self.function.config_read(register, size)
        self.function.config_write(register, size, value)
        return 0

    def bar(self, offset: int, size: int, value: int | None = None) -> int:
        """Read the BAR, or write it."""
        if value is None:
            return self.function.bar_read(0, offset, size) & OPEN_BUS[size]
        self.function.bar_write(0, offset, size, value)
        return 0

    def common(self, offset: int, size: int, value: int | None = None) -> int:
        """Access a register of the common configuration."""
        return self.bar(self.structures[COMMON_CFG][1] + offset, size, value)

    def device_config(self, offset: int, size: int, value: int | None = None) -> int:
        """Access the device-specific configuration."""
        return self.bar(self.structures[DEVICE_CFG][1] + offset, size, value)

    def isr(self) -> int:
        """Read the ISR status."""
        return self.bar(self.structures[ISR_CFG][1], 1)

    def through_window(self, offset: int, size: int, value: int | None = None) -> int:
        """Access the BAR through configuration space (4.1.4.9)."""
        window = self.structures[PCI_CFG][0]
        self.config(window + 4, 1, 0)
        self.config(window + 8, 4, offset)
        self.config(window + 12, 4, size)
        return self.config(window + 16, size, value)

    def negotiate(self) -> None:
        """Get to FEATURES_OK (3.1.1)."""
        self.common(STATUS, 1, 0)
        self.common(STATUS, 1, ACKNOWLEDGE | DRIVER)
        self.common(DRIVER_FEATURE_SELECT, 4, 1)
        self.common(DRIVER_FEATURE, 4, 1)
        self.common(STATUS, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK)

    def start(self) -> None:
        """Enable every queue, and get to DRIVER_OK."""
        self.negotiate()
        for index in range(len(self.device.queues)):
            self.common(QUEUE_SELECT, 2, index)
            for register, address in ((QUEUE_DESC, 0), (QUEUE_DRIVER, 0x400), (QUEUE_DEVICE, 0x800)):
                self.common(register, 4, 0x1000 * (index + 1) + address)
            self.common(QUEUE_ENABLE, 2, 1)
        self.common(STATUS, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)

    def map_vectors(self) -> None:
        """Enable MSI-X; vector n has address 0xFEE0_0000 and data 0x40 + n. Queue n gets vector n, so does the rest."""
        _, table = self.config(self.msix + 2, 2, 0x8000), self.config(self.msix + 4, 4)
        for vector in range(len(self.signals)):
            for at, value in ((0, 0xFEE0_0000), (4, 0), (8, 0x40 + vector), (12, 0)):
                self.bar(table + 16 * vector + at, 4, value)
        for index in range(len(self.device.queues)):
            self.common(QUEUE_SELECT, 2, index)
            self.common(QUEUE_VECTOR, 2, index)
        self.common(CONFIG_VECTOR, 2, len(self.device.queues))

    def interrupt(self, index: int) -> None:
        """Have the device interrupt for a queue, as Queue.notify_driver does it."""
        queue = self.device.queues[index]
        queue.isr[0] = 1
        queue.signal.fire()


@pytest.fixture
def guest() -> Guest:
    return Guest()


# --- 4.1.2.1: discovery ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "class_code"),
    [(1, 0x02_0000), (2, 0x01_8000), (3, 0x07_8000), (4, 0xFF_0000), (5, 0x05_8000), (19, 0x07_8000)],
)
def test_identity(kind, class_code):
    """4.1.2.1: vendor 0x1AF4, device 0x1040 + type, revision 1 or more, subsystem 0x40 or more. Type 0, INTA."""
    guest = Guest(kind=kind)
    assert guest.config(0x00, 2) == 0x1AF4
    assert guest.config(0x02, 2) == 0x1040 + kind
    assert guest.config(0x08, 1) >= 1
    assert guest.config(0x08, 4) >> 8 == class_code
    assert guest.config(0x0E, 1) == 0
    assert guest.config(0x2E, 2) >= 0x40
    assert guest.config(0x3D, 1) == 1


# --- 4.1.4: capabilities ---------------------------------------------------------------------------------------------


def test_each_structure_is_there_and_in_the_bar(guest):
    """4.1.4.3.1, 4.1.4.4.1, 4.1.4.5.1, 4.1.4.6.1, 4.1.4.9.1: at least one of each; none shares a byte with another."""
    assert sorted(guest.structures) == [COMMON_CFG, NOTIFY_CFG, ISR_CFG, DEVICE_CFG, PCI_CFG]
    places = sorted(
        (offset, offset + length) for kind, (_, offset, length) in guest.structures.items() if kind != PCI_CFG
    )
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places))
    assert places[-1][1] <= guest.bar_size
    assert {guest.config(at + 4, 1) for at, _, _ in guest.structures.values()} == {0}


@pytest.mark.parametrize(
    ("kind", "least", "alignment"), [(COMMON_CFG, 56, 4), (ISR_CFG, 1, 1), (DEVICE_CFG, 12, 4), (NOTIFY_CFG, 12, 4)]
)
def test_lengths_and_alignments(guest, kind, least, alignment):
    """4.1.4.3.1, 4.1.4.4.1, 4.1.4.6.1."""
    _, offset, length = guest.structures[kind]
    assert length >= least
    assert offset % alignment == 0


def test_cap_len_includes_the_extra_data(guest):
    """4.1.4.2."""
    lengths = {kind: guest.config(at + 2, 1) for kind, (at, _, _) in guest.structures.items()}
    assert lengths == {COMMON_CFG: 16, NOTIFY_CFG: 20, ISR_CFG: 16, DEVICE_CFG: 16, PCI_CFG: 20}


def test_no_device_structure_without_configuration():
    """4.1.4.6: only for a type that has one."""
    assert DEVICE_CFG not in Guest(config=b"").structures


@pytest.mark.parametrize("queues", [0, 1, 3, 255])
def test_notify_structure(queues):
    """4.1.4.4.1: a multiplier that is an even power of 2, and room for each queue's 16 bits."""
    guest = Guest(queues=queues)
    at, offset, length = guest.structures[NOTIFY_CFG]
    multiplier = guest.config(at + 16, 4)
    assert multiplier == 4
    assert length >= 2
    for index in range(queues):
        guest.common(QUEUE_SELECT, 2, index)
        distance = guest.common(QUEUE_NOTIFY_OFF, 2) * multiplier
        assert length >= distance + 2
        assert guest.function.notify_address(index) == (0, offset + distance)


def test_too_many_queues():
    with pytest.raises(ValueError, match="255"):
        Guest(queues=256)


# --- 4.1.4.3: common configuration -----------------------------------------------------------------------------------


def test_features(guest):
    """4.1.4.3.1: device_feature by device_feature_select, 0 beyond 63; what was chosen is presented."""
    guest.device.offered = VERSION_1 | 0x8000_0005
    offered = []
    for select in (0, 1, 2, 0xFFFF_FFFF):
        guest.common(DEVICE_FEATURE_SELECT, 4, select)
        assert guest.common(DEVICE_FEATURE_SELECT, 4) == select
        offered.append(guest.common(DEVICE_FEATURE, 4))
    assert offered == [0x8000_0005, 1, 0, 0]
    for select, value in ((0, 0x8000_0001), (1, 1)):
        guest.common(DRIVER_FEATURE_SELECT, 4, select)
        guest.common(DRIVER_FEATURE, 4, value)
    chosen = []
    for select in (0, 1, 2):
        guest.common(DRIVER_FEATURE_SELECT, 4, select)
        chosen.append(guest.common(DRIVER_FEATURE, 4))
    assert chosen == [0x8000_0001, 1, 0]


def test_num_queues(guest):
    assert guest.common(NUM_QUEUES, 2) == 3


def test_status_and_reset(guest):
    """4.1.4.3.1: a 0 resets; 0 in device_status and queue_enable after it; vectors are unmapped (4.1.5.1.2.1)."""
    guest.start()
    assert guest.common(STATUS, 1) == ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
    assert guest.common(QUEUE_ENABLE, 2) == 1
    guest.common(CONFIG_VECTOR, 2, 0)
    guest.common(QUEUE_VECTOR, 2, 1)
    guest.common(STATUS, 1, 0)
    assert guest.common(STATUS, 1) == 0
    assert guest.runner.calls[-1] == "stop"
    assert guest.common(CONFIG_VECTOR, 2) == 0xFFFF
    for index in range(3):
        guest.common(QUEUE_SELECT, 2, index)
        assert guest.common(QUEUE_ENABLE, 2) == 0
        assert guest.common(QUEUE_VECTOR, 2) == 0xFFFF


def test_generation(guest):
    """4.1.4.3.1: changed after the driver has read a value that has changed."""
    before = guest.common(GENERATION, 1)
    guest.device_config(0, 1)
    assert guest.common(GENERATION, 1) == before
    guest.function.transport.config_changed()
    guest.device_config(0, 1)
    assert guest.common(GENERATION, 1) == before + 1 & 0xFF


def test_queue_set_up(guest):
    """4.1.5.1.3, 4.1.3.2: sizes, addresses by halves in any order, then enabled."""
    guest.negotiate()
    guest.common(QUEUE_SELECT, 2, 1)
    assert guest.common(QUEUE_SELECT, 2) == 1
    assert guest.common(QUEUE_SIZE, 2) == 16
    guest.common(QUEUE_SIZE, 2, 8)
    assert guest.common(QUEUE_SIZE, 2) == 8
    for register, value in ((QUEUE_DESC, 0x1000), (QUEUE_DRIVER, 0x2000), (QUEUE_DEVICE, 0x3000)):
        guest.common(register + 4, 4, 0xABCD)
        guest.common(register, 4, value)
        assert guest.common(register, 4) == value
        assert guest.common(register + 4, 4) == 0xABCD
        assert guest.common(register, 8) == 0xABCD << 32 | value
        guest.common(register, 8, value)
        assert guest.common(register + 4, 4) == 0
    queue = guest.device.queues[1]
    assert (queue.descriptors, queue.available, queue.used) == (0x1000, 0x2000, 0x3000)
    guest.common(QUEUE_ENABLE, 2, 1)
    assert guest.common(QUEUE_ENABLE, 2) == 1
    assert queue.is_enabled
    assert not guest.device.queues[0].is_enabled


@pytest.mark.parametrize("index", [3, 0xFFFF])
def test_absent_queue(guest, index):
    """4.1.4.3.1: queue_size 0; nothing of it can be set."""
    guest.negotiate()
    guest.common(QUEUE_SELECT, 2, index)
    for register in (QUEUE_SIZE, QUEUE_VECTOR, QUEUE_ENABLE):
        guest.common(register, 2, 1)
    guest.common(QUEUE_DESC, 8, 0x1000)
    assert guest.common(QUEUE_SIZE, 2) == guest.common(QUEUE_ENABLE, 2) == guest.common(QUEUE_NOTIFY_OFF, 2) == 0
    assert guest.common(QUEUE_DESC, 8) == 0
    assert guest.common(QUEUE_VECTOR, 2) == 0xFFFF


@pytest.mark.parametrize("size", [0, 3, 12, 32, 0xFFFF])
def test_impossible_size(guest, size):
    """4.1.4.3.1: 0 or a power of 2 is presented; the queue cannot be enabled, and the device needs a reset."""
    guest.negotiate()
    guest.common(QUEUE_SIZE, 2, size)
    shown = guest.common(QUEUE_SIZE, 2)
    assert shown & (shown - 1) == 0
    guest.common(QUEUE_ENABLE, 2, 1)
    assert guest.common(QUEUE_ENABLE, 2) == 0
    assert guest.common(STATUS, 1) & NEEDS_RESET
    guest.common(STATUS, 1, 0)
    assert guest.common(STATUS, 1) == 0
    assert guest.common(QUEUE_SIZE, 2) == 16


@pytest.mark.parametrize("value", [0, 2, 0xFFFF])
def test_queue_enable_takes_only_one(guest, value):
    """4.1.4.3.2: a driver must not write 0."""
    guest.start()
    guest.common(QUEUE_ENABLE, 2, value)
    assert guest.common(QUEUE_ENABLE, 2) == 1


@pytest.mark.parametrize(
    ("offset", "size"), [(DEVICE_FEATURE, 4), (NUM_QUEUES, 2), (GENERATION, 1), (QUEUE_NOTIFY_OFF, 2)]
)
def test_read_only_registers(guest, offset, size):
    """4.1.4.3.2."""
    guest.common(QUEUE_SELECT, 2, 2)
    before = guest.common(offset, size)
    guest.common(offset, size, ~before & (1 << 8 * size) - 1)
    assert guest.common(offset, size) == before


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (0, 2), (0, 8), (16, 4), (20, 2), (20, 4), (22, 1), (34, 2)])
def test_other_widths_reach_nothing(guest, offset, size):
    """4.1.3.1: each field in its own width."""
    guest.start()
    before = guest.common(STATUS, 1)
    guest.common(offset, size, 0)
    assert guest.common(offset, size) == 0
    assert guest.common(STATUS, 1) == before


# --- 4.1.4.6: device-specific configuration, 4.1.5.2: kicks -----------------------------------------------------------


def test_device_configuration(guest):
    assert guest.device_config(0, 4) == 0x0403_0201
    assert guest.device_config(4, 8) == 0x0C0B_0A09_0807_0605
    assert guest.device_config(11, 1) == 12
    assert guest.device_config(10, 4) == 0x0C0B
    assert guest.device_config(0x800, 4) == 0
    guest.device_config(2, 2, 0x1234)
    guest.device_config(11, 2, 0x1234)
    guest.device_config(0x800, 4, 1)
    assert guest.device.config_writes == [(2, b"\x34\x12")], "none across the end or behind it"


@pytest.mark.parametrize("size", [2, 4])
def test_kick(guest, size):
    bar, offset = guest.function.notify_address(2)
    guest.function.bar_write(bar, offset, size, 2)
    assert guest.runner.calls == [], "not before DRIVER_OK"
    guest.start()
    guest.runner.calls.clear()
    guest.function.bar_write(bar, offset, size, 2)
    assert guest.runner.calls == [2]
    for where, width in ((offset + 4, 2), (offset + 1, 1), (offset + 2, 2), (offset, 1), (offset + 0xFF0, 2)):
        guest.function.bar_write(bar, where, width, 1)
    assert guest.runner.calls == [2]
    assert guest.function.bar_read(bar, offset, 2) == 0


# --- 4.1.4.9: through configuration space ----------------------------------------------------------------------------


def test_window_reads_and_writes(guest):
    """4.1.4.9.1: bar, offset and length choose; pci_cfg_data is the access, whether or not memory decodes."""
    common = guest.structures[COMMON_CFG][1]
    guest.config(0x04, 2, 0)
    assert guest.through_window(common + NUM_QUEUES, 2) == 3
    guest.through_window(common + STATUS, 1, ACKNOWLEDGE)
    assert guest.common(STATUS, 1) == ACKNOWLEDGE
    guest.through_window(common + DRIVER_FEATURE_SELECT, 4, 7)
    assert guest.common(DRIVER_FEATURE_SELECT, 4) == 7
    assert guest.through_window(guest.structures[DEVICE_CFG][1] + 4, 4) == 0x0807_0605


def test_window_only_changes_its_length(guest):
    """4.1.4.9.1: the first cap.length bytes."""
    common = guest.structures[COMMON_CFG][1]
    window = guest.structures[PCI_CFG][0]
    guest.through_window(common + NUM_QUEUES, 2)
    guest.config(window + 12, 4, 0)
    guest.config(window + 16, 4, 0xAABB_CCDD)
    guest.config(window + 12, 4, 2)
    assert guest.config(window + 16, 4) == 0xAABB_0003


@pytest.mark.parametrize(
    ("bar", "offset", "length"),
    [(1, 0, 4), (0, 2, 4), (0, 1, 2), (0, 0, 0), (0, 0, 3), (0, 0, 8), (0, 0x8000, 4), (0, 0xFFFF_FFFC, 4)],
)
def test_window_set_up_wrong_reaches_nothing(guest, bar, offset, length):
    """4.1.4.9.2 forbids it to the driver."""
    window = guest.structures[PCI_CFG][0]
    guest.config(window + 4, 1, bar)
    guest.config(window + 8, 4, offset)
    guest.config(window + 12, 4, length)
    guest.config(window + 16, 4, 0x1357_9BDF)
    assert guest.config(window + 16, 4) == 0x1357_9BDF
    assert guest.common(DEVICE_FEATURE_SELECT, 4) == 0
