"""The source's side of post-copy: the guest runs at the target already, and its last pages are still here.

The target asks for a page that somebody waits for; what nobody has asked for yet goes in between, from there on.
"""

from __future__ import annotations

import secrets
import select
import socket
import threading
from struct import Struct
from typing import TYPE_CHECKING, Final

import numpy as np

from hypervisor.kvm.dirty import PAGE
from hypervisor.kvm.pager import ALL
from hypervisor.migration.wire import Kind, MigrationError, connect

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hypervisor.memory import GuestMemory

__all__ = ["PageLine", "PageServer"]

RUN: Final = Struct("<QQ")
"""First page, number of pages."""
WANT: Final = Struct("<Q")
BATCH: Final = 16
"""Pages that go at once when nobody waits."""
BUFFERED: Final = 128 << 10
"""Bytes on their way: whoever waits for a page waits for these before it."""


class PageServer:
    """Sends pages of a machine that stands still, in a thread of its own, until the target has all of them.

    Attributes:
        pages: how many were to be sent.
        asked: how many of them the target has asked for.
    """

    def __init__(
        self, memory: GuestMemory, connection: socket.socket, runs: Iterable[tuple[int, int]], seconds: float
    ) -> None:
        """Begin to send `runs` of pages; takes the connection over. A target that is silent for `seconds` is gone."""
        self._memory = memory
        self._connection = connection
        self._seconds = seconds
        self._missing = np.zeros(memory.size // PAGE, dtype=np.bool_)
        for first, count in runs:
            self._missing[first : first + count] = True
        self.pages = int(np.count_nonzero(self._missing))
        self.asked = 0
        self._next = 0
        self._is_done = False
        self._error: OSError | None = None
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFERED)
        connection.settimeout(seconds)
        self._thread = threading.Thread(target=self._main, name="hv-pages", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Send no more: the guest goes on here."""
        try:
            self._connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the target has hung up
        self._thread.join()

    def join(self) -> None:
        """Wait until the target has everything, or is gone."""
        self._thread.join()

    def finish(self) -> None:
        """Wait until the target has everything; raises MigrationError when it is gone before that."""
        self.join()
        if not self._is_done:
            raise MigrationError(
                "the target is gone, or does not answer, and its last pages had not been delivered: the guest is lost",
                is_certain=False,
            ) from self._error

    def _main(self) -> None:
        try:
            while not self._is_done:
                self._step()
        except OSError as error:
            self._error = error
        finally:
            self._connection.close()

    def _step(self) -> None:
        batch = self._batch(BATCH)
        writers = [self._connection] if batch else []
        readable, writable, _ = select.select([self._connection], writers, [], self._seconds)
        if readable:
            self._take_wants()
        elif writable:
            self._send(*batch)
        else:
            raise TimeoutError("the target does not take its pages")

    def _batch(self, most: int) -> tuple[int, int] | tuple[()]:
        """Return the next run that is missing; () when there is none."""
        missing = self._missing
        found = int(missing[self._next :].argmax()) + self._next
        if not missing[found]:
            found = int(missing.argmax())
            if not missing[found]:
                return ()
        self._next = found
        part = missing[found : found + most]
        return found, len(part) if part.all() else int(part.argmin())

    def _take_wants(self) -> None:
        data = self._connection.recv(WANT.size * 64)
        while len(data) % WANT.size:
            data += self._connection.recv(WANT.size - len(data) % WANT.size) or b"\0" * WANT.size
        if not data:
            raise ConnectionResetError("the target hung up")
        for (page,) in WANT.iter_unpack(data):
            if page == ALL:
                self._is_done = True
            elif page < len(self._missing) and self._missing[page]:
                self.asked += 1
                self._send(page, 1)
                self._next = page + 1 if page + 1 < len(self._missing) else 0

    def _send(self, first: int, count: int) -> None:
        self._missing[first : first + count] = False
        self._connection.sendall(RUN.pack(first, count))
        self._connection.sendall(self._memory.pages(first, count))


class PageLine:
    """The second connection, of post-copy.

    Attributes:
        token: by which the target knows it.
        server: who sends the pages, once there are any to be sent.
    """

    def __init__(self, address: str, seconds: float) -> None:
        """Be ready to connect to `address`; a target that is silent for `seconds` is gone."""
        self.token = secrets.token_hex(16)
        self._address = address
        self._seconds = seconds
        self._connection: socket.socket | None = None
        self.server: PageServer | None = None

    def open(self) -> None:
        """Connect; the target waits for it."""
        wire = connect(self._address, seconds=self._seconds)
        wire.send(Kind.PAGER, {"token": self.token})
        self._connection = wire.detach()

    def begin(self, memory: GuestMemory, runs: list[tuple[int, int]]) -> PageServer:
        """Begin to send pages; `open` was called."""
        connection, self._connection = self._connection, None
        if connection is None:
            raise ValueError("there is no second connection")
        self.server = PageServer(memory, connection, runs, self._seconds)
        return self.server

    def finish(self) -> PageServer | None:
        """Return who has sent the pages, when the target has all of them; None if there were none."""
        if self.server is not None:
            self.server.finish()
        else:
            self.stop()
        return self.server

    def stop(self) -> None:
        """Send none: the guest goes on here."""
        if self.server is not None:
            self.server.stop()
        if self._connection is not None:
            self._connection.close()
