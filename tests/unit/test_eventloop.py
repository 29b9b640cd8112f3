"""Files and timers of the one waiting thread."""

import os
import socket
import threading
import time

import pytest
from waiting import until

from hypervisor.eventloop import EventLoop


@pytest.fixture
def faults():
    return []


@pytest.fixture
def loop(faults):
    loop = EventLoop(faults.append)
    loop.start()
    yield loop
    loop.close()


def test_a_readable_file_calls_back(loop):
    read_end, write_end = os.pipe()
    seen = threading.Event()

    def callback():
        os.read(read_end, 1)
        seen.set()

    loop.watch(read_end, callback)
    os.write(write_end, b"x")
    assert seen.wait(60)
    loop.unwatch(read_end)
    os.close(read_end)
    os.close(write_end)


def test_a_plain_file_cannot_be_watched(loop, tmp_path):
    with (tmp_path / "f").open("w") as file, pytest.raises(PermissionError):
        loop.watch(file.fileno(), lambda: None)
    loop.unwatch(99)


def test_an_alarm_fires_once_and_not_before_its_time(loop):
    fired = []
    alarm = loop.alarm(lambda: fired.append(time.monotonic_ns()))
    deadline = time.monotonic_ns() + 20_000_000
    alarm.set(deadline)
    until(lambda: fired)
    time.sleep(0.1)
    assert len(fired) == 1
    assert fired[0] >= deadline


def test_the_last_deadline_counts(loop):
    fired = []
    alarm = loop.alarm(lambda: fired.append(1))
    busy, go_on = threading.Event(), threading.Event()
    loop.call_soon(lambda: (busy.set(), go_on.wait(60)))
    assert busy.wait(60)
    alarm.set(time.monotonic_ns() + 10_000_000)
    alarm.set(None)  # in time, since the loop is busy
    go_on.set()
    time.sleep(0.05)
    assert fired == []
    alarm.set(time.monotonic_ns() + 60_000_000_000)
    alarm.set(time.monotonic_ns())
    until(lambda: fired)
    time.sleep(0.05)
    assert fired == [1]


def test_what_it_was_given_before_its_start_is_done_then(faults):
    loop = EventLoop(on_fault=faults.append)
    ours, theirs = os.pipe()
    done = []
    loop.watch(ours, lambda: (done.append("watch"), os.read(ours, 1)))
    loop.alarm(lambda: done.append("alarm")).set(time.monotonic_ns())
    loop.call_soon(lambda: done.append("soon"))
    os.write(theirs, b"x")
    loop.start()
    loop.start()  # once more is once
    until(lambda: len(done) == 3)
    assert sorted(done) == ["alarm", "soon", "watch"]
    assert [thread.name for thread in threading.enumerate()].count("hv-loop") == 1
    loop.close()
    os.close(ours)
    os.close(theirs)


def test_call_soon_runs_on_the_loops_thread(loop):
    names = []
    done = threading.Event()
    loop.call_soon(lambda: (names.append(threading.current_thread().name), done.set()))
    assert done.wait(60)
    assert names == ["hv-loop"]


def test_a_callback_that_fails_ends_the_loop_loudly(loop, faults):
    def fail():
        raise RuntimeError("broken")

    loop.call_soon(fail)
    deadline = time.monotonic() + 60
    while not faults and time.monotonic() < deadline:
        time.sleep(0.001)
    assert [str(fault) for fault in faults] == ["broken"]


def test_a_file_is_watched_for_reading_and_writing_at_once(loop):
    """Each has its callback; taking one away leaves the other."""
    ours, theirs = socket.socketpair()
    read, wrote = threading.Event(), threading.Event()
    try:
        loop.watch(ours.fileno(), read.set)
        loop.watch_writable(ours.fileno(), lambda: (wrote.set(), loop.unwatch_writable(ours.fileno())))
        assert wrote.wait(60)
        assert not read.is_set()
        theirs.send(b"x")
        assert read.wait(60)
        loop.unwatch(ours.fileno())
        loop.unwatch(ours.fileno())
        loop.unwatch_writable(ours.fileno())
    finally:
        ours.close()
        theirs.close()


def test_a_peer_that_is_gone_is_told_to_whoever_waits(loop):
    ours, theirs = socket.socketpair()
    fill_a_socket(ours)
    told = threading.Event()
    loop.watch_writable(ours.fileno(), lambda: (told.set(), loop.unwatch_writable(ours.fileno())))
    theirs.close()
    assert told.wait(60)
    ours.close()


def fill_a_socket(end):
    end.setblocking(False)
    try:
        while end.send(bytes(1 << 16)):
            pass
    except BlockingIOError:
        pass


def test_run_returns_what_a_function_does_in_the_loops_thread(loop):
    name, value = loop.run(lambda: (threading.current_thread().name, 42))
    assert (name, value) == ("hv-loop", 42)
    assert loop.run(lambda: loop.run(lambda: 7)) == 7, "called from the loop itself"


def test_run_raises_what_the_function_raises_and_the_loop_goes_on(loop, faults):
    with pytest.raises(ZeroDivisionError):
        loop.run(lambda: 1 // 0)
    assert loop.run(lambda: 1) == 1
    assert not faults


def test_run_works_before_the_start_and_after_the_end(faults):
    loop = EventLoop(faults.append)
    assert loop.run(lambda: 1) == 1
    loop.start()
    loop.close()
    assert loop.run(lambda: 2) == 2
