"""The traditional memory balloon (Virtio 1.2, section 5.5): memory that the guest gives back to the host.

PAGE_POISON is not offered: pages that were given back read as zeroes, and a driver that wants to find something else in
them may then not accept PAGE_REPORTING (5.5.3.1).
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from struct import Struct, pack
from typing import TYPE_CHECKING, Any, Final

from devices.ports import GuestFault
from devices.saved import Saved
from devices.virtio.device import VirtioDevice
from devices.virtio.queue import MAX_SIZE, BrokenQueueError, Chain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from devices.events import EventLog
    from devices.ports import GuestRam
    from devices.virtio.queue import Queue

__all__ = ["Balloon", "Feature", "Statistic"]


class Feature(IntFlag):
    """Feature bits (5.5.3)."""

    MUST_TELL_HOST = 1 << 0
    STATS_VQ = 1 << 1
    DEFLATE_ON_OOM = 1 << 2
    PAGE_REPORTING = 1 << 5


class Statistic(IntEnum):
    """Tags of the guest's statistics (5.5.6.4); amounts in bytes, else counts."""

    SWAP_IN = 0
    SWAP_OUT = 1
    MAJOR_FAULTS = 2
    MINOR_FAULTS = 3
    FREE = 4
    TOTAL = 5
    AVAILABLE = 6
    DISK_CACHES = 7
    HUGETLB_ALLOCATIONS = 8
    HUGETLB_FAILURES = 9


INFLATE: Final = 0
DEFLATE: Final = 1
STATISTICS: Final = 2
"""Reporting is queue 4 (5.5.2); to drivers that count only the queues that there are it is 3, or 2."""
QUEUES: Final = 5
QUEUE_SIZE: Final = 128
PAGE: Final = 4096
PAGES_IN_MIB: Final = 256
MOST_NUMBERS: Final = 4096
"""Page numbers of one request that are looked at: drivers send 256."""
_STATISTIC: Final = Struct("<HQ")
_ACTUAL: Final = 4
"""Offset of `actual` in the configuration space (5.5.4)."""


class Balloon(VirtioDevice):
    """A balloon.

    Attributes:
        statistics: what the guest last said of its memory, by names as "free".
        reclaimed: bytes given back to the host so far, by inflating and by reports.
    """

    device_id = 5

    def __init__(
        self,
        name: str,
        ram: GuestRam,
        *,
        reclaim: Callable[[int, int], None],
        reporting: bool = True,
        log: EventLog,
    ) -> None:
        """Make a balloon; `reclaim(gpa, size)` gives whole pages back, or raises GuestFault where there is no RAM."""
        features = Feature.MUST_TELL_HOST | Feature.STATS_VQ | Feature.DEFLATE_ON_OOM
        if reporting:
            features |= Feature.PAGE_REPORTING
        super().__init__(name, ram, queue_sizes=[QUEUE_SIZE] * QUEUES, features=int(features), in_order=True, log=log)
        self._reclaim = reclaim
        self._target = 0
        self._actual = 0
        self._held: Chain | None = None
        self.statistics: dict[str, int] = {}
        self.reclaimed = 0

    # --- for the host -------------------------------------------------------------------------------------------------

    @property
    def actual_mib(self) -> float:
        """How much is in the balloon, as the driver says, in MiB."""
        return self._actual / PAGES_IN_MIB

    @property
    def target_mib(self) -> float:
        """How much shall be in it, in MiB."""
        return self._target / PAGES_IN_MIB

    def set_target(self, mib: int) -> None:
        """Ask the driver for a balloon of so many MiB; it follows as far and as fast as it can."""
        self._target = min(max(mib, 0) * PAGES_IN_MIB, 0xFFFF_FFFF)
        if self.is_active:
            self.transport.config_changed()

    def ask_for_statistics(self) -> None:
        """Have the driver send its statistics anew (5.5.6.3)."""
        if self._held is not None and self.is_active:
            queue = self.queues[STATISTICS]
            queue.push(self._held, 0)
            self._held = None
            queue.notify_driver()

    # --- for the driver -----------------------------------------------------------------------------------------------

    def config(self) -> bytes:
        """Return num_pages and actual."""
        return pack("<II", self._target, self._actual)

    def write_config(self, offset: int, data: bytes) -> None:
        """Take `actual`."""
        if offset == _ACTUAL and len(data) == 4:
            self._actual = int.from_bytes(data, "little")

    def reset(self) -> None:
        """Forget the driver's balloon: it takes its pages back."""
        super().reset()
        self._held = None
        self._actual = 0

    def disable(self, queue: Queue) -> None:
        """Forget the buffer that is held of the queue for statistics."""
        super().disable(queue)
        if queue.index == STATISTICS:
            self._held = None

    def state(self) -> dict[str, Any]:
        """Return the device's state: both sizes, the guest's statistics, and the buffer that is held of them."""
        return super().state() | {
            "num_pages": self._target,
            "actual": self._actual,
            "statistics": dict(self.statistics),
            "held": None if self._held is None else self._held.head,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Become what `state` says; raises KeyError, TypeError or ValueError when it is no state of a balloon."""
        saved = Saved(state)
        target, actual = (saved.number(name, 0xFFFF_FFFF) for name in ("num_pages", "actual"))
        told = saved.part("statistics")
        statistics = {name: Saved(told).number(name, (1 << 64) - 1) for name in told}
        names = {tag.name.lower() for tag in Statistic}
        if not statistics.keys() <= names:
            raise ValueError(f"statistics of {sorted(statistics.keys() - names)}")
        held = Chain(saved.number("held", MAX_SIZE - 1)) if saved.optional("held") else None
        self.load_rest(saved)
        self._target, self._actual, self.statistics, self._held = target, actual, statistics, held

    def handle_queue(self, queue: Queue, most: int | None) -> None:
        """Answer requests; a buffer for statistics is kept until they are wanted again."""
        if queue.index != STATISTICS or not self.features & Feature.STATS_VQ:
            super().handle_queue(queue, most)
            return
        while (chain := queue.pop()) is not None or queue.expect_kicks():
            if chain is None:
                continue
            if self._held is not None:
                raise BrokenQueueError("a second buffer for statistics")
            self._take_statistics(chain)
            self._held = chain

    def handle(self, queue: Queue, chain: Chain) -> int:
        """Take pages in or let them go."""
        if queue.index == INFLATE:
            for first, count in _runs(self._page_numbers(chain)):
                self._give_back(first * PAGE, count * PAGE)
        elif queue.index != DEFLATE and self.features & Feature.PAGE_REPORTING:
            self._take_report(chain)
        return 0

    def _page_numbers(self, chain: Chain) -> Iterable[int]:
        data = chain.gather(4 * MOST_NUMBERS)
        return sorted(set(memoryview(data[: len(data) & ~3]).cast("I")))

    def _take_report(self, chain: Chain) -> None:
        """Give back the pages that the buffers of a report are (5.5.6.7); they are named by being writable."""
        for gpa, piece in zip(chain.places, (*chain.readable, *chain.writable), strict=True):
            first = -(-gpa // PAGE) * PAGE
            end = (gpa + len(piece)) // PAGE * PAGE
            if end > first:
                self._give_back(first, end - first)

    def _give_back(self, gpa: int, size: int) -> None:
        try:
            self._reclaim(gpa, size)
        except GuestFault as fault:
            self.log.once("balloon.not_ram", gpa=fault.gpa, size=fault.size)
        else:
            self.reclaimed += size

    def _take_statistics(self, chain: Chain) -> None:
        names = {int(tag): tag.name.lower() for tag in Statistic}
        data = chain.gather(_STATISTIC.size * 64)
        for tag, value in _STATISTIC.iter_unpack(data[: len(data) // _STATISTIC.size * _STATISTIC.size]):
            if tag in names:
                self.statistics[names[tag]] = value


def _runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Join ascending numbers that follow one another: (first, count) each."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][0] + runs[-1][1]:
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((number, 1))
    return runs
