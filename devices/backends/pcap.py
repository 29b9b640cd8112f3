"""A capture of every frame, in the format that tcpdump and Wireshark read (pcap with nanoseconds)."""

from __future__ import annotations

import os
import time
from struct import pack
from typing import TYPE_CHECKING, Final

from devices.backends.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from devices.backends.net import NetBackend
    from devices.events import EventLog

__all__ = ["Capture", "PcapFile"]

MAGIC: Final = 0xA1B23C4D
"""Of a file whose times have nanoseconds."""
LINK_ETHERNET: Final = 1
SNAP_LENGTH: Final = 1 << 18
NS_PER_S: Final = 1_000_000_000


class PcapFile:
    """A file of frames. Each frame is one write, so what a killed process leaves behind can be read."""

    def __init__(self, path: str, *, log: EventLog, clock: Callable[[], int] = time.time_ns) -> None:
        """Make the file; raises BackendError when that cannot be done."""
        self._log = log
        self._clock = clock
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise BackendError(f"capture file {path}: {error.strerror}") from error
        self._write([pack("<IHHiIII", MAGIC, 2, 4, 0, 0, SNAP_LENGTH, LINK_ETHERNET)])

    def _write(self, parts: list[bytes]) -> None:
        if self._fd < 0:
            return
        try:
            if os.writev(self._fd, parts) == sum(map(len, parts)):
                return
            why = "the disk is full"
        except OSError as error:
            why = error.strerror or str(error)
        self._log.warning("pcap.ended", why=why)
        os.close(self._fd)
        self._fd = -1

    def record(self, frame: bytes) -> None:
        """Write a frame down, with the time."""
        seconds, nanoseconds = divmod(self._clock(), NS_PER_S)
        self._write([pack("<IIII", seconds & 0xFFFF_FFFF, nanoseconds, len(frame), len(frame)), frame])

    def close(self) -> None:
        """Close the file; harmless when done already."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Capture:
    """A network whose frames are written to a file on their way. See `devices.backends.net.NetBackend`.

    A disk that is full ends the capture, not the network.
    """

    plain_fd = None

    def __init__(self, inner: NetBackend, path: str, *, log: EventLog, clock: Callable[[], int] = time.time_ns) -> None:
        """Capture the frames of `inner`, which it closes in the end; raises BackendError when there can be no file."""
        self._inner = inner
        self.header_size = inner.header_size
        self.offered = inner.offered
        self.fileno = inner.fileno
        self.set_offloads = inner.set_offloads
        self._file = PcapFile(path, log=log, clock=clock)

    def send(self, buffers: Sequence[memoryview]) -> bool:
        """Send one frame, and note it."""
        self._file.record(b"".join(buffers)[self.header_size :])
        return self._inner.send(buffers)

    def receive(self, buffer: memoryview) -> int | None:
        """Take the next frame, and note it."""
        size = self._inner.receive(buffer)
        if size is not None:
            self._file.record(bytes(buffer[self.header_size : size]))
        return size

    def close(self) -> None:
        """Close the file and the network."""
        self._inner.close()
        self._file.close()
