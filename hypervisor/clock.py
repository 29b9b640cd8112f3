"""The TSC in nanoseconds since the machine's start."""

from __future__ import annotations

import time
from typing import Final

from hypervisor.kvm.recorder import tick

__all__ = ["Clock"]

LONG_ENOUGH_NS: Final = 50_000_000


class Clock:
    """When the machine started, and how long a tick is.

    Attributes:
        khz: the TSC's frequency as KVM tells it; 0 if it does not.
        start_tick: the TSC at the start.
    """

    def __init__(self, khz: int) -> None:
        """Start now."""
        self.khz = khz
        self.start_tick = tick()
        self._start_ns = time.monotonic_ns()
        self._end: tuple[int, int] | None = None

    @property
    def ns_per_tick(self) -> float:
        """Nanoseconds of a tick: measured since the start once that is long enough, before that KVM's word."""
        elapsed, ticks = self._now()
        if self.khz and elapsed < LONG_ENOUGH_NS:
            return 1e6 / self.khz
        return max(elapsed, 1) / max(ticks, 1)

    def now_ns(self) -> int:
        """Return nanoseconds since the start, or from there to the end."""
        return self._now()[0]

    def stop(self) -> None:
        """The machine has ended: no more time passes."""
        self._end = self._now()

    def _now(self) -> tuple[int, int]:
        """Return nanoseconds and ticks since the start."""
        return self._end or (time.monotonic_ns() - self._start_ns, tick() - self.start_tick)
