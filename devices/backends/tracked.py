"""A disk whose changes are noted, so that it can be copied while it is used.

Whoever writes does so first and notes it then, before the guest is told; whoever copies takes the note first and reads
then. So a change is copied, or noted anew: never missed. What the guest flushes is on the image below as ever.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from devices.backends.image import Image

__all__ = ["MOST", "TrackedImage", "runs_of"]

CLUSTER: Final = 1 << 16
MOST: Final = 1 << 20
"""Bytes of a run."""


def runs_of(offsets: Sequence[int], length: int, size: int) -> Iterator[tuple[int, int]]:
    """Join stretches of `length` bytes at sorted `offsets` into runs (offset, bytes) of about MOST, up to `size`."""
    start = end = 0
    for offset in offsets:
        if offset != end or end - start >= MOST:
            if end > start:
                yield start, end - start
            start = offset
        end = min(offset + length, size)
    if end > start:
        yield start, end - start


class TrackedImage:
    """An image over another one. See `devices.backends.image.Image`.

    Attributes:
        below: the image that has the bytes.
    """

    plain_fd = None  # what goes past this layer is not noted

    def __init__(self, below: Image) -> None:
        """Lie over `below`; nothing has changed yet."""
        self.below = below
        self.size = below.size
        self.readonly = below.readonly
        self.block_size = below.block_size
        self.cluster_size = below.cluster_size
        self._changed: set[int] = set()
        self._lock = threading.Lock()

    @property
    def changed(self) -> int:
        """Bytes that may have changed since the last `collect`, in whole clusters."""
        return len(self._changed) * CLUSTER

    def collect(self) -> list[tuple[int, int]]:
        """Return runs (offset, bytes) that may have changed since the last time, and note anew."""
        with self._lock:
            changed, self._changed = self._changed, set()
        return list(runs_of([cluster * CLUSTER for cluster in sorted(changed)], CLUSTER, self.size))

    def _note(self, offset: int, size: int) -> None:
        with self._lock:
            self._changed.update(range(offset // CLUSTER, -(-(offset + size) // CLUSTER)))

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill all of `buffers` from byte `offset` on."""
        self.below.readv(offset, buffers)

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write all of `buffers` at byte `offset`."""
        try:
            self.below.writev(offset, buffers)
        finally:  # one that failed may have written a part
            self._note(offset, sum(map(len, buffers)))

    def flush(self) -> None:
        """Make what was written durable."""
        self.below.flush()

    def discard(self, offset: int, size: int) -> None:
        """Forget `size` bytes."""
        try:
            self.below.discard(offset, size)
        finally:
            self._note(offset, size)

    def write_zeroes(self, offset: int, size: int, unmap: bool) -> None:
        """Make `size` bytes zero."""
        try:
            self.below.write_zeroes(offset, size, unmap)
        finally:
            self._note(offset, size)

    def close(self) -> None:
        """Close the image below."""
        self.below.close()
