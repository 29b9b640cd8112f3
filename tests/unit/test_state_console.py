"""The console of a guest that is saved and loaded: what is typed belongs to the guest, what it printed to the host."""

from __future__ import annotations

import threading

import pytest

from hypervisor.console import MAX_PENDING, Console, ConsoleTimeout
from hypervisor.eventloop import EventLoop
from hypervisor.kvm import ByteRing

IDLE = {"input": b"", "settled": False}
PANIC = b"Kernel panic - not syncing: %b\r\n---[ end Kernel panic"


@pytest.fixture
def consoles():
    faults = []
    made = []

    def make(*, started=False):
        loop, ring = EventLoop(faults.append), ByteRing(1 << 16)
        made.append((loop, ring))
        console = Console(ring, loop)
        if started:
            loop.start()
        return console

    yield make
    for loop, ring in made:
        loop.close()
        ring.close()
    assert faults == []


def test_output_is_the_host_s_before_the_state_is_taken(consoles):
    console = consoles()
    seen = []
    console.listeners.append(seen.append)
    console._ring.push(b"printed")
    assert console.state() == IDLE
    assert seen == [b"printed"]
    assert console.output == b"printed"


def test_input_that_the_guest_has_not_taken_is_in_the_state(consoles):
    saved, loaded = consoles(), consoles()
    saved.write("ls -l\n")
    saved.transfer(lambda data: 2)
    state = saved.state()
    assert state == {"input": b" -l\n", "settled": False}
    loaded.write("of another guest")
    loaded.load(state)
    assert loaded.state() == state
    taken = []
    loaded.transfer(lambda data: taken.append(data) or len(data))
    assert taken == [b" -l\n"]
    assert state["input"] == b" -l\n"
    assert loaded.state() == IDLE


@pytest.mark.parametrize(("settled", "looks"), [(True, 1), (False, 2)])
def test_waiting_input_is_delivered_after_the_load(consoles, settled, looks):
    """A guest that was found to listen gets it at once, any other one when it has been."""
    console = consoles(started=True)
    asked, got = [], threading.Event()
    console.ready = lambda: not asked.append(1)
    console.deliver = got.set
    console.load({"input": b"x", "settled": settled})
    assert got.wait(60)
    assert len(asked) == looks


def test_a_console_that_listens_says_so(consoles):
    console = consoles(started=True)
    got = threading.Event()
    console.deliver = got.set
    console.write("x")
    assert got.wait(60)
    assert console.state() == {"input": b"x", "settled": True}


def test_room_is_announced_when_input_is_dropped(consoles):
    console = consoles(started=True)
    console.ready = lambda: False
    announced = threading.Event()
    console.on_input_room = announced.set
    console.write(b"x" * MAX_PENDING)
    console.load(IDLE)
    assert announced.wait(60)
    assert console.input_room == MAX_PENDING


def test_output_from_before_the_load_matches_nothing(consoles):
    """Neither what has been read nor what still was in the ring; listeners get all of it."""
    console = consoles()
    seen = []
    console.listeners.append(seen.append)
    console.write_from_guest(b"one # ")
    console.expect("one")
    console._ring.push(b"two # ")
    console.load(IDLE)
    assert b"".join(seen) == b"one # two # "
    assert console.output == b""
    assert console.read() == b""
    with pytest.raises(ConsoleTimeout) as caught:
        console.expect("#", timeout=0)
    assert caught.value.output == b""
    console.write_from_guest(b"three # four")
    assert console.expect(r"(\w+) #")[1] == b"three"
    assert console.read() == b" four"
    assert console.last_lines() == ["three # four"]


def test_a_read_after_the_load_waits_for_something_new(consoles):
    console = consoles()
    console.write_from_guest(b"of before")
    console.expect("before")
    console.load(IDLE)
    timer = threading.Timer(0.05, lambda: (console.write_from_guest(b"new"), console.pump()))
    timer.start()
    assert console.read(timeout=60) == b"new"
    timer.join()


def test_who_waits_already_waits_for_what_comes_after_the_load(consoles):
    console = consoles()
    console.write_from_guest(b"login")
    found = []
    waiting = threading.Thread(target=lambda: found.append(console.expect(r"(\w+): ", timeout=60)[1]))
    waiting.start()
    console.load(IDLE)
    console.write_from_guest(b"password: ")
    console.pump()
    waiting.join()
    assert found == [b"password"]


def test_a_panic_before_the_load_was_another_guest_s(consoles, monkeypatch):
    monkeypatch.setattr("hypervisor.console.PANIC_GRACE_NS", 3600 * 10**9)  # the load comes first, however late
    console = consoles(started=True)
    words, declared = [], threading.Event()
    console.on_panic = lambda text: (words.append(text), declared.set())
    console.write_from_guest(b"Kernel panic - not syncing: of before\r\n")
    console.pump()
    assert console.panic == "of before"
    console.load(IDLE)
    assert console.panic is None
    assert console._panic_alarm.deadline_ns is None
    console._declare_panic()  # the loop had begun to when the state was loaded
    console.write_from_guest(PANIC % b"of after")
    console.pump()
    assert declared.wait(60)
    assert words == ["of after"]


def test_half_a_panic_before_the_load_is_none(consoles):
    console = consoles()
    console.write_from_guest(b"Kernel panic - not sy")
    console.load(IDLE)
    console.write_from_guest(b"ncing")
    console.pump()
    assert console.panic is None


def test_a_guest_that_had_ended_goes_on(consoles):
    console = consoles()
    console.end()
    console.load(IDLE)
    timer = threading.Timer(0.05, lambda: (console.write_from_guest(b"alive"), console.pump()))
    timer.start()
    console.expect("alive", timeout=60)
    timer.join()


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"input": b""},
        {"settled": False},
        {"input": "text", "settled": False},
        {"input": b"", "settled": 0},
        {"input": b"", "settled": None},
        {"input": bytes(MAX_PENDING + 1), "settled": False},
        {"input": b"", "settled": False, "output": b""},
        None,
        [],
    ],
)
def test_what_is_no_state_is_refused(consoles, state):
    console = consoles()
    console.write("kept")
    console.write_from_guest(b"printed")
    with pytest.raises((KeyError, TypeError, ValueError)):
        console.load(state)
    assert console.state() == {"input": b"kept", "settled": False}
    assert console.output == b"printed"
