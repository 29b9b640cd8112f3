"""The memory of a snapshot: a sparse file, and an index with a hash for each chunk of it.

A record of the index says of one chunk what its bytes hash to, and where they are: nowhere (zeros), here, or in the
parent. In a raw memory file a chunk lies where it lies in RAM, and all else is holes, so that the file of a snapshot
without a parent can be mapped as it is. In a compressed one the chunks that are here follow each other.

The hashes are xxh3: they find accidents, twenty times as fast as blake2b; they are no proof against forgery.
"""

from __future__ import annotations

import os
import struct
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import xxhash

from hypervisor.errors import DamagedSnapshotError
from hypervisor.snapshot.manifest import CHUNK, MemoryEntry, Range

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Progress = Callable[[int, int], object]

__all__ = ["BASE", "DATA", "INDEX", "MEMORY", "ZERO", "Index", "MemoryFile", "Record", "write_all", "write_memory"]

MEMORY: Final = "memory"
INDEX: Final = "memory.index"
RECORD: Final = struct.Struct("<16s8sII")
"""Hash of the chunk's bytes (xxh3-128), of its frame where it is compressed (xxh3-64), bytes in the file, kind."""
ZERO: Final = 0
DATA: Final = 1
BASE: Final = 2
PAGE: Final = 4096
NO_FRAME: Final = bytes(8)
BATCH: Final = 64
"""Chunks that are worked on at once: enough that a system call costs nothing beside them."""
MOST_FRAME: Final = CHUNK + CHUNK // 128 + 512
"""Bytes that a chunk may take when zstd finds nothing to compress in it."""
LEVEL: Final = 1
"""Of zstd: higher ones take longer and gain little on memory."""
ZEROS: Final = bytearray(CHUNK)
"""A bytearray, since it compares with a view by memcmp; two memoryviews compare item by item."""


class Record(NamedTuple):
    """What the index says of a chunk."""

    hash: bytes
    frame: bytes
    stored: int
    kind: int


class Index:
    """The chunks of a memory, in order.

    Attributes:
        data: the file.
        size: bytes of the memory.
    """

    def __init__(self, data: bytes, size: int) -> None:
        """Take the file's bytes; they are of the right number."""
        self.data = data
        self.size = size

    def __len__(self) -> int:
        return len(self.data) // RECORD.size

    def __getitem__(self, chunk: int) -> Record:
        return Record._make(RECORD.unpack_from(self.data, chunk * RECORD.size))

    def __iter__(self) -> Iterator[Record]:
        return map(Record._make, RECORD.iter_unpack(self.data))

    def hash_of(self, chunk: int) -> bytes:
        """Return what the chunk's bytes hash to, wherever they are."""
        return self.data[chunk * RECORD.size : chunk * RECORD.size + 16]

    def length(self, chunk: int) -> int:
        """Return the bytes of a chunk: the last may be shorter."""
        return min(CHUNK, self.size - chunk * CHUNK)

    def offsets(self, codec: str) -> Sequence[int]:
        """Return where in the memory file each chunk begins."""
        if codec == "raw":
            return range(0, self.size, CHUNK)
        return list(accumulate((record.stored for record in self), initial=0))

    def check(self, entry: MemoryEntry) -> None:
        """Raise ValueError where the records are not those of such a memory file."""
        kinds = [0, 0, 0]
        for chunk, record in enumerate(self):
            length = self.length(chunk)
            if record.kind > BASE:
                raise ValueError(f"chunk {chunk} is of the unknown kind {record.kind}")
            kinds[record.kind] += 1
            if record.kind != DATA:
                is_sound = not record.stored and record.frame == NO_FRAME
                is_sound &= record.kind == BASE or record.hash == _zero_hash(length)
            elif entry.codec == "raw":
                is_sound = record.stored == length and record.frame == NO_FRAME
            else:
                is_sound = 0 < record.stored <= MOST_FRAME
            if not is_sound:
                raise ValueError(f"chunk {chunk} has a record that does not fit its kind")
        if kinds != [entry.zero, entry.data, entry.base]:
            raise ValueError("it has other numbers of chunks than the manifest says")
        if entry.codec != "raw" and sum(record.stored for record in self) != entry.stored:
            raise ValueError("its chunks are not as long as the memory file")


@cache
def _zero_hash(length: int) -> bytes:
    return xxhash.xxh3_128_digest(bytes(length))


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset` of a file; raises OSError."""
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


# --- out --------------------------------------------------------------------------------------------------------------


class _Output:
    """Takes records in order, and the bytes of the chunks that are to be here."""

    def __init__(self, fd: int, *, compress: bool) -> None:
        self._fd = fd
        self._at = 0
        self.kinds = [0, 0, 0]
        self.records: list[bytes] = []
        self._zstd: Any = None
        if compress:
            import zstandard

            self._zstd = zstandard.ZstdCompressor(level=LEVEL)

    def note(self, digest: bytes, kind: int) -> None:
        """Take a chunk that is not to be here."""
        self.records.append(RECORD.pack(digest, NO_FRAME, 0, kind))
        self.kinds[kind] += 1

    def put(self, memory: memoryview, start: int, end: int, digests: list[bytes]) -> None:
        """Take the chunks in `memory[start:end]`, which follow each other."""
        self.kinds[DATA] += len(digests)
        if self._zstd is None:
            write_all(self._fd, memory[start:end], start)
            for at, digest in zip(range(start, end, CHUNK), digests, strict=True):
                self.records.append(RECORD.pack(digest, NO_FRAME, min(CHUNK, end - at), DATA))
            return
        chunks = [memory[at : min(at + CHUNK, end)] for at in range(start, end, CHUNK)]
        frames: Any = self._zstd.multi_compress_to_buffer(chunks, threads=_threads())
        for digest, frame in zip(digests, frames, strict=True):
            self.records.append(RECORD.pack(digest, xxhash.xxh3_64_digest(frame), len(frame), DATA))
        data = b"".join(frames)
        write_all(self._fd, data, self._at)
        self._at += len(data)

    def finish(self, size: int) -> int:
        """Give the file its length, and return it."""
        length = size if self._zstd is None else self._at
        os.ftruncate(self._fd, length)
        return length


def _threads() -> int:
    return min(len(os.sched_getaffinity(0)), 8)


def write_memory(  # noqa: PLR0913 - what is saved, what it is compared to, where it goes
    fd: int,
    memory: memoryview,
    ranges: Sequence[Range],
    *,
    base: Index | None = None,
    changed: bytes | None = None,
    compress: bool = False,
    progress: Progress | None = None,
) -> tuple[MemoryEntry, bytes]:
    """Write a memory file.

    Args:
        fd: an empty file.
        memory: RAM, as one contiguous view of bytes; nobody writes to it meanwhile.
        ranges: where in guest-physical memory it is.
        base: index of the parent, of the same size; chunks that are the same there are left out.
        changed: one bit a page, the lowest first, in the order of `memory`: set if it may differ from the parent.
            Without it every chunk is compared by its hash.
        compress: by zstd.
        progress: told (bytes done, bytes in all) now and then.

    Returns:
        What the manifest says of it, and the index file's bytes.

    Raises:
        OSError: as the disk is full, and the like.
    """
    size = len(memory)
    out = _Output(fd, compress=compress)
    for batch in range(0, size, BATCH * CHUNK):
        end = min(batch + BATCH * CHUNK, size)
        _write_batch(out, memory, batch, end, base, changed)
        if progress is not None:
            progress(end, size)
    stored = out.finish(size)
    index = b"".join(out.records)
    codec = "zstd" if compress else "raw"
    digest = xxhash.xxh3_128_hexdigest(index)
    zero, data, from_base = out.kinds
    return MemoryEntry(size, CHUNK, codec, tuple(ranges), digest, stored, zero, data, from_base), index


def _write_batch(  # noqa: PLR0913, PLR0917 - one step of `write_memory`
    out: _Output, memory: memoryview, batch: int, batch_end: int, base: Index | None, changed: bytes | None
) -> None:
    run = batch
    digests: list[bytes] = []
    for start in range(batch, batch_end, CHUNK):
        end = min(start + CHUNK, batch_end)
        chunk = start // CHUNK
        if base is not None and changed is not None and not _is_changed(changed, start, end):
            digest, kind = base.hash_of(chunk), BASE
        elif _is_zero(memory[start:end]):
            digest, kind = _zero_hash(end - start), ZERO
        else:
            digest = xxhash.xxh3_128_digest(memory[start:end])
            kind = DATA if base is None or base.hash_of(chunk) != digest else BASE
        if kind == BASE and digest == _zero_hash(end - start):
            kind = ZERO
        if kind == DATA:
            digests.append(digest)
            continue
        if digests:
            out.put(memory, run, start, digests)
            digests = []
        run = end
        out.note(digest, kind)
    if digests:
        out.put(memory, run, batch_end, digests)


def _is_zero(view: memoryview) -> bool:
    zeros = ZEROS if len(view) == CHUNK else bytearray(len(view))
    return zeros == view  # in this order: it is the bytearray that compares by memcmp


def _is_changed(changed: bytes, start: int, end: int) -> bool:
    """Return whether a chunk has a page whose bit is set; a chunk's pages are whole bytes of the bitmap."""
    return any(changed[start // PAGE // 8 : -(-end // PAGE // 8)])


# --- in ---------------------------------------------------------------------------------------------------------------


class MemoryFile:
    """A memory file that is open, and its index; those of the parents are others.

    Attributes:
        path: its name, for errors.
        entry: what the manifest says.
        index: its chunks.
        fd: the file.
    """

    def __init__(self, fd: int, path: str, entry: MemoryEntry, index: Index) -> None:
        """Take over a file; raises DamagedSnapshotError when it is not as long as it was."""
        self.fd = fd
        self.path = path
        self.entry = entry
        self.index = index
        self._offsets = index.offsets(entry.codec)
        size = os.fstat(fd).st_size
        if size != entry.stored:
            what = "is cut short" if size < entry.stored else "has grown"
            raise DamagedSnapshotError(path, f"{what}: {size} bytes of {entry.stored}")

    def gpa_of(self, chunk: int) -> int | None:
        """Return the guest-physical address of a chunk's first byte."""
        at = chunk * CHUNK
        for one in self.entry.ranges:
            if one.offset <= at < one.offset + one.size:
                return one.gpa + at - one.offset
        return None

    def damaged(self, chunk: int, what: str) -> DamagedSnapshotError:
        """Return the error for a chunk."""
        return DamagedSnapshotError(self.path, what, chunk=chunk, gpa=self.gpa_of(chunk))

    def runs(self) -> Iterator[tuple[int, int]]:
        """Yield (first, end) of the chunks that are here and follow each other, at most BATCH at once."""
        first = None
        for chunk, record in enumerate(self.index):
            if first is not None and (record.kind != DATA or chunk - first == BATCH):
                yield first, chunk
                first = None
            if first is None and record.kind == DATA:
                first = chunk
        if first is not None:
            yield first, len(self.index)

    def read_run(self, first: int, end: int, into: memoryview, *, verify: bool = True) -> None:
        """Copy chunks that are here and follow each other into `into`, which is as long as they are.

        Raises:
            DamagedSnapshotError: they are not what was saved. Frames are checked even when `verify` is false.
        """
        if self.entry.codec == "raw":
            self._fill(first, into, self._offsets[first])
        else:
            self._decompress(first, end, into)
        if verify:
            for chunk in range(first, end):
                start = (chunk - first) * CHUNK
                if xxhash.xxh3_128_digest(into[start : start + CHUNK]) != self.index.hash_of(chunk):
                    raise self.damaged(chunk, "is altered: its hash does not fit")

    def _fill(self, chunk: int, into: memoryview, offset: int) -> None:
        """Read as many bytes as `into` has."""
        while into:
            try:
                done = os.preadv(self.fd, [into], offset)
            except OSError as error:
                raise self.damaged(chunk, f"cannot be read: {error.strerror}") from error
            if not done:
                raise self.damaged(chunk, "is cut short")
            into, offset = into[done:], offset + done

    def _decompress(self, first: int, end: int, into: memoryview) -> None:
        import zstandard

        offsets = self._offsets
        data = memoryview(bytearray(offsets[end] - offsets[first]))
        self._fill(first, data, offsets[first])
        frames: list[bytes | bytearray | memoryview] = []
        for chunk in range(first, end):
            frame = data[offsets[chunk] - offsets[first] : offsets[chunk + 1] - offsets[first]]
            if xxhash.xxh3_64_digest(frame) != self.index[chunk].frame:
                raise self.damaged(chunk, "is altered: its hash does not fit")
            frames.append(frame)
        sizes = struct.pack(f"={len(frames)}Q", *map(self.index.length, range(first, end)))
        try:
            unpacked: Any = zstandard.ZstdDecompressor().multi_decompress_to_buffer(
                frames, decompressed_sizes=sizes, threads=_threads()
            )
        except (zstandard.ZstdError, ValueError, MemoryError) as error:
            raise self.damaged(first, f"or one of the {end - first - 1} after it is no zstd frame: {error}") from error
        at = 0
        for chunk, part in zip(range(first, end), unpacked, strict=True):
            if len(part) != self.index.length(chunk):
                raise self.damaged(chunk, f"has {len(part)} bytes when it is unpacked")
            into[at : at + len(part)] = part
            at += len(part)

    def verify(self, progress: Progress | None = None) -> None:
        """Compare all that is in the file with the hashes; raises DamagedSnapshotError for the first that differs."""
        buffer = memoryview(bytearray(min(BATCH * CHUNK, self.entry.size)))
        done = 0
        for first, end in self.runs():
            size = min(end * CHUNK, self.entry.size) - first * CHUNK
            self.read_run(first, end, buffer[:size])
            done += end - first
            if progress is not None:
                progress(done, self.entry.data)
        if self.entry.codec == "raw":
            self._verify_holes(buffer)

    def _verify_holes(self, buffer: memoryview) -> None:
        """See that there is nothing where nothing is to be: a copy may have written zeros there."""
        at, size = 0, self.entry.size
        while at < size:
            try:
                at = os.lseek(self.fd, at, os.SEEK_DATA) // CHUNK * CHUNK
            except OSError:  # ENXIO: holes up to the end
                return
            chunk = at // CHUNK
            length = self.index.length(chunk)
            if self.index[chunk].kind != DATA:
                self._fill(chunk, buffer[:length], at)
                if not _is_zero(buffer[:length]):
                    raise self.damaged(chunk, "is altered: it was a hole")
            at += length
