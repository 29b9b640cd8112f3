"""Lines to an agent: a port of a machine in this process, or a socket."""

from __future__ import annotations

import os
import select
import threading
from typing import TYPE_CHECKING, Any, Final, Protocol

from hypervisor.errors import ConfigError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from devices.backends.ports_host import InnerPort
    from hypervisor.machine import Machine

__all__ = ["MachineLine", "SocketLine", "Transport"]

CHUNK: Final = 64 << 10


class Transport(Protocol):
    """A line to an agent.

    Attributes:
        on_data: set by who uses it: takes what the guest sends, in order, never two at once. It must not raise.
        on_end: set by who uses it: called when nothing will come any more.
    """

    on_data: Callable[[bytes], None]
    on_end: Callable[[], None]

    def send(self, data: bytes) -> None:
        """Send, in order of the calls; any thread may. It never waits: what is on its way is bounded by its sender."""

    def drop(self) -> None:
        """Forget what has not left for the guest yet."""

    def trouble(self) -> str:
        """Return why no answer can come any more; "" while one can."""

    def close(self) -> None:
        """Let go of the line."""


class MachineLine:
    """A port of a machine's virtio console. What comes is delivered by the machine's event loop."""

    def __init__(self, machine: Machine, name: str) -> None:
        """Find the port by its name; raises ConfigError when there is none, or it leads elsewhere."""
        from devices.backends.ports_host import InnerPort  # noqa: PLC0415 - for those who have a machine

        console: Any = machine.devices.get("console0")
        found = [port for port in console.ports if port.name == name] if console is not None else []
        if not found or not isinstance(found[0], InnerPort):
            raise ConfigError(
                f"the machine has no port {name} that leads to this program",
                hint=f'MachineConfig(..., ports=["{name},inner"])',
            )
        self._machine = machine
        self._port: InnerPort = found[0]
        self.on_data: Callable[[bytes], None] = lambda _: None
        self.on_end: Callable[[], None] = lambda: None
        self._port.on_output = lambda data: self.on_data(data)
        self.send = self._port.write
        self.drop = self._port.drop

    def trouble(self) -> str:
        """Return how the machine ended, if it has."""
        outcome = self._machine.outcome
        return "" if outcome is None else f"the machine has ended: {outcome.reason.name} {outcome.message}".rstrip()

    def close(self) -> None:
        """Hear no more; the port is the machine's."""
        self._port.on_output = lambda _: None


class SocketLine:
    """A connected stream socket, served by a thread of its own."""

    def __init__(self, end: socket.socket) -> None:
        """Take the socket; it is closed in the end."""
        self._end = end
        end.setblocking(False)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._out = bytearray()
        self._closing = False
        self._ended = False
        self.on_data: Callable[[bytes], None] = lambda _: None
        self.on_end: Callable[[], None] = lambda: None
        self._thread: threading.Thread | None = None

    def send(self, data: bytes) -> None:
        """Send, from any thread."""
        with self._lock:
            self._out += data
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="hv-agent-line", daemon=True)
                self._thread.start()
            if not self._closing:
                os.eventfd_write(self._wake, 1)

    def drop(self) -> None:
        """Forget what has not left yet."""
        with self._lock:
            self._out.clear()

    def trouble(self) -> str:
        """Return whether the other end has hung up."""
        return "the agent has gone: the line to it has ended" if self._ended else ""

    def close(self) -> None:
        """End the thread and close the socket."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            os.eventfd_write(self._wake, 1)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._end.close()
        os.close(self._wake)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        while not self._closing and not self._ended:
            poll.register(self._end, select.POLLIN | (select.POLLOUT if self._out else 0))
            for fd, events in poll.poll():
                if fd == self._wake:
                    os.eventfd_read(fd)
                elif events & ~select.POLLOUT:
                    self._read()
            self._write()
        self._ended = True
        self.on_end()

    def _read(self) -> None:
        try:
            data = self._end.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self.on_data(data)
        else:
            self._ended = True

    def _write(self) -> None:
        with self._lock:
            try:
                if self._out:
                    del self._out[: self._end.send(self._out)]
            except BlockingIOError:
                pass
            except OSError:
                self._ended = True
