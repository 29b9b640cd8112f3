"""What a disk has taken and not yet made durable: writes in their order, and what a power cut leaves of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from random import Random

__all__ = ["FLUSH", "READ", "SECTOR", "WRITE", "WriteCache"]

SECTOR: Final = 512
READ, WRITE, FLUSH = "read", "write", "flush"
"""What a disk is asked for; a discard and zeroes are writes."""
LOST: Final = 0.35
TORN: Final = 0.3
"""Of the writes that a power cut meets, so many are lost wholly, and so many in part."""


class WriteCache:
    """Writes of whole sectors, in the order in which they came. Offsets are in bytes."""

    def __init__(self) -> None:
        """Begin with none."""
        self.size = 0
        self._writes: list[tuple[int, bytes]] = []
        self._newest: dict[int, memoryview] = {}  # content by sector

    def __len__(self) -> int:
        """Return how many writes there are."""
        return len(self._writes)

    def put(self, offset: int, data: bytes) -> None:
        """Add a write."""
        self._writes.append((offset, data))
        self.size += len(data)
        view = memoryview(data)
        for at in range(0, len(data), SECTOR):
            self._newest[(offset + at) // SECTOR] = view[at : at + SECTOR]

    def patch(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Bring what is newer here into buffers that were filled from `offset` on; they may be cut anywhere."""
        newest = self._newest
        for buffer in buffers:
            end = offset + len(buffer)
            for sector in range(offset // SECTOR, -(-end // SECTOR)) if newest else ():
                content = newest.get(sector)
                if content is not None:
                    first, last = max(sector * SECTOR, offset), min((sector + 1) * SECTOR, end)
                    buffer[first - offset : last - offset] = content[first % SECTOR : (last - 1) % SECTOR + 1]
            offset = end

    def oldest(self) -> Iterator[tuple[int, bytes]]:
        """Yield the writes in their order."""
        return iter(self._writes)

    def drop(self, count: int | None = None) -> None:
        """Forget the first `count` writes, all of them when None."""
        kept = [] if count is None else self._writes[count:]
        self._writes, self._newest, self.size = [], {}, 0
        for offset, data in kept:
            self.put(offset, data)

    def copy(self) -> WriteCache:
        """Return another cache of the same writes."""
        other = WriteCache()
        other.size, other._writes, other._newest = self.size, list(self._writes), dict(self._newest)
        return other

    def survivors(self, rng: Random) -> Iterator[tuple[int, bytes]]:
        """Yield what of the writes may be on the medium when the power goes, in their order.

        Each is there, or not, or some of its sectors are; of two to one sector the later one may be gone.
        """
        for offset, data in self._writes:
            fate = rng.random()
            if fate < LOST:
                continue
            if fate >= LOST + TORN:
                yield offset, data
                continue
            for at in range(0, len(data), SECTOR):
                if rng.random() < 0.5:
                    yield offset + at, data[at : at + SECTOR]
