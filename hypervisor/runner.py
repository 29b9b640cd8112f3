"""Who serves a virtio device's queues: the event loop, or threads of the device's own (`devices.virtio.device.Runner`).

A kick is a write to the queue's eventfd, by KVM (a doorbell) or by `kick`.
"""

from __future__ import annotations

import os
import signal
import threading
from functools import partial
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from devices.virtio.device import VirtioDevice
    from hypervisor.eventloop import EventLoop

__all__ = ["DataPath", "LoopRunner", "ThreadRunner"]


class DataPath(Protocol):
    """A queue's hot loop outside the GIL: see `hypervisor.kvm.dataplane`."""

    @property
    def head(self) -> int | None:
        """The head of the chain that `run` wants done; None: the queue's next one."""

    def run(self) -> int:
        """Serve until a queue needs its device model for one chain; returns the queue's index, -1 after `stop`."""

    def stop(self) -> None:
        """Make `run` return soon, now or when it is called next."""

    def close(self) -> None:
        """Give back what it has; nobody is in `run`."""


class Doorbells:
    """The eventfds that a device's queues are kicked by."""

    def __init__(self, device: VirtioDevice) -> None:
        """Make one for each queue of `device`."""
        self.device = device
        self.kick_fds = [os.eventfd(0, os.EFD_CLOEXEC) for _ in device.queues]

    def kick(self, index: int) -> None:
        """Serve queue `index` soon."""
        os.eventfd_write(self.kick_fds[index], 1)

    def close(self) -> None:
        """Close the eventfds; nothing is being served."""
        for fd in self.kick_fds:
            os.close(fd)
        self.kick_fds.clear()


class LoopRunner(Doorbells):
    """Serves in the event loop's thread with the device's lock held: for devices that never block.

    `start`, `stop` and `pause` are called with the lock held, so nothing is being served while they run.
    """

    def __init__(self, device: VirtioDevice, loop: EventLoop, lock: threading.Lock) -> None:
        """Serve `device` in `loop`."""
        super().__init__(device)
        self._loop = loop
        self._lock = lock
        self._running = False
        self._watching = False

    def start(self) -> None:
        """Serve every queue once, and then whenever it is kicked."""
        self._running = True
        for index, fd in enumerate(self.kick_fds):
            if not self._watching:
                self._loop.watch(fd, lambda index=index: self._on_kick(index))  # type: ignore[misc]
            self.kick(index)
        self._watching = True

    def stop(self) -> None:
        """Serve no more."""
        self._running = False
        if self._watching:
            self._watching = False
            for fd in self.kick_fds:
                self._loop.unwatch(fd)

    def pause(self) -> None:
        """Serve no more until `start`, which is soon: the loop is not told. To be called in its own thread."""
        self._running = False

    def _on_kick(self, index: int) -> None:
        with self._lock:
            if not self._running:
                return
            os.eventfd_read(self.kick_fds[index])
            self.device.serve(index)


class ThreadRunner(Doorbells):
    """Serves each group of queues in a thread of its own: for disks, whose files block, and for fast data paths.

    The threads live from `start` to `stop`: they are few, and a driver starts a device once. They outlive a `pause`,
    because a machine may be set back to a snapshot a thousand times a second.
    """

    def __init__(
        self,
        device: VirtioDevice,
        make_path: Callable[[VirtioDevice, Sequence[int], Sequence[int]], DataPath | None],
        groups: Sequence[Sequence[int]],
        on_fault: Callable[[BaseException], None],
    ) -> None:
        """Serve `device`.

        Args:
            device: what to serve.
            make_path: given the device, queue numbers and their eventfds, makes their data path if there is one.
            groups: the queue numbers that share a thread; without a data path each must be alone.
            on_fault: takes an exception that ended a thread.
        """
        super().__init__(device)
        self._make_path = make_path
        self._groups = groups
        self._on_fault = on_fault
        self._stopping = threading.Event()
        self._servers: dict[int, _Server] = {}  # by the first queue of each group
        self._busy: list[_Server] = []
        self._paths: list[DataPath] = []

    def start(self) -> None:
        """Have a thread serve every group whose queues are enabled."""
        self._stopping.clear()
        for group in self._groups:
            if not all(self.device.queues[index].is_enabled for index in group):
                continue
            path = self._make_path(self.device, group, [self.kick_fds[index] for index in group])
            if path is not None:
                self._paths.append(path)
            for index in group:
                self.kick(index)
            server = self._servers.get(group[0])
            if server is None or server.has_ended:
                name = f"hv-{self.device.name}-{group[0]}"
                server = self._servers[group[0]] = _Server(name, self._on_fault)
            self._busy.append(server)
            server.work(partial(self._serve, group[0], path))

    def stop(self) -> None:
        """End the threads; returns when what is in flight is done."""
        self.pause()
        for server in self._servers.values():
            server.end()
        self._servers.clear()

    def pause(self) -> None:
        """Return when what is in flight is done; the threads wait for `start` or `stop`."""
        self._stopping.set()
        self._stop_paths()
        for index in range(len(self.kick_fds)):
            self.kick(index)
        for server in self._busy:
            server.wait()
        self._busy.clear()
        for path in self._paths:
            path.close()
        self._paths.clear()

    def _stop_paths(self) -> None:
        """Have no data path take another request: for good, as what broke in one queue is broken in all."""
        for path in self._paths:
            path.stop()

    def wait(self, seconds: float) -> bool:
        """Sleep on behalf of the device; return False as soon as it is being stopped."""
        return not self._stopping.wait(seconds)

    def _serve(self, index: int, path: DataPath | None) -> None:
        """Serve until `pause`; in a thread of its own."""
        while not self._stopping.is_set():
            if path is None or not self.device.is_active:
                os.eventfd_read(self.kick_fds[index])
                self.device.serve(index)
            elif (wanted := path.run()) >= 0:
                self.device.serve(wanted, most=1, head=path.head)
            if self.device.is_broken:
                self._stop_paths()


class _Server:
    """A thread that does one piece of work after the other.

    Attributes:
        has_ended: it is gone, because of a fault.
    """

    def __init__(self, name: str, on_fault: Callable[[BaseException], None]) -> None:
        """Start a thread called `name`; `on_fault` takes an exception that ended it."""
        self._on_fault = on_fault
        self._work: Callable[[], None] | None = None
        self._has_work, self._is_done = threading.Lock(), threading.Lock()  # locked: there is none, it is not
        self._has_work.acquire()
        self._is_done.acquire()
        self.has_ended = False
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    def work(self, work: Callable[[], None]) -> None:
        """Begin to do `work`."""
        self._work = work
        self._has_work.release()

    def wait(self) -> None:
        """Wait until what `work` was given is done."""
        self._is_done.acquire()

    def end(self) -> None:
        """End the thread, which has nothing to do."""
        if not self.has_ended:
            self._work = None
            self._has_work.release()
        self._thread.join()

    def _main(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            while self._has_work.acquire() and self._work is not None:
                self._work()
                self._is_done.release()
        except BaseException as error:  # noqa: BLE001 - whatever it is, the run ends with it
            self.has_ended = True
            self._on_fault(error)
            self._is_done.release()
