"""Who serves a device's queues."""

import os
import threading
import time

import pytest

from hypervisor.eventloop import EventLoop
from hypervisor.runner import LoopRunner, ThreadRunner

SECONDS = 60


class Queue:
    is_enabled = True


class Device:
    """Counts how often each queue is served, and by which thread."""

    name = "dev0"

    def __init__(self, queues=2):
        self.queues = [Queue() for _ in range(queues)]
        self.is_active = True
        self.is_broken = False
        self.served = []
        self.heads = []
        self.changed = threading.Condition()
        self.lock = None

    def serve(self, index, most=None, head=None):
        assert self.lock is None or self.lock.locked()
        with self.changed:
            self.served.append((index, most, threading.current_thread().name))
            self.heads.append(head)
            self.changed.notify_all()

    def wait_for(self, count):
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.served) >= count, SECONDS), self.served


@pytest.fixture
def loop():
    faults = []
    loop = EventLoop(on_fault=faults.append)
    loop.start()
    yield loop
    loop.close()
    assert faults == []


def test_the_loop_serves_every_queue_at_the_start_and_then_at_kicks(loop):
    device = Device()
    device.lock = lock = threading.Lock()
    runner = LoopRunner(device, loop, lock)
    with lock:
        runner.start()
    device.wait_for(2)
    runner.kick(1)
    device.wait_for(3)
    assert sorted(device.served[:2]) == [(0, None, "hv-loop"), (1, None, "hv-loop")]
    assert device.served[2] == (1, None, "hv-loop")
    with lock:
        runner.stop()
    runner.kick(0)
    loop.call_soon(lambda: device.serve(99) if lock.acquire() else None)
    device.wait_for(4)
    assert device.served[3][0] == 99  # and nothing in between
    runner.close()


def test_nothing_is_served_once_stop_has_returned_even_if_the_loop_has_seen_the_kick(loop):
    device = Device(1)
    device.lock = lock = threading.Lock()
    runner = LoopRunner(device, loop, lock)
    with lock:
        runner.start()
    device.wait_for(1)
    seen = threading.Event()
    loop.call_soon(lambda: (seen.set(), lock.acquire(), lock.release()))
    with lock:
        assert seen.wait(SECONDS)  # the loop waits for the lock
        runner.kick(0)
        runner.stop()
    done = threading.Event()
    loop.call_soon(done.set)
    assert done.wait(SECONDS)
    assert len(device.served) == 1
    runner.close()


def test_threads_serve_a_group_each_and_end_with_stop():
    device = Device()
    runner = ThreadRunner(device, lambda *_: None, [[0], [1]], pytest.fail)
    runner.start()
    device.wait_for(2)
    assert sorted(device.served) == [(0, None, "hv-dev0-0"), (1, None, "hv-dev0-1")]
    runner.kick(1)
    device.wait_for(3)
    runner.stop()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hv-dev0")]
    runner.start()  # a driver may start the device again
    device.wait_for(5)
    runner.stop()
    runner.close()


def threads_of(device):
    return {thread.ident for thread in threading.enumerate() if thread.name.startswith(f"hv-{device.name}")}


def test_a_pause_serves_nothing_and_keeps_the_threads():
    device = Device()
    paths = []
    runner = ThreadRunner(device, lambda *_: paths.append(BusyPath()) or paths[-1], [[0], [1]], pytest.fail)
    runner.start()
    before = threads_of(device)
    assert len(before) == 2
    for count in (1, 2, 3):
        for path in paths[-2:]:
            path.wait_for_work()
        runner.pause()
        assert all(path.at_rest.is_set() for path in paths)
        taken = [path.taken for path in paths]
        runner.kick(0)
        assert threads_of(device) == before
        runner.pause()  # once more is once
        runner.start()
        assert len(paths) == 2 * (count + 1), "data paths are made anew: the queues may be elsewhere"
        assert [path.taken for path in paths[: len(taken)]] == taken
    runner.stop()
    assert threads_of(device) == set()
    runner.start()
    runner.pause()
    runner.stop()
    assert threads_of(device) == set()
    runner.close()


def test_a_pause_of_a_device_that_has_no_data_path():
    device = Device()
    runner = ThreadRunner(device, lambda *_: None, [[0], [1]], pytest.fail)
    runner.start()
    device.wait_for(2)
    runner.pause()
    served = len(device.served)
    runner.kick(0)
    assert len(device.served) == served
    runner.start()
    device.wait_for(served + 2)
    runner.stop()
    runner.close()


def test_a_wait_ends_when_the_device_is_paused():
    device = Device(1)
    waited = []
    runner = ThreadRunner(device, lambda *_: None, [[0]], pytest.fail)
    device.serve = lambda index, most=None: waited.append(runner.wait(SECONDS))
    runner.start()
    runner.pause()
    assert waited[:1] in ([False], [])
    runner.stop()
    runner.close()


def test_after_a_fault_there_is_another_thread():
    device = Device(1)
    faults = []
    serve = device.serve

    def fail(index, most=None):
        raise ValueError("model")

    device.serve = fail
    came = threading.Event()
    runner = ThreadRunner(device, lambda *_: None, [[0]], lambda error: (faults.append(error), came.set()))
    runner.start()
    assert came.wait(SECONDS)
    runner.pause()
    assert len(faults) == 1
    device.serve = serve
    runner.start()
    device.wait_for(1)
    runner.stop()
    runner.close()


def test_the_loop_pauses_without_being_told(loop):
    """In the loop's own thread; what was kicked meanwhile is served afterwards."""
    device = Device()
    device.lock = lock = threading.Lock()
    runner = LoopRunner(device, loop, lock)
    with lock:
        runner.start()
    device.wait_for(2)
    seen = []

    def pause():
        with lock:
            runner.pause()
            runner.kick(1)
            seen.append(len(device.served))
            runner.start()

    loop.call_soon(pause)
    device.wait_for(4)
    assert seen == [2]
    runner.kick(0)
    device.wait_for(5)
    with lock:
        runner.pause()
    runner.kick(0)
    for _ in range(2):
        passed = threading.Event()
        loop.call_soon(passed.set)
        assert passed.wait(SECONDS)
    assert len(device.served) == 5, "the loop has seen the kick, and serves nothing"
    with lock:
        runner.start()
    device.wait_for(7)
    with lock:
        runner.pause()
        runner.stop()
    runner.kick(0)
    done = threading.Event()
    loop.call_soon(done.set)
    assert done.wait(SECONDS)
    assert len(device.served) == 7
    runner.close()


def test_a_group_with_a_disabled_queue_has_no_thread():
    device = Device()
    device.queues[0].is_enabled = False
    runner = ThreadRunner(device, lambda *_: None, [[0], [1]], pytest.fail)
    runner.start()
    device.wait_for(1)
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("hv-dev0")] == ["hv-dev0-1"]
    runner.stop()
    runner.close()


class Path:
    """A data path that waits for kicks and leaves the first one to the model."""

    head = 7

    def __init__(self, fds):
        self.fds = fds
        self.kicks = 0
        self.stopped = False

    def run(self):
        while True:
            os.eventfd_read(self.fds[0])
            if self.stopped:
                return -1
            self.kicks += 1
            if self.kicks == 1:
                return 1

    def stop(self):
        self.stopped = True

    def close(self):
        assert self.stopped


def test_a_data_path_leaves_single_chains_to_the_model():
    device = Device()
    paths = []
    runner = ThreadRunner(device, lambda _d, _g, fds: paths.append(Path(fds)) or paths[-1], [[0, 1]], pytest.fail)
    runner.start()
    device.wait_for(1)
    runner.kick(0)
    runner.stop()
    assert device.served == [(1, 1, "hv-dev0-0")]
    assert device.heads == [7]
    runner.close()


def test_a_broken_device_is_no_longer_run_by_its_data_path():
    device = Device(1)
    device.is_active = False
    runner = ThreadRunner(device, lambda *_: pytest.fail("no path is run"), [[0]], pytest.fail)
    runner._make_path = lambda *_: Path([])
    runner.start()
    device.wait_for(1)
    runner.stop()
    runner.close()


class BusyPath:
    """A data path that takes a request whenever it is not stopped; told to, it leaves one to the model."""

    head = None

    def __init__(self):
        self.taken = 0
        self.leave = threading.Event()
        self.stopped = threading.Event()
        self.at_rest = threading.Event()

    def run(self):
        while not self.stopped.wait(0.001):
            if self.leave.is_set():
                self.leave.clear()
                return 0
            self.taken += 1
        self.at_rest.set()
        return -1

    def wait_for_work(self):
        while not self.taken:
            time.sleep(0.001)

    def stop(self):
        self.stopped.set()

    def close(self):
        assert self.stopped.is_set()


def test_a_device_that_breaks_in_one_queue_takes_nothing_from_the_others():
    device = Device(3)
    paths = []
    runner = ThreadRunner(device, lambda *_: paths.append(BusyPath()) or paths[-1], [[0], [1], [2]], pytest.fail)
    runner.start()

    def breaks(index, most=None, head=None):
        device.is_active, device.is_broken = False, True

    device.serve = breaks
    for path in paths:
        path.wait_for_work()
    paths[0].leave.set()
    for path in paths[1:]:
        assert path.at_rest.wait(SECONDS)
        path.at_rest.clear()
    runner.kick(1)  # their threads wait to be stopped, and do not run the paths again
    names = {thread.name for thread in threading.enumerate()}
    assert {"hv-dev0-0", "hv-dev0-1", "hv-dev0-2"} <= names
    runner.stop()
    assert not any(path.at_rest.is_set() for path in paths)
    runner.close()


def test_a_wait_ends_when_the_device_is_stopped():
    device = Device(1)
    waited = []
    runner = ThreadRunner(device, lambda *_: None, [[0]], pytest.fail)
    device.serve = lambda index, most=None: waited.append(runner.wait(SECONDS))
    runner.start()
    runner.stop()
    assert waited[:1] in ([False], [])
    assert runner.wait(0) is False
    runner.close()


def test_a_fault_is_reported():
    device = Device(1)
    faults = []
    came = threading.Event()

    def fail(index, most=None):
        raise ValueError("model")

    device.serve = fail
    runner = ThreadRunner(device, lambda *_: None, [[0]], lambda error: (faults.append(error), came.set()))
    runner.start()
    assert came.wait(SECONDS)
    assert str(faults[0]) == "model"
    runner.stop()
    runner.close()
