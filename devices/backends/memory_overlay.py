"""A copy-on-write overlay in memory: the base is only read, and what was written is gone with the machine."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from devices.backends.image import Image

__all__ = ["CLUSTER", "MemoryOverlay"]

CLUSTER: Final = 1 << 16
MAP_NORESERVE: Final = 0x4000
MAX_SPARE: Final = 1024
"""Clusters whose memory `forget` may leave for those written next, 64 MiB: the kernel need not find it anew."""


class MemoryOverlay:
    """An image over another one. See `devices.backends.image.Image`.

    Its memory is that of the clusters that were written: never more than the disk's size, or `limit`.

    Attributes:
        base: what lies below.
        limit: most bytes that may differ from the base, in whole clusters; what would need more fails with ENOSPC.
    """

    readonly = False
    cluster_size = CLUSTER
    plain_fd = None

    def __init__(self, base: Image, *, limit: int | None = None) -> None:
        """Lay it over `base`, which it closes in the end."""
        self.base = base
        self.limit = base.size + CLUSTER if limit is None else limit
        self.size = base.size
        self.block_size = base.block_size
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        self._map = mmap.mmap(-1, -(-self.size // CLUSTER) * CLUSTER, flags=flags)
        self._view = memoryview(self._map)
        self._ours = bytearray(-(-self.size // CLUSTER))
        self._written: list[int] = []  # the clusters that are ours
        self._filled: set[int] = set()  # clusters that have memory, ours or not
        self._lock = threading.Lock()

    @property
    def written(self) -> int:
        """Bytes that may differ from the base, in whole clusters."""
        return len(self._written) * CLUSTER

    def changes(self) -> Iterator[tuple[int, memoryview]]:
        """Yield offset and content of every cluster that was written, in their order; nothing may write meanwhile."""
        for cluster in sorted(self._written):
            start = cluster * CLUSTER
            yield start, self._view[start : min(start + CLUSTER, self.size)]

    def forget(self) -> None:
        """Make the content that of the base again, at a cost of what was written; nothing may use it meanwhile."""
        with self._lock:
            for cluster in self._written:
                self._ours[cluster] = 0
            self._written.clear()
            if len(self._filled) > MAX_SPARE:
                self._map.madvise(mmap.MADV_DONTNEED)
                self._filled.clear()

    def _runs(self, offset: int, buffers: Sequence[memoryview]) -> Iterator[tuple[bool, int, list[memoryview]]]:
        """Cut a transfer where ours and the base's meet: whether it is ours, byte of the disk, parts of buffers."""
        run: list[memoryview] = []
        start, is_ours = offset, False
        for _, at, part in self._pieces(offset, buffers):
            ours = bool(self._ours[at // CLUSTER])
            if run and ours != is_ours:
                yield is_ours, start, run
                run = []
            if not run:
                start, is_ours = at, ours
            run.append(part)
        if run:
            yield is_ours, start, run

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

    def _claim(self, cluster: int) -> None:
        """Count a cluster as ours; raises OSError beyond the limit."""
        if not self._ours[cluster]:
            if self.written + CLUSTER > self.limit:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._ours[cluster] = 1
            self._written.append(cluster)

    def _take(self, cluster: int) -> None:
        """Copy a cluster of the base, to be changed."""
        if self._ours[cluster]:
            self._filled.add(cluster)
            return
        if self.written + CLUSTER > self.limit:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        start = cluster * CLUSTER
        self._filled.add(cluster)
        self.base.readv(start, [self._view[start : min(start + CLUSTER, self.size)]])
        self._claim(cluster)

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill all of `buffers` from byte `offset` on."""
        with self._lock:
            for is_ours, start, parts in self._runs(offset, buffers):
                if not is_ours:
                    self.base.readv(start, parts)
                    continue
                at = start
                for part in parts:
                    part[:] = self._view[at : at + len(part)]
                    at += len(part)

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write all of `buffers` at byte `offset`; raises OSError beyond the limit, some of it may be written then."""
        with self._lock:
            end = offset + sum(map(len, buffers))
            for cluster, at, part in self._pieces(offset, buffers):
                if cluster * CLUSTER >= offset and min((cluster + 1) * CLUSTER, self.size) <= end:
                    self._claim(cluster)  # nothing of the base is left in it
                    self._filled.add(cluster)
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
                    self._claim(cluster)
                    self._map.madvise(mmap.MADV_DONTNEED, cluster * CLUSTER, CLUSTER)
                    self._filled.discard(cluster)
                else:
                    self._take(cluster)
                    self._view[offset : offset + length] = bytes(length)
                offset += length

    def close(self) -> None:
        """Forget everything."""
        self.base.close()
        with self._lock:
            self._view.release()
            try:
                self._map.close()
            except BufferError:
                pass  # a transfer's view is still about; the memory goes with it
