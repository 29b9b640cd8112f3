"""Token buckets: so many requests and bytes a second, with a bounded burst."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Limits"]

BURST_SECONDS: Final = 0.1
"""How much of a second's allowance may be used at once after a pause."""


class _Bucket:
    """One allowance; may go into debt, which is waited for."""

    __slots__ = ("_clock", "_left", "_rate", "_then")

    def __init__(self, rate: float, clock: Callable[[], float]) -> None:
        self._rate = rate
        self._clock = clock
        self._left = rate * BURST_SECONDS
        self._then = clock()

    def take(self, amount: float) -> float:
        """Take `amount` and return the seconds to wait until that is covered."""
        now = self._clock()
        self._left = min(self._left + (now - self._then) * self._rate, self._rate * BURST_SECONDS)
        self._then = now
        self._left -= amount
        return max(-self._left / self._rate, 0.0)

    def give_back(self, amount: float) -> None:
        """Undo a `take`."""
        self._left += amount


class Limits:
    """Limits of a disk."""

    def __init__(self, *, iops: int | None, bandwidth: int | None, clock: Callable[[], float]) -> None:
        """Allow `iops` requests and `bandwidth` bytes a second (None: no limit), by a clock in seconds."""
        self._requests = None if iops is None else _Bucket(iops, clock)
        self._lock = threading.Lock()  # each queue has a thread
        self._bytes = None if bandwidth is None else _Bucket(bandwidth, clock)

    def take(self, size: int) -> float:
        """Count a request of `size` bytes and return how many seconds it has to wait."""
        waits = [0.0]
        with self._lock:
            if self._requests is not None:
                waits.append(self._requests.take(1))
            if self._bytes is not None:
                waits.append(self._bytes.take(size))
        return min(max(waits), threading.TIMEOUT_MAX)

    def give_back(self, size: int) -> None:
        """Undo `take`: the request has not been made, and will be counted when it is."""
        with self._lock:
            if self._requests is not None:
                self._requests.give_back(1)
            if self._bytes is not None:
                self._bytes.give_back(size)
