"""The end that has a guest's pages while the guest runs elsewhere already: what `hypervisor.kvm.pager` fetches from.

The other end asks for a page that somebody waits for; what nobody has asked for yet goes in between, from there on.
"""

from __future__ import annotations

import select
import socket
from struct import Struct
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["PageServer", "Pages"]

PAGE: Final = 4096
ALL: Final = (1 << 64) - 1
"""What is sent in a page's place when no more are needed (HV_PAGER_ALL)."""
RUN: Final = Struct("<QQ")
"""First page, number of pages."""
WANT: Final = Struct("<Q")
BATCH: Final = 16
"""Pages that go at once when nobody waits; at most HV_PAGER_MOST."""
BUFFERED: Final = 128 << 10
"""Bytes on their way: whoever waits for a page waits for these before it."""


class Pages(Protocol):
    """Where pages come from.

    Attributes:
        size: of RAM in bytes.
    """

    @property
    def size(self) -> int:
        """Of RAM, in bytes."""

    def pages(self, first: int, count: int) -> memoryview:
        """Return the bytes of `count` pages from page `first` on."""


class PageServer:
    """Sends pages that do not change any more, until the other end has all of them.

    Attributes:
        pages: how many were to be sent.
        asked: how many of them the other end has asked for.
        is_done: it needs no more.
    """

    def __init__(
        self, memory: Pages, connection: socket.socket, runs: Iterable[tuple[int, int]], seconds: float | None
    ) -> None:
        """Be ready to send `runs` of pages.

        Another end that is silent for `seconds` is gone; None: its connection tells.
        """
        self._memory = memory
        self._connection = connection
        self._seconds = seconds
        self._missing = bytearray(memory.size // PAGE)  # 1: not sent yet
        for first, count in runs:
            self._missing[first : first + count] = b"\1" * count
        self.pages = self._missing.count(1)
        self.asked = 0
        self._next = 0
        self.is_done = False
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFERED)
        connection.settimeout(seconds)

    def serve(self) -> None:
        """Send them; raises OSError when the other end is gone, and what `memory` raises."""
        while not self.is_done:
            self._step()

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
        found = self._missing.find(1, self._next)
        if found < 0:
            found = self._missing.find(1)
            if found < 0:
                return ()
        self._next = found
        end = min(found + most, len(self._missing))
        there = self._missing.find(0, found, end)
        return found, (end if there < 0 else there) - found

    def _take_wants(self) -> None:
        data = b""
        while not data or len(data) % WANT.size:
            more = self._connection.recv(WANT.size * 64 - len(data) % WANT.size)
            if not more:
                raise ConnectionResetError("the target hung up")
            data += more
        for (page,) in WANT.iter_unpack(data):
            if page == ALL:
                self.is_done = True
            elif page < len(self._missing) and self._missing[page]:
                self.asked += 1
                self._send(page, 1)
                self._next = page + 1 if page + 1 < len(self._missing) else 0

    def _send(self, first: int, count: int) -> None:
        self._missing[first : first + count] = bytes(count)
        self._connection.sendall(RUN.pack(first, count))
        self._connection.sendall(self._memory.pages(first, count))
