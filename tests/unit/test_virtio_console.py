"""The console with ports, in the driver's words (Virtio 1.2, 5.3)."""

import socket
from struct import pack, unpack_from

import pytest
from virtio_driver import NEEDS_RESET, Driver, FakeRam

from devices.backends.errors import BackendError
from devices.backends.ports_host import FilePort, InnerPort, SocketPort
from devices.events import EventLog
from devices.virtio.console import Console

RX0, TX0, CONTROL_RX, CONTROL_TX, RX1, TX1 = range(6)
READY, ADD, _REMOVE, PORT_READY, CONSOLE_PORT, RESIZE, OPEN, NAME = range(8)


class Host:
    """A host's end with so much room."""

    def __init__(self, name, room=1 << 20):
        self.name, self.room = name, room
        self.is_open = True
        self.got = b""
        self.pending = b""

    def send(self, data):
        taken = min(len(data), self.room)
        self.got += bytes(data[:taken])
        self.room -= taken
        return taken

    def more(self):
        if self.pending:
            self.pending = self.pending[self.on_input(self.pending) :]


@pytest.fixture
def hosts():
    return [Host(""), Host("agent")]


@pytest.fixture
def driver(hosts):
    ram = FakeRam()
    return Driver(Console("console0", ram, hosts, log=EventLog(device="console0")), ram)


def control(driver, port, event, value=0):
    driver.send(CONTROL_TX, pack("<IHH", port, event, value), 0)


def messages(driver):
    """Give buffers for control messages and return those that come."""
    targets = {}
    for _ in range(12):
        head, target = driver.send(CONTROL_RX, b"", 32)
        targets[head] = target
    found = []
    for head, written in driver.queues[CONTROL_RX].collect():
        data = driver.ram.read(targets[head], written)
        found.append((*unpack_from("<IHH", data), data[8:]))
    return found


def test_output_and_input_of_both_ports(driver, hosts):
    driver.send(TX0, b"console", 0)
    driver.send(TX1, b"agent", 0, cuts=(2,))
    assert (hosts[0].got, hosts[1].got) == (b"console", b"agent")
    _, target = driver.send(RX1, b"", 3)
    assert hosts[1].on_input(b"hello") == 3
    assert driver.ram.read(target, 3) == b"hel"
    assert hosts[1].on_input(b"lo") == 0


def test_5_3_6_2_the_ports_introduce_themselves(driver):
    control(driver, 0, READY, 1)
    assert [message[:2] for message in messages(driver)] == [(0, ADD), (1, ADD)]
    driver.start()
    control(driver, 0, PORT_READY, 1)
    assert [message[:3] for message in messages(driver)] == [(0, CONSOLE_PORT, 1), (0, RESIZE, 0), (0, OPEN, 1)]
    driver.start()
    control(driver, 1, PORT_READY, 1)
    assert messages(driver) == [(1, NAME, 1, b"agent"), (1, OPEN, 1, b"")]


def test_a_driver_that_says_it_failed_hears_nothing(driver):
    control(driver, 0, READY, 0)
    control(driver, 1, PORT_READY, 0)
    control(driver, 77, PORT_READY, 1)
    control(driver, 0, 99, 1)
    assert messages(driver) == []
    assert not driver.transport.status & NEEDS_RESET


def test_opening_is_told_both_ways(driver, hosts):
    control(driver, 1, OPEN, 1)
    assert driver.device.guest_has_open(1)
    hosts[1].is_open = False
    hosts[1].on_open()
    assert messages(driver) == [(1, OPEN, 0, b"")]


def test_a_host_that_takes_nothing_stalls_the_guest(driver, hosts):
    hosts[0].room = 4
    first, _ = driver.send(TX0, b"abcdef", 0)
    driver.send(TX0, b"gh", 0)
    assert driver.queues[TX0].collect() == []
    hosts[0].room = 100
    hosts[0].on_room()
    assert hosts[0].got == b"abcdefgh"
    assert driver.queues[TX0].collect()[0] == (first, 0)
    driver.send(TX0, b"i", 0)  # the driver is asked to kick again
    assert hosts[0].got == b"abcdefghi"


def test_output_to_nobody_is_lost(driver, hosts):
    hosts[1].is_open = False
    driver.send(TX1, b"gone", 0)
    assert len(driver.queues[TX1].collect()) == 1
    assert hosts[1].got == b""


def test_input_waits_in_the_host_for_buffers(driver, hosts):
    hosts[1].pending = b"early"
    assert hosts[1].on_input(hosts[1].pending) == 0
    _, target = driver.send(RX1, b"", 10)
    assert driver.ram.read(target, 5) == b"early"


def test_resize(driver):
    driver.device.resize(132, 50)
    assert driver.device.config()[:4] == pack("<HH", 132, 50)
    assert driver.config_signal.count == 1
    assert messages(driver) == [(0, RESIZE, 0, pack("<HH", 132, 50))]


def test_control_messages_are_bounded(driver):
    for _ in range(1000):
        control(driver, 0, PORT_READY, 1)
        driver.queues[CONTROL_TX].collect()
    assert len(driver.device._messages) < 400
    assert len(driver.device.log._once) == 1


@pytest.mark.parametrize("data", [b"", b"1234567"])
def test_a_control_message_that_is_too_short(driver, data):
    driver.send(CONTROL_TX, data, 0 if data else 1)
    assert driver.transport.status & NEEDS_RESET


# --- the host's ends --------------------------------------------------------------------------------------------------


class Loop:
    """Remembers who is watched; a test calls back."""

    def __init__(self):
        self.readers, self.writers, self.soon = {}, {}, []

    def call_soon(self, callback):
        self.soon.append(callback)

    def watch(self, fd, callback):
        self.readers[fd] = callback

    def unwatch(self, fd):
        self.readers.pop(fd, None)

    def watch_writable(self, fd, callback):
        self.writers[fd] = callback

    def unwatch_writable(self, fd):
        self.writers.pop(fd, None)

    def run(self):
        due, self.soon = self.soon, []
        for callback in due:
            callback()
        for fd in [*self.readers]:
            if fd in self.readers:  # one callback may end another
                self.readers[fd]()


@pytest.fixture
def loop():
    return Loop()


@pytest.fixture
def port(tmp_path, loop):
    port = SocketPort("agent", str(tmp_path / "s"), loop)
    port.input = b""
    port.on_input = lambda data: len(data)
    yield port
    port.close()


def client_of(tmp_path, loop):
    end = socket.socket(socket.AF_UNIX)
    end.connect(str(tmp_path / "s"))
    loop.run()
    return end


def test_a_client_comes_talks_and_goes(port, loop, tmp_path):
    opened = []
    got = []
    port.on_open = lambda: opened.append(port.is_open)
    port.on_input = lambda data: got.append(data) or len(data)
    assert port.send(memoryview(b"lost")) == 4
    end = client_of(tmp_path, loop)
    end.sendall(b"in")
    loop.run()
    assert port.send(memoryview(b"out")) == 3
    assert end.recv(10) == b"out"
    assert got == [b"in"]
    end.close()
    loop.run()
    assert opened == [True, False]
    again = client_of(tmp_path, loop)
    assert port.is_open
    again.close()


def test_a_client_that_does_not_read(port, loop, tmp_path):
    rooms = []
    port.on_room = lambda: rooms.append(1)
    end = client_of(tmp_path, loop)
    total = 0
    while (taken := port.send(memoryview(bytes(65536)))) == 65536:
        total += taken
    assert total < 4 << 20
    (writer,) = loop.writers.values()
    end.recv(1 << 20)
    writer()
    assert rooms == [1]
    assert loop.writers == {}
    end.close()


def test_what_a_snapshot_held_comes_before_what_a_new_client_says(port, loop, tmp_path):
    port.held = b"old"
    assert port.held == b"old"
    end = client_of(tmp_path, loop)
    end.sendall(b"new")
    port.on_input = lambda data: 0
    loop.run()
    got = []
    port.on_input = lambda data: got.append(data) or len(data)
    port.more()
    loop.run()
    assert b"".join(got) == b"oldnew"
    port.held = b"again"  # while a client is there: nothing more of it is read
    assert loop.readers == {}
    port.held = b""
    assert len(loop.readers) == 1
    end.close()


def test_input_that_finds_no_room_stops_the_reading(port, loop, tmp_path):
    port.on_input = lambda data: 0
    end = client_of(tmp_path, loop)
    end.sendall(b"abc")
    loop.run()
    assert loop.readers == {}
    got = []
    port.on_input = lambda data: got.append(data) or len(data)
    port.more()
    assert got == [b"abc"]
    assert len(loop.readers) == 1
    end.close()


def test_a_socket_in_use_a_stale_one_and_a_long_one(port, loop, tmp_path):
    with pytest.raises(BackendError, match="in use"):
        SocketPort("x", str(tmp_path / "s"), loop)
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(tmp_path / "stale"))
    stale.close()
    SocketPort("x", str(tmp_path / "stale"), loop).close()
    assert not (tmp_path / "stale").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BackendError):
        SocketPort("x", str(tmp_path / "file"), loop)
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(BackendError, match="longer"):
        SocketPort("x", str(tmp_path / ("x" * 120)), loop)


def test_a_file_takes_output_at_its_end(tmp_path):
    path = tmp_path / "log"
    path.write_text("before\n")
    port = FilePort("x", str(path))
    assert port.send(memoryview(b"after\n")) == 6
    port.close()
    port.close()
    assert path.read_text() == "before\nafter\n"
    with pytest.raises(BackendError):
        FilePort("x", str(tmp_path / "no" / "such"))


@pytest.fixture
def inner(loop):
    port = InnerPort("agent", loop)
    port.room, port.got = 1 << 20, b""

    def take(data):
        taken = min(len(data), port.room)
        port.room -= taken
        port.got += data[:taken]
        return taken

    port.on_input = take
    return port


def test_the_program_itself_is_the_other_end(inner, loop):
    output = []
    assert inner.is_open
    assert inner.send(memoryview(b"lost")) == 4
    inner.on_output = output.append
    assert inner.send(memoryview(b"out")) == 3
    assert output == [b"out"]
    inner.write(b"in")
    inner.write(b" order")
    assert inner.got == b""  # the device is the loop's to touch
    loop.run()
    assert inner.got == b"in order"
    inner.close()


def test_what_the_guest_has_no_room_for_is_offered_again(inner, loop):
    inner.room = 3
    inner.write(b"abcdef")
    loop.run()
    assert inner.got == b"abc"
    inner.more()
    inner.room = 2
    inner.more()
    inner.room = 100
    inner.more()
    assert inner.got == b"abcdef"
    inner.write(bytes(200000))
    inner.room = 1 << 20
    loop.run()
    assert len(inner.got) == 200006


def test_what_was_written_before_a_drop_never_arrives(inner, loop):
    """When a guest is put back to an earlier moment, what was meant for it later is void."""
    inner.room = 1
    inner.write(b"old")
    loop.run()
    inner.write(b"older")
    inner.drop()
    inner.room = 100
    inner.more()
    inner.write(b"new")
    loop.run()
    assert inner.got == b"onew"
    inner.write(b"before a load")
    assert inner.held == b""
    inner.held = b"of the snapshot"
    inner.write(b"er")
    loop.run()
    assert inner.got == b"onewer"
