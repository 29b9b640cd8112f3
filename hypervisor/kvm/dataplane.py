"""The data paths of disks and TAPs: hot loops in C on the queues of `devices.virtio.queue`; see dataplane.h."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Final

from devices.virtio.queue import EVENT_IDX, INDIRECT_DESC
from hypervisor.kvm._kvm import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from devices.ports import DiskShortCut, TapShortCut
    from devices.virtio.queue import Queue
    from hypervisor.kvm.dirty import Marks

__all__ = ["STOPPED", "DiskPath", "TapPath"]

STOPPED: Final[int] = lib.HV_STOPPED


class _Path:
    """What the two have in common.

    Attributes:
        run: serve until a queue needs its device model for one chain, and return its number; STOPPED after `stop`.
            Releases the GIL, and is for one thread at a time. Nothing is on its way to the host when it returns.
    """

    def __init__(
        self,
        ram: Sequence[tuple[int, int, int]],
        queues: Sequence[tuple[Queue, int]],
        fd: int,
        marks: Marks | None,
    ) -> None:
        """Work on enabled queues, each with its kick eventfd, in RAM ranges of (gpa, size, address in this process)."""
        self._c = ffi.new("struct hv_path *")
        self._keep: list[object] = [marks]
        self._marks = ffi.NULL if marks is None else marks.cdata
        self._c.marks = self._marks
        for row, (gpa, size, host) in zip(self._c.ram, ram, strict=False):
            row.gpa, row.size, row.host = gpa, size, host
        self._c.ranges = len(ram)
        for row, (queue, kick_fd) in zip(self._c.queue, queues, strict=False):
            self._describe(row, queue, kick_fd)
        self._c.fd = fd
        self._c.stop_fd = self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.run: Callable[[], int]

    def _describe(self, row: object, queue: Queue, kick_fd: int) -> None:
        cursor, isr = ffi.from_buffer("uint16_t[]", queue.cursor), ffi.from_buffer(queue.isr)
        self._keep += [cursor, isr]
        for name, value in (
            ("descriptors", self._host(queue.descriptors, 16 * queue.size)),
            ("available", self._host(queue.available, 6 + 2 * queue.size)),
            ("used", self._host(queue.used, 6 + 8 * queue.size)),
            ("cursor", cursor),
            ("isr", ffi.cast("uint8_t *", isr)),
            ("marks", self._marks),
            ("call_fd", queue.signal.fileno()),
            ("kick_fd", kick_fd),
            ("size", queue.size),
            ("most", queue.max_size),
            ("index", queue.index),
            ("event_idx", bool(queue.features & EVENT_IDX)),
            ("indirect", bool(queue.features & INDIRECT_DESC)),
        ):
            setattr(row, name, value)

    def _host(self, gpa: int, size: int) -> int:
        """Return where a ring is in this process; the queue was enabled, so all of it is RAM."""
        for row in self._c.ram[0 : self._c.ranges]:
            if row.gpa <= gpa and gpa + size <= row.gpa + row.size:
                host: int = row.host + gpa - row.gpa
                return host
        raise ValueError(f"a ring at {gpa:#x} is not in RAM")

    def stop(self) -> None:
        """Make `run` return STOPPED soon, and whenever it is called from now on."""
        os.eventfd_write(self._stop_fd, 1)

    def close(self) -> None:
        """Give the eventfd back; nobody is in `run`."""
        if self._stop_fd >= 0:
            os.close(self._stop_fd)
            self._stop_fd = -1

    @property
    def head(self) -> int | None:
        """The head of the chain that `run` wants done; None: the queue's next one, which is not taken yet."""
        return None

    @property
    def requests(self) -> int:
        """Requests or frames answered."""
        count: int = self._c.requests
        return count

    @property
    def bytes(self) -> int:
        """Bytes moved."""
        count: int = self._c.bytes
        return count

    @property
    def drops(self) -> int:
        """Frames that found no room, or no taker."""
        count: int = self._c.drops
        return count


class DiskPath(_Path):
    """Reads and writes of a disk that is a plain file."""

    def __init__(
        self,
        ram: Sequence[tuple[int, int, int]],
        queue: Queue,
        short: DiskShortCut,
        kick_fd: int,
        *,
        marks: Marks | None = None,
    ) -> None:
        """Serve one request queue; what is written to guest memory is noted in `marks`."""
        super().__init__(ram, [(queue, kick_fd)], short.fd, marks)
        self._c.sectors = short.sectors
        self._c.readonly = short.readonly
        self.run = partial(lib.hv_disk_run, self._c)

    def close(self) -> None:
        """Give everything back; nobody is in `run`."""
        super().close()
        lib.hv_disk_close(self._c)

    @property
    def head(self) -> int | None:
        """The head of the chain that `run` wants done; None: the queue's next one, which is not taken yet."""
        head: int = self._c.head
        return None if head == lib.HV_NEXT else head

    @property
    def sent(self) -> int:
        """Requests that would have had to wait, or were large, and were left to io_uring."""
        count: int = self._c.sent
        return count


class TapPath(_Path):
    """Frames of a TAP, both ways."""

    def __init__(
        self,
        ram: Sequence[tuple[int, int, int]],
        rx: Queue,
        tx: Queue,
        short: TapShortCut,
        rx_kick_fd: int,
        tx_kick_fd: int,
        *,
        marks: Marks | None = None,
    ) -> None:
        """Serve the receive and the transmit queue; what is written to guest memory is noted in `marks`."""
        super().__init__(ram, [(rx, rx_kick_fd), (tx, tx_kick_fd)], short.fd, marks)
        self._c.header_size = short.header_size
        self._c.mergeable = short.mergeable
        self.run = partial(lib.hv_tap_run, self._c)
