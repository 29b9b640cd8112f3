"""Bytes between this program's own descriptors and the emulated host's ports; nothing here ever blocks."""

from __future__ import annotations

import os
import select
import stat
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import socket

CHUNK: Final = 1 << 16
PIPE_BUF: Final = 4096
"""A pipe that polls as writable takes so much without blocking (pipe(7)). O_NONBLOCK is no choice: a descriptor that
other programs share would become non-blocking for them too."""

ESCAPE: Final = 0x1D
"""Ctrl-]: three of them within ESCAPE_SECONDS end the emulated host from its terminal."""
ESCAPE_SECONDS: Final = 1.0


class OutletClosedError(Exception):
    """Whoever read our output went away."""


class Outlet:
    """From a port to a descriptor of ours.

    Attributes:
        received: bytes that came over the port so far.
        ended: whether the port was closed.
    """

    def __init__(self, port: socket.socket, sink: int) -> None:
        """Read from `port`, write to `sink`."""
        self._port = port
        self._sink = sink
        self._pending = memoryview(b"")
        self._step = CHUNK if stat.S_ISREG(os.fstat(sink).st_mode) else PIPE_BUF
        self._broken = False
        self.received = 0
        self.ended = False

    def wants(self) -> tuple[int, int] | None:
        """Return the descriptor and the poll event that it waits for; None once it has ended."""
        if self._pending:
            return self._sink, select.POLLOUT
        return None if self.ended else (self._port.fileno(), select.POLLIN)

    def drained(self, total: int) -> bool:
        """Whether `total` bytes came and all of them are written; a closed port sends no more."""
        return not self._pending and (self.received >= total or self.ended)

    def discard(self) -> None:
        """From now on, read and throw away."""
        self._broken = True
        self._pending = memoryview(b"")

    def step(self) -> None:
        """Do one piece of what `wants` waited for.

        Raises:
            OutletClosedError: the sink is closed.
        """
        if not self._pending:
            data = _receive(self._port)
            self.ended = data == b""
            self.received += len(data or b"")
            self._pending = memoryview(b"" if self._broken else data or b"")
            return
        try:
            done = os.write(self._sink, self._pending[: self._step])
        except BlockingIOError:
            return
        except OSError as error:
            raise OutletClosedError from error
        self._pending = self._pending[done:]


class Inlet:
    """From our stdin to the port, counting.

    Attributes:
        sent: bytes that were passed to the port.
        ended: whether the source has ended.
    """

    def __init__(self, source: int, port: socket.socket) -> None:
        """Read from `source`, write to `port`."""
        self._source = source
        self._port = port
        self._pending = memoryview(b"")
        self._escapes: list[float] = []
        self.sent = 0
        self.ended = False

    def wants(self) -> tuple[int, int] | None:
        """Return the descriptor and the poll event that it waits for; None once it has ended."""
        if self._pending:
            return self._port.fileno(), select.POLLOUT
        return None if self.ended else (self._source, select.POLLIN)

    @property
    def finished(self) -> bool:
        """Whether all that will ever come has been passed on."""
        return self.ended and not self._pending

    def step(self) -> None:
        """Do one piece of what `wants` waited for."""
        if not self._pending:
            try:
                data = os.read(self._source, CHUNK)
            except BlockingIOError:
                return
            except OSError:  # EIO: a terminal that is not ours to read, or is gone
                data = b""
            self.ended = not data
            self._note_escapes(data)
            self._pending = memoryview(data)
        try:
            done = self._port.send(self._pending) if self._pending else 0
        except BlockingIOError:
            return
        except OSError:  # the machine is gone; its log will say it
            done = len(self._pending)
        self.sent += done
        self._pending = self._pending[done:]

    def _note_escapes(self, data: bytes) -> None:
        now = time.monotonic()
        for byte in data:
            self._escapes = [*self._escapes[-2:], now] if byte == ESCAPE else []

    @property
    def escaped(self) -> bool:
        """Whether the last three bytes were the escape key, struck within ESCAPE_SECONDS."""
        return len(self._escapes) == 3 and self._escapes[2] - self._escapes[0] < ESCAPE_SECONDS


class Control:
    """The port of lines: words to the agent, words from it.

    Attributes:
        ended: whether the port was closed.
    """

    def __init__(self, port: socket.socket) -> None:
        """Talk over `port`."""
        self._port = port
        self._pending = b""
        self._partial = b""
        self.ended = False

    @property
    def has_sent_all(self) -> bool:
        """Whether no line waits."""
        return not self._pending

    def say(self, *words: object) -> None:
        """Queue one line; bytes go as hexadecimal digits."""
        texts = (word.hex() if isinstance(word, bytes) else str(word) for word in words)
        self._pending += " ".join(texts).encode() + b"\n"

    def wants(self) -> tuple[int, int] | None:
        """Return the descriptor and the poll events that it waits for; None once it has ended."""
        return None if self.ended else (self._port.fileno(), select.POLLIN | (select.POLLOUT if self._pending else 0))

    def step(self) -> list[list[str]]:
        """Send what can be sent; return the lines that came, in words."""
        if self._pending:
            try:
                self._pending = self._pending[self._port.send(self._pending) :]
            except BlockingIOError:
                pass
            except OSError:
                self._pending = b""
        data = _receive(self._port)
        self.ended = data == b""
        *lines, self._partial = (self._partial + (data or b"")).split(b"\n")
        return [line.decode().split() for line in lines]


def _receive(port: socket.socket) -> bytes | None:
    """Return what the port has: b"" once it is closed, None when there is nothing now."""
    try:
        return port.recv(CHUNK)
    except BlockingIOError:
        return None
    except OSError:
        return b""
