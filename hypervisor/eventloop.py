"""One thread that waits for files and timers, so that no device needs a thread of its own."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

READABLE = select.EPOLLIN
WRITABLE = select.EPOLLOUT
TROUBLE = select.EPOLLERR | select.EPOLLHUP
_NS_PER_S = 1_000_000_000

T = TypeVar("T")


class LoopAlarm:
    """A one-shot timer of the loop; fits `devices.ports.Alarm`."""

    def __init__(self, loop: EventLoop, callback: Callable[[], None]) -> None:
        """Call `callback` in the loop's thread whenever the deadline last set is reached."""
        self._loop = loop
        self.callback = callback
        self.deadline_ns: int | None = None

    def set(self, deadline_ns: int | None) -> None:
        """Fire once when time.monotonic_ns() reaches `deadline_ns`; None disarms."""
        self.deadline_ns = deadline_ns
        if deadline_ns is not None:
            self._loop.look_by(deadline_ns)


class EventLoop:
    """An epoll loop on a thread of its own. An exception in a callback ends the loop and goes to `on_fault`."""

    def __init__(self, on_fault: Callable[[BaseException], None]) -> None:
        """Make the loop; it runs from `start` to `close`."""
        self._on_fault = on_fault
        self._epoll = select.epoll()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake_fd, READABLE)
        self._readers: dict[int, Callable[[], None]] = {}
        self._writers: dict[int, Callable[[], None]] = {}
        self._soon: list[Callable[[], None]] = []
        self._alarms: list[LoopAlarm] = []  # a handful, made with the devices: no heap is needed
        self._awake_at: int | None = None  # when the thread wakes by itself
        self._lock = threading.Lock()
        self._closing = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, unless it has been; what it has been given to do until then is not lost."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="hv-loop", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the thread and free the descriptors. Does not close files that were watched."""
        self._closing = True
        self._wake()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        if self._wake_fd >= 0:
            self._epoll.close()
            os.close(self._wake_fd)
            self._wake_fd = -1

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Call `callback` whenever `fd` is readable; raises PermissionError where epoll cannot wait (a plain file)."""
        self._change(self._readers, fd, callback)

    def unwatch(self, fd: int) -> None:
        """Watch `fd` no more for being readable; nothing happens when it is not watched."""
        self._change(self._readers, fd, None)

    def watch_writable(self, fd: int, callback: Callable[[], None]) -> None:
        """Call `callback` whenever `fd` can be written to."""
        self._change(self._writers, fd, callback)

    def unwatch_writable(self, fd: int) -> None:
        """Watch `fd` no more for being writable; nothing happens when it is not watched."""
        self._change(self._writers, fd, None)

    def _change(self, callbacks: dict[int, Callable[[], None]], fd: int, callback: Callable[[], None] | None) -> None:
        """Add, replace or (None) remove a callback, and tell epoll."""
        with self._lock:
            before = self._events(fd)
            old = callbacks.pop(fd, None)
            if callback is not None:
                callbacks[fd] = callback
            events = self._events(fd)
            try:
                if not before and events:
                    self._epoll.register(fd, events)
                elif before and not events:
                    self._epoll.unregister(fd)
                elif before != events:
                    self._epoll.modify(fd, events)
            except OSError:
                callbacks.pop(fd, None)
                if callback is not None and old is not None:
                    callbacks[fd] = old
                raise

    def _events(self, fd: int) -> int:
        return (READABLE if fd in self._readers else 0) | (WRITABLE if fd in self._writers else 0)

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Call `callback` once in the loop's thread."""
        with self._lock:
            self._soon.append(callback)
        self._wake()

    def run(self, function: Callable[[], T]) -> T:
        """Run `function` in the loop's thread, so that no callback runs beside it, and return what it does.

        Before `start`, in the loop's own thread, and when it has ended, `function` is called right away.
        """
        thread = self._thread
        if thread is None or thread is threading.current_thread() or not thread.is_alive():
            return function()
        result: list[T] = []
        failure: list[BaseException] = []
        done = threading.Event()

        def job() -> None:
            try:
                result.append(function())
            except BaseException as error:  # noqa: BLE001 - it belongs to the caller
                failure.append(error)
            done.set()

        self.call_soon(job)
        while not done.wait(0.1):
            if not thread.is_alive() and not done.is_set():
                return function()  # the loop ended before it came to this
        if failure:
            raise failure[0]
        return result[0]

    def alarm(self, callback: Callable[[], None]) -> LoopAlarm:
        """Make a timer that calls `callback` in the loop's thread; it lives as long as the loop."""
        alarm = LoopAlarm(self, callback)
        self._alarms.append(alarm)
        return alarm

    def look_by(self, deadline_ns: int) -> None:
        """Look at the alarms no later than when time.monotonic_ns() reaches `deadline_ns`."""
        if self._awake_at is None or deadline_ns < self._awake_at:
            self._wake()

    def _wake(self) -> None:
        if self._wake_fd >= 0 and threading.current_thread() is not self._thread:
            os.eventfd_write(self._wake_fd, 1)

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are the main thread's
        try:
            while not self._closing:
                for fd, events in self._epoll.poll(self._timeout()):
                    if fd == self._wake_fd:
                        os.eventfd_read(fd)
                    else:
                        self._dispatch(fd, events)
                self._run_due()
        except BaseException as error:  # noqa: BLE001 - whatever it is, the run ends with it
            self._on_fault(error)

    def _dispatch(self, fd: int, events: int) -> None:
        """Call who waits for what has happened; trouble is for either of them to find out."""
        if events & (READABLE | TROUBLE) and (callback := self._readers.get(fd)) is not None:
            callback()
        if events & (WRITABLE | TROUBLE) and (callback := self._writers.get(fd)) is not None:
            callback()

    def _timeout(self) -> float:
        with self._lock:
            if self._soon:
                return 0
        self._awake_at = None  # an alarm that is set from here on wakes the thread
        self._awake_at = min((a.deadline_ns for a in self._alarms if a.deadline_ns is not None), default=None)
        if self._awake_at is None:
            return -1
        return max(self._awake_at - time.monotonic_ns(), 0) / _NS_PER_S

    def _run_due(self) -> None:
        with self._lock:
            due, self._soon = self._soon, []
        now = time.monotonic_ns()
        for alarm in self._alarms:
            if alarm.deadline_ns is not None and alarm.deadline_ns <= now:
                alarm.deadline_ns = None
                due.append(alarm.callback)
        for callback in due:
            callback()
