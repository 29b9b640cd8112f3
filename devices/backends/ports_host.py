"""The host's ends of console ports: a unix socket that one program at a time connects to, a file, or this program."""

from __future__ import annotations

import errno
import os
import socket
import stat
from typing import TYPE_CHECKING, Final, Protocol

from devices.backends.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["FilePort", "InnerPort", "Loop", "SocketPort", "listen"]

CHUNK: Final = 4096
OFFER: Final = 64 << 10
PATH_MAX: Final = 107
"""Bytes that a unix socket's path may have."""


class Loop(Protocol):
    """Who waits for files; every callback comes with the device's lock held."""

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Call back whenever `fd` is readable."""

    def unwatch(self, fd: int) -> None:
        """Stop that."""

    def watch_writable(self, fd: int, callback: Callable[[], None]) -> None:
        """Call back whenever `fd` is writable."""

    def unwatch_writable(self, fd: int) -> None:
        """Stop that."""

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Call back once, soon."""


def listen(path: str) -> socket.socket:
    """Make a unix socket that listens at `path`; one that a dead process has left there is replaced.

    Raises:
        BackendError: somebody listens there, or there can be no socket.
    """
    if len(os.fsencode(path)) > PATH_MAX:
        raise BackendError(f"socket {path}: the path is longer than {PATH_MAX} bytes", hint="choose a shorter one")
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        try:
            server.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _is_stale(path):
                raise
            os.unlink(path)
            server.bind(path)
        server.listen(16)
    except OSError as error:
        server.close()
        hint = "another machine has it, or another file is there" if error.errno == errno.EADDRINUSE else ""
        raise BackendError(f"socket {path}: {error.strerror}", hint=hint) from error
    return server


def _is_stale(path: str) -> bool:
    """Whether a socket is at `path` that nobody listens to; a file of another kind is somebody's."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return False
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        probe.connect(path)
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    finally:
        probe.close()
    return False


class _Port:
    """What the ends have in common; fits `devices.virtio.console.PortHost`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_open = False
        self.on_input: Callable[[bytes], int] = len
        self.on_room: Callable[[], None] = lambda: None
        self.on_open: Callable[[], None] = lambda: None

    @property
    def held(self) -> bytes:
        """Input that the guest has had no room for."""
        return b""

    @held.setter
    def held(self, data: bytes) -> None:
        """Hold `data` for the guest; an end that has no input has none."""

    def more(self) -> None:
        """Offer input again; there is none."""


class FilePort(_Port):
    """A file that takes the guest's output, at its end."""

    def __init__(self, name: str, path: str) -> None:
        """Open or make `path`; raises BackendError when that cannot be done."""
        super().__init__(name)
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise BackendError(f"{path}: {error.strerror}") from error
        self.is_open = True

    def send(self, data: memoryview) -> int:
        """Write; when the disk is full the rest is lost."""
        try:
            os.write(self._fd, data)
        except OSError:
            self.is_open = False
        return len(data)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class InnerPort(_Port):
    """The program that has the machine is the other end itself.

    Attributes:
        on_output: set by who uses it: takes what the guest sends, with the device's lock held. It bounds what it keeps,
            since everything counts as taken.
    """

    def __init__(self, name: str, loop: Loop) -> None:
        """Make an end that is always open."""
        super().__init__(name)
        self.is_open = True
        self.on_output: Callable[[bytes], None] = lambda _: None
        self._loop = loop
        self._pending = bytearray()
        self._pending_since = 0  # the number of drops before it was written
        self._drops = 0

    def write(self, data: bytes) -> None:
        """Send to the guest, in the order of the calls, from any thread; what does not fit yet is kept."""
        drops = self._drops
        self._loop.call_soon(lambda: self._add(data, drops))

    def drop(self) -> None:
        """Forget what was written before this call and has not reached the guest yet."""
        self._drops += 1

    @property
    def held(self) -> bytes:
        """Nothing: what this program has to say to a machine that was put back to another moment, it says anew."""
        return b""

    @held.setter
    def held(self, data: bytes) -> None:
        """Forget what was meant for the machine as it was."""
        del data
        self.drop()

    def _add(self, data: bytes, drops: int) -> None:
        if drops == self._drops:
            if self._pending_since != drops:
                self._pending.clear()
                self._pending_since = drops
            self._pending += data
            self.more()

    def send(self, data: memoryview) -> int:
        """Hand output on."""
        self.on_output(bytes(data))
        return len(data)

    def more(self) -> None:
        """Offer what was written."""
        while self._pending and self._pending_since == self._drops:
            part = bytes(self._pending[:OFFER])
            taken = self.on_input(part)
            del self._pending[:taken]
            if taken < len(part):
                break

    def close(self) -> None:
        """There is nothing to close."""
        self.is_open = False


class SocketPort(_Port):
    """A listening unix socket. While nobody is connected the guest's output is lost; a second client has to wait."""

    def __init__(self, name: str, path: str, loop: Loop) -> None:
        """Listen at `path`; raises BackendError when that cannot be done."""
        super().__init__(name)
        self._path = path
        self._loop = loop
        self._server = listen(path)
        self._client: socket.socket | None = None
        self._pending = b""
        loop.watch(self._server.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            self._client, _ = self._server.accept()
        except OSError:
            return
        self._client.setblocking(False)
        self._loop.unwatch(self._server.fileno())
        self._read_on()
        self.is_open = True
        self.on_open()

    def _read(self) -> None:
        if self._client is None:
            return
        try:
            data = self._client.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._hang_up()
            return
        self._pending = data
        self.more()

    @property
    def held(self) -> bytes:
        """Input that the guest has had no room for."""
        return self._pending

    @held.setter
    def held(self, data: bytes) -> None:
        """Hold `data` for the guest instead of what is held; whoever sent it may be gone."""
        self._pending = data
        self._read_on()

    def more(self) -> None:
        """Offer what the client sent; while it does not fit nothing more is read."""
        if self._pending:
            self._pending = self._pending[self.on_input(self._pending) :]
        self._read_on()

    def _read_on(self) -> None:
        """Read from the client while nothing is held."""
        if self._client is not None:
            if self._pending:
                self._loop.unwatch(self._client.fileno())
            else:
                self._loop.watch(self._client.fileno(), self._read)

    def send(self, data: memoryview) -> int:
        """Send what the client takes; the device is called when it takes more."""
        if self._client is None:
            return len(data)
        try:
            sent = self._client.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._hang_up()
            return len(data)
        if sent < len(data):
            self._loop.watch_writable(self._client.fileno(), self._room)
        return sent

    def _room(self) -> None:
        if self._client is not None:
            self._loop.unwatch_writable(self._client.fileno())
        self.on_room()

    def _hang_up(self) -> None:
        """Wait for the next client."""
        client, self._client = self._client, None
        self._pending = b""
        if client is not None:
            self._loop.unwatch(client.fileno())
            self._loop.unwatch_writable(client.fileno())
            client.close()
        self._loop.watch(self._server.fileno(), self._accept)
        self.is_open = False
        self.on_open()

    def close(self) -> None:
        """Close everything and remove the socket's file."""
        if self._server.fileno() < 0:
            return
        self._server.close()
        if self._client is not None:
            self._client.close()
            self._client = None
        try:
            os.unlink(self._path)
        except OSError:
            pass  # somebody else has done it
