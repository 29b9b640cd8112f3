"""Disks that fail as disks do: errors, torn and lost writes, delays, flushes that lie, and power that goes.

A `FaultyImage` lies over any other image and costs nothing while it is asked for nothing: its `plain_fd` is then that
of the image below, so that a short cut to the file stays. Once a fault is armed there is none: whoever has a short cut
must ask again before the guest goes on.
"""

from __future__ import annotations

import errno
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from devices.backends.rewind import DEFAULT_LIMIT, rewindable
from devices.backends.write_cache import FLUSH, READ, SECTOR, WRITE, WriteCache

if TYPE_CHECKING:
    from collections.abc import Sequence

    from devices.backends.fault import Armed, Hit
    from devices.backends.image import Image

__all__ = ["FaultyImage", "faulty"]

MAX_HITS: Final = 4096
"""So many of the last ones are kept."""
CACHE_BYTES: Final = 64 << 20
"""What a disk's own cache holds; what came first goes to the medium when there is more, as in any disk."""
ZEROES: Final = 1 << 20
"""Bytes of zeroes that are kept as a write; more go to the medium at once."""


class FaultyImage:
    """An image that fails when asked to. See `devices.backends.image.Image` and `RewindableImage`.

    Attributes:
        below: the image that it lies over and closes in the end.
        hits: the requests that met a fault, the last 4096 of them.
    """

    def __init__(self, below: Image, *, volatile: bool = False) -> None:
        """Lie over `below`; `volatile` as `hold_writes` does."""
        self.below = below
        self.size = below.size
        self.readonly = below.readonly
        self.block_size = below.block_size
        self.cluster_size = below.cluster_size
        self.hits: deque[Hit] = deque(maxlen=MAX_HITS)
        self._faults: list[Armed] = []
        self._cache: WriteCache | None = None
        self._saved: WriteCache | None = None  # the cache at the checkpoint
        self._off = False
        self._lock = threading.Lock()
        self._cleared = threading.Event()
        if volatile:
            self.hold_writes()

    @property
    def is_transparent(self) -> bool:
        """Whether everything goes to the image below as it is."""
        return not self._faults and self._cache is None and not self._off

    @property
    def holds_writes(self) -> bool:
        """Whether a power cut can lose something; see `hold_writes`."""
        return self._cache is not None

    @property
    def plain_fd(self) -> int | None:
        """The file below, while it is transparent."""
        return self.below.plain_fd if self.is_transparent else None

    # --- what tests ask for -------------------------------------------------------------------------------------------

    def fault(self, kind: str, **how: Any) -> None:
        """Arm a fault, beside those that are armed; of several that a request meets, the first armed counts.

        A "lying-flush" begins `hold_writes`. A "slow" request holds up whoever waits for the disk to come to rest.

        Args:
            kind: see `devices.backends.fault.Fault`, as for all that follows.
            how: its other attributes, by name.

        Raises:
            ValueError, TypeError: there is no such fault.
        """
        from devices.backends.fault import Armed, Fault  # every disk's machine has this module, few have that one

        fault = Fault(kind, **how)
        fault.check()
        if kind == "lying-flush":
            self.hold_writes()
        with self._lock:
            self._cleared.clear()
            self._faults.append(Armed(fault))

    def hold_writes(self) -> None:
        """Keep writes in the disk's own cache until a flush, from now on: a power cut can lose them."""
        with self._lock:
            if self._cache is None and not self.readonly:
                self._cache = WriteCache()

    def power_cut(self, *, keep: str = "flushed", seed: int = 0) -> None:
        """Turn the power off: every request fails until `power_on`, and what was not durable is gone.

        Args:
            keep: "flushed": only what a flush has covered stays; "random": of each other write all, nothing or some
                sectors are there as well, and of two to one sector the later one may be gone.
            seed: of what is there.

        Raises:
            ValueError: writes are not held back (see `hold_writes`): all are durable as they are made.
        """
        with self._lock:
            for offset, data in self._survivors(keep, seed):
                self.below.writev(offset, [memoryview(data)])
            if self._cache is not None:
                self._cache.drop()
            self._off = True

    def power_on(self) -> None:
        """Serve requests again; what was lost is gone."""
        self._off = False

    def after_cut(self, *, keep: str = "random", seed: int = 0) -> bytes:
        """Return what a power cut would leave now, the whole disk, without a cut. See `power_cut`."""
        with self._lock:
            left = bytearray(self.size)
            self.below.readv(0, [memoryview(left)])
            for offset, data in self._survivors(keep, seed):
                left[offset : offset + len(data)] = data
        return bytes(left)

    def _survivors(self, keep: str, seed: int) -> list[tuple[int, bytes]]:
        if self._cache is None and not self.readonly:
            raise ValueError("a power cut finds nothing to lose: `hold_writes` first")
        if keep not in {"flushed", "random"}:
            raise ValueError(f"keep {keep!r} is neither flushed nor random")
        if keep == "flushed" or self._cache is None:
            return []
        from random import Random  # as in `fault`

        return list(self._cache.survivors(Random(seed)))  # noqa: S311 - to be had again, not to be secret

    def clear(self) -> None:
        """Disarm every fault, turn the power on and hold no writes back; what was held goes to the image below."""
        with self._lock:
            self._faults.clear()
            self._cleared.set()
            self._off = False
            self._drain()
            self._cache = None

    def checkpoint(self, *, limit: int = DEFAULT_LIMIT) -> None:
        """Remember the content, and which part of it a power cut can lose. See `devices.backends.rewind`."""
        with self._lock:
            below = rewindable(self.below)
            below.checkpoint(limit=limit)
            self.below = below
            self._saved = None if self._cache is None else self._cache.copy()

    def rewind(self) -> None:
        """Go back to the checkpoint, with the power on; faults stay armed. Raises ValueError without a checkpoint."""
        with self._lock:
            rewindable(self.below).rewind()
            self._off = False
            self._cache = None if self._saved is None else self._saved.copy()

    def commit(self) -> None:
        """Give the checkpoint up and keep the content."""
        with self._lock:
            rewindable(self.below).commit()
            self._saved = None

    # --- requests -----------------------------------------------------------------------------------------------------

    def _meet(self, request: str, offset: int = 0, size: int = 0) -> Armed | None:
        """Return the fault that a request meets and has to show; raises OSError if that is an error."""
        sector, count = offset // SECTOR, -(-size // SECTOR)
        seconds, met = 0.0, None
        with self._lock:
            for armed in self._faults:
                kind = armed.fault.kind
                if (met is None or kind == "slow") and armed.meets(request, sector, count):
                    self.hits.append(armed.hit(request, sector, count))
                    if kind == "slow":
                        seconds += armed.fault.seconds
                    else:
                        met = armed
        if seconds:
            self._cleared.wait(min(seconds, threading.TIMEOUT_MAX))  # not for longer than it is armed
        if self._off:
            raise OSError(errno.EIO, "the disk has no power")
        if met is not None and met.fault.kind.endswith("-error"):
            met.fail()
        return met

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill all of `buffers` from byte `offset` on."""
        if not self.is_transparent:
            self._meet(READ, offset, sum(map(len, buffers)))
            if self._cache is not None:
                with self._lock:
                    self.below.readv(offset, buffers)
                    if self._cache is not None:
                        self._cache.patch(offset, buffers)
                return
        self.below.readv(offset, buffers)

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write all of `buffers` at byte `offset`."""
        if self.is_transparent:
            self.below.writev(offset, buffers)
            return
        size = sum(map(len, buffers))
        met = self._meet(WRITE, offset, size)
        if met is None:
            self._put(offset, buffers)
        elif met.fault.kind == "torn-write":
            kept = met.kept_of(-(-size // SECTOR)) * SECTOR
            if kept:
                self._put(offset, [memoryview(b"".join(buffers))[:kept]])
            met.fail()

    def _put(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Take a write."""
        with self._lock:
            if self._cache is None:
                self.below.writev(offset, buffers)
                return
            self._cache.put(offset, b"".join(buffers))
            if self._cache.size > CACHE_BYTES:
                self._drain(down_to=CACHE_BYTES // 2)

    def _drain(self, down_to: int = 0) -> None:
        """Bring the oldest writes to the image below, all of them by default; those that fail stay."""
        if self._cache is None:
            return
        done, left = 0, self._cache.size
        try:
            for offset, data in self._cache.oldest():
                if left <= down_to:
                    break
                self.below.writev(offset, [memoryview(data)])
                done += 1
                left -= len(data)
        finally:
            self._cache.drop(done)

    def flush(self) -> None:
        """Make what was written durable, or say so."""
        if self.is_transparent:
            self.below.flush()
        elif self._meet(FLUSH) is None:
            with self._lock:
                self._drain()
                self.below.flush()

    def discard(self, offset: int, size: int) -> None:
        """Forget `size` bytes; those that are held back are zero then."""
        self._zero(offset, size, unmap=None)

    def write_zeroes(self, offset: int, size: int, unmap: bool) -> None:
        """Make `size` bytes zero."""
        self._zero(offset, size, unmap=unmap)

    def _zero(self, offset: int, size: int, *, unmap: bool | None) -> None:
        """Write zeroes, or discard with `unmap` None."""
        if not self.is_transparent:
            if self._cache is not None and size <= ZEROES:
                self.writev(offset, [memoryview(bytes(size))])
                return
            met = self._meet(WRITE, offset, size)
            if met is not None:
                if met.fault.kind == "torn-write":  # none of it has reached the disk
                    met.fail()
                return
        with self._lock:
            self._drain()
            if unmap is None:
                self.below.discard(offset, size)
            else:
                self.below.write_zeroes(offset, size, unmap)

    def close(self) -> None:
        """Close the image below; what is held back goes there first, unless the power is off."""
        with self._lock:
            if not self._off:
                self._drain()
        self.below.close()


def faulty(image: Image) -> FaultyImage:
    """Return `image` if it is one that fails when asked to, else one that lies over it."""
    return image if isinstance(image, FaultyImage) else FaultyImage(image)
