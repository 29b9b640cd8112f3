"""The refcounts of a qcow2 file's clusters, and which of them are free (QEMU, docs/interop/qcow2)."""

from __future__ import annotations

import sys
from array import array
from typing import TYPE_CHECKING, Final

from devices.backends.errors import BackendError
from devices.backends.qcow2_header import REFCOUNT_TABLE_AT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from devices.backends.qcow2_header import Header
    from devices.backends.raw import RawImage

__all__ = ["Refcounts"]

OFFSET: Final = 0xFFFF_FFFF_FFFF_FE00


class Refcounts:
    """Counts how often each cluster is used. In memory first; `write` brings them to the file.

    Attributes:
        metadata: numbers of clusters that are no data: header, L1, L2, refcount table and blocks.
        end: bytes of the file that are spoken for.
        outgrown: clusters of tables that have moved; to be released once the new place is durable.
    """

    def __init__(self, file: RawImage, header: Header, damaged: Callable[[str], OSError]) -> None:
        """Read the refcount table; `damaged` is told what is wrong and returns what to raise."""
        self._damaged = damaged
        self._file = file
        self._bits = header.cluster_bits
        self._cluster = 1 << header.cluster_bits
        self._width = 1 << header.refcount_order
        self._code = {16: "H", 32: "I", 64: "Q"}.get(self._width, "B")
        self._in_block = self._cluster * 8 // self._width
        self._table_at = header.refcount_offset
        size = header.refcount_clusters * self._cluster
        data = file.read_at(self._table_at, size)
        self._table = [int.from_bytes(data[at : at + 8], "big") & OFFSET for at in range(0, size, 8)]
        self._blocks: dict[int, array[int]] = {}
        self._dirty: set[int] = set()
        self._new_entries: set[int] = set()  # of the table, which the file does not have yet
        self._table_moved = False
        self._free: list[int] = []
        self._searched = 0  # blocks that were searched for clusters that are free
        self._old_end = self._next = -(-file.size // self._cluster)
        self.metadata: set[int] = set()
        self.outgrown: list[int] = []

    def claim(self, path: str, clusters: Sequence[int], tables: Sequence[int]) -> None:
        """Note which clusters are no data: those of the refcounts and the given ones.

        Args:
            path: for messages.
            clusters: numbers of clusters.
            tables: offsets of tables that are one cluster each.

        Raises:
            BackendError: two of them are at one place, or one is not in the file.
        """
        hint = f"`qemu-img check -r all {path}` may mend it; or open it with readonly"
        tables = [*tables, *filter(None, self._table)]
        for offset in tables:
            if offset % self._cluster or offset >= self._file.size:
                raise BackendError(f"disk image {path} is damaged: a table at {offset:#x}", hint=hint)
        first = self._table_at >> self._bits
        size = len(self._table) * 8 // self._cluster
        claimed = [*clusters, *range(first, first + size), *(offset >> self._bits for offset in tables)]
        self.metadata = set(claimed)
        if len(self.metadata) != len(claimed):
            raise BackendError(f"disk image {path} is damaged: two of its tables are at one place", hint=hint)

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
        while not self._free and self._searched < len(self._table) and self._searched * self._in_block < self._old_end:
            self._search(self._searched)
            self._searched += 1
        if self._free:
            cluster = self._free.pop()
        else:
            cluster = self._next
            self._next += 1
        self._set(cluster, 1)
        return cluster

    def _search(self, index: int) -> None:
        """Find what earlier users of the image have set free."""
        if index in self._blocks or not self._table[index]:
            return  # what was freed since is known; and a block that is missing is not worth making
        block = self._block(index, make=False)
        if block is None:
            return
        if block.count(0):
            first = index * self._in_block
            slots = range(min(self._in_block, self._old_end - first) - 1, -1, -1)
            self._free += [first + slot for slot in slots if not block[slot] and first + slot not in self.metadata]
        if index not in self._dirty:
            del self._blocks[index]  # of a large image there are many

    def release(self, cluster: int) -> bool:
        """Use a cluster once less; return whether nobody uses it now. Nothing durable may point to it any more."""
        count = self.get(cluster)
        if count == 0:
            raise self._damaged(f"cluster {cluster} is in use and has no refcount")
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

    def _block(self, index: int, *, make: bool) -> array[int] | None:
        block = self._blocks.get(index)
        if block is not None:
            return block
        offset = self._table[index] if index < len(self._table) else 0
        if offset:
            if offset % self._cluster or offset + self._cluster > self._file.size:
                raise self._damaged(f"a refcount block at {offset:#x}")
            block = self._unpack(self._file.read_at(offset, self._cluster))
        elif make:
            return self._make_block(index)
        else:
            return None
        self._blocks[index] = block
        return block

    def _make_block(self, index: int) -> array[int]:
        """Put a new block at the end of the file, where nothing was before."""
        while index >= len(self._table):
            self._grow()
        if index in self._blocks:
            return self._blocks[index]  # the table's new place was the first to need it
        block = self._blocks[index] = array(self._code, bytes(max(self._width // 8, 1) * self._in_block))
        place = self._next
        self._next += 1
        self._table[index] = place << self._bits
        self.metadata.add(place)
        self._new_entries.add(index)
        self._dirty.add(index)
        self._set(place, 1)  # it may count itself, or be counted by another new one
        return block

    def _grow(self) -> None:
        """Move the table to the end of the file, twice as long."""
        old = len(self._table) * 8 // self._cluster
        place = self._table_at >> self._bits
        self.outgrown += range(place, place + old)
        self.metadata.difference_update(range(place, place + old))
        clusters = 2 * old
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
        if self._new_entries and not self._table_moved:
            self._file.flush()  # a block counts itself: it must be there before it is pointed to
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

    def _unpack(self, data: bytes) -> array[int]:
        if self._width < 8:
            mask = (1 << self._width) - 1
            return array("B", (byte >> shift & mask for byte in data for shift in range(0, 8, self._width)))
        counts = array(self._code, data)
        if sys.byteorder == "little":
            counts.byteswap()
        return counts

    def _pack(self, counts: array[int]) -> bytes:
        if self._width < 8:
            per = 8 // self._width
            return bytes(
                sum(counts[at + slot] << slot * self._width for slot in range(per)) for at in range(0, len(counts), per)
            )
        counts = array(self._code, counts)
        if sys.byteorder == "little":
            counts.byteswap()
        return counts.tobytes()
