"""Console output to a host file that may block, fill up or go away, without a vCPU ever waiting for it."""

from __future__ import annotations

import os
import select
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

BACKLOG: Final = 1 << 20
"""Bytes that wait for the file at most; what comes on top is dropped, and a line says how much."""
CHUNK: Final = 4096
"""A pipe that polls writable takes this much without blocking (pipe(7), PIPE_BUF)."""


class OutputWriter:
    """Writes to a file descriptor from a thread of its own."""

    def __init__(self, fd: int, on_error: Callable[[OSError], None]) -> None:
        """Write to `fd`, which stays the caller's; `on_error` is called once if it takes no more."""
        self._fd = fd
        self._on_error = on_error
        self._queue: deque[bytes] = deque()
        self._queued = 0
        self._dropped = 0
        self._lost = False
        self._closing = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def write(self, data: bytes) -> None:
        """Queue `data`. Never blocks."""
        with self._changed:
            if self._lost:
                return
            if self._queued + len(data) > BACKLOG:
                self._dropped += len(data)
                return
            if self._dropped:
                data = f"\r\n[hv: {self._dropped} bytes of console output dropped]\r\n".encode() + data
                self._dropped = 0
            self._queue.append(data)
            self._queued += len(data)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="hv-output", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self, timeout: float = 1.0) -> int:
        """Let what is queued go out for up to `timeout` seconds more; return how many bytes never did."""
        deadline = time.monotonic() + timeout
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(max(deadline - time.monotonic(), 0))
        return self._queued + self._dropped

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    return
                data = b"".join(self._queue)
                self._queue.clear()
            try:
                self._write_all(data, poll)
            except OSError as error:
                with self._changed:
                    self._lost = True
                    self._queue.clear()
                self._on_error(error)
                return

    def _write_all(self, data: bytes, poll: select.poll) -> None:
        view = memoryview(data)
        while view:
            poll.poll()
            try:
                written = os.write(self._fd, view[:CHUNK])
            except BlockingIOError:
                continue
            view = view[written:]
            with self._changed:
                self._queued -= written
