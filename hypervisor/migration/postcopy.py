"""The source's side of post-copy: the guest runs at the target already, and its last pages are still here."""

from __future__ import annotations

import secrets
import socket
import threading
from typing import TYPE_CHECKING

from hypervisor.migration.wire import Kind, MigrationError, connect
from hypervisor.pageserver import PageServer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hypervisor.memory import GuestMemory

__all__ = ["PageLine", "PageThread"]


class PageThread(PageServer):
    """Sends pages of a machine that stands still, in a thread of its own, until the target has all of them."""

    def __init__(
        self, memory: GuestMemory, connection: socket.socket, runs: Iterable[tuple[int, int]], seconds: float
    ) -> None:
        """Begin to send `runs` of pages; takes the connection over. A target that is silent for `seconds` is gone."""
        super().__init__(memory, connection, runs, seconds)
        self._error: OSError | None = None
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
        if not self.is_done:
            raise MigrationError(
                "the target is gone, or does not answer, and its last pages had not been delivered: the guest is lost",
                is_certain=False,
            ) from self._error

    def _main(self) -> None:
        try:
            self.serve()
        except OSError as error:
            self._error = error
        finally:
            self._connection.close()


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
        self.server: PageThread | None = None

    def open(self) -> None:
        """Connect; the target waits for it."""
        wire = connect(self._address, seconds=self._seconds)
        wire.send(Kind.PAGER, {"token": self.token})
        self._connection = wire.detach()

    def begin(self, memory: GuestMemory, runs: list[tuple[int, int]]) -> PageThread:
        """Begin to send pages; `open` was called."""
        connection, self._connection = self._connection, None
        if connection is None:
            raise ValueError("there is no second connection")
        self.server = PageThread(memory, connection, runs, self._seconds)
        return self.server

    def finish(self) -> PageThread | None:
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
