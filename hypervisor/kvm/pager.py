"""Guest memory that is fetched when somebody touches it, from another process: see pager.h."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Final

from hypervisor.errors import HostError
from hypervisor.kvm._kvm import ffi, lib

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterable

    from hypervisor.kvm.dirty import Marks

__all__ = ["Pager", "open_userfaultfd"]

PAGE: Final = 4096
GRACE_MS: Final = 5000


def open_userfaultfd() -> int:
    """Return a userfaultfd that tells of the kernel's own accesses too; raises HostError where nobody may have one."""
    fd: int = lib.hv_uffd_open()
    if fd < 0:
        raise HostError(
            f"this host gives no userfaultfd for the kernel's accesses: {os.strerror(-fd)}",
            hint="be root, set vm.unprivileged_userfaultfd or have /dev/userfaultfd; or go without --postcopy, --lazy",
        )
    return fd


class Pager:
    """Fetches pages of one machine's RAM, in a thread that needs the GIL only at its end."""

    def __init__(self, userfaultfd: int, connection: socket.socket, marks: Marks, *, seconds: float | None) -> None:
        """Serve a machine's RAM; takes both descriptors over.

        Args:
            userfaultfd: see `open_userfaultfd`.
            connection: to the source.
            marks: of the RAM.
            seconds: a source that is silent for so long is gone; None: its connection tells.
        """
        self._fd = userfaultfd
        self._connection = connection
        connection.setblocking(True)
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._lost_fd = os.eventfd(0, os.EFD_CLOEXEC)
        pages = marks.size // PAGE
        made = lib.hv_pager_new(userfaultfd, connection.fileno(), self._stop_fd, self._lost_fd, marks.base, pages)
        if made == ffi.NULL:
            raise MemoryError
        self._c = ffi.gc(made, lib.hv_pager_free)
        self._c.timeout_ms = -1 if seconds is None else int(seconds * 1e3)
        self._c.grace_ms = GRACE_MS
        self._threads: list[threading.Thread] = []

    @property
    def left(self) -> int:
        """Pages that are still missing."""
        return int(self._c.left)

    @property
    def faults(self) -> int:
        """How often somebody has touched a page that was not there."""
        return int(self._c.faults)

    def begin(self, runs: Iterable[tuple[int, int]], on_lost: Callable[[int], None]) -> None:
        """Drop pages, and fetch them from now on.

        Args:
            runs: the missing ones: first page and length each.
            on_lost: called once the guest runs here, when the source is gone, with how many pages are missing: it ends
                whoever may touch the memory. If it has not returned after GRACE_MS, because it or they wait for a page,
                the process ends.

        Raises:
            HostError: the host cannot.
        """
        for first, count in runs:
            _check(lib.hv_pager_miss(self._c, first, count))
        _check(lib.hv_pager_register(self._c))

        def watch() -> None:
            if os.eventfd_read(self._lost_fd) == 1:
                on_lost(self.left)
                os.eventfd_write(self._stop_fd, 1)

        def run() -> None:
            lib.hv_pager_run(self._c)
            os.eventfd_write(self._lost_fd, 2)  # whatever it was, it is over: nobody needs to watch any more
            self._connection.close()

        for name, target in (("hv-pager", run), ("hv-pager-lost", watch)):
            self._threads.append(threading.Thread(target=target, name=name, daemon=True))
            self._threads[-1].start()

    def take_over(self) -> bool:
        """Say that the guest runs here from now on; returns False when the source has been lost already."""
        return bool(lib.hv_pager_take(self._c))

    def wait(self) -> None:
        """Wait until all pages are here, or none will come any more."""
        for thread in self._threads:
            thread.join()

    def close(self) -> None:
        """Fetch no more; nobody touches the memory any more."""
        if self._fd < 0:
            return
        os.eventfd_write(self._stop_fd, 1)
        self.wait()
        self._connection.close()
        for fd in (self._fd, self._stop_fd, self._lost_fd):
            os.close(fd)
        self._fd = -1


def _check(result: int) -> None:
    if result < 0:
        raise HostError(f"this host's userfaultfd does not serve the guest's memory: {os.strerror(-result)}")
