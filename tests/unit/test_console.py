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
    assert console.expect(r"version (\d+)\.(\d+)", timeout=5).groups() == (b"6", b"1")
    assert console.output == b"Linux version 6.1\r\n"


def test_expect_goes_on_after_the_last_match(console):
    console.write_from_guest(b"# one\n# two\n")
    assert console.expect("# (.*)$").group(1) == b"one"
    assert console.expect("# (.*)$").group(1) == b"two"
    assert console.read() == b"\n"
    assert console.read() == b""


def test_expect_waits_for_what_comes_later(console):
    threading.Timer(0.05, console.write_from_guest, [b"login: "]).start()
    console.expect("login: ", timeout=5)


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


def test_input_waits_until_the_guest_takes_it(console):
    taken = bytearray()

    def deliver(data):
        room = min(16, len(data))
        taken.extend(data[:room])
        return room

    console.deliver = deliver
    assert console.write("a" * 100) == 100
    deadline = time.monotonic() + 5
    while len(taken) < 100 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert bytes(taken) == b"a" * 100


def test_input_that_nobody_reads_is_bounded(console):
    console.deliver = lambda _data: 0
    assert console.write(b"x" * (MAX_PENDING + 5)) == MAX_PENDING
    assert console.write(b"x") == 0


@pytest.mark.parametrize("split", [0, 5, 20, 26])
def test_a_panic_is_seen_even_when_it_comes_in_pieces(console, split):
    words = []
    console.on_panic = words.append
    text = b"[    1.0] Kernel panic - not syncing: VFS: Unable to mount root fs\r\n---[ end Kernel panic - not syncing"
    console.write_from_guest(text[:split])
    console.pump()
    console.write_from_guest(text[split:])
    console.pump()
    deadline = time.monotonic() + 5
    while not words and time.monotonic() < deadline:
        time.sleep(0.001)
    assert words == ["VFS: Unable to mount root fs"]
