"""The socket device, in the driver's words (Virtio 1.2, 5.10), and its host side."""

import socket
from struct import pack, unpack_from

import pytest
from test_virtio_console import Loop
from virtio_driver import NEEDS_RESET, Driver, FakeRam

from devices.backends.vsock_host import VsockHost
from devices.events import EventLog
from devices.virtio.vsock import Vsock

RX, TX, EVENT = 0, 1, 2
REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(1, 8)
CID, HOST = 3, 2
HEADER = 44
BUFFER = 65536


class End:
    """The host's end of a stream."""

    def __init__(self):
        self.got, self.waiting = b"", b""
        self.room = 1 << 30
        self.closed = self.ended = self.at_end = self.gone = False
        self.ok = None
        self.watched = False

    def accepted(self, host_port):
        self.ok = host_port

    def receive(self, most):
        if not self.waiting:
            return b"" if self.at_end else None
        data, self.waiting = self.waiting[:most], self.waiting[most:]
        return data

    def send(self, data):
        if self.gone:
            raise BrokenPipeError(32, "gone")
        taken = min(len(data), self.room)
        self.got += data[:taken]
        self.room -= taken
        return taken

    def watch(self, wanted):
        self.watched = wanted

    def is_closed_by_peer(self):
        return self.gone

    def end_output(self):
        self.ended = True

    def close(self):
        self.closed = True


class Guest:
    """A driver of the device, with packets as tuples."""

    def __init__(self):
        self.ends = {}
        ram = FakeRam()
        self.device = Vsock("vsock0", ram, cid=CID, connect=self.ends.get, log=EventLog(device="vsock0"))
        self.driver = Driver(self.device, ram)
        self.targets = {}

    def say(
        self,
        op,
        data=b"",
        *,
        port=1000,
        to=80,
        flags=0,
        room=1 << 20,
        forwarded=0,
        src=CID,
        dst=HOST,
        kind=1,
        size=None,
    ):
        header = pack(
            "<QQIIIHHIII", src, dst, port, to, len(data) if size is None else size, kind, op, flags, room, forwarded
        )
        self.driver.send(TX, header + data, 0)
        self.driver.queues[TX].collect()

    def hear(self, buffers=8):
        """Give receive buffers; return (op, flags, data) of each packet."""
        while len(self.targets) < buffers:
            head, target = self.driver.send(RX, b"", 4096)
            self.targets[head] = target
        packets = []
        for head, written in self.driver.queues[RX].collect():
            data = self.driver.ram.read(self.targets.pop(head), written)
            src, dst, src_port, dst_port, size, kind, op, flags, self.room, self.forwarded = unpack_from(
                "<QQIIIHHIII", data
            )
            assert (src, dst, kind, size) == (HOST, CID, 1 if kind == 1 else kind, len(data) - HEADER)
            self.ports = src_port, dst_port
            packets.append((op, flags, data[HEADER:]))
        return packets

    def connect(self):
        self.ends[80] = end = End()
        self.say(REQUEST)
        assert self.hear() == [(RESPONSE, 0, b"")]
        return end


@pytest.fixture
def guest():
    return Guest()


def test_configuration(guest):
    assert guest.device.config() == pack("<Q", CID)


def test_a_connection_to_the_host(guest):
    end = guest.connect()
    assert guest.ports == (80, 1000)
    assert guest.room == BUFFER
    guest.say(RW, b"hello")
    assert end.got == b"hello"
    end.waiting = b"answer"
    end.on_readable()
    assert guest.hear() == [(RW, 0, b"answer")]
    assert guest.forwarded == 5


def test_nobody_listens(guest):
    guest.say(REQUEST)
    assert guest.hear() == [(RST, 0, b"")]


def test_a_connection_from_the_host(guest):
    end = End()
    assert guest.device.open(end, 77)
    assert guest.hear() == [(REQUEST, 0, b"")]
    host_port, guest_port = guest.ports
    assert guest_port == 77
    guest.say(RESPONSE, port=77, to=host_port)
    assert end.ok == host_port
    assert end.watched
    refused = End()
    guest.device.open(refused, 78)
    guest.hear()
    guest.say(RST, port=78, to=guest.ports[0])
    assert refused.closed
    assert refused.ok is None


def test_the_guests_credit_is_never_exceeded(guest):
    end = guest.connect()
    end.waiting = bytes(1000)
    guest.say(CREDIT_UPDATE, room=100)
    end.on_readable()
    assert sum(len(data) for op, _, data in guest.hear() if op == RW) == 100
    end.on_readable()
    assert guest.hear() == []
    guest.say(CREDIT_UPDATE, room=100, forwarded=60)
    end.on_readable()
    assert sum(len(data) for _, _, data in guest.hear()) == 60


def test_a_host_that_does_not_read_stalls_the_guest_and_memory_is_bounded(guest):
    end = guest.connect()
    end.room = 0
    for _ in range(16):
        guest.say(RW, bytes(4096))
    assert guest.hear() == []
    guest.say(RW, b"x")  # more than its credit
    assert guest.hear() == [(RST, 0, b"")]
    assert end.closed


def test_the_guest_learns_that_there_is_room_again(guest):
    end = guest.connect()
    end.room = 0
    for _ in range(16):
        guest.say(RW, bytes(4096))
    end.room = 1 << 20
    end.on_writable()
    assert guest.hear() == [(CREDIT_UPDATE, 0, b"")]
    assert guest.forwarded == BUFFER
    guest.say(CREDIT_REQUEST)
    assert guest.hear() == [(CREDIT_UPDATE, 0, b"")]


def test_half_close_by_the_guest(guest):
    end = guest.connect()
    guest.say(SHUTDOWN, flags=2)
    assert end.ended
    assert not end.closed
    end.waiting = b"still"
    end.on_readable()
    assert guest.hear() == [(RW, 0, b"still")]
    guest.say(SHUTDOWN, flags=3)
    assert guest.hear() == [(RST, 0, b"")]
    assert end.closed


def test_a_shutdown_waits_for_what_is_on_its_way(guest):
    end = guest.connect()
    end.room = 2
    guest.say(RW, b"abc")
    guest.say(SHUTDOWN, flags=3)
    assert guest.hear() == []
    end.room = 10
    end.on_writable()
    assert end.got == b"abc"
    assert guest.hear() == [(RST, 0, b"")]


@pytest.mark.parametrize(("gone", "flags"), [(False, 2), (True, 3)])
def test_the_end_of_the_hosts_stream(guest, gone, flags):
    end = guest.connect()
    end.at_end, end.gone = True, gone
    end.on_readable()
    assert guest.hear() == [(SHUTDOWN, flags, b"")]


def test_a_host_that_is_gone_when_the_guest_sends(guest):
    end = guest.connect()
    end.gone = True
    guest.say(RW, b"x")
    assert guest.hear() == [(RST, 0, b"")]


@pytest.mark.parametrize("op", [RESPONSE, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST, 0, 99])
def test_5_10_6_4_1_what_belongs_to_no_connection_is_answered_rst(guest, op):
    guest.say(op)
    assert guest.hear() == [(RST, 0, b"")]


def test_an_rst_is_never_answered(guest):
    guest.say(RST)
    assert guest.hear() == []
    end = guest.connect()
    guest.say(RST)
    assert guest.hear() == []
    assert end.closed


def test_what_is_not_addressed_right_is_ignored(guest):
    guest.connect()
    guest.say(RW, b"x", src=4)
    guest.say(RW, b"x", dst=1)
    guest.say(RW, b"x", size=1 << 20)
    guest.say(RW, b"x", size=2)
    assert guest.hear() == []
    assert guest.ends[80].got == b""
    guest.say(REQUEST, kind=2, port=5)
    assert guest.hear() == [(RST, 0, b"")]


def test_a_second_request_on_a_connection(guest):
    end = guest.connect()
    guest.say(REQUEST)
    assert guest.hear() == [(RST, 0, b"")]
    assert end.closed


def test_replies_are_bounded_and_the_guest_waits(guest):
    """A guest that gives no receive buffers fills its own transmit queue, not our memory."""
    for number in range(400):
        if not guest.driver.queues[TX].free:
            break
        guest.say(REQUEST, port=number + 1)
    assert len(guest.device._replies) <= 256
    assert not guest.driver.queues[TX].free
    heard = 0
    for _ in range(60):
        heard += len(guest.hear())
        guest.driver.queues[TX].collect()
    assert heard == 256 + 16


@pytest.mark.parametrize("size", [0, 10, 43])
def test_a_packet_without_its_header(guest, size):
    guest.driver.send(TX, bytes(size), 0 if size else 1)
    assert guest.driver.transport.status & NEEDS_RESET


def test_a_receive_buffer_that_holds_no_header(guest):
    guest.driver.send(RX, b"", 20)
    guest.say(REQUEST)
    assert guest.driver.transport.status & NEEDS_RESET


def test_connections_are_bounded(guest):
    for number in range(1100):
        guest.ends[80] = End()
        guest.say(REQUEST, port=number + 1)
        guest.hear()
    assert len(guest.device._connections) == 1024
    assert not guest.device.open(End(), 5)


def test_a_reset_closes_everything(guest):
    end = guest.connect()
    guest.driver.transport.write_status(0)
    assert end.closed
    assert not guest.device.open(End(), 5)


# --- the host side ----------------------------------------------------------------------------------------------------


@pytest.fixture
def host(tmp_path):
    loop = Loop()
    host = VsockHost(str(tmp_path / "v"), loop)
    host.loop, host.asked = loop, []
    host.open = lambda stream, port: host.asked.append((stream, port)) or True
    yield host
    host.close()


def client(host, tmp_path):
    end = socket.socket(socket.AF_UNIX)
    end.connect(str(tmp_path / "v"))
    host.loop.run()
    return end


@pytest.mark.parametrize("pieces", [[b"CONNECT 77\nmore"], [b"CON", b"NECT 7", b"7\n", b"more"]])
def test_the_connect_line_and_what_follows_it(host, tmp_path, pieces):
    end = client(host, tmp_path)
    for piece in pieces:
        end.sendall(piece)
        host.loop.run()
    ((stream, port),) = host.asked
    assert port == 77
    stream.accepted(1024)
    assert end.recv(100) == b"OK 1024\n"
    assert stream.receive(100) == b"more"
    assert stream.receive(100) is None
    stream.close()
    end.close()


@pytest.mark.parametrize(
    "line", [b"CONNECT\n", b"CONNECT x\n", b"CONNECT 4294967296\n", b"HELLO 5\n", b"\n", b"C" * 40]
)
def test_a_line_that_is_wrong_ends_it(host, tmp_path, line):
    end = client(host, tmp_path)
    end.sendall(line)
    host.loop.run()
    assert host.asked == []
    try:
        assert end.recv(10) == b""
    except ConnectionResetError:
        pass
    end.close()


def test_clients_that_say_nothing_are_bounded(host, tmp_path):
    ends = [client(host, tmp_path) for _ in range(70)]
    assert len(host._undecided) == 64
    for end in ends:
        end.close()


def test_a_guest_reaches_the_socket_with_its_port(host, tmp_path):
    assert host.connect(5) is None
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "v_5"))
    server.listen()
    stream = host.connect(5)
    end, _ = server.accept()
    assert stream.send(b"hi") == 2
    assert end.recv(10) == b"hi"
    assert not stream.is_closed_by_peer()
    end.close()
    assert stream.is_closed_by_peer()
    assert stream.receive(10) == b""
    stream.close()
    server.close()
