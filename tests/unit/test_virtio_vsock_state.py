"""The socket device carried into another, or back: connections end there, and the guest learns of it (5.10.6.7)."""

from struct import pack

import pytest
from test_virtio_vsock import CID, EVENT, RESPONSE, RST, RW, RX, TX, End, Guest

from devices.events import EventLog
from devices.virtio.vsock import Vsock

EVENT_SIZE = 4
TRANSPORT_RESET = 0
HEADER = 44


def events(guest, buffers=2):
    """Give buffers to the event queue and return what comes."""
    ours = guest.driver.queues[EVENT]
    targets = getattr(guest, "event_targets", {})
    while len(targets) < buffers:
        head, target = guest.driver.send(EVENT, b"", EVENT_SIZE)
        targets[head] = target
    guest.event_targets = targets
    return [guest.driver.ram.read(targets.pop(head), written) for head, written in ours.collect()]


def carried(guest, *, into=None):
    """Put a guest's device into a new one of another host, or `into` one that runs; the driver goes on with it."""
    state = guest.driver.transport.state()
    ends = {} if into is None else into.ends
    if into is None:
        new = Guest.__new__(Guest)
        new.__dict__.update(guest.__dict__)
        new.ends = ends
        new.device = Vsock("vsock0", guest.driver.ram, cid=77, connect=ends.get, log=EventLog())
        transport = type(guest.driver.transport)(
            new.device, guest.driver.runner, guest.driver.signals, guest.driver.config_signal
        )
        guest.driver.runner.device = guest.driver.device = new.device
        guest.driver.transport = transport
    else:
        new = into
    guest.driver.runner.stop()
    fired = [signal.count for signal in guest.driver.signals]
    new.driver.transport.load(state)
    assert new.driver.transport.state() == state
    assert [signal.count for signal in guest.driver.signals] == fired
    return new


@pytest.fixture
def guest():
    return Guest()


def start(guest):
    assert guest.device.is_active
    guest.driver.runner.start()


def test_a_restored_guest_loses_its_connections(guest):
    """An RST for each, and the event; then everything works again."""
    guest.connect()
    guest.ends[81] = End()
    guest.say(1, port=1001, to=81)
    assert guest.hear() == [(RESPONSE, 0, b"")]
    other = carried(guest)
    start(other)
    heard = []
    for _ in range(2):
        heard += [(packet, other.ports) for packet in other.hear()]
    assert [packet for packet, _ in heard] == [(RST, 0, b"")] * 2
    assert events(other) == [pack("<I", TRANSPORT_RESET)]
    assert events(other) == []
    other.ends[80] = end = End()
    other.say(1)
    assert other.hear() == [(RESPONSE, 0, b"")]
    other.say(RW, b"data")
    assert end.got == b"data"


def test_each_rst_is_for_one_of_its_connections(guest):
    guest.connect()
    other = carried(guest)
    start(other)
    assert other.hear() == [(RST, 0, b"")]
    assert other.ports == (80, 1000)


def test_a_guest_without_connections_notices_nothing(guest):
    other = carried(guest)
    start(other)
    assert other.hear() == []
    assert events(other) == []
    assert other.device.config() == CID.to_bytes(8, "little")


def test_what_waited_for_buffers_is_still_said_when_it_is_true(guest):
    """An RST is; the answer to a connection that is gone is not."""
    guest.say(1, to=99)  # nobody there: RST waits for a buffer
    guest.ends[80] = End()
    guest.say(1)  # RESPONSE waits too
    other = carried(guest)
    start(other)
    packets = []
    for _ in range(3):
        packets += other.hear()
    assert [op for op, _, _ in packets] == [RST, RST]


def test_going_back_closes_what_the_host_opened_since(guest):
    state = guest.driver.transport.state()
    ram = bytes(guest.driver.ram.low)
    end = guest.connect()
    guest.driver.runner.stop()
    guest.driver.ram.write(0, ram)
    guest.driver.transport.load(state)
    assert end.closed
    guest.driver.queues[RX].idx = guest.driver.queues[RX].seen = 0  # as the driver was
    guest.driver.queues[TX].idx = guest.driver.queues[TX].seen = 0
    guest.driver.queues[RX].free = list(range(16))
    guest.driver.queues[TX].free = list(range(16))
    guest.targets.clear()
    start(guest)
    assert guest.hear() == []
    assert events(guest) == []


def test_a_snapshot_before_the_driver_has_heard_still_tells_it(guest):
    guest.connect()
    other = carried(carried(guest))
    start(other)
    assert other.hear() == [(RST, 0, b"")]
    again = carried(other)  # the event is due, no buffer has come
    start(again)
    assert again.hear() == []
    assert events(again) == [pack("<I", TRANSPORT_RESET)]


def test_a_copy_has_an_address_of_its_own(guest):
    """The old connections are reset under the old one; the driver is told to ask for the new one."""
    guest.connect()
    other = carried(guest)
    start(other)
    other.device.set_cid(55)
    assert other.hear() == [(RST, 0, b"")]
    assert events(other) == [pack("<I", TRANSPORT_RESET)]
    assert other.driver.transport.read_config(0, 8) == 55
    other.ends[80] = End()
    other.say(1, src=55)
    with pytest.raises(AssertionError):
        other.hear()  # this driver insists on its old address


def test_the_new_address_may_come_before_the_device_is_served(guest):
    guest.connect()
    other = carried(guest)
    other.device.set_cid(55)
    start(other)
    assert other.hear() == [(RST, 0, b"")]
    assert events(other) == [pack("<I", TRANSPORT_RESET)]


def test_the_same_address_is_nothing_new(guest):
    generation = guest.driver.transport.read_generation()
    guest.device.set_cid(CID)
    assert events(guest) == []
    assert guest.driver.transport.read_generation() == generation


@pytest.mark.parametrize(
    "change",
    [
        {"guest_cid": -1},
        {"guest_cid": "3"},
        {"connections": [[3, 80]]},
        {"connections": [[3, 1 << 32, 1]]},
        {"connections": [80]},
        {"connections": [[3, 80, 1]] * 5000},
        {"replies": [b"short"]},
        {"replies": [None]},
        {"replies": b"x" * HEADER},
        {"next_port": 1 << 32},
        {"reset_is_due": None},
    ],
    ids=lambda change: str(change)[:40],
)
def test_no_socket_device_can_be_like_that(guest, change):
    end = guest.connect()
    state = guest.device.state()
    with pytest.raises((TypeError, ValueError)):
        guest.device.load(state | change)
    assert not end.closed
    for key in change:
        del state[key]
        with pytest.raises(KeyError):
            guest.device.load(state)
