"""The entropy device (Virtio 1.2, section 5.4): fills what the driver hands it with random bytes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from devices.saved import Saved
from devices.virtio.device import VirtioDevice

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from devices.events import EventLog
    from devices.ports import Alarm, GuestRam
    from devices.virtio.queue import Chain, Queue

__all__ = ["Rng"]

QUEUE_SIZE: Final = 64
MOST: Final = 1 << 16
"""Bytes that one request gets at most, however long its buffer: 5.4.6 asks for one or more."""
NS_PER_S: Final = 1_000_000_000


class Rng(VirtioDevice):
    """An entropy source."""

    device_id = 4

    def __init__(
        self,
        name: str,
        ram: GuestRam,
        *,
        source: Callable[[int], bytes] = os.urandom,
        bandwidth: int | None = None,
        alarm: Alarm | None = None,
        now_ns: Callable[[], int] = lambda: 0,
        log: EventLog,
    ) -> None:
        """Make a source.

        Args:
            name: such as "rng0".
            ram: guest memory.
            source: returns so many random bytes.
            bandwidth: most bytes a second, None without a limit; a limit needs an alarm that calls `resume`.
            alarm: wakes the device when it may go on.
            now_ns: the alarm's clock.
            log: for what the guest does wrong.
        """
        super().__init__(name, ram, queue_sizes=[QUEUE_SIZE], in_order=True, log=log)
        self._source = source
        self._bandwidth = bandwidth
        self._alarm = alarm
        self._now_ns = now_ns
        self._free_at = 0

    def state(self) -> dict[str, Any]:
        """Return the device's state: how long the limit makes it wait."""
        wait = 0 if self._bandwidth is None else max(self._free_at - self._now_ns(), 0)
        return super().state() | {"wait_ns": wait}

    def load(self, state: Mapping[str, Any]) -> None:
        """Become what `state` says; raises KeyError, TypeError or ValueError when it is no state of a source."""
        saved = Saved(state)
        wait = saved.number("wait_ns", NS_PER_S)  # no request is longer than a second's allowance
        self.load_rest(saved)
        self._free_at = self._now_ns() + wait
        if self._alarm is not None:
            self._alarm.set(self._free_at if wait else None)

    def handle_queue(self, queue: Queue, most: int | None) -> None:
        """Answer requests, unless the limit says to wait."""
        if self._bandwidth is not None and self._alarm is not None and self._now_ns() < self._free_at:
            self._alarm.set(self._free_at)
            return
        super().handle_queue(queue, 1 if self._bandwidth is not None else most)

    def resume(self) -> None:
        """Go on: the alarm has fired."""
        self.serve(0)

    def handle(self, queue: Queue, chain: Chain) -> int:
        """Fill a buffer, the longest ones in part."""
        del queue
        size = min(chain.writable_size, MOST)
        if self._bandwidth is not None and self._alarm is not None:
            size = min(size, self._bandwidth)
            self._free_at = self._now_ns() + size * NS_PER_S // self._bandwidth
            self._alarm.set(self._free_at)
        return chain.scatter(self._source(size))
