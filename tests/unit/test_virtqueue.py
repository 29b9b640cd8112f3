"""The device's half of a queue: every MUST of 2.7 that falls to it, and every malformed shape."""

from struct import pack, unpack_from

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtio_driver import (
    F_EVENT_IDX,
    F_INDIRECT,
    HIGH,
    HIGH_BASE,
    INDIRECT,
    LOW,
    NEEDS_RESET,
    NEXT,
    WRITE,
    Driver,
    FakeRam,
)

from devices.events import EventLog
from devices.virtio.device import VirtioDevice
from devices.virtio.queue import BrokenQueueError, Queue


class Echo(VirtioDevice):
    """Writes back what it reads."""

    device_id = 42

    def __init__(self, ram, size=16, *, in_order=False):
        super().__init__("echo0", ram, queue_sizes=[size], in_order=in_order, log=EventLog(device="echo0"))
        self.handled = 0

    def handle(self, queue, chain):
        self.handled += 1
        return chain.scatter(chain.gather(1 << 20))


@pytest.fixture
def ram():
    return FakeRam()


@pytest.fixture
def driver(ram):
    return Driver(Echo(ram), ram)


def test_2_7_4_1_no_assumptions_about_framing(driver):
    for cuts in ((), (1,), (3, 1, 1), (7, 0, 2)):
        assert driver.ask(0, b"hello world", 11, cuts=cuts) == b"hello world"


@pytest.mark.parametrize("mixed", [False, True])
def test_2_7_5_3_2_indirect_tables(driver, ram, mixed):
    """Alone, and behind normal descriptors; the WRITE flag of the descriptor that refers to a table is ignored."""
    assert driver.ask(0, b"abc", 3, indirect=True) == b"abc"
    if mixed:
        ours = driver.queues[0]
        table = driver.buffer(32) & ~15
        text, answer = driver.buffer(b"xy"), driver.buffer(2)
        ours.write_descriptor(0, text + 1, 1, NEXT, 1, table=table)
        ours.write_descriptor(1, answer, 2, WRITE, table=table)
        ours.write_descriptor(3, text, 1, NEXT, 5)
        ours.write_descriptor(5, table, 32, INDIRECT | WRITE)
        ours.offer(3)
        ours.publish()
        driver.runner.kick(0)
        assert ours.collect() == [(3, 2)]
        assert ram.read(answer, 2) == b"xy"


def test_2_7_8_2_the_length_is_what_was_written(driver):
    head, _ = driver.send(0, b"abc", 10)
    assert driver.queues[0].collect() == [(head, 3)]


def test_2_7_7_2_flags_suppress_interrupts(ram):
    driver = Driver(Echo(ram), ram, features=F_INDIRECT)
    ours, signal = driver.queues[0], driver.signals[0]
    driver.ask(0, b"a", 1)
    assert signal.count == 1
    assert driver.transport.take_isr() == 1
    ours.want_interrupt(wanted=False)
    driver.ask(0, b"a", 1)
    assert signal.count == 1
    ours.want_interrupt()
    driver.ask(0, b"a", 1)
    assert signal.count == 2


def test_2_7_7_2_used_event_decides_when_there_is_one(driver):
    """Nothing until the entry that used_event names is passed; the flags are ignored."""
    ours, signal = driver.queues[0], driver.signals[0]
    driver.ram.write(ours.available, pack("<H", 1))  # NO_INTERRUPT, which must be ignored now
    ours.want_interrupt(at=2)
    driver.ask(0, b"a", 1)
    driver.ask(0, b"a", 1)
    assert signal.count == 0
    driver.ask(0, b"a", 1)
    assert signal.count == 1
    driver.ask(0, b"a", 1)
    assert signal.count == 1


def test_a_batch_is_one_interrupt(driver):
    ours = driver.queues[0]
    for _ in range(4):
        ours.offer(ours.chain([(driver.buffer(b"x"), 1, False), (driver.buffer(1), 1, True)]))
    ours.publish()
    driver.runner.kick(0)
    assert len(ours.collect()) == 4
    assert driver.signals[0].count == 1


@pytest.mark.parametrize("features", [0, F_EVENT_IDX])
def test_2_7_10_2_a_kick_is_asked_for_whenever_the_queue_is_left_empty(ram, features):
    driver = Driver(Echo(ram), ram, features=features)
    for _ in range(40):  # more than the queue is long
        assert driver.ask(0, b"a", 1) == b"a"  # it would not come back if no kick were wanted


def test_indices_wrap_at_65536(ram):
    driver = Driver(Echo(ram), ram)
    for start in (65530,):
        for item in range(3):
            driver.device.queues[0].cursor[item] = start
        ours = driver.queues[0]
        ours.idx = ours.seen = start
        ram.write(ours.available + 2, pack("<H", start))
        ram.write(ours.used + 2, pack("<H", start))
        ram.write(ours.used + 4 + 8 * ours.size, pack("<H", start))
        for _ in range(12):
            ours.want_interrupt()
            before = driver.signals[0].count
            assert driver.ask(0, b"abc", 3) == b"abc"
            assert driver.signals[0].count == before + 1


def test_zero_length_descriptors_are_skipped(driver):
    ours = driver.queues[0]
    answer = driver.buffer(1)
    head = ours.chain([(0xDEAD0000_0000, 0, False), (driver.buffer(b"z"), 1, False), (answer, 1, True), (0, 0, True)])
    ours.offer(head)
    ours.publish()
    driver.runner.kick(0)
    assert ours.collect() == [(head, 1)]


# --- malformed --------------------------------------------------------------------------------------------------------


def one(*pieces):
    """Chains of (gpa, length, flags, next) from descriptor 0 on."""

    def make(driver):
        for index, piece in enumerate(pieces):
            driver.queues[0].write_descriptor(index, *piece)
        return 0

    return make


def table_of(*pieces, length=None, flags=INDIRECT):
    """An indirect table at 0x8000."""

    def make(driver):
        ours = driver.queues[0]
        for index, piece in enumerate(pieces):
            ours.write_descriptor(index, *piece, table=0x8000)
        ours.write_descriptor(0, 0x8000, 16 * len(pieces) if length is None else length, flags, 1)
        return 0

    return make


BAD = {
    "head beyond the queue": lambda driver: 16,
    "head 65535": lambda driver: 65535,
    "next beyond the queue": one((0x9000, 1, NEXT, 16)),
    "a loop of one": one((0x9000, 1, NEXT, 0)),
    "a loop of two": one((0x9000, 1, NEXT, 1), (0x9000, 1, NEXT, 0)),
    "readable behind writable": one((0x9000, 1, WRITE | NEXT, 1), (0x9000, 1, 0, 0)),
    "not RAM": one((LOW, 1, 0, 0)),
    "across RAM's end": one((LOW - 1, 2, 0, 0)),
    "across the high RAM's end": one((HIGH_BASE + HIGH - 1, 2, 0, 0)),
    "in the hole": one((0xFEE00000, 4, 0, 0)),
    "address and length wrap": one(((1 << 64) - 1, 2, 0, 0)),
    "the longest length": one((0, 0xFFFFFFFF, 0, 0)),
    "indirect and next": table_of((0x9000, 1, 0, 0), flags=INDIRECT | NEXT),
    "indirect within indirect": table_of((0x9000, 16, INDIRECT, 0)),
    "an indirect table of no whole entries": table_of((0x9000, 1, 0, 0), length=24),
    "an empty indirect table": table_of(length=0),
    "an indirect table beyond RAM": one((LOW - 16, 32, INDIRECT, 0)),
    "a huge indirect table": one((0, 16 * 4096, INDIRECT, 0)),
    "next beyond the indirect table": table_of((0x9000, 1, NEXT, 1)),
    "a loop in an indirect table": table_of((0x9000, 1, NEXT, 0)),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_chain_latches_the_device(driver, name):
    """DEVICE_NEEDS_RESET and a configuration interrupt (2.1.2), nothing consumed, idle, and one reset mends it."""
    ours = driver.queues[0]
    ours.offer(BAD[name](driver))
    ours.publish()
    for _ in range(1000):
        driver.runner.kick(0)
    assert driver.transport.status & NEEDS_RESET
    assert driver.config_signal.count == 1
    assert driver.transport.take_isr() == 2
    assert ours.collect() == []
    assert driver.device.handled == 0
    assert len(driver.device.log._once) == 1
    driver.start()
    assert driver.ask(0, b"again", 5) == b"again"


def test_what_breaks_the_device_meanwhile_ends_a_batch(driver):
    """Another queue's thread latches it: the chain in hand is completed, and no other one is taken."""
    ours, handle = driver.queues[0], driver.device.handle

    def breaks(queue, chain):
        driver.device.fail(queue, BrokenQueueError("elsewhere"))
        return handle(queue, chain)

    driver.device.handle = breaks
    for _ in range(3):
        ours.offer(ours.chain([(0x9000, 1, False), (0xA000, 1, True)]))
    ours.publish()
    driver.runner.kick(0)
    assert [written for _, written in ours.collect()] == [1]
    assert driver.transport.status & NEEDS_RESET


def test_indirect_without_the_feature(ram):
    driver = Driver(Echo(ram), ram, features=0)
    driver.queues[0].offer(table_of((0x9000, 1, 0, 0))(driver))
    driver.queues[0].publish()
    driver.runner.kick(0)
    assert driver.transport.status & NEEDS_RESET


@pytest.mark.parametrize("ahead", [17, 1000, 65535])
def test_an_available_index_too_far_ahead(driver, ahead):
    driver.queues[0].publish(idx=ahead)
    driver.runner.kick(0)
    assert driver.transport.status & NEEDS_RESET
    assert driver.device.handled == 0


@pytest.mark.parametrize("size", [0, 3, 17, 32, 65535])
def test_a_size_that_is_no_power_of_two_or_too_large(ram, size):
    queue = Queue(ram, 0, 16)
    queue.size = size
    with pytest.raises(BrokenQueueError):
        queue.enable(0)


@pytest.mark.parametrize(
    ("area", "address"),
    [
        ("descriptors", 0x1008),
        ("available", 0x1001),
        ("used", 0x1002),
        ("descriptors", LOW - 16),
        ("available", LOW - 2),
        ("used", LOW - 4),
        ("used", 0xE0000000),
        ("descriptors", (1 << 64) - 16),
        ("used", HIGH_BASE - 4),
    ],
)
def test_rings_that_are_misaligned_or_not_in_ram(ram, area, address):
    queue = Queue(ram, 0, 16)
    queue.descriptors, queue.available, queue.used = 0x1000, 0x2000, 0x3000
    queue.enable(0)
    queue.reset()
    queue.descriptors, queue.available, queue.used = 0x1000, 0x2000, 0x3000
    setattr(queue, area, address)
    with pytest.raises(BrokenQueueError):
        queue.enable(0)
    assert not queue.is_enabled


def test_one_kick_is_bounded_work(ram):
    """A driver on another CPU that refills as fast as the device empties does not keep it for ever."""

    class Refilled(Echo):
        def handle(self, queue, chain):
            ram.write(
                driver.queues[0].available + 2, pack("<H", (unpack_from("<H", ram.read(0x1102, 2))[0] + 1) & 0xFFFF)
            )
            return super().handle(queue, chain)

    device = Refilled(ram)
    driver = Driver(device, ram)
    assert driver.queues[0].available == 0x1100
    kicks = []
    driver.runner.kick = kicks.append
    driver.queues[0].write_descriptor(0, 0x9000, 1, 0, 0)
    driver.queues[0].offer(0)
    driver.queues[0].publish()
    device.serve(0)
    assert device.handled == 16
    assert kicks == [0]


# --- any legal driver -------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(data=st.data())
def test_any_legal_driver_gets_every_chain_answered_once_and_in_order(data):
    ram = FakeRam()
    features = data.draw(st.sampled_from([0, F_INDIRECT, F_EVENT_IDX, F_INDIRECT | F_EVENT_IDX]))
    size = data.draw(st.sampled_from([2, 4, 16]))
    driver = Driver(Echo(ram), ram, features=features, size=size)
    ours = driver.queues[0]
    expected = []
    for _ in range(data.draw(st.integers(1, 30))):
        if data.draw(st.booleans()):
            ours.want_interrupt(wanted=data.draw(st.booleans()))
        text = data.draw(st.binary(min_size=1, max_size=20))
        cuts = data.draw(st.lists(st.integers(1, 5), max_size=2))
        indirect = bool(features & F_INDIRECT) and data.draw(st.booleans())
        needed = 1 if indirect else 2 * (len(cuts) + 1)
        if len(ours.free) < needed:
            cuts = []
            if not indirect and len(ours.free) < 2:
                continue
        if driver.memory > LOW - 4096:
            break
        head, target = driver.send(0, text, len(text), cuts=cuts, indirect=indirect)
        expected.append((head, len(text), target, text))
        for got in ours.collect():
            head, length, target, text = expected.pop(0)
            assert got == (head, length)
            assert ram.read(target, length) == text
    assert expected == []
