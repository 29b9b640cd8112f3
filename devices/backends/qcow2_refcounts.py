"""The refcounts of a qcow2 file's clusters, and which of them are free (QEMU, docs/interop/qcow2)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from devices.backends.qcow2_header import REFCOUNT_TABLE_AT

if TYPE_CHECKING:
    from devices.backends.qcow2_header import Header
    from devices.backends.raw import RawImage

__all__ = ["Refcounts"]

OFFSET: Final = 0xFFFF_FFFF_FFFF_FE00


class Refcounts:
    """Counts how often each cluster is used. In memory first; `write` brings them to the file.

    Attributes:
        metadata: numbers of clusters that are no data: header, L1, L2, refcount table and blocks.
        end: bytes of the file that are spoken for.
    """

    def __init__(self, path: str, file: RawImage, header: Header, metadata: set[int]) -> None:
        """Read the refcount table; `metadata` are the clusters that are known to be no data."""
        self._path = path
        self._file = file
        self._bits = header.cluster_bits
        self._cluster = 1 << header.cluster_bits
        self._width = 1 << header.refcount_order
        self._in_block = self._cluster * 8 // self._width
        self._table_at = header.refcount_offset
        size = header.refcount_clusters * self._cluster
        data = file.read_at(self._table_at, size)
        self._table = [int.from_bytes(data[at : at + 8], "big") & OFFSET for at in range(0, size, 8)]
        self._blocks: dict[int, list[int]] = {}
        self._dirty: set[int] = set()
        self._new_entries: set[int] = set()  # of the table, which the file does not have yet
        self._table_moved = False
        self._free: list[int] = []
        self._next = -(-file.size // self._cluster)
        first = self._table_at >> self._bits
        self.metadata = metadata
        self.metadata |= {*range(first, first + header.refcount_clusters)}
        self.metadata |= {offset >> self._bits for offset in self._table if offset}

    @property
    def end(self) -> int:
        """Bytes of the file that are spoken for."""
        return self._next << self._bits

    def get(self, cluster: int) -> int:
        """Return how often a cluster is used."""
        index, slot = divmod(cluster, self._in_block)
        block = self._block(index, make=False)
        return 0 if block is None else block[slot]

    def allocate(self) -> int:
        """Return the number of a cluster that nobody used, now used once."""
        if self._free:
            cluster = self._free.pop()
        else:
            cluster = self._next
            self._next += 1
        self._set(cluster, 1)
        return cluster

    def release(self, cluster: int) -> bool:
        """Use a cluster once less; return whether nobody uses it now. Nothing durable may point to it any more."""
        count = self.get(cluster)
        if count == 0:
            raise OSError(errno.EIO, f"{self._path} is damaged: cluster {cluster} is in use and has no refcount")
        self._set(cluster, count - 1)
        if count == 1 and cluster not in self.metadata:
            self._free.append(cluster)
        return count == 1

    def _set(self, cluster: int, count: int) -> None:
        index, slot = divmod(cluster, self._in_block)
        block = self._block(index, make=True)
        if block is not None:
            block[slot] = count
            self._dirty.add(index)

    def _block(self, index: int, *, make: bool) -> list[int] | None:
        block = self._blocks.get(index)
        if block is not None:
            return block
        offset = self._table[index] if index < len(self._table) else 0
        if offset:
            if offset % self._cluster or offset + self._cluster > self._file.size:
                raise OSError(errno.EIO, f"{self._path} is damaged: a refcount block at {offset:#x}")
            block = self._unpack(self._file.read_at(offset, self._cluster))
        elif make:
            return self._make_block(index)
        else:
            return None
        self._blocks[index] = block
        return block

    def _make_block(self, index: int) -> list[int]:
        """Put a new block at the end of the file, where nothing was before."""
        while index >= len(self._table):
            self._grow()
        block = self._blocks[index] = [0] * self._in_block
        place = self._next
        self._next += 1
        self._table[index] = place << self._bits
        self.metadata.add(place)
        self._new_entries.add(index)
        self._dirty.add(index)
        self._set(place, 1)  # it may count itself, or be counted by another new one
        return block

    def _grow(self) -> None:
        """Move the table to the end of the file, twice as long. Its old place is leaked: it is small, and this rare."""
        clusters = 2 * -(-len(self._table) * 8 // self._cluster)
        first = self._next
        self._next += clusters
        self._table += [0] * (clusters * self._cluster // 8 - len(self._table))
        self._table_at = first << self._bits
        self._table_moved = True
        for cluster in range(first, first + clusters):
            self.metadata.add(cluster)
            self._set(cluster, 1)

    def write(self) -> None:
        """Bring every change to the file; durable with the file's next flush."""
        for index in sorted(self._dirty):
            self._file.write_at(self._table[index], self._pack(self._blocks[index]))
        self._dirty.clear()
        if self._table_moved:
            self._file.write_at(self._table_at, b"".join(offset.to_bytes(8, "big") for offset in self._table))
            self._file.flush()
            clusters = len(self._table) * 8 // self._cluster
            place = self._table_at.to_bytes(8, "big") + clusters.to_bytes(4, "big")
            self._file.write_at(REFCOUNT_TABLE_AT, place)
            self._table_moved = False
        else:
            for index in self._new_entries:
                self._file.write_at(self._table_at + 8 * index, self._table[index].to_bytes(8, "big"))
        self._new_entries.clear()

    def _unpack(self, data: bytes) -> list[int]:
        if self._width >= 8:
            size = self._width // 8
            return [int.from_bytes(data[at : at + size], "big") for at in range(0, len(data), size)]
        mask = (1 << self._width) - 1
        return [byte >> shift & mask for byte in data for shift in range(0, 8, self._width)]

    def _pack(self, counts: list[int]) -> bytes:
        if self._width >= 8:
            size = self._width // 8
            return b"".join(count.to_bytes(size, "big") for count in counts)
        per = 8 // self._width
        return bytes(
            sum(counts[at + slot] << slot * self._width for slot in range(per)) for at in range(0, len(counts), per)
        )
