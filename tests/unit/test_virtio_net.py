"""The network device, in the driver's words (Virtio 1.2, 5.1)."""

from struct import unpack_from

import pytest
from virtio_driver import NEEDS_RESET, Driver, FakeRam

from devices.events import EventLog
from devices.virtio.net import Net, parse_mac, random_mac

RX, TX = 0, 1
HEADER = 12
F_MAC, F_MRG_RXBUF, F_STATUS = 1 << 5, 1 << 15, 1 << 16
MAC = bytes.fromhex("525400123456")


class Network:
    """A backend that keeps what is sent and gives what it has."""

    offered = 1 << 0 | 1 << 1
    plain_fd = None

    def __init__(self, header_size=0):
        self.header_size = header_size
        self.sent = []
        self.waiting = []
        self.accepts = True
        self.gone = False
        self.offloads = None

    def fileno(self):
        return -1

    def send(self, buffers):
        self.sent.append(b"".join(buffers))
        return self.accepts

    def receive(self, buffer):
        if self.gone:
            raise OSError(5, "gone")
        if not self.waiting:
            return None
        frame = self.waiting.pop(0)
        buffer[: len(frame)] = frame
        return len(frame)

    def set_offloads(self, features):
        self.offloads = features


@pytest.fixture
def network():
    return Network()


@pytest.fixture
def ram():
    return FakeRam()


def interface(ram, network, features=None):
    device = Net("net0", ram, network, mac=MAC, log=EventLog(device="net0"))
    device.watching = []
    device.on_watch = device.watching.append
    return Driver(device, ram, features=features)


@pytest.fixture
def driver(ram, network):
    return interface(ram, network)


def give_buffers(driver, *sizes):
    return [driver.send(RX, b"", size) for size in sizes]


def arrive(driver, network, *frames):
    network.waiting += frames
    driver.device.host_ready()


def test_a_frame_is_sent_without_its_header(driver, network):
    head, _ = driver.send(TX, bytes(HEADER) + b"frame", 0)
    assert network.sent == [b"frame"]
    assert driver.queues[TX].collect() == [(head, 0)]
    for cuts in ((12,), (5,), (13, 1)):
        driver.send(TX, bytes(HEADER) + b"frame", 0, cuts=cuts)
    assert set(network.sent) == {b"frame"}


def test_a_network_with_headers_gets_them(ram):
    network = Network(HEADER)
    driver = interface(ram, network)
    driver.send(TX, b"h" * HEADER + b"frame", 0)
    assert network.sent == [b"h" * HEADER + b"frame"]


@pytest.mark.parametrize("mergeable", [True, False])
def test_5_1_6_4_a_frame_arrives_behind_its_header(ram, network, mergeable):
    driver = interface(ram, network, None if mergeable else F_MAC)
    ((_, target),) = give_buffers(driver, 2000)
    arrive(driver, network, b"f" * 100)
    assert driver.queues[RX].collect()[0][1] == HEADER + 100
    assert ram.read(target, HEADER) == bytes(10) + b"\1\0"  # num_buffers
    assert ram.read(target + HEADER, 100) == b"f" * 100


def test_5_1_6_4_1_a_frame_over_several_buffers_fills_all_but_the_last(driver, network, ram):
    given = give_buffers(driver, 100, 100, 100, 100)
    arrive(driver, network, bytes(range(250)))
    done = driver.queues[RX].collect()
    assert [written for _, written in done] == [100, 100, 62]
    assert unpack_from("<H", ram.read(given[0][1], HEADER), 10)[0] == 3
    data = b"".join(ram.read(target, written) for (_, target), (_, written) in zip(given, done, strict=False))
    assert data[HEADER:] == bytes(range(250))
    arrive(driver, network, b"next")
    assert driver.queues[RX].collect()[0] == (given[3][0], HEADER + 4)  # the fourth was not touched


def test_without_buffers_frames_stay_in_the_host(driver, network):
    """The backend is watched no more until there are some; then the frame that was taken comes first."""
    arrive(driver, network, b"one", b"two", b"three")
    assert driver.device.watching[-1] is False
    assert len(network.waiting) == 2
    driver.device.host_ready()
    assert len(network.waiting) == 2
    ((_, target),) = give_buffers(driver, 100)
    assert driver.ram.read(target + HEADER, 3) == b"one"
    assert len(network.waiting) == 1


def test_too_few_buffers_are_left_until_there_are_more(driver, network):
    give_buffers(driver, 50)
    arrive(driver, network, bytes(100))
    assert driver.queues[RX].collect() == []
    give_buffers(driver, 70)
    assert [written for _, written in driver.queues[RX].collect()] == [50, 62]


def test_a_frame_that_no_buffer_holds_is_dropped(ram, network):
    driver = interface(ram, network, F_MAC)
    give_buffers(driver, 50, 200)
    arrive(driver, network, bytes(100), b"next")
    assert [written for _, written in driver.queues[RX].collect()] == [0, HEADER + 4]
    assert driver.device.dropped == 1


@pytest.mark.parametrize("size", [0, 5, 11])
def test_a_frame_without_its_header(driver, size):
    driver.send(TX, bytes(size), 0) if size else driver.send(TX, b"", 5)
    assert driver.transport.status & NEEDS_RESET


def test_an_empty_or_endless_frame_is_dropped(driver, network):
    driver.send(TX, bytes(HEADER), 0)
    driver.send(TX, bytes(HEADER + 70000), 0)
    assert network.sent == []
    assert driver.device.dropped == 2
    assert len(driver.queues[TX].collect()) == 2


def test_what_the_host_does_not_take_is_counted(driver, network):
    network.accepts = False
    driver.send(TX, bytes(HEADER) + b"x", 0)
    assert (driver.device.sent, driver.device.dropped) == (0, 1)


def test_a_network_that_vanishes_takes_the_link_down(driver, network):
    give_buffers(driver, 100)
    network.gone = True
    driver.device.host_ready()
    assert unpack_from("<H", driver.device.config(), 6)[0] == 0
    assert driver.config_signal.count == 1
    assert driver.device.watching[-1:] in ([], [False])
    driver.send(TX, bytes(HEADER) + b"x", 0)
    assert not driver.transport.status & NEEDS_RESET


def test_configuration_and_features(driver, network):
    assert driver.device.config()[:8] == MAC + b"\1\0"
    assert driver.device.offered & (F_MAC | F_MRG_RXBUF | F_STATUS | 3) == F_MAC | F_MRG_RXBUF | F_STATUS | 3
    assert network.offloads == driver.wanted


def test_reset_forgets_a_frame_that_waits(driver, network):
    arrive(driver, network, b"old")
    driver.start()
    give_buffers(driver, 100)
    arrive(driver, network, b"new")
    ((_, written),) = driver.queues[RX].collect()
    assert written == HEADER + 3


NO_MACS = (
    *("", "52:54:00:12:34", "52:54:00:12:34:56:78", "x2:54:00:12:34:56", "525400123456", "5:::::6", "-1:0:0:0:0:0"),
    *("01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00"),
)


@pytest.mark.parametrize("text", NO_MACS)
def test_no_mac(text):
    with pytest.raises(ValueError, match="mac is"):
        parse_mac(text)


def test_macs():
    assert parse_mac("52:54:00:12:34:56") == MAC
    assert parse_mac("52-54-0-12-34-56") == MAC
    for _ in range(20):
        mac = random_mac()
        assert mac[0] & 3 == 2  # a station's, and locally administered
