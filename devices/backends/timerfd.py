"""A file that becomes readable at a time: timerfd_create(2), which Python's `os` has from 3.13 on only.

To be imported only where there is one: ctypes costs milliseconds.
"""

from __future__ import annotations

import ctypes
import os
from typing import Final

__all__ = ["TimerFd"]

CLOCK_MONOTONIC: Final = 1
NONBLOCK: Final = os.O_NONBLOCK
CLOEXEC: Final = os.O_CLOEXEC
ABSOLUTE: Final = 1  # TFD_TIMER_ABSTIME
NS_PER_S: Final = 1_000_000_000


class _Times(ctypes.Structure):
    """Struct itimerspec: interval and first time, each in seconds and nanoseconds."""

    _fields_ = [(name, ctypes.c_long) for name in ("again_s", "again_ns", "first_s", "first_ns")]


_libc: Final = ctypes.PyDLL(None, use_errno=True)  # the calls are short: to give the GIL away would take longer


class TimerFd:
    """A timer on the monotonic clock."""

    def __init__(self) -> None:
        """Make one that is not set; raises OSError."""
        self._fd: int = _libc.timerfd_create(CLOCK_MONOTONIC, NONBLOCK | CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._times = _Times()

    def fileno(self) -> int:
        """Return the file; -1 when it is closed."""
        return self._fd

    def set(self, at_ns: int | None) -> None:
        """Be readable from time.monotonic_ns() == `at_ns` on; None: never. A time in the past is now."""
        at_ns = 0 if at_ns is None else max(at_ns, 1)
        self._times.first_s, self._times.first_ns = divmod(at_ns, NS_PER_S)
        if _libc.timerfd_settime(self._fd, ABSOLUTE, ctypes.byref(self._times), None) < 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def close(self) -> None:
        """Close the file; harmless when done already."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
