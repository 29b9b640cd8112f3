"""A byte queue that the run loop fills without the GIL."""

from __future__ import annotations

import os
from typing import Final

from hypervisor.kvm._kvm import ffi, lib

CAPACITY: Final = 1 << 18
DRAIN: Final = 1 << 16


class ByteRing:
    """A bounded queue of console bytes: written by vCPUs (in C) and by device models, read by one thread.

    `fileno()` becomes readable when the first byte comes after `arm()`, and again when the ring is half full.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        """Allocate the queue; `capacity` in bytes, a power of two."""
        self._event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._c = ffi.gc(lib.hv_ring_new(capacity, self._event_fd), lib.hv_ring_free)
        if self._c == ffi.NULL:
            raise MemoryError
        self._buffer = ffi.new("uint8_t[]", DRAIN)

    @property
    def cdata(self) -> object:
        """The C side's pointer, for `Vm.connect_ring`."""
        return self._c

    def fileno(self) -> int:
        """Return the eventfd to wait on."""
        return self._event_fd

    def push(self, data: bytes) -> int:
        """Append as many bytes as fit and return how many that was."""
        accepted: int = lib.hv_ring_push(self._c, data, len(data))
        return accepted

    def drain(self) -> bytes:
        """Take out up to 64 KiB; the ring's one reader calls this."""
        size = lib.hv_ring_drain(self._c, self._buffer, DRAIN)
        return bytes(ffi.buffer(self._buffer, size))

    def arm(self) -> None:
        """Ask to be woken by the next byte (at once when there is one already)."""
        lib.hv_ring_arm(self._c)

    def clear_event(self) -> None:
        """Make `fileno()` unreadable until the next wake-up."""
        try:
            os.eventfd_read(self._event_fd)
        except BlockingIOError:
            pass

    def close(self) -> None:
        """Close the eventfd; nothing may write to the ring any more."""
        if self._event_fd >= 0:
            os.close(self._event_fd)
            self._event_fd = -1
