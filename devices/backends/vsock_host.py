r"""The host's side of a socket device: unix sockets, by the convention of Firecracker.

A program on the host connects to PATH, says "CONNECT PORT\n" and is answered "OK HOSTPORT\\n" when the guest accepts.
A program in the guest that connects to port N of the host reaches the program that listens at PATH_N.
"""

from __future__ import annotations

import os
import select
import socket
from typing import TYPE_CHECKING, Final

from devices.backends.ports_host import Loop, listen

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["VsockHost"]

LINE_MAX: Final = 32
"""Bytes of "CONNECT 4294967295", its newline, and some."""
MAX_UNDECIDED: Final = 64
"""Clients that have not said whom they want; a new one pushes the oldest out."""
PORT_MAX: Final = 0xFFFF_FFFF


class SocketStream:
    """A unix socket as `devices.virtio.vsock.Stream`."""

    def __init__(self, end: socket.socket, loop: Loop, *, says_ok: bool) -> None:
        """Wrap a connected, non-blocking socket."""
        self._socket = end
        self._loop = loop
        self._says_ok = says_ok
        self._is_watched = False
        self.on_readable: Callable[[], None] = lambda: None
        self.on_writable: Callable[[], None] = lambda: None

    def accepted(self, host_port: int) -> None:
        """Say OK."""
        if self._says_ok:
            try:
                self._socket.send(f"OK {host_port}\n".encode())
            except OSError:
                pass  # it is gone; reading will tell

    def receive(self, most: int) -> bytes | None:
        """Return what is there."""
        try:
            return self._socket.recv(most)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def send(self, data: bytes) -> int:
        """Send what there is room for."""
        try:
            sent = self._socket.send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            self._loop.watch_writable(self._socket.fileno(), self._room)
        return sent

    def _room(self) -> None:
        if self._socket.fileno() >= 0:
            self._loop.unwatch_writable(self._socket.fileno())
            self.on_writable()

    def watch(self, wanted: bool) -> None:
        """Call `on_readable` whenever there is something, or do not."""
        if self._socket.fileno() < 0 or wanted == self._is_watched:
            return
        self._is_watched = wanted
        if wanted:
            self._loop.watch(self._socket.fileno(), lambda: self.on_readable())
        else:
            self._loop.unwatch(self._socket.fileno())

    def is_closed_by_peer(self) -> bool:
        """Whether nobody will read what we send."""
        poll = select.poll()
        poll.register(self._socket.fileno(), 0)
        return any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0))

    def end_output(self) -> None:
        """Shut our direction down."""
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it is gone already

    def close(self) -> None:
        """Close the socket."""
        if self._socket.fileno() >= 0:
            self._loop.unwatch(self._socket.fileno())
            self._loop.unwatch_writable(self._socket.fileno())
            self._socket.close()


class VsockHost:
    """Listens at PATH, and connects to PATH_PORT.

    Attributes:
        open: set by whoever has the device: connects a stream to a port of the guest, or returns False.
    """

    def __init__(self, path: str, loop: Loop) -> None:
        """Listen; raises BackendError when that cannot be done."""
        self._path = path
        self._loop = loop
        self._server = listen(path)
        self._undecided: dict[socket.socket, bytes] = {}  # what they have said so far
        self.open: Callable[[SocketStream, int], bool] = lambda _stream, _port: False
        loop.watch(self._server.fileno(), self._accept)

    def connect(self, port: int) -> SocketStream | None:
        """Connect to the program that listens for the guest's port; None when there is none."""
        end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            end.connect(f"{self._path}_{port}")
        except OSError:  # nobody, or too many wait already
            end.close()
            return None
        return SocketStream(end, self._loop, says_ok=False)

    def _accept(self) -> None:
        try:
            client, _ = self._server.accept()
        except OSError:
            return
        client.setblocking(False)
        if len(self._undecided) >= MAX_UNDECIDED:
            self._forget(next(iter(self._undecided)))
        self._undecided[client] = b""
        self._loop.watch(client.fileno(), lambda: self._read_line(client))

    def _forget(self, client: socket.socket) -> None:
        self._loop.unwatch(client.fileno())
        del self._undecided[client]
        client.close()

    def _read_line(self, client: socket.socket) -> None:
        """Read up to the newline and no further: what follows is for the guest."""
        line = self._undecided[client]
        try:
            while not line.endswith(b"\n") and len(line) < LINE_MAX:
                byte = client.recv(1)
                if not byte:
                    self._forget(client)
                    return
                line += byte
        except BlockingIOError:
            self._undecided[client] = line
            return
        except OSError:
            self._forget(client)
            return
        words = line.split()
        port = int(words[1]) if len(words) == 2 and words[0] == b"CONNECT" and words[1].isdigit() else -1
        if not line.endswith(b"\n") or not 0 <= port <= PORT_MAX:
            self._forget(client)
            return
        self._loop.unwatch(client.fileno())
        del self._undecided[client]
        stream = SocketStream(client, self._loop, says_ok=True)
        if not self.open(stream, port):
            stream.close()

    def close(self) -> None:
        """Close everything and remove the socket's file."""
        if self._server.fileno() < 0:
            return
        self._server.close()
        for client in self._undecided:
            client.close()
        self._undecided.clear()
        try:
            os.unlink(self._path)
        except OSError:
            pass  # somebody else has done it
