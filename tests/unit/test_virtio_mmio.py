"""The MMIO transport, register by register (Virtio 1.2, 4.2), and what both transports share (2.1, 2.2, 3.1)."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtio_driver import F_INDIRECT, DriverQueue, FakeRam, FakeSignal, InlineRunner

from devices.events import EventLog
from devices.virtio.device import VirtioDevice
from devices.virtio.mmio import VirtioMmio

MAGIC, VERSION, DEVICE_ID, FEATURES, FEATURES_SEL = 0x00, 0x04, 0x08, 0x10, 0x14
DRIVER_FEATURES, DRIVER_FEATURES_SEL, QUEUE_SEL, QUEUE_NUM_MAX, QUEUE_NUM = 0x20, 0x24, 0x30, 0x34, 0x38
READY, NOTIFY, INTERRUPT_STATUS, INTERRUPT_ACK, STATUS = 0x44, 0x50, 0x60, 0x64, 0x70
DESC, DRIVER_AREA, DEVICE_AREA, SHM_LEN, GENERATION, CONFIG = 0x80, 0x90, 0xA0, 0xB0, 0xFC, 0x100
ONES = 0xFFFFFFFFFFFFFFFF


class Device(VirtioDevice):
    device_id = 42

    def __init__(self, ram):
        super().__init__("d0", ram, queue_sizes=[8, 4], features=1 << 3, log=EventLog())
        self.content = b"\1\2\3\4\5\6\7\10"
        self.writes = []

    def config(self):
        return self.content

    def write_config(self, offset, data):
        self.writes.append((offset, data))

    def handle(self, queue, chain):
        return chain.scatter(chain.gather(100))


@pytest.fixture
def ram():
    return FakeRam()


@pytest.fixture
def mmio(ram):
    runner = InlineRunner()
    runner.device = Device(ram)
    transport = VirtioMmio(runner.device, runner, FakeSignal())
    transport.signal = runner.device.queues[0].signal
    return transport


def write(mmio, *pairs):
    for offset, value in pairs:
        mmio.write(offset, 4, value)


def negotiate(mmio, features=F_INDIRECT | 1 << 3):
    write(mmio, (STATUS, 0), (STATUS, 1), (STATUS, 3), (DRIVER_FEATURES_SEL, 0), (DRIVER_FEATURES, features))
    write(mmio, (DRIVER_FEATURES_SEL, 1), (DRIVER_FEATURES, 1), (STATUS, 11))


def start(mmio, ram):
    """Bring the device up and return the driver's half of its queues."""
    negotiate(mmio)
    queues, base = [], 0x1000
    for index, queue in enumerate(mmio.device.queues):
        ours = DriverQueue(ram, queue, base, 4, F_INDIRECT)
        base = ours.end + 15 & ~15
        write(mmio, (QUEUE_SEL, index), (QUEUE_NUM, 4), (DESC, ours.table), (DESC + 4, 0))
        write(mmio, (DRIVER_AREA, ours.available), (DRIVER_AREA + 4, 0), (DEVICE_AREA, ours.used), (DEVICE_AREA + 4, 0))
        write(mmio, (READY, 1))
        assert mmio.read(READY, 4) == 1
        queues.append(ours)
    write(mmio, (STATUS, 15))
    return queues


def echo(mmio, ram, ours, index=0):
    ram.write(0x9000, b"hello")
    head = ours.chain([(0x9000, 5, False), (0xA000, 5, True)])
    ours.offer(head)
    ours.publish()
    write(mmio, (NOTIFY, index))
    return ours.collect() == [(head, 5)] and ram.read(0xA000, 5) == b"hello"


def test_identification(mmio):
    assert mmio.read(MAGIC, 4) == int.from_bytes(b"virt", "little")
    assert (mmio.read(VERSION, 4), mmio.read(DEVICE_ID, 4)) == (2, 42)
    assert mmio.read(SHM_LEN, 4) == 0xFFFFFFFF


def test_features_by_halves(mmio):
    assert mmio.read(FEATURES, 4) == 1 << 3 | 1 << 28 | 1 << 29
    write(mmio, (FEATURES_SEL, 1))
    assert mmio.read(FEATURES, 4) == 1
    for beyond in (2, 0xFFFFFFFF):
        write(mmio, (FEATURES_SEL, beyond))
        assert mmio.read(FEATURES, 4) == 0


def test_a_request_from_kick_to_interrupt(mmio, ram):
    queues = start(mmio, ram)
    assert echo(mmio, ram, queues[0])
    assert mmio.signal.count == 1
    assert mmio.read(INTERRUPT_STATUS, 4) == 1
    write(mmio, (INTERRUPT_ACK, 1))
    assert mmio.read(INTERRUPT_STATUS, 4) == 0
    assert echo(mmio, ram, queues[1], 1)


def test_2_1_2_nothing_is_consumed_before_driver_ok(mmio, ram):
    queues = start(mmio, ram)
    write(mmio, (STATUS, 0))
    negotiate(mmio)
    write(mmio, (NOTIFY, 0))
    assert queues[0].collect() == []


@pytest.mark.parametrize(("low", "high"), [(1 << 4, 1), (1 << 3, 0), (0, 3)])
def test_2_2_2_features_that_were_not_offered_or_legacy_operation(mmio, low, high):
    write(mmio, (STATUS, 1), (STATUS, 3), (DRIVER_FEATURES, low), (DRIVER_FEATURES_SEL, 1), (DRIVER_FEATURES, high))
    write(mmio, (STATUS, 11))
    assert mmio.read(STATUS, 4) == 3
    write(mmio, (STATUS, 15))
    assert mmio.read(STATUS, 4) & 4 == 0


def test_features_are_fixed_after_features_ok(mmio, ram):
    start(mmio, ram)
    write(mmio, (DRIVER_FEATURES_SEL, 0), (DRIVER_FEATURES, 0))
    assert mmio.device.features & 1 << 3


def test_2_1_1_status_bits_cannot_be_cleared_but_by_a_reset(mmio, ram):
    start(mmio, ram)
    write(mmio, (STATUS, 1))
    assert mmio.read(STATUS, 4) == 15
    write(mmio, (STATUS, 0))
    assert mmio.read(STATUS, 4) == 0
    assert mmio.device.features == 0
    write(mmio, (QUEUE_SEL, 0))
    assert mmio.read(READY, 4) == 0


def test_queues_that_are_set_up_stay_so(mmio, ram):
    queues = start(mmio, ram)
    write(mmio, (QUEUE_SEL, 0), (DESC, 0xDEAD0000), (QUEUE_NUM, 2))
    assert echo(mmio, ram, queues[0])


def test_4_2_2_2_a_queue_can_be_stopped_and_set_up_again(mmio, ram):
    queues = start(mmio, ram)
    write(mmio, (QUEUE_SEL, 0), (READY, 0))
    assert mmio.read(READY, 4) == 0
    assert echo(mmio, ram, queues[1], 1)
    ours = queues[0]
    ram.write(ours.table, bytes(ours.end - ours.table))
    again = DriverQueue(ram, mmio.device.queues[0], ours.table, 4, F_INDIRECT)
    write(
        mmio, (QUEUE_NUM, 4), (DESC, again.table), (DRIVER_AREA, again.available), (DEVICE_AREA, again.used), (READY, 1)
    )
    assert echo(mmio, ram, again)


def test_a_queue_that_is_not_there(mmio):
    negotiate(mmio)
    write(mmio, (QUEUE_SEL, 2))
    assert mmio.read(QUEUE_NUM_MAX, 4) == 0
    write(mmio, (QUEUE_NUM, 4), (READY, 1), (NOTIFY, 2), (NOTIFY, 0xFFFFFFFF))
    assert mmio.read(READY, 4) == 0


def test_rings_outside_ram_need_a_reset(mmio, ram):
    negotiate(mmio)
    write(mmio, (QUEUE_SEL, 0), (QUEUE_NUM, 4), (DESC, 0xE0000000), (READY, 1), (STATUS, 15))
    assert mmio.read(STATUS, 4) & 64
    assert echo(mmio, ram, start(mmio, ram)[0])


def test_configuration_space_and_its_generation(mmio, ram):
    assert mmio.read(CONFIG, 4) == 0x04030201
    assert mmio.read(CONFIG + 5, 1) == 6
    assert mmio.read(CONFIG + 6, 4) == 0x0807  # zeroes behind the end
    mmio.write(CONFIG + 4, 2, 0xBEEF)
    assert mmio.device.writes == [(4, b"\xef\xbe")]
    start(mmio, ram)
    generation = mmio.read(GENERATION, 4)
    mmio.device.content = b"\x99" * 8
    mmio.config_changed()
    assert mmio.read(INTERRUPT_STATUS, 4) == 2
    assert mmio.read(GENERATION, 4) != generation
    write(mmio, (INTERRUPT_ACK, 1))
    assert mmio.read(INTERRUPT_STATUS, 4) == 2
    write(mmio, (INTERRUPT_ACK, 2))
    assert mmio.read(INTERRUPT_STATUS, 4) == 0


@pytest.mark.parametrize("size", [1, 2, 8])
def test_registers_are_32_bits_wide(mmio, size):
    assert mmio.read(MAGIC, size) == ONES
    mmio.write(STATUS, size, 1)
    assert mmio.read(STATUS, 4) == 0


@settings(max_examples=60)
@given(
    accesses=st.lists(
        st.tuples(st.booleans(), st.integers(0, 0x1FF), st.sampled_from([1, 2, 4, 4, 4, 8]), st.integers(0, ONES)),
        max_size=60,
    )
)
def test_random_pokes_raise_nothing_and_a_reset_mends_everything(accesses):
    ram = FakeRam()
    runner = InlineRunner()
    runner.device = Device(ram)
    mmio = VirtioMmio(runner.device, runner, FakeSignal())
    start(mmio, ram)
    for is_read, offset, size, value in accesses:
        if is_read:
            mmio.read(offset, size)
        else:
            mmio.write(offset, size, value & (1 << 8 * size) - 1)
    assert echo(mmio, ram, start(mmio, ram)[0])
