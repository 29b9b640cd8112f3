"""Every device model and a driver that breaks every rule: latched, told once, idle, and sound after a reset.

A model is added by a line in MODELS: how it is made, how the host gives it something to do, how to see that it works.
"""

from contextlib import contextmanager
from struct import pack
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_image import MemoryImage
from test_virtio_console import Host
from test_virtio_net import Network
from test_virtio_vsock import End
from test_virtqueue import BAD
from virtio_driver import F_VERSION_1, HIGH_BASE, LOW, NEEDS_RESET, Driver, FakeRam, FakeSignal

from devices.events import EventLog
from devices.ports import GuestFault
from devices.virtio.balloon import Balloon
from devices.virtio.block import Block
from devices.virtio.console import Console
from devices.virtio.mmio import VirtioMmio
from devices.virtio.net import Net
from devices.virtio.rng import Rng
from devices.virtio.vsock import Vsock

WRITE, NEXT = 2, 1
PAGE = 4096
MAC = bytes.fromhex("525400123456")
ENDLESS = 50_000
"""Chains in one kick that no queue of ours is long enough for."""


class Log(EventLog):
    """Keeps the names of what was logged."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def _emit(self, level, event, fields):
        self.lines.append(event)


def reclaim(gpa, size):
    if gpa + size > LOW:
        raise GuestFault(gpa, size)


class Talker(End):
    """A host's end that always has something to say."""

    def receive(self, most):
        return b"x" * most


# --- how each model works ---------------------------------------------------------------------------------------------


def make_console(ram, log):
    return Console("console0", ram, [Host(""), Host("agent")], log=log)


def type_at_console(device):
    for port in device.ports:
        port.on_input(b"typed" * 200)
    device.resize(100, 50)


def make_net(ram, log):
    return Net("net0", ram, Network(), mac=MAC, log=log)


def send_frames(device):
    device.backend.waiting += [bytes(60)] * 3
    device.host_ready()


def open_stream(device):
    device.open(Talker(), 5)


def ask_balloon(device):
    device.set_target(3)
    device.ask_for_statistics()


def block_works(driver):
    return driver.ask(0, pack("<IIQ", 8, 0, 0), 21)[-1] == 0


def net_works(driver):
    before = driver.device.sent
    driver.send(1, bytes(12 + 60))
    return driver.device.sent == before + 1


def console_works(driver):
    before = len(driver.device.ports[0].got)
    driver.send(1, b"hello")
    return len(driver.device.ports[0].got) == before + 5


def vsock_works(driver):
    _, target = driver.send(0, b"", 100)
    driver.send(1, pack("<QQIIIHHIII", 3, 2, 1000, 80, 0, 1, 1, 0, 4096, 0))
    return len(driver.queues[0].collect()) == 1 and driver.ram.read(target + 30, 2) == b"\2\0"


def balloon_works(driver):
    before = driver.device.reclaimed
    driver.send(0, pack("<I", 3))
    return driver.device.reclaimed == before + PAGE


class Model(NamedTuple):
    """A device model under attack."""

    make: object
    provoke: object
    works: object
    untouched: tuple = ()  # queues that the device never takes anything from


MODELS = {
    "block": Model(
        lambda ram, log: Block("blk0", ram, MemoryImage(bytes(1 << 16)), queues=2, log=log),
        lambda device: None,
        block_works,
    ),
    "net": Model(make_net, send_frames, net_works),
    "rng": Model(
        lambda ram, log: Rng("rng0", ram, source=bytes, log=log),
        lambda device: None,
        lambda driver: len(driver.ask(0, b"", 5)) == 5,
    ),
    "balloon": Model(lambda ram, log: Balloon("mem0", ram, reclaim=reclaim, log=log), ask_balloon, balloon_works),
    "console": Model(make_console, type_at_console, console_works),
    "vsock": Model(
        lambda ram, log: Vsock("sock0", ram, cid=3, connect=lambda port: End(), log=log), open_stream, vsock_works, (2,)
    ),
}
QUEUES = [(name, queue) for name, model in MODELS.items() for queue in range(len(model.make(FakeRam(), Log()).queues))]


class Attack:
    """A driver of one model that counts how often the model takes a chain, from any queue."""

    def __init__(self, name):
        self.model = MODELS[name]
        self.ram, self.log = FakeRam(), Log()
        self.device = self.model.make(self.ram, self.log)
        self.driver = Driver(self.device, self.ram)
        self.pops = 0
        for queue in self.device.queues:
            queue.pop = self.counted(queue.pop)

    def counted(self, pop):
        def counting():
            self.pops += 1
            assert self.pops < ENDLESS, "the device never ends"
            return pop()

        return counting

    def kick(self, queue):
        self.driver.runner.kick(queue)
        self.model.provoke(self.device)

    @contextmanager
    def refilled(self, queue, pieces):
        """Keep one chain of (address, length, flags) pieces available in all of a queue, whatever the device takes."""
        ours, theirs = self.driver.queues[queue], self.device.queues[queue]
        for index, (gpa, length, flags) in enumerate(pieces):
            ours.write_descriptor(index, gpa, length, flags, 1)
        self.ram.write(ours.available + 4, bytes(2 * ours.size))
        push_many = theirs.push_many

        def push_and_refill(done):
            push_many(done)
            ours.publish(idx=(theirs.cursor[1] + ours.size) & 0xFFFF)

        theirs.push_many = push_and_refill
        self.driver.runner.kick = lambda index: None
        ours.publish(idx=(theirs.cursor[1] + ours.size) & 0xFFFF)
        self.pops = 0
        yield
        del self.driver.runner.kick, theirs.push_many

    @property
    def is_broken(self):
        return bool(self.driver.transport.status & NEEDS_RESET)

    def check_latched(self, queue):
        """DEVICE_NEEDS_RESET, a configuration interrupt, a line; then nothing, however often it is kicked."""
        driver = self.driver
        assert self.is_broken
        assert driver.transport.take_isr() & 2
        pops, lines, interrupts = self.pops, list(self.log.lines), [signal.count for signal in driver.signals]
        assert lines.count("virtqueue.broken") == 1
        told = driver.config_signal.count
        for _ in range(300):
            driver.transport.kick(queue)
            self.device.serve(queue)
            self.device.serve(queue, most=1)
        self.model.provoke(self.device)
        assert self.pops == pops
        assert self.log.lines == lines
        assert [signal.count for signal in driver.signals] == interrupts
        assert driver.config_signal.count - told <= 1  # what the host has changed meanwhile

    def check_mended(self):
        """A reset is taken at any time, and after it the device works as ever."""
        self.driver.transport.write_status(0)
        assert self.driver.transport.status == 0
        assert not self.device.is_broken
        self.driver.start()
        assert not self.is_broken
        assert self.model.works(self.driver)
        assert not self.is_broken


# --- chains and rings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(("name", "queue"), QUEUES)
def test_malformed_chains(name, queue, bad):
    attack = Attack(name)
    ours = attack.driver.queues[queue]
    head = BAD[bad](Queues(attack.driver, queue))
    ours.offer(head)
    ours.publish()
    attack.kick(queue)
    if queue in attack.model.untouched:
        assert not attack.is_broken
    else:
        assert ours.collect() == []
        attack.check_latched(queue)
    attack.check_mended()


class Queues:
    """A driver whose first queue is another one: what `BAD` writes to."""

    def __init__(self, driver, queue):
        self.queues = [driver.queues[queue]]


@pytest.mark.parametrize("ahead", [17, 1000, 0x8000, 0xFFFF])
@pytest.mark.parametrize(("name", "queue"), QUEUES)
def test_an_available_index_too_far_ahead(name, queue, ahead):
    attack = Attack(name)
    attack.driver.queues[queue].publish(idx=ahead)
    attack.kick(queue)
    if queue not in attack.model.untouched:
        attack.check_latched(queue)
    attack.check_mended()


@pytest.mark.parametrize("size", [0, 3, 12, 0x8000, 0x1_0000, 0xFFFF_FFFF])
@pytest.mark.parametrize("name", MODELS)
def test_sizes_against_2_7(name, size):
    attack = Attack(name)
    set_up(attack, size=size)
    assert attack.is_broken
    attack.check_mended()


RINGS = [
    ("descriptors", 0x8008),
    ("available", 0x8001),
    ("used", 0x8002),
    ("descriptors", LOW - 16),
    ("available", LOW - 4),
    ("used", LOW - 4),
    ("descriptors", 0xFEC0_0000),
    ("available", HIGH_BASE - 2),
    ("used", HIGH_BASE - 4),
    ("descriptors", (1 << 64) - 16),
    ("available", (1 << 64) - 2),
    ("used", (1 << 64) - 4),
]


@pytest.mark.parametrize(("area", "address"), RINGS)
@pytest.mark.parametrize("name", MODELS)
def test_rings_against_2_7(name, area, address):
    attack = Attack(name)
    set_up(attack, **{area: address})
    assert attack.is_broken
    attack.check_mended()


def set_up(attack, *, size=4, **areas):
    """Reset the device and set its first queue up so, then say that the driver is ready."""
    transport = attack.driver.transport
    transport.write_status(0)
    transport.write_status(3)
    transport.driver_select = 1
    transport.write_driver_features(F_VERSION_1 >> 32)
    transport.write_status(11)
    transport.queue_select = 0
    transport.set_queue_size(size)
    for area, address in ({"descriptors": 0x8000, "available": 0x9000, "used": 0xA000} | areas).items():
        transport.set_queue_address(area, address, (1 << 64) - 1)
    transport.enable_queue()
    transport.write_status(15)
    attack.kick(0)


@pytest.mark.parametrize("name", MODELS)
def test_rings_that_lie_on_one_another(name):
    """The guest's own harm: whatever it reads there, the device ends and can be reset."""
    attack = Attack(name)
    set_up(attack, descriptors=0x8000, available=0x8000, used=0x8000)
    attack.ram.write(0x8000, pack("<HHH", 0, 2, 0) * 8)
    for queue in range(len(attack.device.queues)):
        attack.kick(queue)
    attack.check_mended()


# --- no unbounded work ------------------------------------------------------------------------------------------------

SHAPES = {
    "readable": [(0x9000, 64, 0)],
    "writable": [(0x9000, 64, WRITE)],
    "one writable byte": [(0x9000, 1, WRITE)],
    "both": [(0x9000, 64, NEXT), (0xA000, 64, WRITE)],
    "nothing": [(0x9000, 0, 0)],
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "queue"), QUEUES)
def test_a_driver_that_refills_as_fast_as_it_is_served(name, queue, shape):
    """It runs on another CPU: every buffer that comes back is there again at once. One call has an end nevertheless."""
    attack = Attack(name)
    with attack.refilled(queue, SHAPES[shape]):
        attack.device.serve(queue)
        attack.model.provoke(attack.device)
    attack.check_mended()


@pytest.mark.parametrize("name", MODELS)
def test_a_million_mistakes_are_one_line_each(name):
    """Broken and reset again and again: the log's length depends on the kinds of mistakes, not on their number."""
    attack = Attack(name)
    lengths = []
    for _ in range(50):
        for queue in range(len(attack.device.queues)):
            attack.driver.queues[queue].offer(0xFFFF)
            attack.driver.queues[queue].publish()
            attack.kick(queue)
            attack.driver.start()
        for value in (1, 0x40, 0x80):
            attack.driver.transport.write_status(value)
        attack.driver.start()
        lengths.append(len(attack.log.lines))
    assert lengths[0] == lengths[-1] <= 2 * len(attack.device.queues) + 4
    attack.check_mended()


# --- transport misuse -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_2_4_1_a_reset_at_any_time_leaves_the_rings_alone(name):
    """Buffers are in every queue, some held by the device; after the reset nothing of them is touched or told."""
    attack = Attack(name)
    driver = attack.driver
    for queue in range(len(attack.device.queues)):
        for _ in range(2):
            driver.send(queue, b"", 100)
            if attack.is_broken:
                driver.start()
    attack.model.provoke(attack.device)
    driver.transport.write_status(0)
    before = bytes(attack.ram.low)
    counts = [signal.count for signal in (*driver.signals, driver.config_signal)]
    attack.model.provoke(attack.device)
    for queue in range(len(attack.device.queues)):
        driver.transport.kick(queue)
        attack.device.serve(queue)
    assert bytes(attack.ram.low) == before
    assert [signal.count for signal in (*driver.signals, driver.config_signal)] == counts
    attack.check_mended()


@pytest.mark.parametrize(("name", "queue"), QUEUES)
def test_4_2_2_2_a_queue_that_is_taken_out_of_use_is_left_alone(name, queue):
    attack = Attack(name)
    driver = attack.driver
    driver.send(queue, b"\4\0" + bytes(8) if name == "balloon" else b"", 0 if name == "balloon" else 100)
    if not attack.is_broken:
        driver.transport.queue_select = queue
        driver.transport.disable_queue()
        before = bytes(attack.ram.low[driver.queues[queue].table : driver.queues[queue].end])
        attack.kick(queue)
        for index in range(len(attack.device.queues)):
            attack.kick(index)
        assert bytes(attack.ram.low[driver.queues[queue].table : driver.queues[queue].end]) == before
    attack.check_mended()


POKES = st.lists(
    st.tuples(
        st.booleans(),
        st.one_of(
            st.sampled_from([0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, 0x80, 0x90, 0xA0, 0x100, 0x104]),
            st.integers(0, 0x1FF),
        ),
        st.sampled_from([1, 2, 4, 4, 4, 4, 8]),
        st.one_of(st.sampled_from([0, 1, 3, 11, 15, 0x1000, 0x8000]), st.integers(0, (1 << 64) - 1)),
    ),
    max_size=40,
)


@settings(max_examples=120)
@given(name=st.sampled_from(sorted(MODELS)), pokes=POKES, provoked=st.sets(st.integers(0, 40)))
def test_any_accesses_to_any_device_over_mmio(name, pokes, provoked):
    """Registers and configuration space, of any width, in any state, while the host is busy with the device as well."""
    attack = Attack(name)
    attack.driver.transport = mmio = VirtioMmio(attack.device, attack.driver.runner, FakeSignal())
    attack.driver.start()
    for number, (is_read, offset, size, value) in enumerate(pokes):
        if is_read:
            assert mmio.read(offset, size) >= 0
        else:
            mmio.write(offset, size, value & (1 << 8 * size) - 1)
        if number in provoked:
            attack.model.provoke(attack.device)
    assert len(attack.log.lines) <= 64
    attack.check_mended()
