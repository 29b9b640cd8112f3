"""The console between the ring, the UART and whoever listens."""

import threading
import time

import pytest

from hypervisor.console import KEPT, MAX_PENDING, Console, ConsoleTimeout
from hypervisor.eventloop import EventLoop
from hypervisor.kvm import ByteRing


@pytest.fixture
def loop():
    faults = []
    loop = EventLoop(faults.append)
    yield loop
    loop.close()
    assert faults == []


@pytest.fixture
def ring():
    ring = ByteRing(1 << 16)
    yield ring
    ring.close()


@pytest.fixture
def console(ring, loop):
    console = Console(ring, loop)
    loop.start()
    return console


def test_what_the_run_loop_pushes_is_output(console, ring):
    ring.push(b"Linux version 6.1\r\n")
    assert console.expect(r"version (\d+)\.(\d+)", timeout=60).groups() == (b"6", b"1")
    assert console.output == b"Linux version 6.1\r\n"


def test_expect_goes_on_after_the_last_match(console):
    console.write_from_guest(b"# one\n# two\n")
    assert console.expect("# (.*)$").group(1) == b"one"
    assert console.expect("# (.*)$").group(1) == b"two"
    assert console.read() == b"\n"
    assert console.read() == b""


def test_expect_waits_for_what_comes_later(console):
    threading.Timer(0.05, console.write_from_guest, [b"login: "]).start()
    console.expect("login: ", timeout=60)


def test_a_timeout_shows_the_last_lines(console):
    console.write_from_guest(b"".join(b"line %d\n" % i for i in range(40)))
    with pytest.raises(ConsoleTimeout) as caught:
        console.expect("never", timeout=0.05)
    assert "line 39" in str(caught.value)
    assert "line 25" in str(caught.value)
    assert "line 24" not in str(caught.value)
    assert "0.05 s" in str(caught.value)


def test_expect_ends_with_the_machine(console):
    threading.Timer(0.05, console.end).start()
    with pytest.raises(ConsoleTimeout, match="the machine ended"):
        console.expect("never", timeout=None)


def test_output_beyond_the_ring_is_in_order(console):
    data = bytes(range(256)) * 1024
    seen = []
    console.listeners.append(seen.append)
    console.write_from_guest(data)
    console.pump()
    assert b"".join(seen) == data


def test_only_the_last_mebibyte_is_kept(console):
    for _ in range(40):
        console.write_from_guest(b"x" * (1 << 15))
    console.write_from_guest(b"the end")
    assert len(console.output) == KEPT
    console.expect("the end")


class Receiver:
    """A device's receiver with room for 16 bytes; `read` is the guest, which makes room for more."""

    def __init__(self, console):
        self.console = console
        self.lock = threading.Lock()
        self.fifo = b""
        self.listening = True
        console.deliver = self.deliver
        console.ready = lambda: self.listening

    def deliver(self):
        with self.lock:
            self.console.transfer(self.receive)

    def receive(self, data):
        taken = data[: 16 - len(self.fifo)]
        self.fifo += taken
        return len(taken)

    def read(self):
        with self.lock:
            data, self.fifo = self.fifo, b""
            self.console.transfer(self.receive)
        return data


def read_all(receiver, size):
    data = b""
    deadline = time.monotonic() + 60
    while len(data) < size and time.monotonic() < deadline:
        data += receiver.read() if receiver.fifo else b""
        time.sleep(0.0005)
    return data


def test_input_comes_in_order_as_the_guest_takes_it(console):
    receiver = Receiver(console)
    data = bytes(range(200)) * 10
    assert console.write(data[:700]) == 700
    assert console.write(data[700:]) == 1300
    assert read_all(receiver, len(data)) == data
    assert console.input_room == MAX_PENDING


def test_input_waits_until_the_guest_listens(console):
    receiver = Receiver(console)
    receiver.listening = False
    console.write("hello")
    time.sleep(0.2)
    assert receiver.fifo == b""
    receiver.listening = True
    assert read_all(receiver, 5) == b"hello"


def test_input_that_nobody_reads_is_bounded_and_room_is_announced(console):
    announced = threading.Event()
    console.on_input_room = announced.set
    assert console.write(b"x" * (MAX_PENDING + 5)) == MAX_PENDING
    assert console.write(b"x") == 0
    assert not announced.is_set()
    receiver = Receiver(console)
    console.write(b"")
    read_all(receiver, MAX_PENDING)
    assert announced.wait(60)


@pytest.mark.parametrize("split", [0, 5, 20, 26])
def test_a_panic_is_seen_even_when_it_comes_in_pieces(console, monkeypatch, split):
    monkeypatch.setattr("hypervisor.console.PANIC_GRACE_NS", 3600 * 10**9)  # its end is what it is declared at
    words = []
    console.on_panic = words.append
    text = b"[    1.0] Kernel panic - not syncing: VFS: Unable to mount root fs\r\n---[ end Kernel panic - not syncing"
    console.write_from_guest(text[:split])
    console.pump()
    console.write_from_guest(text[split:])
    console.pump()
    deadline = time.monotonic() + 60
    while not words and time.monotonic() < deadline:
        time.sleep(0.001)
    assert words == ["VFS: Unable to mount root fs"]
