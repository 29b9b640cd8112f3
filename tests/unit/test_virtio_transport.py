"""Status, features, reset and configuration as both transports have them (Virtio 1.2, 2.1 to 2.5, 3.1)."""

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_virtqueue import Echo
from virtio_driver import (
    ACKNOWLEDGE,
    DRIVER,
    DRIVER_OK,
    F_EVENT_IDX,
    F_INDIRECT,
    F_VERSION_1,
    FEATURES_OK,
    NEEDS_RESET,
    Driver,
    DriverQueue,
    FakeRam,
)

from devices.events import EventLog
from devices.virtio.device import VirtioDevice
from hypervisor.runner import ThreadRunner

FAILED = 128
ALL_BITS = 0xFFFF_FFFF_FFFF_FFFF
OURS = 1 << 3
READY = ACKNOWLEDGE | DRIVER | FEATURES_OK


class Configured(Echo):
    """A device with a feature of its own, two queues and eight bytes of configuration."""

    def __init__(self, ram):
        VirtioDevice.__init__(self, "conf0", ram, queue_sizes=[16, 16], features=OURS, log=EventLog(device="conf0"))
        self.handled = 0
        self.content = bytes(range(1, 9))
        self.activations = []

    def config(self):
        return self.content

    def activate(self, features):
        super().activate(features)
        self.activations.append(features)


@pytest.fixture
def ram():
    return FakeRam()


@pytest.fixture
def driver(ram):
    return Driver(Configured(ram), ram)


@pytest.fixture
def fresh(ram):
    """A driver that has not looked at its device yet."""
    return Driver(Configured(ram), ram, start=False)


def choose(transport, features):
    for half in (0, 1):
        transport.driver_select = half
        transport.write_driver_features(features >> 32 * half & 0xFFFF_FFFF)


def negotiate(transport, features, status=READY):
    transport.write_status(0)
    transport.write_status(ACKNOWLEDGE | DRIVER)
    choose(transport, features)
    transport.write_status(status)
    return transport.status


def break_ring(driver, queue=0):
    """Make a head available that no queue has."""
    driver.queues[queue].offer(0xFFFF)
    driver.queues[queue].publish()
    driver.runner.kick(queue)


# --- 2.1 status -------------------------------------------------------------------------------------------------------


def test_2_1_2_nothing_is_consumed_or_told_before_driver_ok(driver, ram):
    """Neither by kicks nor because a chain is there when the driver gets ready; then it is."""
    driver.transport.write_status(0)
    transport = driver.transport
    negotiate(transport, F_VERSION_1)
    ours = DriverQueue(ram, driver.device.queues[0], 0x20000, 4, 0)
    transport.queue_select = 0
    transport.set_queue_size(4)
    for area, address in (("descriptors", ours.table), ("available", ours.available), ("used", ours.used)):
        transport.set_queue_address(area, address, ALL_BITS)
    transport.enable_queue()
    head = ours.chain([(0x9000, 1, False), (0xA000, 1, True)])
    ours.offer(head)
    ours.publish()
    interrupts = driver.signals[0].count
    transport.kick(0)
    driver.runner.kick(0)
    driver.device.serve(0)
    assert driver.device.handled == 0
    assert driver.signals[0].count == interrupts
    transport.write_status(READY | DRIVER_OK)
    assert ours.collect() == [(head, 1)]
    assert driver.signals[0].count == interrupts + 1


def test_2_1_2_a_broken_device_tells_a_driver_that_is_ready(driver):
    break_ring(driver)
    assert driver.transport.status == READY | DRIVER_OK | NEEDS_RESET
    assert driver.config_signal.count == 1
    assert driver.transport.take_isr() == 2


def test_2_1_2_no_driver_is_told_before_it_is_ready(fresh):
    """A ring outside of RAM breaks the device during set-up: the status says so, no interrupt does."""
    transport = fresh.transport
    negotiate(transport, F_VERSION_1)
    transport.set_queue_address("descriptors", 0xE000_0000, ALL_BITS)
    transport.enable_queue()
    assert transport.status == READY | NEEDS_RESET
    assert fresh.config_signal.count == 0
    transport.write_status(READY | DRIVER_OK)
    assert fresh.device.activations == []
    assert not fresh.runner.running
    fresh.start()
    assert fresh.ask(0, b"x", 1) == b"x"


def test_2_1_1_the_driver_sets_and_cannot_clear_bits(driver):
    for value in (ACKNOWLEDGE, DRIVER_OK, 0x80, 0x40, 0x30):
        before = driver.transport.status
        driver.transport.write_status(value)
        assert driver.transport.status & before == before
        assert not driver.transport.status & (NEEDS_RESET | 0x30)
    assert driver.transport.status & FAILED
    assert driver.device.activations == [driver.wanted]


def test_the_driver_cannot_make_the_device_need_a_reset(fresh):
    fresh.transport.write_status(NEEDS_RESET)
    assert fresh.transport.status == 0


def test_3_1_1_driver_ok_waits_for_features_ok(fresh):
    fresh.transport.write_status(ACKNOWLEDGE | DRIVER | DRIVER_OK)
    assert fresh.transport.status == ACKNOWLEDGE | DRIVER
    assert fresh.device.activations == []


# --- 2.2 features -----------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    features=st.one_of(
        st.sets(st.sampled_from([3, 28, 29, 32])).map(lambda bits: sum(1 << bit for bit in bits)),
        st.integers(0, ALL_BITS),
    )
)
def test_2_2_2_any_valid_subset_is_accepted_and_no_other(features):
    """2.2.2, and 6.2: a device may refuse a driver without VERSION_1. Again and again alike, after a reset as well."""
    ram = FakeRam()
    fresh = Driver(Configured(ram), ram, start=False)
    offered = OURS | F_INDIRECT | F_EVENT_IDX | F_VERSION_1
    valid = not features & ~offered and bool(features & F_VERSION_1)
    for _ in range(3):
        assert bool(negotiate(fresh.transport, features) & FEATURES_OK) == valid
    fresh.transport.write_status(READY | DRIVER_OK)
    assert fresh.device.activations == ([features] if valid else [])


def test_2_2_a_refused_driver_may_choose_again(fresh):
    transport = fresh.transport
    assert not negotiate(transport, F_VERSION_1 | 1 << 63) & FEATURES_OK
    choose(transport, F_VERSION_1)
    transport.write_status(READY)
    assert transport.status == READY


def test_2_2_1_features_after_features_ok_are_ignored(driver):
    driver.transport.driver_select = 0
    driver.transport.write_driver_features(0)
    assert driver.transport.driver_features == driver.wanted & 0xFFFF_FFFF
    driver.transport.write_status(0)
    assert driver.transport.driver_features == 0


@pytest.mark.parametrize("select", [2, 3, 0xFFFF_FFFF])
def test_features_beyond_the_64th_are_none(fresh, select):
    transport = fresh.transport
    transport.device_select = transport.driver_select = select
    transport.write_driver_features(0xFFFF_FFFF)
    assert (transport.device_features, transport.driver_features) == (0, 0)
    assert negotiate(transport, F_VERSION_1) & FEATURES_OK


# --- 2.4 reset --------------------------------------------------------------------------------------------------------


def test_2_4_1_status_is_0_after_a_reset(driver):
    break_ring(driver)
    driver.transport.write_status(0)
    assert driver.transport.status == 0
    assert driver.transport.peek_isr() == 0
    assert (driver.device.features, driver.device.is_active, driver.device.is_broken) == (0, False, False)
    assert not any(queue.is_enabled for queue in driver.device.queues)


def test_2_4_1_a_device_that_was_reset_is_silent(driver, ram):
    """No notification and no queue is touched until the driver is ready again."""
    ours = driver.queues[0]
    driver.transport.write_status(0)
    counts = driver.config_signal.count, driver.signals[0].count
    ours.offer(ours.chain([(0x9000, 1, False), (0xA000, 1, True)]))
    ours.publish()
    before = bytes(ram.low)
    driver.transport.config_changed()
    driver.transport.kick(0)
    driver.device.serve(0)
    driver.device.queues[0].notify_driver()
    assert (driver.config_signal.count, driver.signals[0].count) == counts
    assert driver.transport.peek_isr() == 0
    assert bytes(ram.low) == before


def test_2_4_1_a_reset_waits_for_what_is_in_flight(ram):
    """Status reads 0 when the thread that serves has come to rest, and its answer is out before that."""
    begun, go_on = threading.Event(), threading.Event()

    class Slow(Echo):
        def handle(self, queue, chain):
            begun.set()
            assert go_on.wait(60)
            return super().handle(queue, chain)

    device = Slow(ram)
    driver = Driver(device, ram, start=False)
    faults = []
    runner = ThreadRunner(device, lambda *_: None, [[0]], faults.append)
    driver.runner = driver.transport._runner = device.runner = runner
    driver.start()
    try:
        driver.send(0, b"abc", 3)
        assert begun.wait(60)
        resetting = threading.Thread(target=driver.transport.write_status, args=(0,))
        resetting.start()
        resetting.join(0.05)
        assert resetting.is_alive()
        assert driver.transport.status & DRIVER_OK
        go_on.set()
        resetting.join(60)
        assert driver.transport.status == 0
        before = bytes(ram.low)
        assert len(driver.queues[0].collect()) == 1
        runner.kick(0)
        assert bytes(ram.low) == before
        driver.start()
    finally:
        go_on.set()
        runner.stop()
        runner.close()
    assert faults == []


# --- 2.5 configuration ------------------------------------------------------------------------------------------------


def test_2_5_3_the_configuration_is_there_before_features_ok(fresh):
    assert fresh.transport.read_config(0, 8) == 0x0807060504030201
    assert fresh.transport.read_config(6, 4) == 0x0807
    assert fresh.transport.read_config(4000, 4) == 0


@settings(max_examples=60)
@given(moments=st.sets(st.integers(0, 4)), from_zero=st.booleans())
def test_2_5_a_torn_read_shows_in_the_generation(moments, from_zero):
    """Read generation, then two halves, then generation: if both are alike the halves belong together (2.5.1)."""
    ram = FakeRam()
    driver = Driver(Configured(ram), ram, start=False)
    transport, device = driver.transport, driver.device
    transport.config_generation = 0 if from_zero else 255
    epoch = [0]

    def moment(number):
        if number in moments:
            epoch[0] += 1
            device.content = bytes([epoch[0]] * 8)
            transport.config_changed()

    device.content = bytes(8)
    moment(0)
    first = transport.read_generation()
    moment(1)
    low = transport.read_config(0, 4)
    moment(2)
    high = transport.read_config(4, 4)
    moment(3)
    last = transport.read_generation()
    assert low == high or first != last
    assert 0 <= last <= 255
    if not moments & {1, 2, 3}:
        assert first == last


# --- queues -----------------------------------------------------------------------------------------------------------


def test_an_enabled_queue_stays_as_it_is(driver):
    """3.1.1: queues are set up before DRIVER_OK; later writes go nowhere, one line is logged."""
    for _ in range(1000):
        driver.transport.queue_select = 0
        driver.transport.set_queue_size(2)
        for area in ("descriptors", "available", "used"):
            driver.transport.set_queue_address(area, 0xDEAD_0000, ALL_BITS)
        driver.transport.enable_queue()
    assert driver.ask(0, b"abc", 3) == b"abc"
    assert len(driver.device.log._once) == 1


def test_no_queue_is_enabled_before_the_features_are_known(fresh):
    fresh.transport.write_status(ACKNOWLEDGE | DRIVER)
    fresh.transport.enable_queue()
    assert not fresh.device.queues[0].is_enabled
    assert not fresh.transport.status & NEEDS_RESET


@pytest.mark.parametrize("size", [0, 3, 17, 32, 0xFFFF, 0xFFFF_FFFF])
def test_2_7_a_wrong_size_needs_a_reset(driver, size):
    transport = driver.transport
    negotiate(transport, F_VERSION_1)
    transport.queue_select = 1
    transport.set_queue_size(size)
    transport.enable_queue()
    assert transport.status & NEEDS_RESET
    driver.start()
    assert driver.ask(1, b"abc", 3) == b"abc"


def test_queues_are_independent_until_one_is_broken(driver):
    transport = driver.transport
    transport.queue_select = 0
    transport.disable_queue()
    transport.disable_queue()
    assert driver.ask(1, b"abc", 3) == b"abc"
    break_ring(driver, 1)
    assert transport.status & NEEDS_RESET
    driver.start()
    assert driver.ask(0, b"abc", 3) == b"abc"


def test_isr_bits_are_taken_one_by_one(driver):
    driver.ask(0, b"a", 1)
    driver.transport.config_changed()
    assert driver.transport.peek_isr() == 3
    assert driver.transport.take_isr(1) == 1
    assert driver.transport.take_isr(1) == 0
    assert driver.transport.take_isr() == 2
    assert driver.transport.peek_isr() == 0
