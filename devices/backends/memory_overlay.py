"""A copy-on-write overlay in memory: the base is only read, and what was written is gone with the machine."""

from __future__ import annotations

import mmap
import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from devices.backends.image import Image

__all__ = ["MemoryOverlay"]

CLUSTER: Final = 1 << 16
MAP_NORESERVE: Final = 0x4000


class MemoryOverlay:
    """An image over another one. See `devices.backends.image.Image`.

    Its memory is that of the clusters that were written: never more than the disk's size.
    """

    readonly = False
    cluster_size = CLUSTER
    plain_fd = None

    def __init__(self, base: Image) -> None:
        """Lay it over `base`, which it closes in the end."""
        self._base = base
        self.size = base.size
        self.block_size = base.block_size
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        self._map = mmap.mmap(-1, -(-self.size // CLUSTER) * CLUSTER, flags=flags)
        self._view = memoryview(self._map)
        self._ours = bytearray(-(-self.size // CLUSTER))
        self._lock = threading.Lock()

    def _pieces(self, offset: int, buffers: Sequence[memoryview]) -> Iterator[tuple[int, int, memoryview]]:
        """Cut a transfer at clusters: cluster, byte of the disk, part of a buffer."""
        for buffer in buffers:
            done = 0
            while done < len(buffer):
                room = CLUSTER - offset % CLUSTER
                part = buffer[done : done + room]
                yield offset // CLUSTER, offset, part
                offset += len(part)
                done += len(part)

    def _take(self, cluster: int) -> None:
        """Copy a cluster of the base, to be changed."""
        if not self._ours[cluster]:
            start = cluster * CLUSTER
            self._base.readv(start, [self._view[start : min(start + CLUSTER, self.size)]])
            self._ours[cluster] = 1

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill all of `buffers` from byte `offset` on."""
        with self._lock:
            for cluster, at, part in self._pieces(offset, buffers):
                if self._ours[cluster]:
                    part[:] = self._view[at : at + len(part)]
                else:
                    self._base.readv(at, [part])

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write all of `buffers` at byte `offset`."""
        with self._lock:
            for cluster, at, part in self._pieces(offset, buffers):
                if len(part) == CLUSTER:
                    self._ours[cluster] = 1
                else:
                    self._take(cluster)
                self._view[at : at + len(part)] = part

    def flush(self) -> None:
        """Do nothing: memory is as durable as it gets."""

    def discard(self, offset: int, size: int) -> None:
        """Make the bytes zero, and give their memory back."""
        self.write_zeroes(offset, size, unmap=True)

    def write_zeroes(self, offset: int, size: int, unmap: bool) -> None:
        """Make `size` bytes zero; whole clusters give their memory back."""
        del unmap
        end = offset + size
        with self._lock:
            while offset < end:
                cluster, inside = divmod(offset, CLUSTER)
                length = min(CLUSTER - inside, end - offset)
                if not inside and (length == CLUSTER or end == self.size):
                    self._map.madvise(mmap.MADV_DONTNEED, cluster * CLUSTER, CLUSTER)
                    self._ours[cluster] = 1
                else:
                    self._take(cluster)
                    self._view[offset : offset + length] = bytes(length)
                offset += length

    def close(self) -> None:
        """Forget everything."""
        self._base.close()
        with self._lock:
            self._view.release()
            try:
                self._map.close()
            except BufferError:
                pass  # a transfer's view is still about; the memory goes with it
