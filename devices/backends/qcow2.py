"""Qcow2 images, read and write (QEMU, docs/interop/qcow2), versions 2 and 3, with backing files.

What was written and not flushed may be lost, as on any disk. What is in the file is sound at every moment: a cluster's
data and refcount are durable before an L2 entry points to it, an L2 table before the L1 points to it, and a cluster is
free only once nothing durable points to it. At worst a crash leaks clusters.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from array import array
from typing import TYPE_CHECKING, Final

from devices.backends.errors import BackendError
from devices.backends.image import is_qcow2
from devices.backends.qcow2_compressed import unpack
from devices.backends.qcow2_header import (
    AUTOCLEAR_AT,
    CORRUPT,
    DIRTY,
    FEATURES_AT,
    Header,
    check_stands_alone,
    create,
    parse,
)
from devices.backends.qcow2_refcounts import Refcounts
from devices.backends.raw import RawImage

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from devices.backends.image import Image

__all__ = ["Qcow2Image", "create_overlay", "open_qcow2"]

COPIED: Final = 1 << 63
COMPRESSED: Final = 1 << 62
ZERO: Final = 1 << 0
OFFSET: Final = 0x00FF_FFFF_FFFF_FE00
MAX_DEPTH: Final = 64
"""Backing files of backing files."""
MAX_TABLES: Final = 256
"""L2 tables that are kept in memory."""
MAX_FREED_BYTES: Final = 64 << 20
"""Clusters that wait to be free; a guest that never flushes makes the file no larger than the disk and this."""
MAX_ZEROED: Final = 1 << 15
"""Clusters whose entries are changed at once."""


def open_qcow2(
    path: str, *, readonly: bool, cache: str, wanted_backing: str | None = None, trusted: bool = True
) -> Qcow2Image:
    """Open an image and its backing files.

    Args:
        path: of the image.
        readonly: refuse writes.
        cache: see `devices.backends.image.open_image`.
        wanted_backing: the file that must be its backing file; None: any.
        trusted: whether somebody said that it is a qcow2 image; one that only looks like it may name no other file.

    Raises:
        BackendError: one of them cannot be used.
    """
    image = Qcow2Image(path, readonly=readonly, cache=cache, above=(), trusted=trusted)
    if wanted_backing is not None:
        found = image.backing_path
        if found is None or not os.path.samefile(found, wanted_backing):
            image.close()
            raise BackendError(
                f"overlay {path} lies over {found or 'nothing'}, not over {wanted_backing}",
                hint="name another overlay file, which is made then",
            )
    return image


def create_overlay(path: str, backing_path: str, backing_format: str, *, trusted: bool = True) -> None:
    """Make an empty overlay over an image; raises BackendError when that cannot be done. `trusted`: see open_qcow2."""
    base = _open_backing(backing_path, backing_format, cache="writeback", above=(), trusted=trusted)
    try:
        create(path, base.size, backing=backing_path, backing_format=backing_format)
    except OSError as error:
        raise BackendError(f"overlay {path}: {error.strerror}") from error
    finally:
        base.close()


def _open_backing(
    path: str, form: str | None, *, cache: str, above: tuple[tuple[int, int], ...], trusted: bool = True
) -> Image:
    """Open a backing file. Without a stated format it is raw: who wrote its beginning does not decide what it is."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise BackendError(
            f"backing file {path}: {error.strerror}", hint="`qemu-img rebase -u -b FILE IMAGE` names another place"
        ) from error
    if (status.st_dev, status.st_ino) in above or len(above) >= MAX_DEPTH:
        raise BackendError(f"backing file {path}: it leads back to itself, or through more than {MAX_DEPTH} files")
    if form not in {None, "raw", "qcow2"}:
        raise BackendError(f"backing file {path}: its format {form!r} is not supported")
    if form == "qcow2" and not is_qcow2(path):
        raise BackendError(f"backing file {path} is no qcow2 image, though it is said to be one")
    if form is None and is_qcow2(path):
        raise BackendError(
            f"backing file {path} looks like a qcow2 image, and no format is stated for it",
            hint=f"`qemu-img rebase -u -b {path} -F qcow2 IMAGE` states it",
        )
    if form == "qcow2":
        return Qcow2Image(path, readonly=True, cache=cache, above=above, trusted=trusted)
    return RawImage(path, readonly=True, cache="writeback" if cache == "none" else cache, any_size=True)


class Qcow2Image:
    """A qcow2 image. See `devices.backends.image.Image`.

    Attributes:
        path: of the image, absolute.
        cache: how it was opened; see `devices.backends.image.open_image`.
        backing_path: where its backing file is, or None.
        backing: that file, as an image.
    """

    block_size = 512
    plain_fd = None

    def __init__(
        self, path: str, *, readonly: bool, cache: str, above: tuple[tuple[int, int], ...], trusted: bool = True
    ) -> None:
        """Open it; `above` are the device and inode numbers of the images that it is the backing file of."""
        self.readonly = readonly
        self.path = os.path.abspath(path)
        self.cache = cache
        self._path = path
        self._file = RawImage(path, readonly=readonly, cache="writeback" if cache == "none" else cache, any_size=True)
        self.backing: Image | None = None
        self._lock = threading.Lock()
        try:
            self._open(above, trusted)
        except OSError as error:
            self.close()
            raise BackendError(f"disk image {path}: {error.strerror}") from error
        except BaseException:
            self.close()
            raise

    def _open(self, above: tuple[tuple[int, int], ...], trusted: bool) -> None:
        file = self._file
        data = file.read_at(0, min(file.size, 1 << 16))
        if not trusted:
            check_stands_alone(self._path, data)
        header = self._header = parse(self._path, data, file.size)
        self.size = header.size
        self._bits = header.cluster_bits
        self._cluster = self.cluster_size = 1 << header.cluster_bits
        self._entries = self._cluster // 8
        self._l1 = _words(file.read_at(header.l1_offset, 8 * header.l1_size))
        self._tables: dict[int, array[int]] = {}  # L2 tables by index in the L1, least recently used first
        self._dirty: set[int] = set()
        self._fresh: set[int] = set()  # those of them that the file's L1 does not point to yet
        self._freed: list[int] = []  # clusters that are free once the L2 tables are durable
        self._broken = False
        self.backing_path: str | None = None
        if not self.readonly:
            self._prepare_to_write(header)
        if header.backing is not None:
            self.backing_path = os.path.join(os.path.dirname(self._path), header.backing)
            status = os.stat(self._path)
            chain = (*above, (status.st_dev, status.st_ino))
            self.backing = _open_backing(self.backing_path, header.backing_format, cache=self.cache, above=chain)

    def _prepare_to_write(self, header: Header) -> None:
        if header.incompatible & (DIRTY | CORRUPT):
            what = "marked as damaged" if header.incompatible & CORRUPT else "was not closed"
            raise BackendError(f"disk image {self._path} {what}", hint=f"`qemu-img check -r all {self._path}` mends it")
        if header.snapshots:
            raise BackendError(
                f"disk image {self._path} has internal snapshots, which are not written to",
                hint="open it with overlay=memory or overlay=FILE, or `qemu-img convert` makes a copy without",
            )
        tables = [entry & OFFSET for entry in self._l1 if entry & OFFSET]
        first = [0, *self._span(header.l1_offset, 8 * header.l1_size)]
        self._refcounts = Refcounts(self._file, header, self._corrupt)
        self._refcounts.claim(self._path, first, tables)
        if header.autoclear:
            self._file.write_at(AUTOCLEAR_AT, bytes(8))

    @property
    def _end(self) -> int:
        """Bytes of the file that may be pointed to."""
        return self._file.size if self.readonly else max(self._file.size, self._refcounts.end)

    def _span(self, offset: int, size: int) -> range:
        """Return the numbers of the clusters that hold some bytes of the file."""
        return range(offset >> self._bits, (offset + size - 1 >> self._bits) + 1)

    def _corrupt(self, why: str) -> OSError:
        """Latch the image: nothing is written to it any more. Returns what to raise."""
        if not self.readonly and not self._broken and self._header.version >= 3:
            try:
                self._file.write_at(FEATURES_AT, (self._header.incompatible | CORRUPT).to_bytes(8, "big"))
            except OSError:
                pass  # it stays unmarked; we at least write no more
        self._broken = True
        return OSError(errno.EIO, f"{self._path} is damaged: {why}")

    # --- L2 tables ----------------------------------------------------------------------------------------------------

    def _table(self, index: int, *, make: bool = False) -> array[int] | None:
        """Return an L2 table; None when there is none and none is to be made."""
        table = self._tables.pop(index, None)
        if table is None:
            if len(self._tables) >= MAX_TABLES:
                self._make_room()
            offset = self._l1[index] & OFFSET
            if offset:
                if offset % self._cluster or offset + self._cluster > self._end or offset < self._cluster:
                    raise self._corrupt(f"an L2 table at {offset:#x}")
                table = _words(self._file.read_at(offset, self._cluster))
            elif make:
                place = self._refcounts.allocate()
                table = array("Q", bytes(self._cluster))
                self._refcounts.metadata.add(place)
                self._l1[index] = place << self._bits | COPIED
                self._fresh.add(index)
                self._dirty.add(index)
            else:
                return None
        self._tables[index] = table
        return table

    def _make_room(self) -> None:
        """Forget the L2 table that was not used for longest."""
        index = next(iter(self._tables))
        if index in self._dirty:
            self._check_writable()
            self._write_back()
        del self._tables[index]

    def _entry(self, cluster: int) -> int:
        table = self._table(cluster // self._entries)
        return 0 if table is None else table[cluster % self._entries]

    def _set_entry(self, cluster: int, entry: int) -> None:
        index, slot = divmod(cluster, self._entries)
        table = self._table(index, make=True)
        if table is not None:
            table[slot] = entry
            self._dirty.add(index)

    # --- reading ------------------------------------------------------------------------------------------------------

    def _pieces(self, offset: int, buffers: Sequence[memoryview]) -> Iterator[tuple[int, memoryview]]:
        """Cut a transfer at clusters: byte of the disk, part of a buffer."""
        for buffer in buffers:
            done = 0
            while done < len(buffer):
                part = buffer[done : done + self._cluster - offset % self._cluster]
                yield offset, part
                offset += len(part)
                done += len(part)

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill all of `buffers` from byte `offset` on."""
        with self._lock:
            start, run, length = 0, list[memoryview](), 0  # neighbours in the file are read at once
            for at, part in self._pieces(offset, buffers):
                entry = self._entry(at >> self._bits)
                place = self._data_place(entry)
                if place is None:
                    self._read_piece(entry, at, part)
                    continue
                place += at % self._cluster
                if run and place == start + length:
                    run.append(part)
                    length += len(part)
                    continue
                if run:
                    self._read_data(start, run)
                start, run, length = place, [part], len(part)
            if run:
                self._read_data(start, run)

    def _data_place(self, entry: int) -> int | None:
        """Return where in the file the data of a standard cluster is; None: it has none."""
        if entry & COMPRESSED or (entry & ZERO and self._header.version >= 3) or not entry & OFFSET:
            return None
        place = entry & OFFSET
        if place % self._cluster or place >= self._end:
            raise self._corrupt(f"a cluster at {place:#x}")
        return place

    def _read_data(self, place: int, parts: list[memoryview]) -> None:
        """Read from the file; its last cluster may be cut short, and is zero there."""
        if place + sum(map(len, parts)) <= self._file.size:
            self._file.readv(place, parts)
            return
        there = self._file.current_size() - place
        for part in parts:
            size = max(min(there, len(part)), 0)
            if size:
                self._file.readv(place, [part[:size]])
            part[size:] = bytes(len(part) - size)
            place += len(part)
            there -= len(part)

    def _read_piece(self, entry: int, at: int, part: memoryview) -> None:
        """Read part of a cluster that has no plain data of its own."""
        if entry & COMPRESSED:
            inside = at % self._cluster
            part[:] = self._decompress(entry)[inside : inside + len(part)]
            return
        there = 0
        if self.backing is not None and not entry & ZERO:
            there = max(min(self.backing.size - at, len(part)), 0)
        if there and self.backing is not None:
            self.backing.readv(at, [part[:there]])
        part[there:] = bytes(len(part) - there)

    def _compressed_place(self, entry: int) -> tuple[int, int]:
        """Return where compressed data begins and how long it may be."""
        shift = 62 - (self._bits - 8)
        place = entry & (1 << shift) - 1
        size = ((entry >> shift & (1 << self._bits - 8) - 1) + 1) * 512 - place % 512
        if place >= self._end:
            raise self._corrupt(f"a compressed cluster at {place:#x}")
        return place, min(size, self._end - place)

    def _decompress(self, entry: int) -> bytes:
        data = self._file.read_at(*self._compressed_place(entry))
        try:
            return unpack(data, self._cluster, zstd=self._header.compression != 0)
        except ValueError as error:
            raise self._corrupt(f"a compressed cluster that cannot be unpacked ({error})") from error

    # --- writing ------------------------------------------------------------------------------------------------------

    def _check_writable(self) -> None:
        if self.readonly or self._broken:
            raise OSError(errno.EIO, f"{self._path} is not written to")

    def _is_ours(self, entry: int, place: int) -> bool:
        """Whether a cluster may be written in place: nobody else uses it."""
        cluster = place >> self._bits
        if cluster in self._refcounts.metadata:
            raise self._corrupt(f"data at {place:#x}, where metadata is")
        return bool(entry & COPIED) or self._refcounts.get(cluster) == 1

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write all of `buffers` at byte `offset`."""
        with self._lock:
            self._check_writable()
            clusters: dict[int, list[memoryview]] = {}
            for at, part in self._pieces(offset, buffers):
                clusters.setdefault(at >> self._bits, []).append(part)
            changes: list[tuple[int, int, int]] = []  # clusters whose data moves: number, old and new entry
            try:
                self._write_clusters(clusters, offset % self._cluster, changes)
            except OSError:
                if not self._broken:
                    for _, _, new in changes:  # nothing points to them
                        self._refcounts.release((new & OFFSET) >> self._bits)
                raise
            self._change(changes)

    def _write_clusters(
        self, clusters: dict[int, list[memoryview]], inside: int, changes: list[tuple[int, int, int]]
    ) -> None:
        """Write data from byte `inside` of the first cluster on; adds to `changes` what moves."""
        start, run, length = 0, list[memoryview](), 0
        for cluster, parts in clusters.items():
            entry = self._entry(cluster)
            place = self._data_place(entry)
            if place is not None and self._is_ours(entry, place):
                place += inside
            else:
                parts = self._whole(entry, cluster, inside, parts)  # noqa: PLW2901 - the same data, completed
                place = self._refcounts.allocate() << self._bits
                changes.append((cluster, entry, place | COPIED))
            inside = 0
            if not run or place != start + length:
                if run:
                    self._file.writev(start, run)
                start, run, length = place, [], 0
            run += parts
            length += sum(map(len, parts))
        if run:
            self._file.writev(start, run)

    def _whole(self, entry: int, cluster: int, inside: int, parts: list[memoryview]) -> list[memoryview]:
        """Complete data for a cluster with what it holds now."""
        size = sum(map(len, parts))
        if size == self._cluster:
            return parts
        whole = memoryview(bytearray(self._cluster))
        place = self._data_place(entry)
        if place is not None:
            self._read_data(place, [whole])
        else:
            self._read_piece(entry, cluster << self._bits, whole)
        for part in parts:
            whole[inside : inside + len(part)] = part
            inside += len(part)
        return [whole]

    def _change(self, changes: list[tuple[int, int, int]]) -> None:
        """Point clusters elsewhere; what they pointed to is free once that is durable."""
        for cluster, old, new in changes:
            self._set_entry(cluster, new)
            if old & COMPRESSED:
                place, size = self._compressed_place(old)
                self._freed += self._span(place, size)
            elif old & OFFSET:
                self._freed.append((old & OFFSET) >> self._bits)
        if len(self._freed) << self._bits > MAX_FREED_BYTES:
            self._settle()

    # --- holes --------------------------------------------------------------------------------------------------------

    def discard(self, offset: int, size: int) -> None:
        """Give whole clusters back; they read as zeroes."""
        with self._lock:
            self._check_writable()
            first, end = -(-offset // self._cluster), (offset + size) // self._cluster
            if offset + size == self.size:
                end = -(-self.size // self._cluster)
            self._zero_clusters(range(first, end))

    def write_zeroes(self, offset: int, size: int, unmap: bool) -> None:
        """Make `size` bytes zero: whole clusters by an entry that says so, others by writing."""
        del unmap
        first, end = -(-offset // self._cluster), (offset + size) // self._cluster
        if self._header.version < 3 or first >= end:
            self._write_zeroes(offset, size)
            return
        with self._lock:
            self._check_writable()
            self._zero_clusters(range(first, end))
        self._write_zeroes(offset, first * self._cluster - offset)
        self._write_zeroes(end * self._cluster, offset + size - end * self._cluster)

    def _write_zeroes(self, offset: int, size: int) -> None:
        zeroes = memoryview(bytes(self._cluster))
        while size > 0:
            part = min(size, self._cluster - offset % self._cluster)
            self.writev(offset, [zeroes[:part]])
            offset += part
            size -= part

    def _zero_clusters(self, clusters: range) -> None:
        """Make clusters read as zeroes, where the format can say so."""
        if self._header.version < 3 and self.backing is not None:
            return  # nothing can be said: they stay, which a discard may do
        zero = ZERO if self._header.version >= 3 else 0
        for start in range(0, len(clusters), MAX_ZEROED):
            changes = []
            for cluster in clusters[start : start + MAX_ZEROED]:
                entry = self._entry(cluster)
                if entry & ~COPIED != zero and (entry or self.backing is not None):
                    changes.append((cluster, entry, zero))
            self._change(changes)

    # --- durability ---------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Make everything that was written durable."""
        if self.readonly:
            return
        with self._lock:
            if self._broken:
                raise OSError(errno.EIO, f"{self._path} is not written to")
            self._settle()

    def _settle(self) -> None:
        """Make everything durable, then free what nothing points to any more."""
        self._write_back()
        self._file.flush()
        freed, self._freed = self._freed + self._refcounts.outgrown, []
        self._refcounts.outgrown = []
        for cluster in reversed(freed):  # so that they are allocated in their order
            if self._refcounts.release(cluster):
                self._file.discard(cluster << self._bits, self._cluster)

    def _write_back(self) -> None:
        """Bring L2 tables to the file, each behind what it points to; the last of it is durable with the next flush."""
        self._refcounts.write()
        if not self._dirty:
            return
        self._file.flush()
        for index in sorted(self._dirty):
            self._file.write_at(self._l1[index] & OFFSET, _bytes(self._tables[index]))
        self._dirty.clear()
        if self._fresh:
            self._file.flush()
            for index in sorted(self._fresh):
                self._file.write_at(self._header.l1_offset + 8 * index, self._l1[index].to_bytes(8, "big"))
            self._fresh.clear()

    def settle(self) -> None:
        """Flush until the file is complete: what the first flush sets free is in the next one's refcounts."""
        for _ in range(3):  # and their table may have moved
            self.flush()

    def fileno(self) -> int:
        """Return the file's descriptor."""
        return self._file.fileno()

    def close(self) -> None:
        """Bring what was written to the file, and close it and its backing files."""
        if self._file.is_open and not self.readonly and hasattr(self, "_refcounts"):
            try:
                self.flush()
                self._refcounts.write()  # of what that has set free
            except OSError:
                pass  # nobody was promised that it is there
        self._file.close()
        if self.backing is not None:
            self.backing.close()


def _words(data: bytes) -> array[int]:
    """Return big-endian 64-bit words as numbers."""
    words = array("Q", data)
    if sys.byteorder == "little":
        words.byteswap()
    return words


def _bytes(words: array[int]) -> bytes:
    """Return numbers as big-endian 64-bit words."""
    copy = array("Q", words)
    if sys.byteorder == "little":
        copy.byteswap()
    return copy.tobytes()
